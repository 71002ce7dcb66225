"""Image-level metrics against scikit-learn, and the cases where there is none."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from iqe_jax.metrics import image_auroc


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_has_no_curve(label):
    assert np.isnan(image_auroc(np.arange(4.0), np.full(4, label)))


def test_image_auroc_is_scikit_learns():
    draw = np.random.default_rng(2)
    labels, scores = np.arange(40) % 2, np.round(draw.random(40), 1)
    assert image_auroc(scores, labels) == roc_auc_score(labels, scores)

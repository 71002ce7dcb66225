"""AUROC from counts against scikit-learn's exact one, its bound, and the cases where there is no curve."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from iqe_jax.pixel_metrics import auroc_from_histogram, pixel_histogram


def counted(values, masks, bins=2**20, weight=None):
    weight = np.ones(len(values), np.float32) if weight is None else weight
    return np.asarray(pixel_histogram(values, masks, weight, bins), np.int64)


@pytest.mark.parametrize("spread", [0.1, 1e-2, 1e-4])
def test_pixel_auroc_is_exact_within_its_bound(spread):
    draw = np.random.default_rng(0)
    masks = (draw.random((4, 50, 50)) < 0.1).astype(np.float32)
    values = np.clip(0.5 + spread * (draw.normal(size=masks.shape) + masks), 0, 1).astype(np.float32)
    found, error = auroc_from_histogram(counted(values, masks))
    exact = roc_auc_score(masks.ravel(), values.ravel())
    assert abs(found - exact) <= error + 1e-12
    assert error < 2e-3
    coarse, coarse_error = auroc_from_histogram(counted(values, masks, bins=64))
    assert abs(coarse - exact) <= coarse_error


def test_equal_values_count_half():
    masks = np.zeros((1, 2, 2), np.float32)
    masks[0, 0] = 1
    assert auroc_from_histogram(counted(np.full((1, 2, 2), 0.3, np.float32), masks))[0] == 0.5


def test_both_ends_of_the_range_are_counted():
    values = np.array([[[0.0, 1.0], [-0.1, 1.1]]], np.float32)
    histogram = counted(values, np.zeros((1, 2, 2), np.float32), bins=16)
    assert histogram[0, 0] == 2
    assert histogram[0, -1] == 2
    assert histogram.sum() == 4


def test_padding_is_not_counted():
    values = np.random.default_rng(1).random((3, 4, 4), np.float32)
    histogram = counted(values, (values > 0.5).astype(np.float32), weight=np.array([1, 0, 1], np.float32))
    assert histogram.sum() == 2 * 16


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_has_no_curve(label):
    masks = np.full((1, 2, 2), label, np.float32)
    assert np.isnan(auroc_from_histogram(counted(np.full((1, 2, 2), 0.5, np.float32), masks))).all()

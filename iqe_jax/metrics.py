"""Image-level metrics, exact. Those over pixels, which do not fit in memory, are in pixel_metrics.py."""

import numpy as np
from jaxtyping import Float


def image_auroc(scores: Float[np.ndarray, " image"], labels: Float[np.ndarray, " image"]) -> float:
    """Exact area under the ROC curve of image scores; NaN where only one class is there, as no curve exists then."""
    from sklearn.metrics import roc_auc_score

    if len(np.unique(labels)) < 2:
        return float("nan")
    return float(roc_auc_score(labels, scores))

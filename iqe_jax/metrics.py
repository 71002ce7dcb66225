"""Image-level metrics, exact, with bootstrap intervals; and the interval over seeds. docs/metrics.md defines them all.

Those over pixels, which do not fit in memory, are in pixel_metrics.py.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

SPECIFICITY = 0.95
"""Specificity at which sensitivity is reported."""

FEWEST = 5
"""Images that each class must have for an interval: fewer can hardly be resampled into anything new."""

RESAMPLES = 1000
"""Bootstrap resamples behind an interval."""

IMAGE_METRICS = ("image_auroc", "image_ap", "image_f1_max", "image_sensitivity_at_95_specificity")

Interval = tuple[float, float] | None


def image_metrics(scores: Float[np.ndarray, " image"], labels: Float[np.ndarray, " image"]) -> dict[str, float]:
    """The figures of `IMAGE_METRICS`, by scikit-learn; all NaN where only one class is there.

    AUROC counts ties half; AP is the step-wise area under precision and recall; F1-max the highest F1 over all
    thresholds; the last the highest sensitivity over all thresholds whose specificity is at least 0.95.
    """
    from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

    if len(np.unique(labels)) < 2:
        return dict.fromkeys(IMAGE_METRICS, float("nan"))
    precision, recall, _ = precision_recall_curve(labels, scores)
    false_rate, sensitivity, _ = roc_curve(labels, scores, drop_intermediate=False)
    allowed = false_rate <= 1 - SPECIFICITY + 1e-12
    found = (
        roc_auc_score(labels, scores),
        average_precision_score(labels, scores),
        (2 * precision * recall / np.maximum(precision + recall, 1e-300)).max(),
        sensitivity[allowed].max(),
    )
    return dict(zip(IMAGE_METRICS, map(float, found), strict=True))


def bootstrap(
    scores: Float[np.ndarray, " image"],
    labels: Float[np.ndarray, " image"],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval]:
    """95 % percentile bootstrap intervals of `image_metrics`.

    Resampling is stratified: normal images among themselves and anomalous ones among themselves, so that every
    resample has both classes in the test set's proportion. The same scores and seed give the same intervals. None where
    a class has fewer than `FEWEST` images, and where all anomalous images score above all normal ones: so do those of
    each resample, and an interval of no width would say that chance has no part in it.
    """
    if min((labels == label).sum() for label in (0, 1)) < FEWEST:
        return dict.fromkeys(IMAGE_METRICS)
    if scores[labels == 0].max() < scores[labels == 1].min():
        return dict.fromkeys(IMAGE_METRICS)
    low, high = np.quantile(bootstrap_metrics(scores, labels, resamples, seed), [0.025, 0.975], axis=1)
    return {name: (float(a), float(b)) for name, a, b in zip(IMAGE_METRICS, low, high, strict=True)}


def bootstrap_metrics(
    scores: Float[np.ndarray, " image"], labels: Float[np.ndarray, " image"], resamples: int, seed: int
) -> Float[np.ndarray, "metric resample"]:
    """The figures of `IMAGE_METRICS` on each resample of `bootstrap`. One seed draws the same images of any scores."""
    return np.concatenate([resampled_metrics(*drawn) for drawn in _resampled(scores, labels, resamples, seed)], 1)


def _resampled(
    scores: np.ndarray, labels: np.ndarray, resamples: int, seed: int
) -> Iterator[tuple[Int[np.ndarray, "resample rank"], Int[np.ndarray, "resample rank"]]]:
    """How often each distinct score, highest first, was drawn among normal and among anomalous images, in parts."""
    distinct, rank = np.unique(-scores, return_inverse=True)
    draw = np.random.default_rng(seed)
    at_once = max(1, 1_000_000 // len(scores))
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        offset = np.arange(rows)[:, None] * len(distinct)
        counts = []
        for label in (0, 1):
            own = rank[labels == label]
            drawn = own[draw.integers(len(own), size=(rows, len(own)))] + offset
            counts.append(np.bincount(drawn.ravel(), minlength=rows * len(distinct)).reshape(rows, -1))
        yield counts[0], counts[1]


def resampled_metrics(
    normal: Int[np.ndarray, "resample rank"], anomalous: Int[np.ndarray, "resample rank"]
) -> Float[np.ndarray, "metric resample"]:
    """The figures of `IMAGE_METRICS` of many sets at once, from how often each score, highest first, stands in each."""
    false, true = normal.cumsum(1), anomalous.cumsum(1)
    negatives, positives = false[:, -1:], true[:, -1:]
    pairs = (negatives * positives)[:, 0]
    auroc = (normal * (true - 0.5 * anomalous)).sum(1) / pairs
    precision = true / np.maximum(true + false, 1)
    ap = (anomalous * precision).sum(1) / positives[:, 0]
    f1_max = (2 * true / (true + false + positives)).max(1)
    allowed = false <= (1 - SPECIFICITY + 1e-12) * negatives
    sensitivity = np.where(allowed, true, 0).max(1) / positives[:, 0]
    return np.stack([auroc, ap, f1_max, sensitivity])


def defined(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Metrics as JSON has them: None in the place of NaN."""
    return {name: None if np.isnan(value) else float(value) for name, value in metrics.items()}


def over_seeds(values: Sequence[float]) -> tuple[float, Interval]:
    """Mean of one figure over several seeds, and the 95 % interval of that mean by Student's t.

    The interval is cut to [0, 1], where all figures lie. NaN and None where a value is NaN; None with one value alone.
    """
    from scipy.stats import t

    mean = float(np.mean(values))
    if len(values) < 2 or np.isnan(mean):
        return mean, None
    half = float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return mean, (max(0.0, mean - half), min(1.0, mean + half))

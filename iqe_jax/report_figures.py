"""The figures of the report page in numbers: ROC and precision-recall curves, histograms, reliability, and which
images are most wrong. Drawing them is the template's work (templates/report.html).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from iqe_jax.pixel_metrics import Histogram

POINTS = 400  # of a curve; the eye sees no more on a figure of 300 pixels
BINS = 24  # of the histogram of scores
RELIABILITY_BINS = 10

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class ReliabilityBin:
    """Images of like score: their mean score, and the share of anomalous ones with its 95 % Wilson interval."""

    score: float
    observed: float
    low: float
    high: float
    images: int


def f1_max_threshold(scores: Float[np.ndarray, " image"], labels: Float[np.ndarray, " image"]) -> float | None:
    """The score from which on images are called anomalous where F1 is highest; None where only one class is there."""
    from sklearn.metrics import precision_recall_curve

    if len(np.unique(labels)) < 2:
        return None
    precision, recall, thresholds = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return float(thresholds[np.argmax(f1[:-1])])


def wrongness(
    scores: Float[np.ndarray, " image"], labels: Float[np.ndarray, " image"], threshold: float | None
) -> Float[np.ndarray, " image"]:
    """How far each score lies on the wrong side of `threshold`, in units of the score; negative on the right side.

    Without a threshold (one class only) scores are compared with 0, which gives the same order within a class.
    """
    return np.where(labels > 0, 1, -1) * ((threshold or 0.0) - scores)


def most_wrong(scores: Float[np.ndarray, " image"], labels: Float[np.ndarray, " image"]) -> list[int]:
    """All images, the most wrong first, by `wrongness` at the F1-max threshold; ties stay in the order of the set."""
    return np.argsort(-wrongness(scores, labels, f1_max_threshold(scores, labels)), kind="stable").tolist()


def roc(scores: Float[np.ndarray, " image"], labels: Float[np.ndarray, " image"]) -> Points:
    """False and true positive rates from (0, 0) to (1, 1); empty where only one class is there."""
    from sklearn.metrics import roc_curve

    if len(np.unique(labels)) < 2:
        return []
    false, true, _ = roc_curve(labels, scores)
    return _thinned(false, true)


def precision_recall(scores: Float[np.ndarray, " image"], labels: Float[np.ndarray, " image"]) -> Points:
    """Recall and precision, from recall 0 up; empty where only one class is there."""
    from sklearn.metrics import precision_recall_curve

    if len(np.unique(labels)) < 2:
        return []
    precision, recall, _ = precision_recall_curve(labels, scores)
    return _thinned(recall[::-1], precision[::-1])


def pixel_curves(pixels: Histogram) -> tuple[Points, Points]:
    """ROC and precision-recall of counted pixels; both empty where only one class is there."""
    false, true = np.cumsum(pixels.normal[::-1]), np.cumsum(pixels.anomalous[::-1])
    if false[-1] == 0 or true[-1] == 0:
        return [], []
    recall, precision = true / true[-1], true / (true + false)
    curve = _thinned(np.concatenate([[0], false / false[-1]]), np.concatenate([[0], recall]))
    return curve, _thinned(np.concatenate([[0], recall]), np.concatenate([[precision[0]], precision]))


def histogram(
    scores: Float[np.ndarray, " image"], labels: Float[np.ndarray, " image"]
) -> tuple[Float[np.ndarray, " edge"], Float[np.ndarray, "2 bins"]]:
    """Edges of equal bins over the range of scores, and the share of normal (row 0) and anomalous images in each."""
    edges = np.linspace(*span(scores), BINS + 1)
    shares = [np.histogram(scores[labels == label], edges)[0] / max((labels == label).sum(), 1) for label in (0, 1)]
    return edges, np.stack(shares)


def reliability(
    scores: Float[np.ndarray, " image"], labels: Float[np.ndarray, " image"], *, probabilities: bool
) -> list[ReliabilityBin]:
    """Observed share of anomalous images by score: in tenths of [0, 1] for probabilities, else in bins of like many
    images. Empty bins are left out.
    """
    if probabilities:
        place = np.clip((scores * RELIABILITY_BINS).astype(int), 0, RELIABILITY_BINS - 1)
    else:
        inner = np.unique(np.quantile(scores, np.linspace(0, 1, RELIABILITY_BINS + 1))[1:-1])
        place = np.searchsorted(inner, scores, side="right")
    found = []
    for number in np.unique(place):
        inside = place == number
        count, anomalous = int(inside.sum()), float(labels[inside].sum())
        low, high = wilson(anomalous, count)
        found.append(ReliabilityBin(float(scores[inside].mean()), anomalous / count, low, high, count))
    return found


def wilson(successes: float, trials: int) -> tuple[float, float]:
    """The 95 % interval of a proportion after Wilson (1927), within [0, 1]."""
    z = 1.959964
    share, scale = successes / trials, 1 + z**2 / trials
    middle = (share + z**2 / (2 * trials)) / scale
    half = z / scale * np.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def span(scores: Float[np.ndarray, " image"]) -> tuple[float, float]:
    """Least and greatest score, for an axis; where all are equal, a unit around them."""
    low, high = float(scores.min()), float(scores.max())
    return (low, high) if high - low > 1e-9 else (low - 0.5, high + 0.5)


def ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers within [low, high]."""
    step = 10.0 ** np.floor(np.log10((high - low) / 3))
    step *= max(m for m in (1, 2, 2.5, 5) if (high - low) / (step * m) >= 3)
    return [round(float(n * step), 10) for n in range(int(np.ceil(low / step - 1e-9)), int(high / step + 1e-9) + 1)]


def _thinned(x: np.ndarray, y: np.ndarray) -> Points:
    """At most POINTS points of a curve, evenly along its length, both ends among them."""
    chosen = np.arange(len(x))
    if len(x) > POINTS:
        length = np.concatenate([[0], np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))])
        chosen = np.unique(np.searchsorted(length, np.linspace(0, length[-1], POINTS)))
        chosen = np.unique([0, *chosen[chosen < len(x)], len(x) - 1])[-POINTS:]
        chosen[0] = 0
    return [(round(float(x[i]), 5), round(float(y[i]), 5)) for i in chosen]

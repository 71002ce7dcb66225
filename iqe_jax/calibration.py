"""What a raw score means: a probability and a yes or no, fitted on the valid pool and kept with the run.

A run's scores and labels go in, `RUN/calibration.json` comes out; nothing here runs the model. Since the pool's scores
are kept, `python -m iqe_jax.calibration --run RUN --sensitivity 0.95` fits again in no time.

A pool has more anomalies than most clinics see, so probabilities hold for its prevalence, which is stored;
`probability(…, prevalence=…)` moves them to another by Bayes' rule, on the assumption that only the share changes and
not what normal and anomalous images look like.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from jaxtyping import Bool, Float

FILE = "calibration.json"
LEAST = 10
"""Images of a class without which nothing is said that rests on that class."""
ISOTONIC_FROM = 1000
"""Images in the pool from which on the probability is isotonic; below, where that overfits, it is Platt's."""
SPECIFICITY = 0.95
"""The specificity that a threshold is chosen for where nothing else is asked."""
FOLDS, BINS = 5, 10

Scores = Float[np.ndarray, " image"]


@dataclass(frozen=True)
class Calibration:
    """A map from raw scores to probabilities, a threshold, and how far both can be trusted. Plain JSON on disk."""

    target: dict[str, float]
    """{"specificity": s} or {"sensitivity": s}: what the threshold was chosen for."""
    scores: list[float]
    """Raw scores of the pool."""
    labels: list[int]
    """1 for an anomalous image of the pool, 0 for a normal one."""
    curve: dict[str, Any] | None = None
    """Platt's {"slope", "intercept"} or isotonic {"x", "y"}; None where probabilities are withheld."""
    threshold: float | None = None
    """Scores from here on are called anomalous; None where decisions are withheld."""
    achieved: dict[str, Any] = field(default_factory=dict)
    """Sensitivity and specificity of the threshold on the pool it was chosen on, with 95 % intervals."""
    reliability: dict[str, Any] | None = None
    """Cross-validated: `brier`, `ece` and the `bins` of the reliability diagram; `brier_of_prevalence` beside them."""
    withheld: tuple[str, ...] = ()
    """Why probability or decision is not given, a sentence each."""
    adapter: str | None = None
    """SHA-256 of the weights that made the scores."""
    chosen_on_test_data: bool = False
    """Whether those were chosen on the test set."""

    @property
    def prevalence(self) -> float:
        """The share of anomalous images in the pool, which probabilities hold for."""
        return float(np.mean(self.labels)) if self.labels else float("nan")

    def probability(self, scores: Scores, prevalence: float | None = None) -> Float[np.ndarray, " image"] | None:
        """The probability in [0, 1] that images of these scores are anomalous; None where it is withheld.

        `prevalence` is the share of anomalous images where the scores come from, in (0, 1); by default the pool's.
        Raises ValueError for another value.
        """
        if self.curve is None:
            return None
        fitted = _apply(self.curve, np.asarray(scores, np.float64))
        if prevalence is None:
            return fitted
        if not 0 < prevalence < 1:
            raise ValueError(f"prevalence is {prevalence}; it must lie between 0 and 1")
        factor = prevalence / (1 - prevalence) * (1 - self.prevalence) / self.prevalence
        return fitted * factor / (fitted * factor + 1 - fitted)

    def decision(self, scores: Scores) -> Bool[np.ndarray, " image"] | None:
        """Whether images of these scores are called anomalous; None where decisions are withheld."""
        return None if self.threshold is None else np.asarray(scores) >= self.threshold

    def on(self, scores: Scores, labels: Float[np.ndarray, " image"]) -> dict[str, Any] | None:
        """What the threshold does on images it was not chosen on, None without one.

        The counts of each outcome, and sensitivity, specificity and precision with 95 % intervals after Clopper and
        Pearson, None where there is no image to take them of.
        """
        if (called := self.decision(scores)) is None:
            return None
        anomalous = np.asarray(labels) == 1
        counts = {
            "true_positives": int((called & anomalous).sum()),
            "false_positives": int((called & ~anomalous).sum()),
            "true_negatives": int((~called & ~anomalous).sum()),
            "false_negatives": int((~called & anomalous).sum()),
        }
        hits = {"sensitivity": called[anomalous], "specificity": ~called[~anomalous], "precision": anomalous[called]}
        shares = {name: _share(those) if len(those) else None for name, those in hits.items()}
        return {"threshold": self.threshold, "target": self.target, **counts, **shares}

    def summary(self) -> str:
        """One line that says what was fitted and how good it is."""
        anomalous = sum(self.labels)
        parts = [f"Calibration on {len(self.labels) - anomalous} normal and {anomalous} anomalous valid images"]
        if self.threshold is not None:
            found = ", ".join(
                f"{name} {value['value']:.2f} ({value['low']:.2f}–{value['high']:.2f})"
                for name, value in self.achieved.items()
            )
            asked = ", ".join(f"{name} {value:g}" for name, value in self.target.items())
            parts.append(f"threshold {self.threshold:.4g} for {asked}, there {found}")
        if self.curve is not None and self.reliability is not None:
            parts.append(
                f"{self.curve['method']} probability, cross-validated Brier {self.reliability['brier']:.3f} "
                f"(prevalence alone {self.reliability['brier_of_prevalence']:.3f}), ECE {self.reliability['ece']:.3f}"
            )
        mark = ["weights chosen on the TEST SET"] if self.chosen_on_test_data else []
        return "; ".join([*parts, *self.withheld, *mark])

    def save(self, run_dir: Path) -> None:
        """Write RUN/calibration.json, whole or not at all, marked with the run's weights."""
        from iqe_jax.checkpoint import write_whole

        marked = dataclasses.replace(self, adapter=_digest(run_dir))
        content = dataclasses.asdict(marked) | {"prevalence": self.prevalence}
        write_whole(Path(run_dir) / FILE, json.dumps(content, indent=2) + "\n")


def load(run_dir: Path) -> Calibration | None:
    """The calibration of a run, None where it has none.

    Raises ValueError where the file is damaged, or was made with other weights than those that are there now.
    """
    path = Path(run_dir) / FILE
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text())
        values.pop("prevalence")
        calibration = Calibration(**{**values, "withheld": tuple(values["withheld"])})
    except (ValueError, KeyError, TypeError, AttributeError) as fault:
        raise ValueError(f"{path} is damaged ({fault}): remove it, and run evaluate.py to make it again") from fault
    if calibration.adapter != _digest(run_dir):
        raise ValueError(
            f"{path} was made with other weights than those of {run_dir} now: run evaluate.py to make it again"
        )
    return calibration


def target_of(run_dir: Path) -> dict[str, float]:
    """What the threshold of a run was asked to keep, as `fit` takes it; nothing where there is no such file."""
    try:
        found = load(run_dir)
    except ValueError:  # of other weights, or damaged: it is made anew
        return {}
    return {} if found is None else found.target


def fit(
    scores: Sequence[float] | Scores,
    labels: Sequence[int] | Float[np.ndarray, " image"],
    *,
    sensitivity: float | None = None,
    specificity: float | None = None,
) -> Calibration:
    """Fit threshold and probability on a pool that the model was not trained on.

    The threshold is the one at which the pool just has the asked `sensitivity` or `specificity` (the other one as high
    as can be), half way to the next score. It needs 10 images of the class it is asked of. The probability is Platt's
    logistic curve, with unit ridge on standardised scores, and from 1000 images on an isotonic one; it needs 10 images
    of each class, and scores that rise with anomaly. What is not given, `withheld` says why.

    Args:
      scores: raw image scores.
      labels: 1 for anomalous, 0 for normal images.
      sensitivity: share of anomalous images to be called so, in (0, 1].
      specificity: share of normal images not to be called anomalous, in (0, 1]; 0.95 where neither is given.

    Raises:
      ValueError: both targets are given, a target is out of range, scores and labels differ in number, a score is not
        finite, or a label is neither 0 nor 1.
    """
    target = _target(sensitivity, specificity)
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels).astype(int)
    if scores.shape != labels.shape or scores.ndim != 1:
        raise ValueError(f"there are {scores.shape} scores and {labels.shape} labels: expected one of each per image")
    if not np.isfinite(scores).all() or not np.isin(labels, (0, 1)).all():
        raise ValueError("a score is not finite, or a label is neither 0 nor 1")
    normal, anomalous = np.sort(scores[labels == 0]), np.sort(scores[labels == 1])
    withheld = []
    threshold, achieved = None, {}
    if len(decisive := normal if "specificity" in target else anomalous) < LEAST:
        kind = "normal" if "specificity" in target else "anomalous"
        withheld.append(f"no decision: it takes {LEAST} {kind} images to choose a threshold, there are {len(decisive)}")
    else:
        threshold = _threshold(scores, normal, anomalous, target)
        achieved = {"sensitivity": _share(anomalous >= threshold), "specificity": _share(normal < threshold)}
        achieved = {name: share for name, share in achieved.items() if share["of"]}
    curve, reliability = None, None
    if min(len(normal), len(anomalous)) < LEAST:
        there = f"there are {len(normal)} and {len(anomalous)}"
        withheld.append(f"no probability: it takes {LEAST} normal and {LEAST} anomalous images, {there}")
    elif (area := _auroc(normal, anomalous)) <= 0.5 or (curve := _curve(scores, labels)).get("slope", 1) <= 0:
        curve = None
        withheld.append(f"no probability: scores do not rise with anomaly on these images (AUROC {area:.2f})")
    else:
        reliability = _reliability(scores, labels)
    return Calibration(
        target, scores.tolist(), labels.tolist(), curve, threshold, achieved, reliability, tuple(withheld)
    )


def _target(sensitivity: float | None, specificity: float | None) -> dict[str, float]:
    if sensitivity is not None and specificity is not None:
        raise ValueError("a threshold is chosen for a sensitivity or for a specificity: give one of them")
    name = "sensitivity" if sensitivity is not None else "specificity"
    value = sensitivity if sensitivity is not None else SPECIFICITY if specificity is None else specificity
    if not 0 < value <= 1:
        raise ValueError(f"{name} is {value}; it must be above 0 and at most 1")
    return {name: float(value)}


def _threshold(scores: Scores, normal: Scores, anomalous: Scores, target: dict[str, float]) -> float:
    """The threshold that meets the target on the pool, half way between the two scores it parts."""
    if "specificity" in target:
        may_pass = int(np.floor((1 - target["specificity"]) * len(normal) + 1e-9))
        below = normal[max(len(normal) - 1 - may_pass, 0)]  # the highest that has to stay below
        above = scores[scores > below]
        return float((below + above.min()) / 2) if len(above) else float(np.nextafter(below, np.inf))
    must_pass = max(int(np.ceil(target["sensitivity"] * len(anomalous) - 1e-9)), 1)
    above = anomalous[len(anomalous) - must_pass]  # the lowest that has to pass
    below = scores[scores < above]
    return float((above + below.max()) / 2) if len(below) else float(above)


def _share(hits: Bool[np.ndarray, " image"]) -> dict[str, Any]:
    """A share with its 95 % interval after Clopper and Pearson."""
    from scipy.stats import binomtest

    if not len(hits):
        return {"value": float("nan"), "low": 0.0, "high": 1.0, "of": 0}
    interval = binomtest(int(hits.sum()), len(hits)).proportion_ci()
    return {"value": float(hits.mean()), "low": float(interval.low), "high": float(interval.high), "of": len(hits)}


def _auroc(normal: Scores, anomalous: Scores) -> float:
    pairs = np.searchsorted(normal, anomalous, "left") + np.searchsorted(normal, anomalous, "right")
    return float(pairs.sum()) / (2 * len(normal) * len(anomalous))


def _curve(scores: Scores, labels: Float[np.ndarray, " image"]) -> dict[str, Any]:
    if len(scores) >= ISOTONIC_FROM:
        from sklearn.isotonic import IsotonicRegression

        fitted = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(scores, labels)
        return {"method": "isotonic", "x": fitted.X_thresholds_.tolist(), "y": fitted.y_thresholds_.tolist()}
    from sklearn.linear_model import LogisticRegression

    centre, spread = scores.mean(), max(scores.std(), np.finfo(np.float32).tiny)
    fitted = LogisticRegression().fit((scores - centre)[:, None] / spread, labels)
    slope = float(fitted.coef_[0, 0]) / spread
    return {"method": "Platt", "slope": float(slope), "intercept": float(fitted.intercept_[0] - slope * centre)}


def _apply(curve: dict[str, Any], scores: Scores) -> Float[np.ndarray, " image"]:
    if curve["method"] == "isotonic":
        return np.interp(scores, curve["x"], curve["y"])
    from scipy.special import expit

    return expit(curve["slope"] * scores + curve["intercept"])


def _reliability(scores: Scores, labels: Float[np.ndarray, " image"]) -> dict[str, Any]:
    """How well probabilities hold for images they were not fitted on: five folds, each predicted from the others."""
    from sklearn.metrics import brier_score_loss
    from sklearn.model_selection import StratifiedKFold

    predicted = np.empty(len(scores))
    for others, fold in StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(scores, labels):
        predicted[fold] = _apply(_curve(scores[others], labels[others]), scores[fold])
    place = np.minimum((predicted * BINS).astype(int), BINS - 1)
    bins = []
    for i in range(BINS):
        if (inside := place == i).any():
            mean, share = float(predicted[inside].mean()), float(labels[inside].mean())
            bins.append({"from": i / BINS, "images": int(inside.sum()), "probability": mean, "anomalous": share})
    return {
        "brier": float(brier_score_loss(labels, predicted)),
        "brier_of_prevalence": float(labels.mean() * (1 - labels.mean())),
        "ece": sum(b["images"] * abs(b["probability"] - b["anomalous"]) for b in bins) / len(scores),
        "bins": bins,
    }


def _digest(run_dir: Path) -> str | None:
    from iqe_jax.weights import adapter_file

    path = adapter_file(Path(run_dir))
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


@dataclass(frozen=True)
class Options:
    """What `python -m iqe_jax.calibration` is told."""

    run: Path
    """Directory of a run that evaluate.py has scored."""
    sensitivity: float | None = None
    """Share of anomalous valid images that are to be called so."""
    specificity: float | None = None
    """Share of normal valid images that are not to be called anomalous; 0.95 where neither is given."""


def main(argv: list[str]) -> None:
    """Fit a run's calibration again, on the scores of the valid pool that evaluate.py has left."""
    import tyro

    from iqe_jax.cli import user_errors

    program = "python -m iqe_jax.calibration"
    with user_errors(program):
        options = tyro.cli(
            Annotated[Options, tyro.conf.FlagConversionOff], args=argv, prog=program, description=main.__doc__
        )
        kept = load(options.run)
        if kept is None:
            raise ValueError(
                f"{options.run} has no {FILE}: run evaluate.py with its settings, which scores the valid pool"
            )
        again = fit(kept.scores, kept.labels, sensitivity=options.sensitivity, specificity=options.specificity)
        again = dataclasses.replace(again, chosen_on_test_data=kept.chosen_on_test_data)
        again.save(options.run)
        print(again.summary())


if __name__ == "__main__":
    main(sys.argv[1:])

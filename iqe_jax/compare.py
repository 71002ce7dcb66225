"""Compares runs on the same test images: `python -m iqe_jax.compare RUN RUN…` says how much and how surely they differ.

Reads the scores.csv of each run; no image or weight is looked at. AUROC is compared after DeLong et al. (1988), in the
fast form of Sun and Xu (2014); other metrics by a paired bootstrap over images.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from jaxtyping import Float, Int

from iqe_jax import cli
from iqe_jax.checkpoint import write_whole
from iqe_jax.data.scans import printable
from iqe_jax.metrics import IMAGE_METRICS, bootstrap_metrics, image_metrics
from iqe_jax.progress import console
from iqe_jax.report import PHANTOMS, on_test_data, read_scores
from iqe_jax.report_page import METRICS

PROGRAM = "python -m iqe_jax.compare"
DESCRIPTION = """Compare runs that evaluate.py has scored on the same test images, each with the first.

Shows each run's figure and its difference to the first run, both with 95 % intervals, and a two-sided p value: how
often runs that are equally good would differ as much by chance. With more than two runs also p values after Holm, as
several comparisons find something by chance more often than one.

  python -m iqe_jax.compare runs/brain_fewshot/brain-k4-seed0 runs/brain_fewshot/brain-k16-seed0
  python -m iqe_jax.compare runs/a runs/b runs/c --metric image_ap --out comparison.json

Images are what varies here: the interval says what another draw of test images might give, not another training seed.
For that, train with several seeds."""

Metric = Literal["image_auroc", "image_ap", "image_f1_max", "image_sensitivity_at_95_specificity"]
_Z = 1.959964  # of a two-sided 95 % interval
_NAMED_AT_MOST = 5  # images in one error message


@dataclass(frozen=True)
class Options:
    """What is compared."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run directories with a scores.csv, two or more; the first is what the others are compared with."""
    metric: Metric = "image_auroc"
    """AUROC is compared by DeLong's method, the others by a paired bootstrap. docs/metrics.md defines them."""
    resamples: int = 2000
    """Resamples of the bootstrap; more make the p value finer, whose least is 2 / (resamples + 1)."""
    seed: int = 0
    """Seed of the bootstrap."""
    out: Path | None = None
    """JSON file to write the comparison into."""


@dataclass(frozen=True)
class Compared:
    """One run. `difference` and what follows are against the first run, None for that itself.

    Intervals are of 95 %; `p` is two-sided, `p_holm` the same after Holm over all runs. Both are None where the images
    give no variance to judge the difference by.
    """

    run: str
    dataset: str
    about: str
    chosen_on_test_data: bool
    phantoms: bool
    value: float
    interval: tuple[float, float]
    difference: float | None = None
    difference_interval: tuple[float, float] | None = None
    p: float | None = None
    p_holm: float | None = None


def compare(
    runs: Sequence[Path], metric: Metric = "image_auroc", *, resamples: int = 2000, seed: int = 0
) -> list[Compared]:
    """Compare run directories, each with the first.

    Raises FileNotFoundError for a run without scores, and ValueError where the runs are not of the same data set,
    images and labels, naming those that differ, where there is one class only, or for fewer than two runs.
    """
    if len(runs) < 2:
        raise ValueError("give two runs or more: the directories that evaluate.py wrote, the first is compared with")
    scores, labels = _paired(runs)
    if len(np.unique(labels)) < 2:
        raise ValueError(f"all images of {runs[0]} are of one class; {_title(metric)} is undefined")
    facts = [_facts(run) for run in runs]
    for run, own in zip(runs, facts, strict=True):  # images of two sets may have the same names
        if own["dataset"] != (first := facts[0]["dataset"]):
            raise ValueError(f"{run} was scored on {own['dataset']} and {runs[0]} on {first}: they cannot be compared")
    if metric == "image_auroc":
        values, covariance = delong(scores, labels)
        intervals = [_normal_interval(value, var, 0, 1) for value, var in zip(values, np.diag(covariance), strict=True)]
        tests = [_delong_test(values, covariance, i) for i in range(len(runs))]
    else:
        own = IMAGE_METRICS.index(metric)
        values = np.array([image_metrics(row, labels)[metric] for row in scores])
        drawn = np.stack([bootstrap_metrics(row, labels, resamples, seed)[own] for row in scores])
        intervals = [_percentiles(row) for row in drawn]
        tests = [(_percentiles(row - drawn[0]), _bootstrap_p(row - drawn[0])) for row in drawn]
    adjusted = iter(holm([p for _, p in tests[1:] if p is not None]))
    compared = []
    for i, run in enumerate(runs):
        own = Compared(str(run), **facts[i], value=float(values[i]), interval=intervals[i])
        if i:
            difference, (interval, p) = float(values[i] - values[0]), tests[i]
            own = replace(own, difference=difference, difference_interval=interval, p=p)
            own = replace(own, p_holm=None if p is None else next(adjusted))
        compared.append(own)
    return compared


def delong(
    scores: Float[np.ndarray, "run image"], labels: Int[np.ndarray, " image"]
) -> tuple[Float[np.ndarray, " run"], Float[np.ndarray, "run run"]]:
    """AUROC of each row of scores on the same images, and the covariance of these AUROCs.

    DeLong et al. 1988, by midranks as Sun and Xu 2014: O(n log n) for n images. A class of one image adds no variance,
    as none can be estimated from it.
    """
    from scipy.stats import rankdata

    anomalous, normal = scores[:, labels == 1], scores[:, labels == 0]
    m, n = anomalous.shape[1], normal.shape[1]
    among_all = rankdata(np.concatenate([anomalous, normal], 1), axis=1)
    # The share of the other class that each image is on the right side of; ties count half.
    of_anomalous = (among_all[:, :m] - rankdata(anomalous, axis=1)) / n
    of_normal = 1 - (among_all[:, m:] - rankdata(normal, axis=1)) / m
    covariance = sum(
        np.atleast_2d(np.cov(share)) / share.shape[1] for share in (of_anomalous, of_normal) if share.shape[1] > 1
    )
    return of_anomalous.mean(1), covariance * np.ones((len(scores), len(scores)))


def holm(p_values: Sequence[float]) -> list[float]:
    """P values adjusted for being several, after Holm (1979), in the order given."""
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = least
    return adjusted


def _delong_test(values: np.ndarray, covariance: np.ndarray, i: int) -> tuple[tuple[float, float], float | None]:
    """Interval and p value of run i's difference to the first."""
    from scipy.stats import norm

    difference = float(values[i] - values[0])
    variance = float(covariance[i, i] + covariance[0, 0] - 2 * covariance[i, 0])
    if variance <= 1e-15:  # the same ranks, or classes that both runs part in the same way all through
        return (difference, difference), 1.0 if abs(difference) < 1e-12 else None
    return _normal_interval(difference, variance, -1, 1), float(2 * norm.sf(abs(difference) / np.sqrt(variance)))


def _normal_interval(value: float, variance: float, least: float, most: float) -> tuple[float, float]:
    half = _Z * float(np.sqrt(max(variance, 0.0)))
    return max(least, float(value) - half), min(most, float(value) + half)


def _percentiles(drawn: Float[np.ndarray, " resample"]) -> tuple[float, float]:
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


def _bootstrap_p(differences: Float[np.ndarray, " resample"]) -> float:
    """Two-sided: twice the share of resamples on the rarer side of 0, never 0 itself."""
    rarer = min((differences <= 0).sum(), (differences >= 0).sum())
    return float(min(1.0, 2 * (rarer + 1) / (len(differences) + 1)))


def _paired(runs: Sequence[Path]) -> tuple[Float[np.ndarray, "run image"], Int[np.ndarray, " image"]]:
    """The scores of all runs in the order of the first one's images, and the labels."""
    found = [read_scores(run / "scores.csv") for run in runs]
    first, rows = dict(zip(found[0].names, found[0].labels, strict=True)), []
    for run, scores in zip(runs, found, strict=True):
        own = dict(zip(scores.names, zip(scores.labels, scores.score, strict=True), strict=True))
        problems = [
            ("images that only the first has", [name for name in first if name not in own]),
            ("images that the first has not", [name for name in own if name not in first]),
            ("images of another label", [name for name in first if name in own and own[name][0] != first[name]]),
        ]
        if any(names for _, names in problems):
            said = "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in problems if names)
            raise ValueError(f"{run} and {runs[0]} were not scored on the same test set: {said}")
        rows.append([own[name][1] for name in first])
    return np.array(rows), np.array(list(first.values()))


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(map(printable, names[:_NAMED_AT_MOST])) + (f" and {more} more" if more > 0 else "")


def _facts(run: Path) -> dict[str, Any]:
    """What the run's metrics.json says of it, in a few words, and its marks."""
    path = run / "metrics.json"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}, which says how the weights of that run were chosen: run evaluate.py again")
    try:
        summary = json.loads(path.read_text())
        weights, names = summary["weights"], ("config", "dataset", "protocol")
        about = ", ".join([*(summary[name] for name in names), f"seed {summary['seed']}", weights["chosen"]])
        marks = {"chosen_on_test_data": on_test_data(weights), "phantoms": summary["data"] == PHANTOMS}
        return {"dataset": summary["dataset"], "about": about, **marks}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not what evaluate.py writes ({error!r}): run evaluate.py again") from error


def print_table(compared: Sequence[Compared], metric: Metric) -> None:
    """The comparison on standard output."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    show = Console(soft_wrap=True).print
    table = Table(title=f"{_title(metric)} of runs on the same images", show_lines=True)
    for name in ("run", "value", "difference to run 1", "p", *(["p, Holm"] if len(compared) > 2 else [])):
        table.add_column(name, justify="left" if name == "run" else "right", no_wrap=True)
    for number, own in enumerate(compared, 1):
        mark = "\n[bold]chosen on\nTEST SET[/bold]" if own.chosen_on_test_data else ""
        show(f"run {number}: {escape(own.run)}\n       {escape(own.about)}")
        cells = [f"{number}{mark}", "{:.4f}\n{:.4f} … {:.4f}".format(own.value, *own.interval)]
        if own.difference is not None and own.difference_interval is not None:
            cells.append("{:+.4f}\n{:+.4f} … {:+.4f}".format(own.difference, *own.difference_interval))
            cells += [_p_text(own.p), _p_text(own.p_holm)]
        table.add_row(*cells[: len(table.columns)])
    how = "DeLong" if metric == "image_auroc" else "paired bootstrap"
    caption = [f"below each figure its 95 % interval ({how}): of other test images, not of other training seeds"]
    if any(own.chosen_on_test_data for own in compared):
        caption.append("weights chosen on the test set make a run look better than it is")
    if any(own.phantoms for own in compared):
        caption.append(PHANTOMS)
    table.caption = "\n".join(caption)
    show(table)


def _title(metric: Metric) -> str:
    return METRICS[metric][0]


def _p_text(p: float | None) -> str:
    return "–" if p is None else f"{p:.3f}" if p >= 0.001 else "< 0.001"


def main(argv: list[str]) -> None:
    """Compare the runs that `argv` names."""
    options = tyro.cli(Options, args=argv, prog=PROGRAM, description=DESCRIPTION)
    with cli.user_errors(PROGRAM):
        if options.resamples < 100:
            raise ValueError(f"--resamples is {options.resamples}; fewer than 100 make no interval")
        compared = compare(options.runs, options.metric, resamples=options.resamples, seed=options.seed)
        print_table(compared, options.metric)
        if options.out is not None:
            method = "delong" if options.metric == "image_auroc" else f"bootstrap, {options.resamples} resamples"
            found = {"metric": options.metric, "method": method, "runs": [asdict(own) for own in compared]}
            options.out.parent.mkdir(parents=True, exist_ok=True)
            write_whole(options.out, json.dumps(found, indent=2) + "\n")
            console.print(f"Written to {options.out}")


if __name__ == "__main__":
    main(sys.argv[1:])

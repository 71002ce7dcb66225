"""What evaluations leave behind: tables on screen, metrics.json, scores.csv, heat maps, and a summary over seeds."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from iqe_jax.calibration import Calibration
from iqe_jax.checkpoint import write_whole
from iqe_jax.config import Config
from iqe_jax.data.bmad import Sample
from iqe_jax.data.phantoms import MARK
from iqe_jax.data.scans import printable
from iqe_jax.data.transforms import load_image, load_mask
from iqe_jax.evaluator import Evaluation
from iqe_jax.metrics import bootstrap, defined, image_metrics, over_seeds

MARKED = "chosen on the TEST SET"
RULES = {
    "last": "weights of the last step",
    "valid": "best on the held-out part of the target's valid pool",
    "paper": "chosen on the TEST SET, as the official code does: optimistic",
    "given": "the given adapter",
}
TITLES = {
    "image_": "image ",
    "pixel_": "pixel ",
    "auroc": "AUROC",
    "aupro": "AUPRO",
    "f1_max": "F1-max",
    "ap": "AP",
    "sensitivity_at_95_specificity": "sensitivity at 95 % specificity",
}
PHANTOMS = "rendered phantoms: says nothing about the real data set"
# Dark blue, blue, cyan, yellow, red: a fixed scale, so that the same value looks the same in every picture.
_COLOURS = np.array([[0, 0, 80], [0, 60, 255], [0, 220, 220], [255, 230, 0], [220, 0, 0]], np.float32)


def write(
    config: Config,
    directory: Path,
    samples: Sequence[Sample],
    evaluation: Evaluation,
    kept: dict[str, Any],
    others: Mapping[str, tuple[Evaluation, dict[str, Any]]] | None = None,
    calibrated: Calibration | None = None,
) -> None:
    """Print the table and write all files of an evaluation into `directory`.

    `kept` says what weights those are; `others` has evaluations by further rules of keeping weights, with the same.
    What the threshold of `calibrated` does on the set is told too.
    """
    shown = {kept["rule"]: (evaluation, kept), **(others or {})}
    summary = _summary(config, evaluation, kept, shown)
    summary["at_threshold"] = calibrated.on(evaluation.scores, evaluation.labels) if calibrated else None
    print_table(summary)
    write_whole(directory / "metrics.json", json.dumps(summary, indent=2) + "\n")
    for rule, (scored, facts) in shown.items():
        name = "scores.csv" if rule == kept["rule"] else f"scores-{rule}.csv"
        _write_scores(directory / name, samples, scored, facts)
    if evaluation.maps:
        _write_heatmaps(directory / "heatmaps", config.model.image_size, samples, evaluation)


def on_test_data(facts: Mapping[str, Any]) -> bool:
    """Whether weights, as kept.json tells of them, were chosen on test data."""
    return facts["rule"] == "paper" or bool(facts.get("chosen_on_test_data"))


def chosen(facts: Mapping[str, Any]) -> str:
    """How weights were chosen, in words; those chosen on test data say so."""
    words = RULES[facts["rule"]]
    return words if facts["rule"] == "paper" or not on_test_data(facts) else f"{words}, {MARKED}"


def _write_scores(path: Path, samples: Sequence[Sample], evaluation: Evaluation, facts: Mapping[str, Any]) -> None:
    reductions = evaluation.reductions
    weights = facts["rule"] + (", chosen on test data" if on_test_data(facts) else "")
    lines = io.StringIO()
    rows = csv.writer(lines, lineterminator="\n")
    rows.writerow(["image", "label", "score", *(f"score_{name}" for name in reductions), "weights"])
    for i, sample in enumerate(samples):
        values = (evaluation.scores[i], *(values[i] for values in reductions.values()))
        rows.writerow([sample.name, sample.label, *(f"{value:.9g}" for value in values), weights])
    write_whole(path, lines.getvalue())


def _summary(
    config: Config,
    evaluation: Evaluation,
    kept: dict[str, Any],
    shown: Mapping[str, tuple[Evaluation, dict[str, Any]]],
) -> dict[str, Any]:
    anomalous = int(evaluation.labels.sum())
    labels = evaluation.labels
    return {
        "config": config.name,
        "dataset": config.data.dataset,
        "data": PHANTOMS if (config.data.root / MARK).exists() else str(config.data.root),
        "protocol": "zero-shot" if config.zero_shot else f"few-shot, k = {config.data.shots}",
        "seed": config.train.seed,
        "images": {"normal": len(labels) - anomalous, "anomalous": anomalous},
        "weights": {**kept, "chosen": chosen(kept), "chosen_on_test_data": on_test_data(kept)},
        "image_score": config.model.score,
        "metrics": defined(evaluation.metrics),
        "intervals": bootstrap(evaluation.scores, labels),
        "reductions": {name: defined(image_metrics(x, labels)) for name, x in evaluation.reductions.items()},
        "rules": {
            rule: {
                **defined(scored.metrics),
                "intervals": bootstrap(scored.scores, labels),
                "step": facts.get("step"),
                "chosen": chosen(facts),
                "chosen_on_test_data": on_test_data(facts),
            }
            for rule, (scored, facts) in shown.items()
        },
    }


def print_table(summary: dict[str, Any]) -> None:
    """The metrics of one evaluation as a table on standard output, one column for each rule of keeping weights.

    With several rules each interval stands below its figure, so that 80 columns hold three of them.
    """
    from rich.console import Console
    from rich.table import Table

    rules = summary["rules"]
    several = len(rules) > 1

    def lines(text: str) -> str:
        return text.replace(" [", "\n[").replace(" (", "\n(").replace(" the TEST", "\nthe TEST") if several else text

    heading = f"{summary['config']}: {summary['dataset']}, {summary['protocol']}, seed {summary['seed']}"
    table = Table(title=heading, show_lines=several)
    table.add_column("metric", min_width=None if several else 20)
    for rule, found in rules.items():
        words = [rule if several else "value"] + [MARKED] * found["chosen_on_test_data"]
        table.add_column(lines("\n".join(words)), justify="right")
    for name in summary["metrics"]:
        if not name.endswith("_error"):
            table.add_row(title(name), *(lines(figure(found, name)) for found in rules.values()))
    for reduction, found in summary["reductions"].items():
        if reduction != summary["image_score"] and not several:
            table.add_row(f"image AUROC, score {reduction}", figure(found, "image_auroc"), style="dim")
    images = summary["images"]
    of = " of the mean over seeds" if "seeds" in summary else ""
    caption = [f"{images['normal']} normal, {images['anomalous']} anomalous images; in brackets 95 % intervals{of}"]
    if decided := summary.get("at_threshold"):
        shares = [(name, decided[name]) for name in ("sensitivity", "specificity") if decided[name]]
        found = ", ".join(f"{name} {s['value']:.2f} ({s['low']:.2f}–{s['high']:.2f})" for name, s in shares)
        caption.append(f"at the calibrated threshold {decided['threshold']:.4g}, on these images: {found}")
    caption += [f"{rule}: {found['chosen']}" if several else found["chosen"] for rule, found in rules.items()]
    if summary["image_score"] != "official":
        caption.append(f"image score: {summary['image_score']} of the map, not the official mean")
    if summary["data"] == PHANTOMS:
        caption.append(PHANTOMS)
    table.caption = "\n".join(caption)
    Console().print(table)


def title(name: str) -> str:
    """A metric's name as people write it."""
    for plain, written in TITLES.items():
        name = name.replace(plain, written)
    return name


def figure(found: Mapping[str, Any], name: str) -> str:
    """A figure with its interval, where it has one."""
    if found.get(name) is None:
        return "undefined (one class only)"
    interval = found.get("intervals", {}).get(name)
    return f"{found[name]:.4f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def seeds_summary(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What evaluations that differ in their seeds alone, as metrics.json holds them, come to together."""
    first = summaries[0]
    rules = {}
    for rule, found in first["rules"].items():
        names = [name for name in first["metrics"] if not name.endswith("_error")]
        rules[rule] = {name: _over_seeds([s["rules"][rule][name] for s in summaries]) for name in names}
        rules[rule] |= {name: found[name] for name in ("chosen", "chosen_on_test_data")}
    same = {name: first[name] for name in ("config", "dataset", "data", "protocol", "images", "image_score")}
    return {**same, "seeds": [summary["seed"] for summary in summaries], "rules": rules}


def _over_seeds(values: Sequence[float | None]) -> dict[str, Any]:
    mean, interval = over_seeds([float("nan") if value is None else value for value in values])
    return {"mean": None if np.isnan(mean) else mean, "interval": interval, "values": list(values)}


def write_seeds(path: Path, summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Print and write `seeds_summary`; returns it."""
    found = seeds_summary(summaries)
    write_whole(path, json.dumps(found, indent=2) + "\n")
    flat: dict[str, Any] = {
        rule: {
            **{name: value["mean"] if isinstance(value, dict) else value for name, value in figures.items()},
            "intervals": {name: value["interval"] for name, value in figures.items() if isinstance(value, dict)},
        }
        for rule, figures in found["rules"].items()
    }
    names = [name for name, value in next(iter(found["rules"].values())).items() if isinstance(value, dict)]
    shown = {**found, "metrics": names, "rules": flat, "reductions": {}}
    print_table({**shown, "seed": f"{found['seeds'][0]} to {found['seeds'][-1]} (mean over seeds)"})
    return found


def _write_heatmaps(directory: Path, size: int, samples: Sequence[Sample], evaluation: Evaluation) -> None:
    """One picture per kept map, image | mask | heat map, and all of them in overview.png."""
    from PIL import Image

    directory.mkdir(exist_ok=True)
    strips = []
    for index, segmentation in evaluation.maps.items():
        sample = samples[index]
        image = load_image(sample.image, size)
        mask = load_mask(sample.mask, size) if sample.mask else np.zeros((size, size), np.float32)
        strip = np.concatenate(
            [_bytes(image), _bytes(np.repeat(mask[..., None], 3, -1)), overlay(image, segmentation)], 1
        )
        Image.fromarray(strip).save(directory / f"{'anomalous' if sample.label else 'normal'}-{index:05d}.png")
        strips.append(strip)
    half = -(-len(strips) // 2)
    columns = [np.concatenate(column) for column in (strips[:half], strips[half:]) if column]
    height = max(len(column) for column in columns)
    padded = [np.pad(column, ((0, height - len(column)), (0, 8), (0, 0)), constant_values=255) for column in columns]
    Image.fromarray(np.concatenate(padded, 1)[:, :-8]).save(directory / "overview.png")


def overlay(
    image: Float[np.ndarray, "side side 3"], segmentation: Float[np.ndarray, "side side"]
) -> Int[np.ndarray, "side side 3"]:
    """The image with its segmentation laid over it in colour, both in [0, 1]; colour is stronger where values are."""
    return _bytes(0.5 * image + 0.5 * colours(segmentation))


def colours(values: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape 3"]:
    """RGB in [0, 1] of values in [0, 1], on the fixed scale of every heat map."""
    place = np.clip(values, 0, 1) * (len(_COLOURS) - 1)
    below = np.minimum(place.astype(int), len(_COLOURS) - 2)
    part = (place - below)[..., None]
    return (_COLOURS[below] * (1 - part) + _COLOURS[below + 1] * part) / 255


def _bytes(image: Float[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


@dataclass(frozen=True)
class Scores:
    """scores.csv: names, labels (1 for an anomaly), the score, and further reductions by name."""

    names: list[str]
    labels: Int[np.ndarray, " image"]
    score: Float[np.ndarray, " image"]
    others: dict[str, Float[np.ndarray, " image"]]


def read_scores(path: Path) -> Scores:
    """Read a run's scores.csv, whose names may hold any bytes that file names do.

    Raises FileNotFoundError, or ValueError naming file, line and field, when it is not there or not what it should be.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: evaluate.py writes it into the run's directory")
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = csv.DictReader(file, strict=True)
        columns = rows.fieldnames or []
        if missing := [name for name in ("image", "label", "score") if name not in columns]:
            raise ValueError(
                f"{path} has no column {missing[0]!r}; expected image,label,score as evaluate.py writes them"
            )
        others = [name for name in columns if name.startswith("score_")]
        names, labels, values = [], [], []
        try:
            for row in rows:
                label, numbers = row["label"], [float(row[name] or "nan") for name in ("score", *others)]
                if label not in ("0", "1") or not np.isfinite(numbers[0]):
                    raise ValueError("label must be 0 or 1 and score a finite number")
                names.append(row["image"])
                labels.append(int(label))
                values.append(numbers)
        except (ValueError, TypeError, csv.Error) as error:
            raise ValueError(f"{path}, line {rows.line_num}: {error}") from error
    if not names:
        raise ValueError(f"{path} lists no images; run evaluate.py again")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{path} lists {printable(twice)} twice")
    table = np.array(values)
    return Scores(names, np.array(labels), table[:, 0], {n[6:]: table[:, i + 1] for i, n in enumerate(others)})

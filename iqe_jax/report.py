"""What an evaluation leaves behind: a table on screen, metrics.json, scores.csv, and heat maps as pictures."""

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from iqe_jax.config import Config
from iqe_jax.data.bmad import Sample
from iqe_jax.data.phantoms import MARK
from iqe_jax.data.transforms import load_image, load_mask
from iqe_jax.evaluator import Evaluation

RULES = {
    "last": "weights of the last step",
    "valid": "best on the held-out part of the target's valid pool",
    "paper": "chosen on the TEST SET, as the official code does: optimistic",
    "given": "the given adapter",
}
PHANTOMS = "rendered phantoms: says nothing about the real data set"
# Dark blue, blue, cyan, yellow, red: a fixed scale, so that the same value looks the same in every picture.
_COLOURS = np.array([[0, 0, 80], [0, 60, 255], [0, 220, 220], [255, 230, 0], [220, 0, 0]], np.float32)


def write(
    config: Config, directory: Path, samples: Sequence[Sample], evaluation: Evaluation, kept: dict[str, Any]
) -> None:
    """Print the table and write all files of an evaluation into `directory`."""
    summary = _summary(config, evaluation, kept)
    print_table(summary)
    (directory / "metrics.json").write_text(json.dumps(summary, indent=2) + "\n")
    with (directory / "scores.csv").open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "label", "score"])
        for sample, score in zip(samples, evaluation.scores, strict=True):
            rows.writerow([sample.name, sample.label, f"{score:.6f}"])
    if evaluation.maps:
        _write_heatmaps(directory / "heatmaps", config.model.image_size, samples, evaluation)


def on_test_data(facts: Mapping[str, Any]) -> bool:
    """Whether weights, as kept.json tells of them, were chosen on test data."""
    return facts["rule"] == "paper" or bool(facts.get("chosen_on_test_data"))


def _summary(config: Config, evaluation: Evaluation, kept: dict[str, Any]) -> dict[str, Any]:
    anomalous = int(evaluation.labels.sum())
    return {
        "config": config.name,
        "dataset": config.data.dataset,
        "data": PHANTOMS if (config.data.root / MARK).exists() else str(config.data.root),
        "protocol": "zero-shot" if config.zero_shot else f"few-shot, k = {config.data.shots}",
        "seed": config.train.seed,
        "images": {"normal": len(evaluation.labels) - anomalous, "anomalous": anomalous},
        "weights": {**kept, "chosen": RULES[kept["rule"]]},
        "image_score": config.model.score,
        "metrics": {name: None if np.isnan(value) else value for name, value in evaluation.metrics.items()},
    }


def print_table(summary: dict[str, Any]) -> None:
    """The metrics of one evaluation as a table on standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{summary['config']}: {summary['dataset']}, {summary['protocol']}, seed {summary['seed']}")
    table.add_column("metric", min_width=40)
    table.add_column("value", justify="right")
    for name, value in summary["metrics"].items():
        if name != "pixel_auroc_error":
            table.add_row(
                name.replace("_auroc", " AUROC"), "undefined (one class only)" if value is None else f"{value:.4f}"
            )
    images = summary["images"]
    caption = [f"{images['normal']} normal, {images['anomalous']} anomalous images", summary["weights"]["chosen"]]
    if summary["image_score"] != "official":
        caption.append(f"image score: {summary['image_score']} of the map, not the official mean")
    if summary["data"] == PHANTOMS:
        caption.append(PHANTOMS)
    table.caption = "\n".join(caption)
    Console().print(table)


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
        raise ValueError(f"{path} lists {shown_name(twice)} twice")
    table = np.array(values)
    return Scores(names, np.array(labels), table[:, 0], {n[6:]: table[:, i + 1] for i, n in enumerate(others)})


def shown_name(name: str) -> str:
    r"""A file name as text: bytes that are no UTF-8 and characters that print nothing are shown as \xff or \u202e."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

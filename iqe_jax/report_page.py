"""report.html: one self-contained page of an evaluation, made from the files of the run and the maps of its images.

It opens offline and may run and load nothing but itself (a Content-Security-Policy with digests holds it to that).
Figures come from report_figures.py, how they look from templates/report.html, .css and .js; every text from disk is
escaped by Jinja.
"""

import base64
import dataclasses
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from iqe_jax import calibration
from iqe_jax import report_figures as figures
from iqe_jax.calibration import Calibration
from iqe_jax.checkpoint import write_whole
from iqe_jax.config import Config
from iqe_jax.data.bmad import SETS, Sample
from iqe_jax.data.scans import printable
from iqe_jax.data.transforms import load_image, load_mask
from iqe_jax.pixel_metrics import Histogram
from iqe_jax.report import PHANTOMS, Scores, colours, on_test_data, read_scores

GALLERY = 200  # images in the gallery at most
SIDE = 240  # pixels that pictures in the page are reduced to: 200 of them stay under 20 MB, whatever they show
_HEAT_LEVELS = 128  # steps of the heat map's colours in the page
_JPEG_QUALITY = 85

PAPER = (
    "These weights were chosen on the test set, as the official code does: all figures are optimistic, and none tells "
    "how the weights do on new images."
)
METRICS = {
    "image_auroc": ("Image AUROC", "chance that an anomalous image scores above a normal one"),
    "image_ap": (
        "Image AP",
        "average precision: mean precision over the recalls; chance level is the share of anomalous",
    ),
    "image_f1_max": ("Image F1-max", "best F1 over all thresholds, which is chosen on these images"),
    "image_sensitivity_at_95_specificity": (
        "Sensitivity at 95 % specificity",
        "anomalous images found where at most 5 % of the normal ones are called anomalous",
    ),
    "pixel_auroc": ("Pixel AUROC", "over all pixels of the test set together"),
    "pixel_ap": ("Pixel AP", "average precision over all pixels together"),
    "pixel_f1_max": ("Pixel F1-max", "best F1, or Dice, of one threshold for all pixels"),
    "pixel_aupro": ("Pixel AUPRO", "mean overlap with each anomalous region, up to 30 % false positive pixels"),
}


def provenance(
    config: Config, weights: Mapping[str, str], *, command: str, device: str, date: str
) -> list[tuple[str, str]]:
    """Where an evaluation comes from, as (what, value) in the order of the page. `weights` has digests by name."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:  # run from a checkout
            return "from a checkout"

    versions = ", ".join(f"{name} {installed(name)}" for name in ("iqe-jax", "jax", "flax", "numpy"))
    return [
        ("Command", command),
        ("Date", date),
        ("Data", str(config.data.root)),
        ("CLIP", config.model.clip),
        *((f"Digest of {name}", digest) for name, digest in weights.items()),
        ("Device", device),
        ("Versions", f"{versions}, Python {platform.python_version()}"),
    ]


def write(
    config: Config,
    directory: Path,
    samples: Sequence[Sample],
    maps: Mapping[int, Float[np.ndarray, "side side"]],
    origin: Sequence[tuple[str, str]],
    pixels: Histogram | None = None,
) -> Path:
    """Write `directory`/report.html from its metrics.json, scores.csv and, where there is one, calibration.json.

    Args:
      config: the resolved config, shown in full.
      directory: the run.
      samples: the test set, in the order of scores.csv.
      maps: segmentations in [0, 1] by place in `samples`; these images make the gallery, the most wrong first.
      origin: what `provenance` returned.
      pixels: counts of pixels by their value in the segmentation, for curves over pixels.

    Raises ValueError when the files of the run do not go with `samples`.
    """
    summary = json.loads((directory / "metrics.json").read_text())
    scores = read_scores(directory / "scores.csv")
    if scores.names != [sample.name for sample in samples]:
        raise ValueError(f"{directory / 'scores.csv'} is not of the images that are here now; run evaluate.py again")
    fitted, why = _calibration(directory)
    gallery = [i for i in figures.most_wrong(scores.score, scores.labels) if i in maps]
    page = _render(
        {
            **_about(config, summary),
            "summary": summary,
            "metrics": _metric_cards(summary),
            "tables": _tables(summary),
            "support": [printable(name) for name in summary["weights"].get("support") or ()],
            "names": METRICS,
            "image": [curve(scores.score, scores.labels) for curve in (figures.roc, figures.precision_recall)],
            "pixel": None if pixels is None else figures.pixel_curves(pixels),
            "histogram": _histogram(scores),
            "reliability": _reliability(fitted, why, scores),
            "cards": [_card(config.model.image_size, i, samples[i], maps[i], scores) for i in gallery],
            "total": len(samples),
            "side": min(SIDE, config.model.image_size),
            "full_side": config.model.image_size,
            "origin": origin,
            "settings": _settings(config),
            "scale": [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in _palette()[:: _HEAT_LEVELS // 16]],
            "data": _data(scores, fitted),
        }
    )
    write_whole(directory / "report.html", page)
    return directory / "report.html"


def _about(config: Config, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Title and marks. Marks stand in the page's head and beside every figure."""
    known = SETS.get(summary["dataset"])
    marks = [("paper", "chosen on test data", PAPER)] if on_test_data(summary["weights"]) else []
    if summary["data"] == PHANTOMS:
        marks.append(
            ("phantoms", "phantoms", "What is measured on rendered phantoms says nothing about the real data set.")
        )
    return {"title": known.title if known else printable(summary["dataset"]), "marks": marks, "run": config.name}


def _metric_cards(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    metrics, intervals = summary["metrics"], summary.get("intervals") or {}
    order = [n for n in METRICS if n in metrics] + [n for n in metrics if n not in METRICS and not n.endswith("_error")]
    return [
        {
            "name": METRICS.get(name, (name.replace("_", " "), ""))[0],
            "what": METRICS.get(name, ("", ""))[1],
            "value": metrics[name],
            "interval": intervals.get(name),
            "error": metrics.get(f"{name}_error"),
        }
        for name in order
    ]


def _tables(summary: Mapping[str, Any]) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """(heading, explanation, columns) of each table of figures side by side that the summary has the numbers of."""
    tables = []
    for key, heading, about in (
        ("rules", "Choices of weights", "The same run, scored with the weights that each rule keeps."),
        ("reductions", "Image scores", "How the anomaly map becomes one score for the image."),
    ):
        columns = [
            {
                "name": name,
                "rows": {n: values.get(n) for n in summary["metrics"] if n in values and not n.endswith("_error")},
                "intervals": values.get("intervals") or {},
                "on_test": key == "rules" and (name == "paper" or bool(values.get("chosen_on_test_data"))),
            }
            for name, values in (summary.get(key) or {}).items()
        ]
        if len(columns) > 1:
            tables.append((heading, about, columns))
    return tables


def _histogram(scores: Scores) -> dict[str, Any]:
    edges, shares = figures.histogram(scores.score, scores.labels)
    return {"edges": edges.tolist(), "shares": shares.tolist(), "ticks": figures.ticks(edges[0], edges[-1])}


def _calibration(directory: Path) -> tuple[Calibration | None, str]:
    """The run's fitted calibration, if it has one that goes with its weights, and a sentence where it has not."""
    try:
        fitted = calibration.load(directory)
    except ValueError as fault:
        return None, f"A fitted calibration is there but not used: {fault}."
    if fitted is None:
        return None, "No probability has been fitted for this run."
    return fitted, "".join(f"{reason[0].upper()}{reason[1:]}. " for reason in fitted.withheld)


def _reliability(fitted: Calibration | None, why: str, scores: Scores) -> dict[str, Any]:
    """Bins and axis of the reliability diagram, by fitted probability or else by raw score, and what to say of it."""
    prevalence = float(scores.labels.mean())
    probabilities = None if fitted is None else fitted.probability(scores.score)
    if fitted is None or probabilities is None:
        low, high = figures.span(scores.score)
        bins = figures.reliability(scores.score, scores.labels, probabilities=False)
        text = [
            "Raw scores are not probabilities: a score of 0.8 does not mean that 8 of 10 such images are anomalous. "
            "The figure shows how often images of like score were anomalous in this test set, and that share depends "
            f"on how common anomalies are, here {prevalence:.0%}.",
            why,
        ]
    else:
        low, high = 0.0, 1.0
        bins = figures.reliability(probabilities, scores.labels, probabilities=True)
        brier = float(np.mean((probabilities - scores.labels) ** 2))
        gap = sum(b.images * abs(b.score - b.observed) for b in bins) / len(scores.labels)
        text = [
            f"Probabilities come from raw scores by a curve ({(fitted.curve or {})['method']}) fitted on "
            f"{len(fitted.labels)} images of the valid pool, never on these. On these test images the Brier score is "
            f"{brier:.3f} (0 is best; always saying the share of anomalous ones has "
            f"{prevalence * (1 - prevalence):.3f}) and the expected calibration error {gap:.3f}.",
            f"A probability holds for the pool's share of anomalous images, {fitted.prevalence:.0%}; in this test "
            f"set it is {prevalence:.0%}, and where scans come from it is usually far lower. {why}",
        ]
    axis = {"low": low, "high": high, "ticks": figures.ticks(low, high)}
    return {"bins": bins, **axis, "probabilities": probabilities is not None, "text": text}


def _card(
    size: int, index: int, sample: Sample, segmentation: Float[np.ndarray, "side side"], scores: Scores
) -> dict[str, Any]:
    """One image of the gallery: pictures as data URIs, and what it scored."""
    mask = None
    if sample.mask is not None:
        mask = _uri(_shrunk(load_mask(sample.mask, size)) > 0.5, "PNG")
    levels = np.round(np.clip(_shrunk(segmentation), 0, 1) * (_HEAT_LEVELS - 1)).astype(np.uint8)
    return {
        "index": index,
        "name": printable(sample.name),
        "label": int(scores.labels[index]),
        "score": float(scores.score[index]),
        "others": {name: float(values[index]) for name, values in scores.others.items()},
        "image": _uri(np.round(_shrunk(load_image(sample.image, size)) * 255).astype(np.uint8), "JPEG"),
        "mask": mask,
        "heat": _uri(levels, "PNG", _palette()),
    }


def _shrunk(array: Float[np.ndarray, "side side ..."]) -> Float[np.ndarray, "shown shown ..."]:
    """The array resized so that its side is SIDE, where it is larger; values are averaged."""
    from PIL import Image

    if len(array) <= SIDE:
        return array
    channels = [array] if array.ndim == 2 else list(np.moveaxis(array, -1, 0))
    small = [
        np.asarray(Image.fromarray(c.astype(np.float32)).resize((SIDE, SIDE), Image.Resampling.BOX)) for c in channels
    ]
    return small[0] if array.ndim == 2 else np.stack(small, -1)


def _palette() -> Int[np.ndarray, "level 3"]:
    return np.round(colours(np.linspace(0, 1, _HEAT_LEVELS)) * 255).astype(np.uint8)


def _uri(array: np.ndarray, form: str, palette: Int[np.ndarray, "level 3"] | None = None) -> str:
    """A picture as a data URI: 1-bit for bool, 8-bit with a palette where one is given, grey where it has no colour."""
    from PIL import Image

    if array.ndim == 3 and (array == array[..., :1]).all():
        array = array[..., 0]
    picture = Image.fromarray(np.ascontiguousarray(array))
    if palette is not None:
        picture.putpalette(palette.tobytes())
    held = io.BytesIO()
    picture.save(held, form, optimize=True, **({"quality": _JPEG_QUALITY} if form == "JPEG" else {}))
    return f"data:image/{form.lower()};base64,{base64.b64encode(held.getvalue()).decode()}"


def _settings(config: Config) -> list[tuple[str, str, bool]]:
    """Every setting as (dotted name, value, whether it is not the default)."""

    def flat(value: Any, default: Any, name: str) -> list[tuple[str, str, bool]]:
        if dataclasses.is_dataclass(value):
            return [
                row
                for field in dataclasses.fields(value)
                for row in flat(getattr(value, field.name), getattr(default, field.name), f"{name}.{field.name}")
            ]
        return [(name.removeprefix("."), str(value), value != default)]

    return flat(config, Config(), "")


def _data(scores: Scores, fitted: Calibration | None) -> dict[str, Any]:
    """What the page's script reads: all scores, the threshold it starts at, and the calibrated one if there is one."""
    probabilities = None if fitted is None else fitted.probability(scores.score)
    return {
        "scores": scores.score.tolist(),
        "labels": scores.labels.tolist(),
        "probabilities": None if probabilities is None else np.round(probabilities, 4).tolist(),
        "threshold": figures.f1_max_threshold(scores.score, scores.labels),
        "calibrated": None if fitted is None else fitted.threshold,
    }


def _render(context: Mapping[str, Any]) -> str:
    """The page. Style and script may run because the policy in its head has their digests; nothing else may."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("iqe_jax"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    parts = {}
    for name, kind in (("style", "css"), ("script", "js")):
        text = environment.loader.get_source(environment, f"report.{kind}")[0]  # pyright: ignore
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        parts |= {name: Markup(text), f"{name}_digest": f"sha256-{digest}"}
    return environment.get_template("report.html").render(**context, **parts)

"""An evaluated run for the tests of its page, without a model: real files, some with hostile names, scores and maps."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from iqe_jax import config, report, report_page
from iqe_jax.data.bmad import Sample
from iqe_jax.data.phantoms import MARK
from iqe_jax.evaluator import Evaluation

HOSTILE = [
    '<img src=x onerror="window.attacked=1">.png',
    "\"'><script>window.attacked=1<.png",
    "{{ 7 * 7 }}&lt;.png",
    os.fsdecode(b"not utf-8 \xff.png"),
    "turned \u202e round.png",
    "two\nlines.png",
]


@dataclass(frozen=True)
class Page:
    """A run, what it was made of, and `write`, which makes its page."""

    config: config.Config
    directory: Path
    samples: list[Sample]
    evaluation: Evaluation

    def write(self, **options) -> str:
        origin = report_page.provenance(
            self.config, {"CLIP": "0123abcd"}, command="python evaluate.py --report", device="1 × cpu", date="today"
        )
        path = report_page.write(self.config, self.directory, self.samples, self.evaluation.maps, origin, **options)
        return path.read_text()


def make_run(
    folder: Path, *, count: int = 12, size: int = 24, rule: str = "last", phantoms: bool = False, names: bool = True
) -> Page:
    """A run of `count` normal and as many anomalous images of noise, the worst that can be to keep small."""
    draw = np.random.default_rng(0)
    samples, maps = [], {}
    for label, part in enumerate(("good", "ungood")):
        (folder / part).mkdir(parents=True)
        for i in range(count):
            name = HOSTILE[i] if names and i < len(HOSTILE) else f"{part}_{i:03d}.png"
            image, mask = folder / part / name, folder / part / f"mask_{i}.png"
            Image.fromarray(draw.integers(0, 256, (size, size, 3), np.uint8)).save(image)
            marked = np.zeros((size, size), np.uint8)
            marked[size // 4 : size // 2, size // 4 : size // 2] = 255
            Image.fromarray(marked).save(mask)
            maps[len(samples)] = spread(gaussian_filter(draw.random((size, size)), size / 30))
            samples.append(Sample(image, mask if label else None, label, f"{part}/{name}"))
    labels = np.array([float(sample.label) for sample in samples])
    scores = np.round(draw.normal(0.4 + 0.15 * labels, 0.1), 6)
    if phantoms:
        (folder / MARK).touch()
    recipe = config.Config(
        "small", model=config.ModelConfig(image_size=size), data=config.DataConfig(root=folder, shots=4)
    )
    evaluation = Evaluation({"image_auroc": 0.875, "pixel_auroc": 0.5, "pixel_auroc_error": 1e-7}, scores, labels, maps)
    directory = folder / "run"
    directory.mkdir()
    report.write(recipe, directory, samples, Evaluation(**{**vars(evaluation), "maps": {}}), {"rule": rule, "step": 3})
    return Page(recipe, directory, samples, evaluation)


def spread(values: np.ndarray) -> np.ndarray:
    """Values stretched to all of [0, 1]."""
    return ((values - values.min()) / np.ptp(values)).astype(np.float32)

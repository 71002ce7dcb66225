"""Pixel metrics at size: memory over hundreds of millions of pixels, error and speed against exact ones.

Scores and masks are drawn, with the ties and the bunching near 0 that anomaly maps have.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks.measure import Report, in_turns
from benchmarks.starts import ROOT, environment
from iqe_jax.pixel_metrics import Histogram, auroc, average_precision, count, histogram, pixel_metrics, start

SIDE, BATCH = 240, 16
LIMIT_MB, LIMIT_ERROR, LIMIT_SPEED = 200, 1e-6, 40


def drawn(images: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Maps in [0, 1] and masks of `images` images, with 1/area for the anomalous pixels' one region."""
    draw = np.random.default_rng(seed)
    masks = np.zeros((images, SIDE, SIDE), np.float32)
    for mask in masks:
        y, x, size = (int(draw.integers(*limits)) for limits in ((0, SIDE - 40), (0, SIDE - 40), (8, 40)))
        mask[y : y + size, x : x + size] = 1
    maps = 1 / (1 + np.exp(-(draw.standard_normal(masks.shape, np.float32) - 4 + 2 * masks)))
    regions = masks / np.maximum(masks.sum((1, 2), keepdims=True), 1)
    return maps.astype(np.float32), masks, regions


def measure(report: Report, pixels: int, sample: int, batch: int) -> None:
    """All four metrics of `pixels` pixels with the memory they take, and error and speed on a `sample`."""
    weight = np.ones(batch, np.float32)
    maps, masks, regions = (jax.device_put(x) for x in drawn(batch, 0))
    on_device = jax.device_put(weight)
    counts = jax.block_until_ready(count(start(maps, on_device, regions=True), maps, masks, on_device, regions))

    def counted() -> object:
        nonlocal counts
        counts = count(counts, maps, masks, on_device, regions)
        return counts

    times = in_turns({"": counted}, report.repeats)[""]
    report.add("pixel metrics", "counting a batch", times, images=batch, note=f"{SIDE}² pixels an image")
    del counts, maps, masks, regions
    # In a process of its own, as the peak of this one may lie before the pixels.
    command = [sys.executable, "-m", "benchmarks.pixels", str(pixels), str(batch)]
    said = subprocess.run(command, check=True, cwd=ROOT, env=environment(), capture_output=True, text=True).stdout
    found = json.loads(said.splitlines()[-1])
    name = f"{found['pixels'] / 1e6:.0f} million pixels, all four"
    report.add("pixel metrics", name, [found["seconds"]], images=found["pixels"] // SIDE**2)
    report.target("extra memory of all four pixel metrics", found["extra_mb"], LIMIT_MB, unit=" MB")
    report.facts["pixel metrics"] = found
    _against_exact(report, max(1, sample // SIDE**2))


def through_all(pixels: int, batch: int) -> dict[str, float]:
    """All four metrics of `pixels` pixels, with the seconds and the MB they took, compiling included."""
    maps, masks, regions = (jax.device_put(x) for x in drawn(batch, 0))
    weight = jax.block_until_ready(jax.device_put(np.ones(batch, np.float32)))
    here = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6
    begin, steps = time.perf_counter(), -(-pixels // (batch * SIDE**2))
    counts = start(maps, weight, regions=True)
    for _ in range(steps):
        counts = jax.block_until_ready(count(counts, maps, masks, weight, regions))
    figures = pixel_metrics(histogram(counts))
    seconds = time.perf_counter() - begin
    # Of /proc and not of getrusage, whose peak a process starts with is that of the one that started it.
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6
    return {"pixels": steps * batch * SIDE**2, "seconds": seconds, "extra_mb": peak - here, **figures}


def _against_exact(report: Report, images: int) -> None:
    """AUROC and AP of as many images against scikit-learn's, and how much quicker AUROC is."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    maps, masks, _ = drawn(images, 1)
    weight = np.ones(images, np.float32)
    batches = [  # as an evaluation has them
        [jax.device_put(x[i : i + BATCH]) for x in (maps, masks, weight)] for i in range(0, images, BATCH)
    ]

    def counted() -> Histogram:
        counts = start(batches[0][0], batches[0][2], regions=False)
        for batch in batches:
            counts = count(counts, *batch)
        return histogram(counts)

    labels, scores = masks.ravel() > 0.5, maps.ravel()
    exact = 0.0

    def ours() -> object:
        return auroc(counted())

    def peer() -> None:
        nonlocal exact
        exact = float(roc_auc_score(labels, scores))

    times = in_turns({"ours": ours, "peer": peer}, report.repeats)
    size = f"{labels.size / 1e6:.1f} million pixels, AUROC"
    row = report.add("pixel metrics", size, times["ours"], images=images)
    theirs = report.add("pixel metrics", f"{size}, scikit-learn", times["peer"], images=images)
    report.target("AUROC, times as fast as scikit-learn", theirs.median / row.median, LIMIT_SPEED, at_least=True)
    found = counted()
    report.target("AUROC, difference from the exact one", abs(auroc(found)[0] - exact), LIMIT_ERROR)
    exact = float(average_precision_score(labels, scores))
    report.target("AP, difference from the exact one", abs(average_precision(found)[0] - exact), LIMIT_ERROR)


if __name__ == "__main__":
    print(json.dumps(through_all(*(int(x) for x in sys.argv[1:]))))

"""The way in: decoding image files, reading kept features from disk, and how long training waits for either."""

import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.measure import Report, in_turns
from benchmarks.starts import phantoms_here
from iqe_jax.data.bmad import load_split
from iqe_jax.data.pipeline import FewShotBatches, image_batches
from iqe_jax.feature_files import OnDisk, write
from iqe_jax.features import SHARD, FeatureSet, kept_dtype
from iqe_jax.sharding import Layout
from iqe_jax.train_state import Batch, create, train_step
from iqe_jax.training_data import batches_ahead

WAITING = 0.05  # share of the time that training may wait for its input


def decoding(report: Report, size: int, batch: int, workers: int) -> None:
    """Opening, decoding and resizing phantom files, in `workers` threads."""
    samples = load_split(phantoms_here(), "brain", "test")[: 4 * batch]

    def decode() -> int:
        return len(list(image_batches(samples, size, batch, workers=workers, with_masks=True)))

    times = in_turns({"": decode}, report.repeats)[""]
    report.add("input", f"decode and resize, {workers} threads", times, images=len(samples))


def kept_features(parts: Any, report: Report, steps: int) -> None:
    """Reading batches of kept features from disk, and training on them."""
    model, layout, size = parts.model, parts.layout, parts.batch
    clip, side = model.clip, model.config.image_size
    shape = (len(model.config.levels), model.grid**2, clip.vision_width)
    draw, dtype = np.random.default_rng(0), kept_dtype(parts.config)
    with tempfile.TemporaryDirectory() as folder:
        shards = [Path(folder) / str(i) for i in range(2)]
        for shard in shards:
            masks = (draw.random((SHARD, side, side)) > 0.9).astype(np.uint8)
            tokens = draw.standard_normal((SHARD, *shape), np.float32).astype(dtype)
            write(shard, {"tokens": tokens, "masks": masks})
        count = SHARD * len(shards)
        labels = (np.arange(count) % 2).astype(np.float32)
        image_features = draw.standard_normal((count, clip.embed_dim), np.float32)
        tokens = OnDisk([shard / "tokens.npy" for shard in shards], dtype)
        masks = OnDisk([shard / "masks.npy" for shard in shards], np.dtype(np.uint8))
        kept = FeatureSet(tokens, image_features, masks, labels)
        order = draw.integers(0, count, (report.repeats + 1, size))
        chosen = iter(order)
        weight = np.ones(size, np.float32)
        times = in_turns({"": lambda: kept.batch(next(chosen), weight).patch_tokens}, report.repeats)[""]
        each = dtype.itemsize * np.prod(shape)
        row = report.add("input", "a batch of kept features, memory-mapped", times, images=size)
        report.facts["kept features, read at GB/s"] = float(size * each / row.median / 1e9)
        waited, total = _waited(parts, kept, layout, steps)
    report.add("input", f"{steps} training steps on them, waiting", [waited], images=steps * size)
    report.add("input", f"{steps} training steps on them, in all", [total], images=steps * size)
    report.target("share of training's time that it waits for input", waited / total, WAITING)


def _waited(parts: Any, kept: FeatureSet, layout: Layout, steps: int) -> tuple[float, float]:
    """Seconds that the training loop stood still for a batch, and seconds in all."""
    model, train, size = parts.model, parts.config.train, parts.batch
    order = FewShotBatches(len(kept), size, 0)
    text = {"text": parts.frozen["text"]}
    state, pending = create(model, train, parts.frozen, layout), None
    batches = batches_ahead([kept], order, 0, steps + 2, layout.rows(size))
    waited, begin = 0.0, time.perf_counter()
    for step in range(steps + 2):
        if step == 2:  # two to compile and to fill the queue
            jax.block_until_ready(pending)
            waited, begin = 0.0, time.perf_counter()
        start = time.perf_counter()
        _, local = next(batches)
        batch: Batch = local.placed(layout, size)
        waited += time.perf_counter() - start
        state, metrics = train_step(state, text, batch, model=model, config=train, dropout=0.0, layout=layout)
        if pending is not None:
            jax.block_until_ready(pending)  # as the trainer does, which writes down the step before
        pending = metrics
    jax.block_until_ready(pending)
    return waited, time.perf_counter() - begin

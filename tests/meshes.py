"""Run by test_sharding.py in a process of its own with 8 fake devices: what a small model does on several meshes.

Writes one JSON file: how far loss, gradients and training are from one device's, and where arrays lie.
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
from flax import linen as nn
from flax.core import meta

from iqe_jax import pixel_metrics, training_data
from iqe_jax.config import MeshConfig, ModelConfig, TrainConfig
from iqe_jax.data.pipeline import FewShotBatches
from iqe_jax.features import FeatureSet, run_tower
from iqe_jax.models.clip import ClipConfig, Templates
from iqe_jax.models.iqe_clip import IqeClip
from iqe_jax.sharding import Layout, make_layout
from iqe_jax.train_state import Batch, create, objective, shapes_laid_out, train_step
from iqe_jax.weights import frozen_shardings

CLIP = ClipConfig(56, 14, 256, 2, 4, 256, 2, 4, 16, 32)
MODEL = ModelConfig(image_size=42, levels=(1, 2), iqm_layers=1, iqm_heads=4, iqm_width=256, sigma=2.0, start="clip")
TEMPLATES = Templates(((1, 5, 6, 7), (1, 5, 9, 7)), 2)
TRAIN = TrainConfig(learning_rate=1e-3)
MESHES = {
    "data": MeshConfig(),
    "fsdp": MeshConfig(fsdp=8),
    "tensor": MeshConfig(data=2, tensor=4),
    "mixed": MeshConfig(data=2, fsdp=2, tensor=2),
}


def host_batch(images: int, size: int) -> Batch:
    """`images` random ones; rows past them repeat the first with weight 0, as the pipeline's padding does."""
    draw = np.random.default_rng(0)
    rows = np.where(np.arange(size) < images, np.arange(size), 0)
    return Batch(
        patch_tokens=draw.standard_normal((2, images, 9, 256), np.float32)[:, rows],
        image_features=draw.standard_normal((images, 256), np.float32)[rows],
        masks=(draw.random((images, 42, 42)) > 0.7).astype(np.float32)[rows],
        labels=(np.arange(images, dtype=np.float32) % 2)[rows],
        weight=(np.arange(size) < images).astype(np.float32),
    )


class Run:
    """A small model on one mesh, before its first step."""

    def __init__(self, layout: Layout, frozen, *, images=16, dropout=0.1, **settings):
        self.dropout = dropout
        self.layout, self.model = layout, IqeClip(CLIP, MODEL, TEMPLATES)
        self.train = dataclasses.replace(TRAIN, **settings)
        self.frozen = layout.put(frozen, frozen_shardings(self.model, layout))
        self.state = create(self.model, self.train, self.frozen, layout)
        self.size = layout.padded(images // self.train.accumulate) * self.train.accumulate
        batch = host_batch(images, self.size)
        rows = layout.rows(self.size)
        self.batch = batch.map(lambda x, axis: x.take(rows, axis)).placed(layout, self.size)

    def gradients_and_head(self):
        """Loss and gradients on the host, without dropout, and the head's outputs where they lie."""

        def loss_and_head(trainable, frozen, batch):
            head = self.model.head(trainable, frozen, batch.features())
            return objective(self.model, trainable, frozen, batch)[0], head

        gradient = jax.jit(jax.value_and_grad(loss_and_head, has_aux=True))
        with self.layout.active():
            (loss, head), gradients = gradient(self.state.trainable, self.frozen, self.batch)
        return self.layout.gather((loss, gradients)), head

    def places(self, head):
        """How every parameter and every activation by name is split."""
        layout, state, model = self.layout, self.state, self.model
        pixels = layout.place(np.zeros((len(layout.rows(self.size)), 42, 42, 3), np.float32), self.size)
        with layout.active():
            tower = run_tower(model, self.frozen, pixels, layout)
        arrays = {"trainable": state.trainable, "opt_state": state.opt_state, "frozen": self.frozen, "head": head}
        arrays["tower"] = dict(zip(("patch_tokens", "image_features"), tower, strict=True))
        return specs(arrays)

    def five_steps(self):
        """The losses of five steps; the parameters stay where they were."""
        before, losses = specs(self.state.trainable), []
        for _ in range(5):
            self.state, metrics = train_step(
                *(self.state, self.frozen, self.batch),
                **{"model": self.model, "config": self.train, "dropout": self.dropout, "layout": self.layout},
            )
            losses.append([float(metrics[name]) for name in ("loss", "detection", "focal", "dice")])
        assert specs(self.state.trainable) == before
        return np.array(losses)


def taken_and_gathered(layout: Layout) -> list[list[Batch]]:
    """The batches of three steps, 12 images each, the last with 2: taken on the devices, and gathered on the host."""
    whole = host_batch(26, 26)
    tokens = np.moveaxis(np.asarray(whole.patch_tokens), 0, 1)
    sets = [FeatureSet(tokens, whole.image_features, whole.masks.astype(np.uint8), whole.labels)]  # pyright: ignore
    order, size = FewShotBatches(26, 12, seed=0), layout.padded(12)
    vars(layout)["memory"] = 10**9  # CPUs do not say
    kept = training_data.on_devices(sets, layout)
    assert kept is not None
    taken = training_data.batches_of(kept, order, 0, 3, layout, size)
    gathered = training_data.batches_ahead(sets, order, 0, 3, layout.rows(size))
    return [[batch for _, batch in taken], [batch.placed(layout, size) for _, batch in gathered]]


def pixel_figures(layout: Layout | None):
    """Metrics over the pixels of 16 images, the last three of which are padding."""
    draw = np.random.default_rng(0)
    masks = np.zeros((16, 42, 42), np.float32)
    masks[4:, 5:15, 5:15] = 1
    values = np.clip(0.5 + 0.1 * (draw.standard_normal(masks.shape) + masks), 0, 1).astype(np.float32)
    batch = (values, masks, (np.arange(16) < 13).astype(np.float32), masks / 100)
    split = None if layout is None else layout.batch
    if layout is not None:
        batch = layout.place(batch, 16)
    counts = pixel_metrics.start(batch[0], batch[2], regions=True, split=split)
    counts = pixel_metrics.count(counts, *batch, split=split)
    return pixel_metrics.pixel_metrics(pixel_metrics.histogram(counts))


def specs(tree):
    """`name: how its axes are split` of every array, such as "- | data × fsdp"."""

    def split(axes):
        return " × ".join(axes) if isinstance(axes, tuple) else axes or "-"

    return {name: " | ".join(split(axes) for axes in x.sharding.spec) for name, x in named(tree)}


def named(tree):
    for path, x in jax.tree.leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), x


def far(one, other) -> float:
    """The largest difference of two trees, in parts of the largest value of the second."""
    largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(other))
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(a - b).max()), one, other))) / largest


def main(path: Path) -> None:
    assert len(jax.devices()) == 8
    frozen = meta.unbox(jax.jit(IqeClip(CLIP, MODEL, TEMPLATES).init_frozen)(jax.random.key(1)))
    frozen = jax.tree.map(np.asarray, frozen)
    single = make_layout(MeshConfig(), jax.devices()[:1])
    one = Run(single, frozen)
    (loss, gradients), _ = one.gradients_and_head()
    losses = one.five_steps()
    found = {}
    for name, mesh in MESHES.items():
        run = Run(make_layout(mesh), frozen)
        rates = (run.train.learning_rate, run.train.temperature_learning_rate)
        shapes = shapes_laid_out(run.model, rates, run.layout)
        alike = jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y.sharding, y.ndim), shapes, run.state)
        (a, b), head = run.gradients_and_head()
        places, c = run.places(head), run.five_steps()
        found[name] = {"loss": abs(float(a) - float(loss)), "gradients": far(b, gradients), "steps": far(c, losses)}
        found[name]["pixels"] = far(pixel_figures(run.layout), pixel_figures(None))
        found[name] |= {"places": places, "mesh": dict(run.layout.mesh.shape), "ahead": all(jax.tree.leaves(alike))}
        taken, gathered = taken_and_gathered(make_layout(mesh))
        found[name]["taken"] = max(map(far, taken, gathered))
        found[name]["taken where"] = [specs(batch) for batch in taken] == [specs(batch) for batch in gathered]
    # 26 images, and the 13 of each half, are padded to whole rows on 8 devices, and not on one. Dropout draws by row
    # and by part: none here.
    plain = Run(single, frozen, dropout=0.0, images=26).five_steps()
    cases = {
        "accumulated": (single, {"accumulate": 13}),
        "padded, remat": (make_layout(MESHES["data"]), {"remat": True}),
        "padded, accumulated on a mesh": (make_layout(MESHES["mixed"]), {"accumulate": 2}),
    }
    for name, (layout, settings) in cases.items():
        steps = Run(layout, frozen, dropout=0.0, images=26, **settings).five_steps()
        found[name] = {"steps": far(steps, plain)}
    try:
        boxed = nn.LogicallyPartitioned(jax.ShapeDtypeStruct((2, 6), np.float32), ("embed", "heads"))
        make_layout(MESHES["tensor"]).shardings({"dense": {"kernel": boxed}})
    except ValueError as error:
        found["misfit"] = str(error)
    path.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

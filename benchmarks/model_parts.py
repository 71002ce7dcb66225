"""The model's parts against plain PyTorch: image tower, prompted text, query module, head, inference, training step.

Weights and images are random, as no figure here depends on them.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from benchmarks import cost, kernels, peers
from benchmarks.measure import Report, flops_of, in_turns
from iqe_jax.config import Config
from iqe_jax.detector import _predict as infer  # pyright: ignore[reportPrivateUsage]
from iqe_jax.features import kept_dtype
from iqe_jax.footprint import in_bytes
from iqe_jax.models.clip import attend_to_all
from iqe_jax.models.iqe_clip import Features, IqeClip, _exact_products  # pyright: ignore[reportPrivateUsage]
from iqe_jax.models.iqm import reads
from iqe_jax.models.layers import TOWER_OPTIONS, product
from iqe_jax.models.shared import Shared
from iqe_jax.sharding import Layout
from iqe_jax.train_state import Batch, create, step_program, step_settings

# On a CPU: a training step on kept features and inference against the tower's time, the tower against a product.
TOWER_SHARE, INFERENCE_SHARE, MATRIX_SHARE = 0.07, 1.05, 0.8
# On a GPU: the tower and inference against the peak rate, the step's images a second against the tower's.
TOWER_PEAK, INFERENCE_PEAK, STEP_RATE = 0.5, 0.45, 10
# Dense bfloat16 FLOP/s of NVIDIA's data sheets (H100 SXM, H200 SXM), by the names that the devices give themselves.
PEAKS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}
PEER_IMAGES = 128  # on a GPU, as PyTorch's textbook head keeps much more for the way back
ATTENTION, TEXT, QUERY_MODULE = "tower's attention, a block", "text, prompted", "query module (IQM)"
STEP = "training step, kept features"


def matrix_rate(report: Report, model: IqeClip, size: int, torch: Any, device: str) -> None:
    """The rate of one large matrix product, which fractions are of; and PyTorch's."""
    a = jax.random.normal(jax.random.key(0), (size, size), model.dtype)
    ours = jax.jit(lambda a: product(a, a), compiler_options=TOWER_OPTIONS)  # as the tower multiplies
    calls: dict[str, Callable[[], Any]] = {"ours": partial(ours, a)}
    if torch is not None:
        calls["PyTorch"] = peers.product(size, model.config.dtype, peers.device_name(device))
    for name, times in in_turns(calls, max(report.repeats, 3), report.turn, report.ahead).items():
        row = report.add("matrix product", f"{name}, {size} × {size}", times, flops=2.0 * size**3)
        if name == "ours":
            report.matrix_rate = 2.0 * size**3 / row.median


def batch_for_memory(model: IqeClip, device: Any, limit: int = 1024) -> int:
    """The largest power of two of images, up to `limit`, whose tower fits in 80 % of the memory that is free.

    On a GPU or TPU that is what the device says it has, on a CPU what the machine has free.
    """
    stats = device.memory_stats() or {}
    free = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
    if free <= 0:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    frozen, side = jax.eval_shape(lambda key: meta.unbox(model.init_frozen(key)), jax.random.key(0)), model.config
    tower = jax.jit(model.features, compiler_options=TOWER_OPTIONS)

    def needed(size: int) -> int:
        images = jax.ShapeDtypeStruct((size, side.image_size, side.image_size, 3), jnp.float32)
        memory: Any = tower.lower({"vision": frozen["vision"]}, images).compile().memory_analysis()
        return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes

    one, two = needed(1), needed(2)
    each = max(two - one, 1)
    fits = max(1, int((0.8 * free - one) // each))
    return min(limit, 2 ** (fits.bit_length() - 1))


@dataclass
class Parts:
    """The model with all it takes to run it, on `batch` images."""

    model: IqeClip
    config: Config
    layout: Layout
    batch: int
    device: str
    profile: bool = False

    def __post_init__(self) -> None:
        """Draw weights and images, and run the tower once for the features."""
        model, size, side = self.model, self.batch, self.model.config.image_size
        draw = np.random.default_rng(0)
        shapes = jax.eval_shape(lambda key: meta.unbox(model.init_frozen(key)), jax.random.key(0))
        self.frozen = jax.tree.map(
            lambda s: jax.device_put(0.02 * draw.standard_normal(s.shape, np.float32)), dict(shapes)
        )
        self.images = draw.random((size, side, side, 3), np.float32)
        self.on_device = jax.device_put(self.images)
        tower = jax.jit(model.features, compiler_options=TOWER_OPTIONS)
        self.tower = tower.lower({"vision": self.frozen["vision"]}, self.on_device).compile()
        self.features: Features = self.tower({"vision": self.frozen["vision"]}, self.on_device)
        self.masks = (draw.random((size, side, side)) > 0.9).astype(np.float32)
        self.labels = (np.arange(size) % 2).astype(np.float32)
        self.trainable = self.state().trainable

    def state(self) -> Any:
        """A fresh state; a step gives it up."""
        return create(self.model, self.config.train, self.frozen, self.layout)

    def kept(self) -> Batch:
        """The features as training keeps them, laid out."""
        tokens = np.asarray(self.features.patch_tokens, kept_dtype(self.config))
        image_features = np.asarray(self.features.image_features)
        batch = Batch(tokens, image_features, self.masks, self.labels, np.ones_like(self.labels))
        return batch.placed(self.layout, self.batch)

    def peer_batch(self) -> dict[str, np.ndarray]:
        """The same for peers.head, of as many images as PyTorch gets."""
        some, features = self.peer_images, self.features
        tokens = np.asarray(features.patch_tokens[:, :some], np.float32)
        image_features = np.asarray(features.image_features[:some])
        masks, labels = self.masks[:some], self.labels[:some]
        return {"patch_tokens": tokens, "image_features": image_features, "masks": masks, "labels": labels}

    @property
    def peer_images(self) -> int:
        """Images that PyTorch gets in a call."""
        return self.batch if self.device == "cpu" else min(self.batch, PEER_IMAGES)


def measure(parts: Parts, report: Report, torch: Any, wanted: set[str]) -> None:
    """Rows and targets of the sections among `wanted`; calls that are compared are taken in turns."""
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    flops: dict[tuple[str, str], float] = {}
    model, vision = parts.model, {"vision": parts.frozen["vision"]}
    # The tower is what the others are measured against.
    calls["tower", "ours"] = lambda: parts.tower(vision, parts.on_device)
    flops["tower", "ours"] = cost.tower(model, parts.batch)  # a compiler counts what is in a loop once
    if "attention" in wanted:
        _attention(parts, calls, flops)
    if "text" in wanted:
        _text(parts, calls, flops)
    if "iqm" in wanted:
        _query_module(parts, calls, flops)
    if "head" in wanted:
        head = jax.jit(lambda trainable, frozen, found: _segmented(model, trainable, frozen, found))
        arguments = (parts.trainable, {"text": parts.frozen["text"]}, parts.features)
        compiled = head.lower(*arguments).compile()
        calls["head", "ours"], flops["head", "ours"] = partial(compiled, *arguments), flops_of(compiled)
    if "inference" in wanted:
        found = infer.lower(model, parts.trainable, parts.frozen, parts.on_device, False).compile()
        calls["inference", "ours"] = partial(found, parts.trainable, parts.frozen, parts.on_device)
        flops["inference", "ours"] = flops["tower", "ours"] + cost.head(model, parts.batch)
    if "training" in wanted:
        _training(parts, calls, flops, report)
    if torch is not None:
        _peers(parts, calls, flops, wanted)
    order = list(dict.fromkeys(section for section, _ in calls))
    calls = dict(sorted(calls.items(), key=lambda call: order.index(call[0][0])))  # each beside its peer
    for (section, name), seconds in in_turns(calls, report.repeats, report.turn, report.ahead).items():
        images = parts.peer_images if name == "PyTorch" else parts.batch
        report.add(section, name, seconds, images=images, flops=flops.get((section, name)))
    report.facts["batch"] = parts.batch
    _targets(parts, report)
    if parts.profile:
        own = [(name, "ours") for name in ("tower", STEP)]
        report.facts["kernels"] = {key[0]: kernels.seconds(calls[key]) for key in own if key in calls}


def _segmented(model: IqeClip, trainable: Any, frozen: Any, found: Features) -> Any:
    prediction = model.predict(model.head(trainable, frozen, found))
    return prediction["segmentation"], prediction["score_few"]


def _attention(parts: Parts, calls: Any, flops: Any) -> None:
    """Attention of the image tower by itself, one block of it, beside what JAX has for the device."""
    clip, tokens, half = parts.model.clip, parts.model.grid**2 + 1, parts.model.dtype != jnp.float32
    shape = (3, parts.batch, tokens, clip.vision_heads, clip.vision_width // clip.vision_heads)
    arrays = jax.random.normal(jax.random.key(0), shape, parts.model.dtype)
    name, peer = ("cuDNN's", "cudnn") if parts.device == "gpu" and half else ("JAX's own", "xla")
    forms = {"ours": attend_to_all, name: partial(jax.nn.dot_product_attention, implementation=peer)}
    for form, attend in forms.items():
        calls[ATTENTION, form] = partial(jax.jit(attend, compiler_options=TOWER_OPTIONS), *arrays)
        flops[ATTENTION, form] = 4.0 * parts.batch * tokens**2 * clip.vision_width


def _text(parts: Parts, calls: Any, flops: Any) -> None:
    """Prompts and the prompted text tower, forward."""
    model = parts.model

    def text(trainable: Any, frozen: Any, found: Features) -> jax.Array:
        return model.head(trainable, frozen, found)["text_embeddings"]  # the compiler drops the rest

    arguments = (parts.trainable, {"text": parts.frozen["text"]}, parts.features)
    compiled = jax.jit(text).lower(*arguments).compile()
    calls[TEXT, "ours"], flops[TEXT, "ours"] = partial(compiled, *arguments), flops_of(compiled)


def _query_module(parts: Parts, calls: Any, flops: Any) -> None:
    """The query module by itself, forward, on the head's own dense features and text embeddings."""
    model, config = parts.model, parts.model.config
    head = jax.jit(model.head)(parts.trainable, {"text": parts.frozen["text"]}, parts.features)
    adapter = model._adapter()  # pyright: ignore[reportPrivateUsage]

    @_exact_products
    def queries(_: IqeClip, params: Any, query_tokens: jax.Array, dense_features: jax.Array, text: jax.Array) -> Any:
        patches = Shared(dense_features, reads(config.iqm_layers, config.iqm_heads))
        return adapter.apply({"params": params}, query_tokens, patches, text, method="queries")

    given = [head[name] for name in ("query_tokens", "dense_features", "text_embeddings")]
    calls[QUERY_MODULE, "ours"] = partial(jax.jit(queries, static_argnums=0), model, parts.trainable, *given)
    flops[QUERY_MODULE, "ours"] = cost.query_module(model, parts.batch)  # compilers see into no kernel of our own


def _peers(parts: Parts, calls: Any, flops: Any, wanted: set[str]) -> None:
    """The same in PyTorch; inference is its tower, then its head on what that found."""
    model, device, dtype = parts.model, peers.device_name(parts.device), parts.model.config.dtype
    if wanted & {"tower", "inference"}:
        calls["tower", "PyTorch"] = peers.tower(model, parts.images[: parts.peer_images], dtype, device)
        flops["tower", "PyTorch"] = cost.tower(model, parts.peer_images)
    if wanted & {"text", "iqm", "head", "inference", "training"}:
        head = peers.head(model, parts.peer_batch(), dtype, device)
        rows = {"text": TEXT, "iqm": QUERY_MODULE, "head": "head", "training": STEP}
        calls |= {(row, "PyTorch"): head[section] for section, row in rows.items() if section in wanted}
        if "inference" in wanted:
            calls["inference", "PyTorch"] = lambda: head["head"](calls["tower", "PyTorch"]())


def _training(parts: Parts, calls: Any, flops: Any, report: Report) -> None:
    """One Adam step on kept features, and the same with the tower before it."""
    model, train, layout = parts.model, parts.config.train, parts.layout
    settings, text = step_settings(model, train, 0.0, layout), {"text": parts.frozen["text"]}
    kept, holder = parts.kept(), {"state": parts.state()}
    with layout.active():
        lowered = step_program.lower(holder["state"], text, kept, **settings)
    start = time.perf_counter()
    compiled = lowered.compile()
    report.facts["seconds to compile the training step"] = time.perf_counter() - start

    def step(batch: Batch) -> Any:
        holder["state"], metrics = compiled(holder["state"], text, batch)
        return metrics

    def whole() -> Any:
        found = parts.tower({"vision": parts.frozen["vision"]}, parts.on_device)
        split = layout.batch_at(1), layout.batch
        tokens, image_features = jax.device_put((found.patch_tokens, found.image_features), split)
        return step(kept.replace(patch_tokens=tokens, image_features=image_features))  # pyright: ignore

    calls[STEP, "ours"], flops[STEP, "ours"] = partial(step, kept), flops_of(compiled)
    calls["training step, with the tower", "ours"] = whole
    flops["training step, with the tower", "ours"] = flops_of(compiled) + cost.tower(model, parts.batch)
    memory: Any = compiled.memory_analysis()
    report.facts["temporaries of the training step"] = in_bytes(memory.temp_size_in_bytes)


def _targets(parts: Parts, report: Report) -> None:
    tower, step = report.find("tower", "ours"), report.find(STEP, "ours")
    inference, peer = report.find("inference", "ours"), report.find("tower", "PyTorch")
    assert tower is not None and tower.flops is not None
    if peer is not None:
        each = (tower.median / parts.batch) / (peer.median / parts.peer_images)
        report.target("tower ÷ PyTorch's tower, an image", each, 1.0)
    peak = PEAKS.get(jax.devices()[0].device_kind) if parts.model.config.dtype == "bfloat16" else None
    rate, of = (peak, "peak") if peak else (report.matrix_rate, "matrix-product")
    gpu = parts.device == "gpu"
    if rate:
        least, share = TOWER_PEAK if gpu else MATRIX_SHARE, tower.flops / tower.median / rate
        report.target(f"tower, share of the {of} rate", share, least, at_least=True)
    if step is not None:
        if gpu:
            name = "training step on kept features, times the tower's images a second"
            report.target(name, tower.median / step.median, STEP_RATE, at_least=True)
        else:
            report.target("training step on kept features ÷ tower", step.median / tower.median, TOWER_SHARE)
        report.target("seconds to compile the training step", report.facts["seconds to compile the training step"], 60)
    if inference is not None:
        if gpu and rate and inference.flops:
            share = inference.flops / inference.median / rate
            report.target(f"inference, share of the {of} rate", share, INFERENCE_PEAK, at_least=True)
        else:
            report.target("inference ÷ tower", inference.median / tower.median, INFERENCE_SHARE)

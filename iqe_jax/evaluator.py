"""Scores a test set: images by every reduction of their maps, and all their pixels, in memory that does not grow.

The loop never waits for the batch it has just started: counts stay on the device, scores follow two batches later, and
maps come off it for the images asked for alone.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from iqe_jax import pixel_metrics
from iqe_jax.metrics import image_metrics
from iqe_jax.models.iqe_clip import IqeClip, Params
from iqe_jax.pixel_metrics import Histogram, PixelCounts
from iqe_jax.processes import in_turn
from iqe_jax.sharding import Layout
from iqe_jax.train_state import Batch

REDUCTIONS: tuple[str, ...] = ("official", "mean", "max", "top")
"""Image scores, in the order of `evaluation_step`'s rows: the official one, and the segmentation's mean, maximum and
mean of the highest hundredth."""

OnMaps = Callable[[int, Float[np.ndarray, "batch side side"]], object]
"""Is handed the number of a batch's first image and the segmentations of its images."""

AHEAD = 2  # batches that the host may be ahead of the device: enough to keep it busy, few enough to fit


@dataclass(frozen=True)
class Evaluation:
    """What a test set's images scored. `maps` has the segmentation (S, S) in [0, 1] of the images asked for.

    `scores` are those that the model's config asks for, `reductions` every kind of `REDUCTIONS`, by name. `pixels` are
    the counts behind the figures of pixels, where the set has masks.
    """

    metrics: dict[str, float]
    scores: Float[np.ndarray, " image"]
    labels: Float[np.ndarray, " image"]
    maps: dict[int, Float[np.ndarray, "side side"]]
    reductions: dict[str, Float[np.ndarray, " image"]] = field(default_factory=dict)
    pixels: Histogram | None = None


@partial(jax.jit, static_argnames=("model", "zero_shot", "layout"))
def evaluation_step(
    model: IqeClip, trainable: Params, frozen: Params, batch: Batch, zero_shot: bool, layout: Layout
) -> tuple[Float[Array, "6 batch"], Float[Array, "batch side side"]]:
    """Image scores by `REDUCTIONS`, labels and weights, on all devices; and segmentations, split as the batch is."""
    prediction = model.predict(model.head(trainable, frozen, batch.features()))
    official = prediction["score_zero" if zero_shot else "score_few"]
    scores = [official, *(prediction[f"score_{name}"] for name in REDUCTIONS[1:])]
    images = jnp.stack([*scores, jnp.asarray(batch.labels), jnp.asarray(batch.weight)])
    images = jax.lax.with_sharding_constraint(images, layout.replicated)
    return images, jax.lax.with_sharding_constraint(prediction["segmentation"], layout.batch)


@partial(jax.jit, static_argnames="layout")
def _one(segmentation: jax.Array, index: int, layout: Layout) -> Float[Array, "side side"]:
    return jax.lax.with_sharding_constraint(segmentation[index], layout.replicated)


def evaluate(
    model: IqeClip,
    trainable: Params,
    frozen: Params,
    batches: Iterable[Batch],
    *,
    zero_shot: bool,
    layout: Layout,
    keep_maps: Collection[int] = (),
    on_maps: OnMaps | None = None,
    check: Callable[[], object] = lambda: None,
) -> Evaluation:
    """Score all images of `batches`, which come in order, laid out, padded at the end; `check` is called before each.

    Every process gets the whole result. `on_maps` is called with every batch, on every process; nothing of it is held.

    Metrics: those of `metrics.image_metrics`, and where the set has masks those of `pixel_metrics.pixel_metrics`, AUPRO
    where batches have `regions`. Raises FloatingPointError when a score is not finite.
    """
    adapters = {"": trainable}
    settings = {"zero_shot": zero_shot, "layout": layout, "keep_maps": keep_maps, "on_maps": on_maps, "check": check}
    return evaluate_each(model, adapters, frozen, batches, **settings)[""]


def evaluate_each(
    model: IqeClip,
    adapters: Mapping[str, Params],
    frozen: Params,
    batches: Iterable[Batch],
    *,
    zero_shot: bool,
    layout: Layout,
    keep_maps: Collection[int] = (),
    on_maps: OnMaps | None = None,
    check: Callable[[], object] = lambda: None,
) -> dict[str, Evaluation]:
    """As `evaluate`, of several adapters by name, in one pass over the images. Maps are of the first alone."""
    scorers = {name: _Scorer(model, params, frozen, zero_shot, layout) for name, params in adapters.items()}
    wanted = {name: keep_maps if first == 0 else () for first, name in enumerate(scorers)}
    next(iter(scorers.values())).on_maps = on_maps
    for batch in batches:
        check()
        for name, scorer in scorers.items():
            scorer.add(batch, wanted[name])
    return {name: scorer.result() for name, scorer in scorers.items()}


class _Scorer:
    """One adapter's way through the batches."""

    def __init__(self, model: IqeClip, trainable: Params, frozen: Params, zero_shot: bool, layout: Layout):
        self._score = partial(evaluation_step, model, trainable, frozen, zero_shot=zero_shot, layout=layout)
        self._model, self._layout = model, layout
        self._counts: PixelCounts | None = None
        self._started: deque[tuple[jax.Array, dict[int, jax.Array], jax.Array | None]] = deque()
        self._images: list[Float[np.ndarray, "6 batch"]] = []
        self._maps: dict[int, np.ndarray] = {}
        self._first = 0  # number of the next batch's first image
        self._seen = 0  # pixels that each device has counted, padding too
        self.on_maps: OnMaps | None = None

    def add(self, batch: Batch, keep_maps: Collection[int]) -> None:
        """Start a batch, and fetch the scores of one that was started before."""
        layout = self._layout
        with layout.active():
            images, segmentation = in_turn(self._score(batch=batch))
            size = len(segmentation)
            places = {i: i - self._first for i in keep_maps if self._first <= i < self._first + size}
            maps = {i: in_turn(_one(segmentation, place, layout)) for i, place in places.items()}
        if batch.masks is not None:
            if self._counts is None:
                regions = batch.regions is not None
                counts = pixel_metrics.start(segmentation, batch.weight, regions=regions, split=layout.batch)
                self._counts = in_turn(counts)
            seen, self._seen = self._seen, self._seen + segmentation.size // layout.batch_shards
            if seen <= pixel_metrics.MOST < self._seen:
                self._counts = in_turn(pixel_metrics.widened(self._counts))
            counted = (segmentation, batch.masks, batch.weight, batch.regions)
            self._counts = pixel_metrics.count(self._counts, *counted, split=layout.batch)
        self._first += size
        self._started.append((images, maps, None if self.on_maps is None else segmentation))
        if len(self._started) > AHEAD:
            self._fetch()

    def _fetch(self) -> None:
        images, maps, segmentation = self._started.popleft()
        self._images.append(np.asarray(images))
        if self.on_maps is not None and segmentation is not None:
            before = sum(found.shape[1] for found in self._images[:-1])  # only the last batch is padded
            self.on_maps(before, np.asarray(self._layout.gather(segmentation))[self._images[-1][-1] > 0])
        self._maps |= {i: np.asarray(segmentation) for i, segmentation in maps.items()}

    def result(self) -> Evaluation:
        """All that was found, once every batch is in."""
        while self._started:
            self._fetch()
        rows = np.concatenate(self._images, 1)
        *scores, labels, _ = rows[:, rows[-1] > 0]
        for values in scores:
            if not np.isfinite(values).all():
                bad = int(np.flatnonzero(~np.isfinite(values))[0])
                raise FloatingPointError(
                    f"the score of image {bad} is {values[bad]}; the weights or the image are not usable"
                )
        reductions = dict(zip(REDUCTIONS, scores, strict=True))
        chosen = reductions[self._model.config.score]
        metrics = image_metrics(chosen, labels)
        pixels = None if self._counts is None else pixel_metrics.histogram(self._counts)
        if pixels is not None:
            metrics |= pixel_metrics.pixel_metrics(pixels)
        maps = {i: segmentation for i, segmentation in self._maps.items() if i < len(labels)}
        return Evaluation(metrics, chosen, labels, maps, reductions, pixels)

"""Scores a test set: image AUROC and pixel AUROC over all of it, with memory that does not grow with it."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from iqe_jax.metrics import image_auroc
from iqe_jax.models.iqe_clip import IqeClip, Params
from iqe_jax.pixel_metrics import auroc_from_histogram, pixel_histogram
from iqe_jax.sharding import Layout
from iqe_jax.train_state import Batch


@dataclass(frozen=True)
class Evaluation:
    """What a test set's images scored. `maps` has the segmentation (S, S) in [0, 1] of the images asked for."""

    metrics: dict[str, float]
    scores: Float[np.ndarray, " image"]
    labels: Float[np.ndarray, " image"]
    maps: dict[int, Float[np.ndarray, "side side"]]


@partial(jax.jit, static_argnames=("model", "zero_shot", "layout"))
def evaluation_step(
    model: IqeClip, trainable: Params, frozen: Params, batch: Batch, zero_shot: bool, layout: Layout
) -> tuple[Float[Array, "3 batch"], Float[Array, "batch side side"], Int[Array, "2 bins"] | None]:
    """Scores, labels and weights of the images, on all devices; their segmentations, split as the batch is; and the
    counts of pixel values where the batch has masks.
    """
    prediction = model.predict(model.head(trainable, frozen, batch.features()))
    scores = model.image_score(prediction, zero_shot=zero_shot)
    segmentation = prediction["segmentation"]
    counts = None if batch.masks is None else pixel_histogram(segmentation, batch.masks, batch.weight)
    images = jnp.stack([scores, jnp.asarray(batch.labels), jnp.asarray(batch.weight)])
    whole = jax.lax.with_sharding_constraint((images, counts), layout.replicated)
    return whole[0], jax.lax.with_sharding_constraint(segmentation, layout.batch), whole[1]


def evaluate(
    model: IqeClip,
    trainable: Params,
    frozen: Params,
    batches: Iterable[Batch],
    *,
    zero_shot: bool,
    layout: Layout,
    keep_maps: Collection[int] = (),
    on_maps: Callable[[int, Float[np.ndarray, "batch side side"]], object] | None = None,
    check: Callable[[], object] = lambda: None,
) -> Evaluation:
    """Score all images of `batches`, which come in order, laid out, padded at the end; `check` is called before each.

    Every process gets the whole result. `on_maps` is handed the number of a batch's first image and the segmentations
    of its images, on every process, and nothing of them is held.

    Metrics: `image_auroc`, and where the set has masks `pixel_auroc` with `pixel_auroc_error`, the most that counting
    into bins can have moved it. Raises FloatingPointError when a score is not finite.
    """
    scores, labels, maps = [], [], {}
    histogram, first = None, 0
    for batch in batches:
        check()
        with layout.active():
            images, segmentation, counts = evaluation_step(model, trainable, frozen, batch, zero_shot, layout)
        if counts is not None:
            counts = np.asarray(counts, np.int64)
            histogram = counts if histogram is None else histogram + counts
        batch_scores, batch_labels, weight = np.asarray(images)
        real = weight > 0
        wanted = [int(i) for i in np.flatnonzero(real) if first + i in keep_maps]
        if wanted or on_maps is not None:
            whole = layout.gather(segmentation)
            maps |= {first + i: whole[i].copy() for i in wanted}  # a copy, or the whole batch would be held
            if on_maps is not None:
                on_maps(first, whole[real])
        scores.append(batch_scores[real])
        labels.append(batch_labels[real])
        first += int(real.sum())
    all_scores, all_labels = np.concatenate(scores), np.concatenate(labels)
    if not np.isfinite(all_scores).all():
        bad = int(np.flatnonzero(~np.isfinite(all_scores))[0])
        raise FloatingPointError(
            f"the score of image {bad} is {all_scores[bad]}; the weights or the image are not usable"
        )
    metrics = {"image_auroc": image_auroc(all_scores, all_labels)}
    if histogram is not None:
        metrics["pixel_auroc"], metrics["pixel_auroc_error"] = auroc_from_histogram(histogram)
    return Evaluation(metrics, all_scores, all_labels, maps)

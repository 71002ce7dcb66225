"""Pixel AUROC. Pixels are counted into histograms, so the memory needed does not grow with the test set."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

PIXEL_BINS = 2**20


@partial(jax.jit, static_argnames="bins")
def pixel_histogram(
    maps: Float[Array, "batch side side"],
    masks: Float[Array, "batch side side"],
    weight: Float[Array, " batch"],
    bins: int = PIXEL_BINS,
) -> Int[Array, "2 bins"]:
    """How many normal (row 0) and anomalous (row 1, mask > 0.5) pixels fall in each of `bins` equal parts of [0, 1].

    Images of weight 0 are not counted.
    """
    place = jnp.clip((maps * bins).astype(jnp.int32), 0, bins - 1)
    row = (masks > 0.5).astype(jnp.int32)
    counted = jnp.broadcast_to(weight[:, None, None] > 0, maps.shape).astype(jnp.int32)
    return jnp.zeros((2, bins), jnp.int32).at[row, place].add(counted)


def auroc_from_histogram(histogram: Int[np.ndarray, "2 bins"]) -> tuple[float, float]:
    """AUROC from counts of normal (row 0) and anomalous (row 1) values per bin, and how far it can be off.

    Values in one bin count as ties. Had their order been known, each such pair could have counted 0 or 1 instead of
    1/2, so the true AUROC lies within half the share of pairs that fall together. NaN where only one class is there.
    """
    normal, anomalous = histogram.astype(np.float64)
    pairs = normal.sum() * anomalous.sum()
    if pairs == 0:
        return float("nan"), float("nan")
    below = np.cumsum(normal) - normal
    ties = float((anomalous * normal).sum())
    return float((anomalous * below).sum() + ties / 2) / pairs, ties / 2 / pairs

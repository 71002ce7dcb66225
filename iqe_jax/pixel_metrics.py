"""Metrics over all pixels of a test set (AUROC, AP, F1-max, AUPRO) in memory that does not grow with it.

Pixels are counted into about two million bins on the device; what ordering inside a bin could have changed is the error
bound that goes with every figure. `start` lays the bins, `count` adds a batch, `histogram` brings the counts to the
host, and `pixel_metrics` turns them into figures. docs/metrics.md defines the figures.
"""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Integer

AnyArray = jax.Array | np.ndarray

FPR_LIMIT = 0.3
"""False positive rate up to which AUPRO integrates."""

# [0, 1] in the order of float32's bit patterns, in cells of 2¹⁶ neighbouring values; the last one holds 1 alone. A cell
# has 2⁵ to 2¹⁶ bins; one with 2¹⁶ tells all values apart.
_CELLS = (0x3F800000 >> 16) + 1
_LEAST = 5
_UNIFORM = 19  # a cell has at least its share of 2¹⁹ bins spread evenly over [0, 1],
_FITTED = 20  # and of 2²⁰ spread as the first batch's pixels are
MOST = 2**32 - 1
"""Pixels that the counters of one device surely hold as `start` makes them: 74,000 images of 240 × 240."""
BINS = 2**19 + 2**_UNIFORM + 2**_FITTED


@struct.dataclass
class PixelCounts:
    """What has been counted, on the devices, each its own part of the images.

    `scale` says for each cell where its bins begin (times 16) and how many low bits of a value it does not tell apart.
    `seen` is the number of pixels, `pixels` are normal and anomalous ones, in uint32, which is a quarter faster than
    the int64 of `widened`, and `overlap` is the sum of 1/area of its region over each anomalous pixel, in float64.
    """

    scale: Int[Array, " cell"]
    seen: Int[Array, " part"]
    pixels: Integer[Array, "part 2 bin"]
    overlap: Float[Array, "part bin"] | None


class Histogram(NamedTuple):
    """Counts on the host, in rising order of value, of the bins that have any. `exact` bins hold one value only."""

    normal: Float[np.ndarray, " bin"]
    anomalous: Float[np.ndarray, " bin"]
    overlap: Float[np.ndarray, " bin"] | None
    exact: Bool[np.ndarray, " bin"]


# ---------------------------------------------------------------------------- counting


def start(
    maps: Float[AnyArray, "batch side side"],
    weight: Float[AnyArray, " batch"],
    *,
    regions: bool,
    split: NamedSharding | None = None,
) -> PixelCounts:
    """Empty counts, with more bins where the values of `maps`, the first batch, lie; it is not counted yet.

    `regions` says whether AUPRO is wanted. `split` is how batches lie over devices, None for a single one.
    """
    parts = 1 if split is None else _parts(split)
    with jax.enable_x64(True):
        whole = None if split is None else NamedSharding(split.mesh, PartitionSpec())
        scale = jax.jit(_fit, out_shardings=whole)(maps, weight)
        shapes = {"seen": ((parts,), np.int64), "pixels": ((parts, 2, BINS), np.uint32)}
        shapes["overlap"] = ((parts, BINS), np.float64)
        if not regions:
            del shapes["overlap"]
        empty = {name: jnp.zeros(*shape, device=split) for name, shape in shapes.items()}
    return PixelCounts(scale, empty["seen"], empty["pixels"], empty.get("overlap"))


def count(
    counts: PixelCounts,
    maps: Float[AnyArray, "batch side side"],
    masks: Float[AnyArray, "batch side side"],
    weight: Float[AnyArray, " batch"],
    regions: Float[AnyArray, "batch side side"] | None = None,
    *,
    split: NamedSharding | None = None,
) -> PixelCounts:
    """`counts`, which are given up, with the pixels of a batch added; those of images of weight 0 are not.

    Maps are in [0, 1], others are cut to it; masks are anomalous above 0.5; `regions` is 1/area of each anomalous
    pixel's region (data/transforms.py finds it), and needed where `start` was told so. Nothing is waited for, and no
    device hears of another's images.
    """
    with jax.enable_x64(True):
        return _count(counts, maps, masks, weight, None if counts.overlap is None else regions, split=split)


@partial(jax.jit, static_argnames="split", donate_argnums=0)
def _count(
    counts: PixelCounts, maps: jax.Array, masks: jax.Array, weight: jax.Array, regions: Any, split: Any
) -> PixelCounts:
    if split is None:
        return _add(counts, maps, masks, weight, regions)
    own = PartitionSpec(*split.spec)
    counted = PixelCounts(PartitionSpec(), own, own, own)  # pyright: ignore[reportArgumentType]
    return jax.shard_map(_add, mesh=split.mesh, in_specs=(counted, own, own, own, own), out_specs=counted)(
        counts, maps, masks, weight, regions
    )


def _add(counts: PixelCounts, maps: jax.Array, masks: jax.Array, weight: jax.Array, regions: Any) -> PixelCounts:
    def image(held: tuple[jax.Array, Any], given: Any) -> tuple[tuple[jax.Array, Any], None]:
        pixels, overlap = held
        values, mask, there, shares = given
        place, anomalous = _place(values.reshape(-1), counts.scale), mask.reshape(-1) > 0.5
        # One flat index: XLA's scatter is several times slower with more. Most pixels are normal, so that their bins by
        # themselves take half the cache that pairs of bins would.
        pixels = pixels.at[BINS * anomalous.astype(jnp.int32) + place].add(there.astype(pixels.dtype))
        if overlap is not None:
            shares = jnp.where(there & anomalous, shares.reshape(-1), 0).astype(jnp.float64)
            overlap = overlap.at[place].add(shares)
        return (pixels, overlap), None

    there = weight > 0
    flat = (counts.pixels.reshape(-1), None if counts.overlap is None else counts.overlap.reshape(-1))
    # Image by image, as places and shares of all at once would take more memory than the counts.
    (pixels, overlap), _ = jax.lax.scan(image, flat, (maps, masks, there, regions))
    seen = counts.seen + there.sum(dtype=jnp.int64) * math.prod(maps.shape[1:])
    overlap = None if counts.overlap is None else overlap.reshape(counts.overlap.shape)
    return PixelCounts(counts.scale, seen, pixels.reshape(counts.pixels.shape), overlap)


def widened(counts: PixelCounts) -> PixelCounts:
    """The same counts with room for any number of pixels, for when a device comes to see more than `MOST`."""
    with jax.enable_x64(True):
        return counts.replace(pixels=counts.pixels.astype(jnp.int64))  # pyright: ignore[reportAttributeAccessIssue]


def _bits(values: jax.Array) -> jax.Array:
    """Bit patterns of values cut to [0, 1], which are ordered as the values are; below 1.2e-38, and -0, is 0."""
    bits = jax.lax.bitcast_convert_type(jnp.clip(values.astype(jnp.float32), 0, 1), jnp.int32)
    return jnp.where(bits < 0x00800000, 0, bits)


def _place(values: jax.Array, scale: jax.Array) -> jax.Array:
    """The bin of each value."""
    bits = _bits(values)
    cell = scale[bits >> 16]
    return (cell >> 4) + ((bits & 0xFFFF) >> (cell & 15))


def _fit(maps: jax.Array, weight: jax.Array) -> jax.Array:
    """How many bins each cell gets, a power of two, from how many pixels of the first batch fall in it."""
    there = jnp.broadcast_to((weight > 0)[:, None, None], maps.shape)
    seen = jnp.zeros(_CELLS, jnp.int64).at[_bits(maps) >> 16].add(there.astype(jnp.int64))
    # In proportion to the pixels, and as fine as fits: many values in few cells are all told apart.
    zoom = _FITTED + jnp.arange(16)[:, None]
    fitted = 63 - jax.lax.clz((seen << zoom) // jnp.maximum(seen.sum(), 1))  # the whole part of log2, or -1
    fitted = jnp.minimum(fitted, 16)
    fits = jnp.where(fitted < 0, 0, 1 << jnp.maximum(fitted, 0)).sum(1) <= 2**_FITTED
    fitted = fitted[jnp.where(fits, jnp.arange(16), 0).max()]
    even = (jnp.arange(_CELLS) >> 7) - 134 + _UNIFORM  # cells of one exponent, 2⁷ of them, are equally wide
    bins = jnp.clip(jnp.maximum(fitted, even), _LEAST, None)
    sizes = 1 << bins
    return ((jnp.cumsum(sizes) - sizes) * 16 + 16 - bins).astype(jnp.int32)


def _parts(split: NamedSharding) -> int:
    """Into how many parts `split` cuts a batch."""
    axes = split.spec[0] if split.spec else None
    names = (axes,) if isinstance(axes, str) else axes or ()
    return int(np.prod([split.mesh.shape[name] for name in names], dtype=int))


# ---------------------------------------------------------------------------- figures


def histogram(counts: PixelCounts) -> Histogram:
    """The counts of all devices and processes, on the host of each. All processes have to call it.

    Raises ValueError when one device has seen more than `MOST` pixels and counts were not `widened` before.
    """
    if (most := int(_whole(counts.seen, "max"))) > MOST and counts.pixels.dtype == np.uint32:
        raise ValueError(f"{most} pixels were counted on one device; counters of 32 bits surely hold {MOST}")
    pixels, scale = _whole(counts.pixels), np.asarray(counts.scale)
    hidden = scale & 15
    exact = np.repeat(hidden == 0, 1 << (16 - hidden))
    exact[[0, scale[-1] >> 4]] = True  # 0 and 1, to which values saturate
    used = np.flatnonzero(pixels[0] | pixels[1])
    normal, anomalous = pixels[:, used].astype(np.float64)
    overlap = None if counts.overlap is None else _whole(counts.overlap)[used]
    return Histogram(normal, anomalous, overlap, exact[used])


def _whole(parts: jax.Array, how: str = "sum") -> np.ndarray:
    """The sum or the maximum over parts, wherever they lie."""
    if len(parts) == 1:
        return np.asarray(parts)[0]
    with jax.enable_x64(True):
        whole = NamedSharding(parts.sharding.mesh, PartitionSpec())  # pyright: ignore[reportAttributeAccessIssue]
        return np.asarray(_over_parts(parts, how, whole))


@partial(jax.jit, static_argnames=("how", "whole"))
def _over_parts(parts: jax.Array, how: str, whole: NamedSharding) -> jax.Array:
    over = parts.max(0) if how == "max" else parts.sum(0, dtype=jnp.promote_types(parts.dtype, jnp.int64))
    return jax.lax.with_sharding_constraint(over, whole)


def pixel_metrics(found: Histogram, names: Iterable[str] = ("auroc", "ap", "f1_max", "aupro")) -> dict[str, float]:
    """`pixel_NAME` of each metric and `pixel_NAME_error`, the most that the exact value can differ from it.

    All NaN where only one class is there; no AUPRO where regions were not counted.
    """
    compute = {"auroc": auroc, "ap": average_precision, "f1_max": f1_max, "aupro": aupro}
    result = {}
    for name in names:
        if name == "aupro" and found.overlap is None:
            continue
        one_class = not (found.normal.any() and found.anomalous.any())
        value, error = (float("nan"), float("nan")) if one_class else compute[name](found)
        result |= {f"pixel_{name}": value, f"pixel_{name}_error": error}
    return result


def auroc(found: Histogram) -> tuple[float, float]:
    """Area under the ROC curve, and its error bound.

    Values in one bin count as ties. Had their order been known, each such pair could have counted 0 or 1 instead of
    1/2, so the true AUROC lies within half the share of pairs that fall together, other than by being equal.
    """
    normal, anomalous = found.normal, found.anomalous
    pairs = normal.sum() * anomalous.sum()
    below = np.cumsum(normal) - normal
    ties = anomalous * normal
    return float(anomalous @ below + ties.sum() / 2) / pairs, float(ties[~found.exact].sum()) / 2 / pairs


def average_precision(found: Histogram) -> tuple[float, float]:
    """Average precision as scikit-learn defines it, and its error bound.

    Anomalous pixels of a bin are taken to lie evenly among its normal ones; the bound lets them all come before or all
    come after.
    """
    from scipy.special import digamma

    total = found.anomalous.sum()
    has = found.anomalous[::-1] > 0
    n, a = found.normal[::-1], found.anomalous[::-1]
    false, true = (np.cumsum(n) - n)[has], (np.cumsum(a) - a)[has]  # at higher values
    n, a, exact = n[has], a[has], found.exact[::-1][has]
    tied = a * (true + a) / (true + a + false + n)
    # Of a bin's a anomalous pixels the j-th has on average j·n/(a+1) normal ones before it: a sum of
    # (true + j) / (true + j + false + j·n/(a+1)) = (1 + (true - x) / (x + j)) / step, in closed form by digamma.
    step = 1 + n / (a + 1)
    x = (true + false) / step
    near = np.minimum(x, 64)
    harmonic = np.where(x < 64, digamma(near + a + 1) - digamma(near + 1), np.log1p(a / (x + 0.5)))
    value = np.where(exact, tied, (a + (true - x) * harmonic) / step)
    highest = a * (true + a) / (true + a + false)
    after = false + n
    lowest = a - after * np.log1p(a / np.maximum(true + after, 1e-300)) * (after > 0)
    best, worst = np.where(exact, tied, highest).sum(), np.where(exact, tied, lowest).sum()
    return float(value.sum() / total), float(max(best - value.sum(), value.sum() - worst, 0.0) / total)


def f1_max(found: Histogram) -> tuple[float, float]:
    """Highest F1 over the thresholds between bins, and by how much one inside a bin could have surpassed it."""
    normal, anomalous, exact = found.normal[::-1], found.anomalous[::-1], found.exact[::-1]
    false, true, total = np.cumsum(normal), np.cumsum(anomalous), anomalous.sum()
    value = (2 * true / (true + false + total)).max()
    inside = np.where(exact, 0, 2 * true / (true + false - normal + total)).max()  # all anomalous ones first
    return float(value), float(max(inside - value, 0.0))


def aupro(found: Histogram) -> tuple[float, float]:
    """Area under mean per-region overlap over false positive rates up to 0.3, in parts of 0.3, and its error bound.

    The curve runs straight between its points, as between equal values it must; inside a bin it may run anywhere in the
    rectangle that the bin's two ends span.
    """
    assert found.overlap is not None
    rate = np.concatenate([[0], np.cumsum(found.normal[::-1])]) / found.normal.sum()
    share = np.concatenate([[0], np.cumsum(found.overlap[::-1])]) / found.overlap.sum()
    inexact = ~found.exact[::-1]
    last = int(np.searchsorted(rate, FPR_LIMIT, side="right"))  # the bin in which the limit is passed
    step = (FPR_LIMIT - rate[last - 1]) / (rate[last] - rate[last - 1])
    rise = share[last] - share[last - 1]
    x = np.append(rate[:last], FPR_LIMIT)
    y = np.append(share[:last], share[last - 1] + step * rise)
    error = (np.diff(x[:-1]) * np.diff(y[:-1]))[inexact[: last - 1]].sum() / 2
    error += (x[-1] - x[-2]) * rise * inexact[last - 1]
    return float(np.trapezoid(y, x) / FPR_LIMIT), float(error / FPR_LIMIT)

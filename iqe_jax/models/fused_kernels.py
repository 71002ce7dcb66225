"""The kernels of fused_attention.py, in Pallas for Triton, which is imported where they are taken and nowhere else."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

# Tokens in a block, columns in a part of the width, warps, and blocks on their way: the quickest on an H200, and on an
# H100 those that only `kernel_all` and `kernel_gradient` have.
BLOCK, PART, WARPS, STAGES = 32, 256, 4, 2
BLOCK_ALL, WARPS_ALL, STAGES_ALL = 64, 4, 3
STAGES_GRADIENT = 3


def kernel(rows: jax.Array, tokens: jax.Array, scale: float, **settings) -> tuple[jax.Array, jax.Array]:
    """`fused_attention.attend` as one kernel; `settings` are `pallas_call`'s own."""
    shapes = [jax.ShapeDtypeStruct(rows.shape, tokens.dtype), jax.ShapeDtypeStruct(rows.shape[:-1], jnp.float32)]
    return _call(_forth, scale, shapes, rows, tokens, **settings)


def kernel_back(
    rows: jax.Array,
    tokens: jax.Array,
    gradient: jax.Array,
    total: jax.Array,
    mean: jax.Array,
    scale: float,
    **settings,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`fused_attention.attend_back` as one kernel; `settings` are `pallas_call`'s own."""
    weights = jax.ShapeDtypeStruct((*tokens.shape[:2], rows.shape[1]), tokens.dtype)
    shapes = [jax.ShapeDtypeStruct(rows.shape, rows.dtype), weights, weights]
    return _call(_back, scale, shapes, rows, tokens, gradient, total, mean, **settings)


def kernel_all(query: jax.Array, key: jax.Array, value: jax.Array, **settings) -> jax.Array:
    """`fused_attention.attend_all` as one kernel, a program for each block of queries of each head of each image."""
    batch, tokens, heads, dim = query.shape
    one = pl.BlockSpec((None, tokens, None, dim), lambda block, head, image: (image, 0, head, 0))
    return pl.pallas_call(
        partial(_all, scale=dim**-0.5),
        grid=(pl.cdiv(tokens, BLOCK_ALL), heads, batch),
        in_specs=[one] * 3,
        out_specs=one,
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        compiler_params=triton.CompilerParams(num_warps=WARPS_ALL, num_stages=STAGES_ALL),
        name="attention_to_all",
        **settings,
    )(query, key, value)


def kernel_gradient(
    tokens: jax.Array, bias: jax.Array, shares: jax.Array, *factors: jax.Array, **settings
) -> jax.Array:
    """`fused_attention.gradient` as one kernel, a program for each entry and part of the width.

    Rows are filled up to a power of two, of which tensor cores take no fewer than 16.
    """
    batch, _, dim = tokens.shape
    part = math.gcd(dim, PART)

    def filled(x: jax.Array, axis: int) -> jax.Array:
        more = max(16, pl.next_power_of_2(x.shape[axis])) - x.shape[axis]
        return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)])

    def columns(x: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, x.shape[1], part), lambda n, i: (n, 0, i))

    left, right = [filled(x, 2) for x in factors[::2]], [filled(x, 1) for x in factors[1::2]]
    return pl.pallas_call(
        _gradient,
        grid=(batch, dim // part),
        in_specs=[columns(tokens), columns(bias), _entry(shares), *map(_entry, left), *map(columns, right)],
        out_specs=columns(tokens),
        out_shape=jax.ShapeDtypeStruct(tokens.shape, tokens.dtype),
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=STAGES_GRADIENT),
        name="tokens_gradient",
        **settings,
    )(tokens, bias, shares, *left, *right)


def _all(query_ref, key_ref, value_ref, out_ref, *, scale: float) -> None:
    """As `_forth`, with a block of queries for the rows. Exponentials are powers of two, as the GPU has them."""
    tokens, dim = query_ref.shape

    def block(i) -> tuple[jax.Array, Any]:
        return i * BLOCK_ALL + jnp.arange(BLOCK_ALL) < tokens, pl.ds(i * BLOCK_ALL, BLOCK_ALL)

    def read(ref, there: jax.Array, place: Any) -> jax.Array:
        return triton.load(ref.at[place, :], mask=there[:, None], other=0.0)

    own = block(pl.program_id(0))
    query = read(query_ref, *own)

    def body(i, carry):
        highest, total, sums = carry
        there, place = block(i)
        key, value = read(key_ref, there, place), read(value_ref, there, place)
        logits = jnp.where(there[None], triton.dot(query, key.T) * (scale * math.log2(math.e)), -jnp.inf)
        higher = jnp.maximum(highest, logits.max(1))
        weights, shrink = jnp.exp2(logits - higher[:, None]), jnp.exp2(highest - higher)
        sums = sums * shrink[:, None] + triton.dot(weights.astype(value.dtype), value)
        return higher, total * shrink + weights.sum(1), sums

    low, zero = jnp.full((BLOCK_ALL,), -jnp.inf, jnp.float32), jnp.zeros((BLOCK_ALL,), jnp.float32)
    start = low, zero, jnp.zeros((BLOCK_ALL, dim), jnp.float32)
    _, total, sums = jax.lax.fori_loop(0, pl.cdiv(tokens, BLOCK_ALL), body, start)
    there, place = own
    triton.store(out_ref.at[place, :], (sums / total[:, None]).astype(out_ref.dtype), mask=there[:, None])


def _call(body, scale: float, shapes: list[jax.ShapeDtypeStruct], *arrays: jax.Array, **settings):
    """Run `body` on each entry of the arrays' first axis."""
    return pl.pallas_call(
        partial(body, scale=scale),
        grid=arrays[0].shape[:1],
        in_specs=[_entry(x) for x in arrays],
        out_specs=[_entry(x) for x in shapes],
        out_shape=shapes,
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        name="fused_attention",
        **settings,
    )(*arrays)


def _entry(x: jax.Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
    """One entry of the first axis, which the first axis of the grid counts."""
    return pl.BlockSpec((None, *x.shape[1:]), lambda n, *_: (n, *(0,) * (len(x.shape) - 1)))


def _columns(dim: int) -> list:
    """The width in parts whose sizes are powers of two, as Triton's arrays have to be."""
    part = math.gcd(dim, PART)
    return [pl.ds(start, part) for start in range(0, dim, part)]


def _block(tokens_ref, i: jax.Array, columns: list) -> tuple[jax.Array, list[jax.Array], tuple]:
    """Which tokens of block `i` there are, the tokens by parts of their width, and where they stand."""
    there, place = i * BLOCK + jnp.arange(BLOCK) < tokens_ref.shape[0], pl.ds(i * BLOCK, BLOCK)
    read = partial(triton.load, mask=there[:, None], other=0.0)
    return there, [read(tokens_ref.at[place, c]) for c in columns], (place, slice(None))


def _logits(rows: list[jax.Array], tokens: list[jax.Array]) -> jax.Array:
    return sum(triton.dot(r, x.T) for r, x in zip(rows, tokens, strict=True))  # [row, token]  # pyright: ignore


def _forth(rows_ref, tokens_ref, out_ref, total_ref, *, scale: float) -> None:
    """Running sums, made smaller whenever a higher logit turns up."""
    columns = _columns(rows_ref.shape[1])
    rows, count = [rows_ref[:, c] for c in columns], rows_ref.shape[0]

    def body(i, carry):
        highest, total, sums = carry
        there, tokens, _ = _block(tokens_ref, i, columns)
        logits = jnp.where(there[None], _logits(rows, tokens) * scale, -jnp.inf)
        higher = jnp.maximum(highest, logits.max(1))
        weights, shrink = jnp.exp(logits - higher[:, None]), jnp.exp(highest - higher)
        total = total * shrink + weights.sum(1)
        weights = weights.astype(tokens_ref.dtype)
        pairs = zip(sums, tokens, strict=True)
        return higher, total, tuple(a * shrink[:, None] + triton.dot(weights, x) for a, x in pairs)

    empty = tuple(jnp.zeros((count, c.size), jnp.float32) for c in columns)
    start = jnp.full((count,), -jnp.inf, jnp.float32), jnp.zeros((count,), jnp.float32), empty
    highest, total, sums = jax.lax.fori_loop(0, pl.cdiv(tokens_ref.shape[0], BLOCK), body, start)
    for c, a in zip(columns, sums, strict=True):
        out_ref[:, c] = (a / total[:, None]).astype(out_ref.dtype)
    total_ref[:] = highest + jnp.log(total)


def _back(
    rows_ref, tokens_ref, gradient_ref, total_ref, mean_ref, back_ref, weights_ref, logits_ref, *, scale: float
) -> None:
    """Weights are formed again; a row's gradient needs no second pass since `mean` is known."""
    columns = _columns(rows_ref.shape[1])
    rows, gradient = ([ref[:, c] for c in columns] for ref in (rows_ref, gradient_ref))
    total, mean, dtype = total_ref[:], mean_ref[:], weights_ref.dtype

    def body(i, sums):
        there, tokens, place = _block(tokens_ref, i, columns)
        weights = jnp.exp(jnp.where(there[None], _logits(rows, tokens) * scale, -jnp.inf) - total[:, None])
        logits = (weights * (_logits(gradient, tokens) - mean[:, None]) * scale).astype(dtype)
        for ref, value in ((weights_ref, weights.astype(dtype)), (logits_ref, logits)):
            triton.store(ref.at[place], value.T, mask=there[:, None])
        return tuple(a + triton.dot(logits, x) for a, x in zip(sums, tokens, strict=True))

    empty = tuple(jnp.zeros((rows_ref.shape[0], c.size), jnp.float32) for c in columns)
    sums = jax.lax.fori_loop(0, pl.cdiv(tokens_ref.shape[0], BLOCK), body, empty)
    for c, a in zip(columns, sums, strict=True):
        back_ref[:, c] = a.astype(back_ref.dtype)


def _gradient(tokens_ref, bias_ref, shares_ref, *refs) -> None:
    """Of a block of tokens those by their shares, and the products of its factors with the right ones, which stay."""
    *factors, out_ref = refs
    half = len(factors) // 2
    bias, right = bias_ref[...].astype(jnp.float32), [ref[...] for ref in factors[half:]]

    def body(i, _) -> None:
        there, (tokens,), place = _block(tokens_ref, i, [slice(None)])
        shares = triton.load(shares_ref.at[place[0]], mask=there, other=0.0)
        total = shares[:, None] * (tokens + bias)
        for ref, rows in zip(factors[:half], right, strict=True):
            total += triton.dot(triton.load(ref.at[place], mask=there[:, None], other=0.0), rows)
        triton.store(out_ref.at[place], total.astype(out_ref.dtype), mask=there[:, None])

    jax.lax.fori_loop(0, pl.cdiv(tokens_ref.shape[0], BLOCK), body, None)

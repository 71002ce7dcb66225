"""Softmax attention in one pass, for NVIDIA's Hopper GPUs: of a few rows to many tokens, and of all tokens to all.

Two products with a softmax between them read all tokens twice, forth and back, and with few rows that is what takes
their time. Here a block of tokens is read once for both; logits, weights and sums are float32, products have the
tokens' type. And what such products hand back for the tokens' gradient is summed up in one pass (see shared.py). The
kernels are in fused_kernels.py; all but attention of all to all is here in plain JAX as well.
"""

from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from itertools import chain

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from iqe_jax.models.layers import capability, precision, where_nvidia, whole


def fits(rows: jax.Array, tokens: jax.Array) -> bool:
    """Whether the kernels can be taken: bfloat16 on one Hopper GPU, and sizes that its registers hold."""
    *batch, count, dim = rows.shape
    known = all(isinstance(size, int) for size in (*batch, *tokens.shape))  # an exported program may not know its batch
    sizes = known and count in (16, 32) and dim % 128 == 0 and dim <= 1024
    return sizes and rows.dtype == tokens.dtype == jnp.bfloat16 and _one_hopper()


def fits_all(tokens: jax.Array) -> bool:
    """Whether `attend_all` can be taken, and is quicker than cuDNN's kernel: so it was found up to 362 tokens.

    That one works in blocks of 128 queries, of which three are needed for the 290 tokens of an image of 240 × 240.
    """
    batch, count, _, head_dim = tokens.shape
    sizes = isinstance(batch, int) and count <= 384 and head_dim in (32, 64)
    return sizes and tokens.dtype == jnp.bfloat16 and _one_hopper()


def _one_hopper() -> bool:
    """Whether there is one Hopper GPU, and Pallas for Triton, which JAX since 0.11 announces to remove."""
    return whole() and 9 <= capability() < 10 and find_spec("jax.experimental.pallas.triton") is not None


def attend(
    rows: Float[Array, "batch row dim"], tokens: Float[Array, "batch token dim"], scale: float
) -> tuple[Float[Array, "batch row dim"], Float[Array, "batch row"]]:
    """For each row the sum of the tokens by its weights, and the logarithm of the sum of its exponentials."""
    from iqe_jax.models import fused_kernels

    kernel = partial(fused_kernels.kernel, scale=scale)
    return where_nvidia(kernel, partial(plain, scale=scale), rows, tokens)


def attend_back(
    rows: Float[Array, "batch row dim"],
    tokens: Float[Array, "batch token dim"],
    gradient: Float[Array, "batch row dim"],
    total: Float[Array, "batch row"],
    mean: Float[Array, "batch row"],
    scale: float,
) -> tuple[Float[Array, "batch row dim"], Float[Array, "batch token row"], Float[Array, "batch token row"]]:
    """The gradient of the rows, the weights, and the gradient of the unscaled logits.

    `gradient` is that of the attended rows, `total` what `attend` gave with them, `mean` the product of the attended
    rows with their gradient.
    """
    from iqe_jax.models import fused_kernels

    kernel = partial(fused_kernels.kernel_back, scale=scale)
    return where_nvidia(kernel, partial(plain_back, scale=scale), rows, tokens, gradient, total, mean)


def attend_all(
    query: Float[Array, "batch tokens heads head_dim"],
    key: Float[Array, "batch tokens heads head_dim"],
    value: Float[Array, "batch tokens heads head_dim"],
) -> Float[Array, "batch tokens heads head_dim"]:
    """Attention of every token to every token of its image, forward only."""
    from iqe_jax.models import fused_kernels

    return fused_kernels.kernel_all(query, key, value)


def gradient(
    array: Float[Array, "*batch token dim"],
    bias: Float[Array, "*batch 1 dim"],
    shares: Float[Array, "*batch token"],
    factors: Sequence[tuple[Float[Array, "*batch token row"], Float[Array, "*batch row dim"]]],
) -> Float[Array, "*batch token dim"]:
    """The sum of the products of all factors, and of the tokens `array + bias` by their `shares`."""
    every = (array, bias, shares, *chain.from_iterable(factors))
    if not fits(factors[0][1], array):
        return plain_gradient(*every)
    from iqe_jax.models import fused_kernels

    def kernel(*arrays: jax.Array) -> jax.Array:
        flat = (x.reshape(-1, *x.shape[array.ndim - 2 :]) for x in arrays)
        return fused_kernels.kernel_gradient(*flat).reshape(array.shape)

    return where_nvidia(kernel, plain_gradient, *every)


def plain(rows: jax.Array, tokens: jax.Array, scale: float) -> tuple[jax.Array, jax.Array]:
    """`attend` in plain JAX."""
    logits = jnp.einsum("nld,nrd->nlr", tokens, rows, preferred_element_type=jnp.float32) * scale
    total = jax.nn.logsumexp(logits, 1)
    weights = jnp.exp(logits - total[:, None]).astype(tokens.dtype)
    return jnp.einsum("nlr,nld->nrd", weights, tokens), total


def plain_back(
    rows: jax.Array, tokens: jax.Array, gradient: jax.Array, total: jax.Array, mean: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`attend_back` in plain JAX."""
    product = partial(jnp.einsum, "nld,nrd->nlr", tokens, preferred_element_type=jnp.float32)
    weights = jnp.exp(product(rows) * scale - total[:, None])
    logits = (weights * (product(gradient) - mean[:, None]) * scale).astype(tokens.dtype)
    return jnp.einsum("nlr,nld->nrd", logits, tokens), weights.astype(tokens.dtype), logits


def plain_gradient(array: jax.Array, bias: jax.Array, shares: jax.Array, *factors: jax.Array) -> jax.Array:
    """`gradient` in plain JAX; the factors one after the other."""
    left, right = jnp.concatenate(factors[::2], -1), jnp.concatenate(factors[1::2], -2)
    if array.dtype != jnp.float32:  # tensor cores are fed in eights
        more, whole = (0, -left.shape[-1] % 8), ((0, 0),) * (left.ndim - 2)
        left, right = jnp.pad(left, (*whole, (0, 0), more)), jnp.pad(right, (*whole, more, (0, 0)))
    product = jnp.matmul(left, right, precision=precision(array))
    return product + (shares[..., None] * (array + bias)).astype(array.dtype)

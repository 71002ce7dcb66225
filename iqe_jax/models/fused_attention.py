"""Softmax attention in one pass, for NVIDIA's Hopper GPUs: of a few rows to many tokens, and of all tokens to all.

Two products with a softmax between them read all tokens twice, forth and back, and with few rows that is what takes
their time. Here a block of tokens is read once for both; logits, weights and sums are float32, products have the
tokens' type. The kernels are in fused_kernels.py; attention of a few rows is here in plain JAX as well.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from iqe_jax.models.layers import capability, where_nvidia, whole


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
    return whole() and 9 <= capability() < 10


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

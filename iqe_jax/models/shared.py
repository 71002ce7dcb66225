"""An array that many products read, whose gradient is formed by one product for all of them.

By itself, reverse mode forms a gradient of the array's size for each product and then adds them up. Here each product
hands back the two factors of its part, which are small where it has few rows, and they are multiplied at the end.
"""

from collections.abc import Sequence
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# The two factors of a product's part of the gradient: [..., token, row] and [..., row, dim].
Factors = tuple[jax.Array, jax.Array]


class Shared:
    """`array` for a known sequence of products with it; lives within one trace.

    Tokens come before rows, as on a CPU such products are quicker: XLA packs the right factor, and that is then
    the small one.

    Args:
        array: what is read.
        rows: how many rows each product has, in the order in which they are asked for.
    """

    def __init__(self, array: Float[Array, "*batch token dim"], rows: Sequence[int]) -> None:
        self.array, factors = cast(tuple[jax.Array, list[Factors]], _shared(array, tuple(rows)))
        self._factors = iter(factors)

    def dot(self, x: Float[Array, "*batch row dim"]) -> Float[Array, "*batch token row"]:
        """The product of each token with each row, in the type of `x`."""
        return _dot(x, self.array, next(self._factors))

    def mix(self, weights: Float[Array, "*batch token row"]) -> Float[Array, "*batch row dim"]:
        """For each row the sum of the tokens by its weights, in the type of `weights`."""
        return _mix(weights, self.array, next(self._factors))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _shared(array: jax.Array, rows: tuple[int, ...]) -> tuple[jax.Array, list[Factors]]:
    *batch, tokens, dim = array.shape
    empty = partial(jnp.zeros, dtype=array.dtype)
    return array, [(empty((*batch, tokens, row)), empty((*batch, row, dim))) for row in rows]


def _shared_forward(array: jax.Array, rows: tuple[int, ...]):
    return _shared(array, rows), None


def _shared_backward(rows: tuple[int, ...], _: None, gradients: tuple[jax.Array, list[Factors]]) -> tuple[jax.Array]:
    array, factors = gradients  # of other uses of the array, and what the products handed back
    left, right = zip(*factors, strict=True)
    return (array + jnp.concatenate(left, -1) @ jnp.concatenate(right, -2),)


_shared.defvjp(_shared_forward, _shared_backward)


@jax.custom_vjp
def _dot(x: jax.Array, array: jax.Array, factors: Factors) -> jax.Array:
    return jnp.einsum("...ld,...rd->...lr", array.astype(x.dtype), x)


def _dot_forward(x: jax.Array, array: jax.Array, factors: Factors):
    return _dot(x, array, factors), (x, array)


def _dot_backward(kept: tuple[jax.Array, jax.Array], gradient: jax.Array):
    x, array = kept
    factors = gradient.astype(array.dtype), x.astype(array.dtype)
    return _mix(gradient, array, factors), None, factors


_dot.defvjp(_dot_forward, _dot_backward)


@jax.custom_vjp
def _mix(weights: jax.Array, array: jax.Array, factors: Factors) -> jax.Array:
    return jnp.einsum("...lr,...ld->...rd", weights, array.astype(weights.dtype))


def _mix_forward(weights: jax.Array, array: jax.Array, factors: Factors):
    return _mix(weights, array, factors), (weights, array)


def _mix_backward(kept: tuple[jax.Array, jax.Array], gradient: jax.Array):
    weights, array = kept
    factors = weights.astype(array.dtype), gradient.astype(array.dtype)
    return _dot(gradient, array, factors), None, factors


_mix.defvjp(_mix_forward, _mix_backward)

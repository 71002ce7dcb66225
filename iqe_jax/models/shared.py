"""An array that many products read, whose gradient is formed by one product for all of them.

By itself, reverse mode forms a gradient of the array's size for each product and then adds them up. Here each product
hands back the two factors of its part, which are small where it has few rows, and they are multiplied at the end.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from iqe_jax.models import fused_attention

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

    def attend(
        self, rows: Float[Array, "*batch row dim"], scale: float, drop: Callable[[jax.Array], jax.Array] | None = None
    ) -> tuple[Float[Array, "*batch row dim"], Float[Array, "*batch row"]]:
        """Softmax attention of each row to all tokens; two products, first `dot`, then `mix`.

        Logits are multiplied by `scale`, and weights go through `drop` if given. Returns the attended rows, in the
        type of `rows`, and the sums of each one's weights, which dropping may move away from 1.
        """
        if drop is None and fused_attention.fits(rows, self.array):
            factors = next(self._factors), next(self._factors)
            attended = cast(jax.Array, _attend(scale, rows, self.array, *factors))
            return attended, jnp.ones(rows.shape[:-1], rows.dtype)
        weights = jax.nn.softmax(self.dot(rows).astype(jnp.float32) * scale, -2).astype(rows.dtype)
        weights = weights if drop is None else drop(weights)
        return self.mix(weights), weights.sum(-2)


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
    left, right = jnp.concatenate(left, -1), jnp.concatenate(right, -2)
    if array.dtype != jnp.float32:  # tensor cores are fed in eights
        more, whole = (0, -left.shape[-1] % 8), ((0, 0),) * (left.ndim - 2)
        left, right = jnp.pad(left, (*whole, (0, 0), more)), jnp.pad(right, (*whole, more, (0, 0)))
    return (array + jnp.matmul(left, right, precision=_precision(array)),)


def _precision(array: jax.Array) -> jax.lax.Precision | None:
    """Of products with `array`. By name, as the way back is traced where the model's default is no longer in force."""
    return jax.lax.Precision.HIGHEST if array.dtype == jnp.float32 else None


_shared.defvjp(_shared_forward, _shared_backward)


@jax.custom_vjp
def _dot(x: jax.Array, array: jax.Array, factors: Factors) -> jax.Array:
    return jnp.einsum("...ld,...rd->...lr", array.astype(x.dtype), x, precision=_precision(array))


def _dot_forward(x: jax.Array, array: jax.Array, factors: Factors):
    return _dot(x, array, factors), (x, array)


def _dot_backward(kept: tuple[jax.Array, jax.Array], gradient: jax.Array):
    x, array = kept
    factors = gradient.astype(array.dtype), x.astype(array.dtype)
    return _mix(gradient, array, factors), None, factors


_dot.defvjp(_dot_forward, _dot_backward)


@jax.custom_vjp
def _mix(weights: jax.Array, array: jax.Array, factors: Factors) -> jax.Array:
    return jnp.einsum("...lr,...ld->...rd", weights, array.astype(weights.dtype), precision=_precision(array))


def _mix_forward(weights: jax.Array, array: jax.Array, factors: Factors):
    return _mix(weights, array, factors), (weights, array)


def _mix_backward(kept: tuple[jax.Array, jax.Array], gradient: jax.Array):
    weights, array = kept
    factors = weights.astype(array.dtype), gradient.astype(array.dtype)
    return _dot(gradient, array, factors), None, factors


_mix.defvjp(_mix_forward, _mix_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale: float, rows: jax.Array, array: jax.Array, dot: Factors, mix: Factors) -> jax.Array:
    return _attend_forward(scale, rows, array, dot, mix)[0]


def _attend_forward(scale: float, rows: jax.Array, array: jax.Array, dot: Factors, mix: Factors):
    attended, total = fused_attention.attend(_flat(rows), _flat(array), scale)
    return attended.reshape(rows.shape), (rows, array, attended, total)


def _attend_backward(scale: float, kept: tuple[jax.Array, ...], gradient: jax.Array):
    rows, array, attended, total = kept
    flat = _flat(gradient)
    mean = (attended.astype(jnp.float32) * flat.astype(jnp.float32)).sum(-1)
    back, *left = fused_attention.attend_back(_flat(rows), _flat(array), flat, total, mean, scale)
    weights, logits = (x.reshape(*array.shape[:-1], -1) for x in left)
    return back.reshape(rows.shape), None, (logits, rows), (weights, gradient)


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(-1, *x.shape[-2:])


_attend.defvjp(_attend_forward, _attend_backward)

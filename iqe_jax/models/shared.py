"""Tokens that many products read, whose gradient is formed once for all of them.

By itself, reverse mode forms a gradient of the tokens' size for each product and then adds them up. Here each product
hands back the two factors of its part, which are small where it has few rows, and they are multiplied at the end.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from iqe_jax.models import fused_attention
from iqe_jax.models.layers import precision

# The two factors of a product's part of the gradient: [..., token, row] and [..., row, dim].
Factors = tuple[jax.Array, jax.Array]


class Shared:
    """Tokens, `array + bias`, for a known sequence of products with them; lives within one trace.

    The two are not added up before a product: softmax over the tokens cancels the bias, and a sum of tokens gets it
    once. Tokens come before rows, as on a CPU such products are quicker: XLA packs the right factor, and that is then
    the small one.

    Args:
        array: the tokens but for their bias.
        rows: how many rows each product has, in the order in which they are asked for.
        bias: what is added to each token; it broadcasts to [*batch, 1, dim].
    """

    def __init__(
        self, array: Float[Array, "*batch token dim"], rows: Sequence[int], bias: jax.Array | float = 0.0
    ) -> None:
        bias = jnp.broadcast_to(jnp.asarray(bias, array.dtype), (*array.shape[:-2], 1, array.shape[-1]))
        shared = _shared(array, bias, tuple(rows))
        self.array, factors, self._shares = cast(tuple[jax.Array, list[Factors], jax.Array], shared)
        self._bias, self._factors = bias, iter(factors)

    def tokens(self) -> Float[Array, "*batch token dim"]:
        """The tokens themselves, for other uses."""
        return self.array + self._bias

    def attend(
        self, rows: Float[Array, "*batch row dim"], scale: float, drop: Callable[[jax.Array], jax.Array] | None = None
    ) -> tuple[Float[Array, "*batch row dim"], Float[Array, "*batch row"]]:
        """Softmax attention of each row to all tokens, in two products.

        Logits are multiplied by `scale`, and weights go through `drop` if given. Returns the attended rows, in the
        type of `rows`, and the sums of each one's weights, which dropping may move away from 1.
        """
        dot, mix = next(self._factors), next(self._factors)
        if drop is None and fused_attention.fits(rows, self.array):
            attended = cast(jax.Array, _attend(scale, rows, self.array, dot, mix))
            return attended + self._bias, jnp.ones(rows.shape[:-1], rows.dtype)
        weights = jax.nn.softmax(_dot(rows, self.array, dot).astype(jnp.float32) * scale, -2).astype(rows.dtype)
        weights = weights if drop is None else drop(weights)
        total = weights.sum(-2)
        return _mix(weights, self.array, mix) + total[..., None] * self._bias, total

    def unit_dot(self, x: Float[Array, "*batch row dim"]) -> Float[Array, "*batch token row"]:
        """The product of each token, divided by its length, with each row, in the type of `x`.

        It is the product that is divided, so that unit tokens are never formed.
        """
        return _unit_dot(x, self.array, self._bias, next(self._factors), self._shares)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _shared(
    array: jax.Array, bias: jax.Array, rows: tuple[int, ...]
) -> tuple[jax.Array, list[Factors], Float[Array, "*batch token"]]:
    """The array, and what takes up the parts of its gradient: factors, and the share of each token itself."""
    *batch, tokens, dim = array.shape
    empty = partial(jnp.zeros, dtype=array.dtype)
    factors = [(empty((*batch, tokens, row)), empty((*batch, row, dim))) for row in rows]
    return array, factors, jnp.zeros((*batch, tokens))


def _shared_forward(array: jax.Array, bias: jax.Array, rows: tuple[int, ...]):
    return _shared(array, bias, rows), (array, bias)


def _shared_backward(rows: tuple[int, ...], kept: tuple[jax.Array, jax.Array], gradients):
    other, factors, shares = gradients
    return other + fused_attention.gradient(*kept, shares, factors), None


_shared.defvjp(_shared_forward, _shared_backward)


@jax.custom_vjp
def _dot(x: jax.Array, array: jax.Array, factors: Factors) -> jax.Array:
    return jnp.einsum("...ld,...rd->...lr", array.astype(x.dtype), x, precision=precision(array))


def _dot_forward(x: jax.Array, array: jax.Array, factors: Factors):
    return _dot(x, array, factors), (x, array)


def _dot_backward(kept: tuple[jax.Array, jax.Array], gradient: jax.Array):
    x, array = kept
    factors = gradient.astype(array.dtype), x.astype(array.dtype)
    return _mix(gradient, array, factors), None, factors


_dot.defvjp(_dot_forward, _dot_backward)


@jax.custom_vjp
def _mix(weights: jax.Array, array: jax.Array, factors: Factors) -> jax.Array:
    return jnp.einsum("...lr,...ld->...rd", weights, array.astype(weights.dtype), precision=precision(array))


def _mix_forward(weights: jax.Array, array: jax.Array, factors: Factors):
    return _mix(weights, array, factors), (weights, array)


def _mix_backward(kept: tuple[jax.Array, jax.Array], gradient: jax.Array):
    weights, array = kept
    factors = weights.astype(array.dtype), gradient.astype(array.dtype)
    return _dot(gradient, array, factors), None, factors


_mix.defvjp(_mix_forward, _mix_backward)


@jax.custom_vjp
def _unit_dot(x: jax.Array, array: jax.Array, bias: jax.Array, factors: Factors, shares: jax.Array) -> jax.Array:
    return _unit_dot_forward(x, array, bias, factors, shares)[0]


def _unit_dot_forward(x: jax.Array, array: jax.Array, bias: jax.Array, factors: Factors, shares: jax.Array):
    length = jnp.linalg.norm((array + bias).astype(jnp.float32), axis=-1, keepdims=True)
    found = (_dot(x, array, factors) + (x * bias).sum(-1)[..., None, :]) / length
    return found, (x, array, bias, length, found)


def _unit_dot_backward(kept: tuple[jax.Array, ...], gradient: jax.Array):
    """By its length a token has a share of itself in its gradient; one more row adds up the tokens by their shares."""
    x, array, bias, length, found = kept
    gradient = gradient / length
    shares = -(gradient * found).sum(-1, keepdims=True) / length  # [..., token, 1]
    mixed = _mix(jnp.concatenate([gradient, shares], -1), array, (gradient, x))
    each, total = gradient.sum(-2)[..., None], shares.sum(-2)[..., None]
    of_bias = mixed[..., -1:, :] + total * bias + (each * x).sum(-2, keepdims=True)
    factors = gradient.astype(array.dtype), x.astype(array.dtype)
    return mixed[..., :-1, :] + each * bias, None, of_bias.astype(bias.dtype), factors, shares[..., 0]


_unit_dot.defvjp(_unit_dot_forward, _unit_dot_backward)


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

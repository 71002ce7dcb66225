"""The instance-aware query module: two query tokens that read patch features and text embeddings of their image.

A BERT-style post-norm decoder shared by all feature levels, run on all of them in one call. Its attention to the
patches is folded: the key projection is applied to the queries and the value projection after the weighted sum, so
that keys and values of the many patches are never formed. The patches are `Shared`, since every layer reads them twice.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from iqe_jax.models.layers import (
    ACTIVATIONS,
    Einsum,
    LayerNorm,
    dense,
    few_attended,
    few_logits,
    linear,
    parameter,
    split,
)
from iqe_jax.models.shared import Shared

BERT_EPS = 1e-12


class QueryAttention(nn.Module):
    """Multi-head attention of a few queries to a context, with output projection, residual and norm.

    A `Shared` context is read as it is, by folded projections. Of any other, keys and values are formed, which is
    cheaper where it is as short as the queries. That is the order of the products, never the result.
    """

    dim: int
    heads: int
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch query dim"], context: Float[Array, "*#batch token dim"] | Shared
    ) -> Float[Array, "*batch query dim"]:
        """Attend from `x` to `context` and add; leading axes broadcast. Dropout acts where a 'dropout' rng is given.

        A `Shared` context has the leading axes of `x`, and two products of query × heads rows read it.
        """
        head_dim = self.dim // self.heads
        shape, axes = (self.dim, self.heads, head_dim), ("embed", "heads", "head_dim")

        def projection(name: str) -> Projection:
            return Projection(shape, axes, self.dtype, name=name)

        query = projection("query")(x)  # [..., query, heads, head_dim]
        key, value = projection("key"), projection("value")
        drop = partial(_dropout, self, rate=self.dropout) if _drops(self, self.dropout) else None
        if isinstance(context, Shared):
            # The key bias adds the same to every logit of a query, so the softmax cancels it.
            rows = jnp.einsum("...qhe,dhe->...qhd", query, key.kernel())
            lead = rows.shape[:-1]  # [..., query, heads]
            pooled, total = context.attend(rows.reshape(*x.shape[:-2], -1, self.dim), head_dim**-0.5, drop)
            # Dropout leaves weights that do not add up to 1, so the bias counts as often as they do.
            bias = total.reshape(*lead, 1) * value.bias()
            attended = jnp.einsum("...qhd,dhe->...qhe", pooled.reshape(*lead, -1), value.kernel()) + bias
        else:
            logits = few_logits(query, key(context))  # [..., token, query, heads]
            weights = jax.nn.softmax(logits * head_dim**-0.5, -3).astype(self.dtype)
            attended = few_attended(weights if drop is None else drop(weights), value(context))
        out = Einsum(
            "...he,hew->...w", (self.heads, head_dim, self.dim), (*axes[1:], axes[0]), dtype=self.dtype, name="out"
        )(attended)
        return LayerNorm(BERT_EPS, self.dtype, name="norm")(x + _dropout(self, out, self.dropout))


def reads(layers: int, heads: int) -> tuple[int, ...]:
    """Rows of each product of an `Iqm` with the patches: in each layer one to weigh them and one to add them up."""
    return (2 * heads,) * (2 * layers)


class Projection(nn.Module):
    """A linear map to heads whose kernel and bias can also be had by themselves, for folding."""

    shape: tuple[int, int, int]
    axes: tuple[str, str, str]
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Declare kernel [dim, heads, head_dim] and bias [heads, head_dim]."""
        init = nn.initializers.normal(0.02)
        self._kernel = parameter(self, "kernel", init, self.shape, self.axes)
        self._bias = parameter(self, "bias", nn.initializers.zeros, self.shape[1:], self.axes[1:])

    def kernel(self) -> Float[Array, "dim heads head_dim"]:
        """The kernel in the compute type."""
        return self._kernel.astype(self.dtype)

    def bias(self) -> Float[Array, "heads head_dim"]:
        """The bias in the compute type."""
        return self._bias.astype(self.dtype)

    def __call__(self, x: Float[Array, "... dim"]) -> Float[Array, "... heads head_dim"]:
        """Project."""
        return linear("...d,dhe->...he", x.astype(self.dtype), self.kernel(), self.bias())


class Iqm(nn.Module):
    """The decoder: LayerNorm on the query tokens, then `layers` × (self, patch and text attention, MLP).

    Args:
        dim: joint embedding width D.
        layers, heads, mlp_width: depth, attention heads and MLP width; full size 4, 8, 3072.
        dropout: rate on attention weights and on each projection's output, where a 'dropout' rng is given.
    """

    dim: int
    layers: int
    heads: int
    mlp_width: int
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        query_tokens: Float[Array, "batch 2 dim"],
        dense_features: Shared,
        text_embeddings: Float[Array, "batch 2 dim"],
    ) -> Float[Array, "level batch 2 dim"]:
        """Query features for every level: row 0 stands for normal, row 1 for anomalous.

        `dense_features`, [level, batch, patch, dim], are shared for products as `reads` has them.
        """
        x = LayerNorm(BERT_EPS, self.dtype, name="layernorm")(query_tokens)
        # Levels could be one until the first layer reads their patches. But broadcast only there, rows are multiplied
        # wrong by jaxlib 0.10.2 on CPUs in larger batches.
        x = jnp.broadcast_to(x, (dense_features.array.shape[0], *x.shape))  # [level, batch, query, dim]
        x = _dropout(self, x, self.dropout)
        for i in range(self.layers):
            layer = IqmLayer(self.dim, self.heads, self.mlp_width, self.dropout, self.dtype, name=f"layer_{i}")
            x = split(layer(x, dense_features, text_embeddings), None, "batch", None, None)
        return x


class IqmLayer(nn.Module):
    """One decoder layer, every step being LayerNorm(x + dropout(step(x)))."""

    dim: int
    heads: int
    mlp_width: int
    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "level batch 2 dim"],
        dense_features: Shared,
        text_embeddings: Float[Array, "batch 2 dim"],
    ) -> Float[Array, "level batch 2 dim"]:
        """Self-attention among the queries, then to the patches, then to the text, then the MLP."""

        def attention(name: str) -> QueryAttention:
            return QueryAttention(self.dim, self.heads, self.dropout, self.dtype, name=name)

        x = attention("attention")(x, x)
        x = attention("crossattention")(x, dense_features)
        x = attention("text_crossattention")(x, text_embeddings)
        init = nn.initializers.normal(0.02)
        hidden = dense(
            self.dim, self.mlp_width, ("embed", "mlp"), name="intermediate_query", dtype=self.dtype, kernel_init=init
        )(x)
        out = dense(
            self.mlp_width, self.dim, ("mlp", "embed"), name="output_query", dtype=self.dtype, kernel_init=init
        )(ACTIVATIONS["gelu"](hidden))
        return LayerNorm(BERT_EPS, self.dtype, name="output_norm")(x + _dropout(self, out, self.dropout))


def _drops(module: nn.Module, rate: float) -> bool:
    return rate > 0 and module.has_rng("dropout")


def _dropout(module: nn.Module, x: Float[Array, "level batch ..."], rate: float) -> Float[Array, "level batch ..."]:
    """Drop entries of `x` at `rate` where the caller gave a 'dropout' rng, else return it as it is.

    Drawn image by image, so that those which only fill up a batch change nothing for the others.
    """
    if not _drops(module, rate):
        return x
    levels, images, *rest = x.shape
    keep = jax.random.bernoulli(module.make_rng("dropout"), 1 - rate, (images, levels, *rest)).swapaxes(0, 1)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)

"""The prompt tokens: class-based ones read off the image, learnable ones for the text tower, and the query tokens.

Makes tokens only; the text tower (clip.py) and the query module (iqm.py) consume them.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float

from iqe_jax.models.layers import LayerNorm, dense, fan_in_normal, parameter


@struct.dataclass
class Prompts:
    """What the prompt module makes for one batch."""

    class_tokens: Float[Array, "batch class dim"]
    query_tokens: Float[Array, "batch 2 dim"]
    learnable: Float[Array, "depth tokens dim"]


class ChannelConv(nn.Module):
    """A 1-D convolution from one channel to `channels`, width 3, same padding, run along the last axis."""

    channels: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch dim"]) -> Float[Array, "batch channels dim"]:
        """Cross-correlate each row with each channel's three taps."""
        kernel = parameter(
            self,
            "kernel",
            nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
            (3, 1, self.channels),
            (None,) * 3,
        )
        bias = parameter(self, "bias", nn.initializers.zeros, (self.channels,), (None,))
        padded = jnp.pad(x, ((0, 0), (1, 1)))
        windows = jnp.stack([padded[:, i : i + x.shape[1]] for i in range(3)], 1)  # [batch, tap, dim]
        return jnp.einsum("btd,tc->bcd", windows, kernel[:, 0]) + bias[:, None]


class PromptTokens(nn.Module):
    """All prompt parameters; `__call__` makes the tokens, `norm` is applied to the text tower's output.

    Args:
        dim: joint embedding width D, also the text tower's.
        prompt_len: class-based tokens P.
        learnable_tokens: learnable text tokens N per layer.
        depth: text layers that get learnable tokens of their own, 1 … number of text layers.
        use_global: whether the image's embedding enters class and query tokens.
    """

    dim: int
    prompt_len: int
    learnable_tokens: int
    depth: int
    use_global: bool

    def setup(self) -> None:
        """Declare the parameters; names and shapes follow the official checkpoint."""
        dim = self.dim

        def token(name: str, shape: tuple[int, ...]) -> jax.Array:
            return parameter(self, name, nn.initializers.normal(0.02), shape, (None, None, "embed"))

        self.prompt_query = token("prompt_query", (1, self.prompt_len, dim))
        self.query_tokens = token("query_tokens", (1, 2, dim))
        self.class_conv = ChannelConv(self.prompt_len)
        self.query_conv = ChannelConv(2)
        self.prompt_embeddings = token("prompt_embeddings", (1, self.learnable_tokens, dim))
        self.deep_prompt_embeddings = token("deep_prompt_embeddings", (self.depth - 1, self.learnable_tokens, dim))
        self.prompt_proj = dense(dim, dim, (None, "embed"))
        self.prompt_norm = LayerNorm(eps=1e-6)
        # No output depends on it. The official checkpoints hold it, and ours must turn into theirs exactly.
        self.prompt_text_projection = parameter(
            self, "prompt_text_projection", fan_in_normal, (dim, dim), (None, "embed")
        )

    def __call__(self, image_features: Float[Array, "batch dim"]) -> Prompts:
        """Class, query and learnable tokens for a batch of image embeddings (not normalised)."""
        image_features = image_features.astype(jnp.float32)
        class_tokens = jnp.broadcast_to(self.prompt_query, (image_features.shape[0], *self.prompt_query.shape[1:]))
        query_tokens = jnp.broadcast_to(self.query_tokens, (image_features.shape[0], 2, self.dim))
        # Run even when unused, so that the parameters exist under either setting and checkpoints stay exchangeable.
        class_offset, query_offset = self.class_conv(image_features), self.query_conv(image_features)
        if self.use_global:
            class_tokens, query_tokens = class_tokens + class_offset, query_tokens + query_offset
        learnable = jnp.concatenate([self.prompt_embeddings, self.deep_prompt_embeddings])
        return Prompts(class_tokens, query_tokens, self.prompt_proj(learnable))

    def norm(self, x: Float[Array, "... dim"]) -> Float[Array, "... dim"]:
        """The trained LayerNorm between the text tower's last block and its own final norm."""
        return self.prompt_norm(x)

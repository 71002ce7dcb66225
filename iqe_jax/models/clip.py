"""CLIP's two towers as the method uses them: patch tokens tapped at several depths, and a text tower with prompts.

The text tower runs what all images share once and then only the class tokens of each image against its keys and
values. What the prompts are made of is the business of prompts.py; weights come from `convert`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from iqe_jax.models import fused_attention
from iqe_jax.models.layers import (
    Attend,
    Block,
    LayerNorm,
    capability,
    dense,
    few_attended,
    few_logits,
    parameter,
    split,
    whole,
)

# The statistics CLIP was trained with; the published IQE-CLIP numbers were made without them.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ClipConfig:
    """Sizes of a CLIP ViT. `image_size` is the native one, in pixels; the text tower is `embed_dim` wide."""

    image_size: int
    patch_size: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    embed_dim: int
    text_layers: int
    text_heads: int
    context_length: int
    vocab_size: int

    @property
    def grid(self) -> int:
        """Patches along a side at the native size."""
        return self.image_size // self.patch_size


class VisionTower(nn.Module):
    """The image tower: patch tokens after chosen blocks, and the image's embedding."""

    config: ClipConfig
    levels: Sequence[int]
    activation: str = "gelu"
    normalisation: str = "none"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch side side 3"]
    ) -> tuple[Float[Array, "level batch patch width"], Float[Array, "batch dim"]]:
        """Encode images in [0, 1]; `side` may be any number of pixels from one patch up.

        Returns the outputs of blocks `levels` (counted from 1) without the class token, and the projected class token.
        """
        config, patch, width = self.config, self.config.patch_size, self.config.vision_width
        grid = images.shape[1] // patch
        images = images.astype(jnp.float32)
        if self.normalisation == "clip":
            images = (images - jnp.array(CLIP_MEAN)) / jnp.array(CLIP_STD)

        x = PatchEmbedding(patch, width, self.dtype, name="patch_embedding")(images)  # [batch, patch, width]
        class_token = parameter(self, "class_embedding", nn.initializers.normal(0.02), (width,), ("embed",))
        class_token = jnp.broadcast_to(class_token.astype(self.dtype), (x.shape[0], 1, width))
        positions = parameter(
            self, "position_embedding", nn.initializers.normal(0.02), (config.grid**2 + 1, width), (None, "embed")
        )
        x = jnp.concatenate([class_token, x], 1) + resize_positions(positions, grid).astype(self.dtype)
        x = split(LayerNorm(dtype=self.dtype, name="ln_pre")(x), "batch", None, None)

        taps = {}
        for i in range(config.vision_layers):
            block = Block(width, config.vision_heads, self.activation, self.dtype, name=f"block_{i}")
            x = split(block(x, attend_to_all)[0], "batch", None, None)
            taps[i + 1] = x[:, 1:]
        class_token = LayerNorm(dtype=self.dtype, name="ln_post")(x[:, 0])
        features = dense(width, config.embed_dim, ("embed", None), name="proj", bias=False, dtype=self.dtype)
        return jnp.stack([taps[level] for level in self.levels]), features(class_token)


def attend_to_all(
    query: Float[Array, "batch tokens heads head_dim"],
    key: Float[Array, "batch tokens heads head_dim"],
    value: Float[Array, "batch tokens heads head_dim"],
) -> Float[Array, "batch tokens heads head_dim"]:
    """Attention of every token to every token, in the form that is quick where the program will run.

    One CPU takes image after image, so that logits stay in its cache. An NVIDIA GPU takes a fused kernel in half
    precision: ours where it is the quicker one, else cuDNN's. All else, and several CPU devices, take JAX's own.
    """
    forms: dict[str, Attend] = {}
    known = isinstance(query.shape[0], int)  # an exported program may not know its batch
    if known and whole():
        forms["cpu"] = _image_by_image
    if fused_attention.fits_all(query):
        forms["cuda"] = fused_attention.attend_all
    elif known and query.dtype != jnp.float32 and capability() >= 8.0:
        forms["cuda"] = partial(jax.nn.dot_product_attention, implementation="cudnn")
    return jax.lax.platform_dependent(query, key, value, **forms, default=jax.nn.dot_product_attention)


def _image_by_image(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    def image(_: None, arrays: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        q, k, v = (jnp.swapaxes(x, 0, 1) for x in arrays)  # [heads, tokens, head_dim]
        logits = jnp.einsum("hqe,hke->hqk", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
        weights = jnp.exp(logits - logits.max(-1, keepdims=True))
        attended = jnp.einsum("hqk,hke->hqe", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        attended = attended / weights.sum(-1, keepdims=True)  # here, since there are fewer of these than weights
        return None, jnp.swapaxes(attended.astype(v.dtype), 0, 1)

    # XLA works off the images of a loop one by one, and those of one turn of it side by side. With small images that
    # saves less than it takes to compile.
    large = query.shape[2] * query.shape[1] ** 2 >= 2**18
    return jax.lax.scan(image, None, (query, key, value), unroll=8 if large else 1)[1]


class PatchEmbedding(nn.Module):
    """The patch convolution (stride = patch size, no bias) as one matrix product; a partial last patch is dropped."""

    patch: int
    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "batch side side 3"]) -> Float[Array, "batch patch width"]:
        """Cut the images into patches, row by row, and embed each."""
        patch, width = self.patch, self.width
        kernel = parameter(
            self, "kernel", nn.initializers.normal(0.02), (patch, patch, 3, width), (None, None, None, "embed")
        )
        batch, grid = images.shape[0], images.shape[1] // patch
        x = images[:, : grid * patch, : grid * patch].astype(self.dtype)
        x = x.reshape(batch, grid, patch, grid, patch, 3).swapaxes(2, 3)  # [batch, row, column, patch, patch, 3]
        x = x.reshape(batch, grid * grid, -1)
        return x @ kernel.reshape(-1, width).astype(self.dtype)


def resize_positions(table: Float[Array, "tokens width"], grid: int) -> Float[Array, "new_tokens width"]:
    """Resize a position table, class token first, to grid×grid patches: bicubic, antialiased, half-pixel centres."""
    native = round((table.shape[0] - 1) ** 0.5)
    if grid == native:
        return table
    patches = table[1:].reshape(native, native, -1)
    patches = jax.image.resize(patches, (grid, grid, patches.shape[-1]), "cubic", antialias=True)
    return jnp.concatenate([table[:1], patches.reshape(grid * grid, -1)])


@dataclass(frozen=True)
class Templates:
    """Token ids of the prompt templates: start token first, end token left out, lengths free to differ."""

    ids: tuple[tuple[int, ...], ...]
    end: int

    @property
    def common(self) -> int:
        """How many tokens all templates start with."""
        columns = enumerate(zip(*self.ids, strict=False))
        return next((i for i, ids in columns if len(set(ids)) > 1), min(map(len, self.ids)))

    def padded(self) -> tuple[Int[np.ndarray, "template tokens"], Int[np.ndarray, " template"]]:
        """The ids right-padded with 0 to one length, and their lengths."""
        lengths = np.array([len(ids) for ids in self.ids])
        table = np.zeros((len(self.ids), lengths.max()), np.int32)
        for row, ids in zip(table, self.ids, strict=True):
            row[: len(ids)] = ids
        return table, lengths


class TextTower(nn.Module):
    """The causal text tower, plain (`encode`) and with prompt tokens (`encode_prompted`)."""

    config: ClipConfig
    activation: str = "gelu"
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Declare the parameters both ways of encoding share."""
        config, dim = self.config, self.config.embed_dim
        init = nn.initializers.normal(0.02)
        self.token_embedding = parameter(self, "token_embedding", init, (config.vocab_size, dim), ("vocab", "embed"))
        self.position_embedding = parameter(
            self, "position_embedding", init, (config.context_length, dim), (None, "embed")
        )
        for i in range(config.text_layers):  # set one by one, for the names block_0, block_1, …
            setattr(self, f"block_{i}", Block(dim, config.text_heads, self.activation, self.dtype))
        self.ln_final = LayerNorm(dtype=self.dtype)
        self.proj = dense(dim, dim, ("embed", None), bias=False, dtype=self.dtype)

    @property
    def _blocks(self) -> list[Block]:
        return [getattr(self, f"block_{i}") for i in range(self.config.text_layers)]

    def encode(self, ids: Int[Array, "batch tokens"], ends: Int[Array, " batch"]) -> Float[Array, "batch dim"]:
        """CLIP's own text embedding, read at each text's end token (position `ends`); not normalised."""
        x = self.token_embedding[ids] + self.position_embedding[: ids.shape[1]]
        x, causal = x.astype(self.dtype), partial(jax.nn.dot_product_attention, is_causal=True)
        for block in self._blocks:
            x, _ = block(x, causal)
        return self.project(jnp.take_along_axis(x, ends[:, None, None], 1)[:, 0])

    def project(self, x: Float[Array, "... dim"]) -> Float[Array, "... dim"]:
        """Final norm and projection into the joint embedding space."""
        return self.proj(self.ln_final(x))

    def encode_prompted(
        self,
        templates: Templates,
        learnable: Float[Array, "depth tokens dim"],
        class_tokens: Float[Array, "batch class dim"],
    ) -> Float[Array, "batch template dim"]:
        """The last class token of each template after the last block, before any norm.

        `learnable[0]` stands after the start token and carries no position; before block i + 1 its slots are
        overwritten by `learnable[i]` while there is one. The class tokens stand where each template ends. The mask
        is causal, so all before them is the same for every image and computed once, and nothing need follow them.
        """
        ids, lengths = templates.padded()
        count, slots, per_class = len(lengths), learnable.shape[1], class_tokens.shape[1]
        embedded = self.token_embedding[ids] + self.position_embedding[: ids.shape[1]]
        prefix = jnp.concatenate(
            [embedded[:, :1], jnp.broadcast_to(learnable[0], (count, *learnable.shape[1:])), embedded[:, 1:]], 1
        ).astype(self.dtype)  # [template, prefix, dim]
        positions = self.position_embedding[lengths[:, None] + np.arange(per_class)]  # [template, class, dim]
        x = (class_tokens[None] + positions[:, None]).astype(self.dtype)  # [template, batch, class, dim]
        # Padding of the shorter templates is hidden from the class tokens; causality hides it from the prefix.
        visible = np.arange(prefix.shape[1]) < (lengths + slots)[:, None]  # [template, prefix]
        # The templates' common rows stand once among the rows of the one product below.
        common = templates.common and templates.common + slots
        layout = Rows((count, prefix.shape[1]), (count, x.shape[1], per_class), common)
        merged = partial(_attend_merged, layout=layout, visible=visible)
        causal = partial(jax.nn.dot_product_attention, is_causal=True)

        for i, block in enumerate(self._blocks):
            if 0 < i < learnable.shape[0]:
                prefix = prefix.at[:, 1 : 1 + slots].set(learnable[i].astype(self.dtype))
            if whole():  # one product for all rows reads the weights once, which is what takes the time
                rows, _ = block(layout.merge(prefix, x), merged)
                prefix, x = layout.split(rows)
                continue
            prefix, key_value = block(prefix, causal)
            x, _ = block.forward(x, partial(_attend_to_prefix, prefix=key_value, visible=visible))
            prefix, x = split(prefix, None, None, None), split(x, None, "batch", None, None)
        return x[:, :, -1].swapaxes(0, 1)


@dataclass(frozen=True)
class Rows:
    """How rows of the prefixes and rows of the images' class tokens stand in one array.

    `prefix` is (templates, tokens), `own` (templates, batch, class tokens). The first `common` tokens are the same in
    all prefixes and stand there once.
    """

    prefix: tuple[int, int]
    own: tuple[int, int, int]
    common: int

    def merge(
        self, prefix: Float[Array, "template prefix *width"], own: Float[Array, "template batch class *width"]
    ) -> Float[Array, "rows *width"]:
        """All rows in one array."""
        width = prefix.shape[2:]
        parts = prefix[0, : self.common], prefix[:, self.common :], own
        return jnp.concatenate([part.reshape(-1, *width) for part in parts])

    def split(
        self, rows: Float[Array, "rows *width"]
    ) -> tuple[Float[Array, "template prefix *width"], Float[Array, "template batch class *width"]]:
        """What was merged."""
        count, tokens = self.prefix
        apart = tokens - self.common
        end = self.common + count * apart
        common = jnp.broadcast_to(rows[: self.common], (count, self.common, *rows.shape[1:]))
        rest = rows[self.common : end].reshape(count, apart, *rows.shape[1:])
        return jnp.concatenate([common, rest], 1), rows[end:].reshape(*self.own, *rows.shape[1:])


def _attend_merged(
    query: Float[Array, "rows heads head_dim"],
    key: Float[Array, "rows heads head_dim"],
    value: Float[Array, "rows heads head_dim"],
    *,
    layout: Rows,
    visible: np.ndarray,
) -> Float[Array, "rows heads head_dim"]:
    """Attention within the prefixes and from the images' class tokens, whose rows came in one array."""
    (q, own_q), (k, own_k), (v, own_v) = (layout.split(rows) for rows in (query, key, value))
    within = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    after = _attend_to_prefix(own_q, own_k, own_v, prefix=(k, v), visible=visible)
    return layout.merge(within, after)


def _attend_to_prefix(
    query: Float[Array, "template batch class heads head_dim"],
    key: Float[Array, "template batch class heads head_dim"],
    value: Float[Array, "template batch class heads head_dim"],
    *,
    prefix: tuple[jax.Array, jax.Array],
    visible: np.ndarray,
) -> Float[Array, "template batch class heads head_dim"]:
    """Causal attention of each image's class tokens to the shared prefix and to themselves."""
    prefix_key, prefix_value = prefix  # [template, prefix, heads, head_dim]
    scale = query.shape[-1] ** -0.5
    shared = jnp.einsum("tbphe,tmhe->tbhpm", query, prefix_key, preferred_element_type=jnp.float32) * scale
    own = few_logits(query, key) * scale  # [template, batch, class as key, class as query, heads]
    shared = jnp.where(visible[:, None, None, None], shared, -jnp.inf)
    own = jnp.where(np.tri(key.shape[2], dtype=bool).T[..., None], own, -jnp.inf)
    # One softmax over both, which are not put together for it. The highest logit only keeps numbers small.
    highest = jax.lax.stop_gradient(jnp.maximum(shared.max(-1), own.max(2).swapaxes(2, 3)))
    shared, own = jnp.exp(shared - highest[..., None]), jnp.exp(own - highest.swapaxes(2, 3)[:, :, None])
    total = shared.sum(-1) + own.sum(2).swapaxes(2, 3)  # [template, batch, heads, class]
    shared = (shared / total[..., None]).astype(value.dtype)
    own = own / total.swapaxes(2, 3)[:, :, None]
    return jnp.einsum("tbhpm,tmhe->tbphe", shared, prefix_value) + few_attended(own, value)

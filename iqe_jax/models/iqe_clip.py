"""IQE-CLIP put together, as pure functions of two parameter trees: `frozen` (CLIP) and `trainable` (the adapter).

`features` runs the frozen image tower, `head` all that is trained up to logits and scores on the patch grid, `maps`
and `segmentation` bring those to pixels. Every intermediate comes back by name. Losses, data and devices are
elsewhere.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float

from iqe_jax.config import ModelConfig
from iqe_jax.models.clip import ClipConfig, Templates, TextTower, VisionTower
from iqe_jax.models.iqm import Iqm, reads
from iqe_jax.models.layers import l2_normalise, parameter, product, split
from iqe_jax.models.prompts import PromptTokens
from iqe_jax.models.shared import Shared

Params = Mapping[str, Any]
P = ParamSpec("P")
R = TypeVar("R")

INITIAL_TEMPERATURE = float(np.log(1 / 0.07))  # as CLIP's own logit scale starts


@struct.dataclass
class Features:
    """What the frozen image tower says of a batch; all the head needs to know of the images."""

    patch_tokens: Float[Array, "level batch patch width"]
    image_features: Float[Array, "batch dim"]


def _exact_products(function: Callable[Concatenate["IqeClip", P], R]) -> Callable[Concatenate["IqeClip", P], R]:
    """Trace with full float32 products where the compute type is float32: GPUs and TPUs round them otherwise."""

    @wraps(function)
    def traced(self: "IqeClip", *args: P.args, **kwargs: P.kwargs) -> R:
        with jax.default_matmul_precision("float32" if self.config.dtype == "float32" else "default"):
            return function(self, *args, **kwargs)

    return traced


@dataclass(frozen=True)
class IqeClip:
    """The method for one CLIP, one config and one pair of tokenised templates. Hashable; holds no arrays.

    Raises ValueError when config and CLIP do not go together.
    """

    clip: ClipConfig
    config: ModelConfig
    templates: Templates

    def __post_init__(self) -> None:
        """Check what neither config nor weights could check alone."""
        clip, config = self.clip, self.config
        if max(config.levels) > clip.vision_layers:
            raise ValueError(f"model.levels is {config.levels}, but this CLIP has {clip.vision_layers} vision blocks")
        if config.image_size < clip.patch_size:
            raise ValueError(f"model.image_size is {config.image_size}; one patch has {clip.patch_size} pixels a side")
        if clip.embed_dim % config.iqm_heads:
            raise ValueError(
                f"model.iqm_heads is {config.iqm_heads}; it must divide CLIP's embedding width {clip.embed_dim}"
            )
        if not 1 <= self.prompt_depth <= clip.text_layers:
            raise ValueError(
                f"model.prompt_depth is {config.prompt_depth}; this CLIP has {clip.text_layers} text layers"
            )
        longest = max(len(ids) for ids in self.templates.ids) + config.prompt_len
        if longest > clip.context_length:
            raise ValueError(
                f"the longest of model.templates and model.prompt_len make {longest} tokens; "
                f"this CLIP has places for {clip.context_length}"
            )

    @property
    def prompt_depth(self) -> int:
        """Text layers that get learnable tokens of their own."""
        return self.config.prompt_depth or self.clip.text_layers

    @property
    def grid(self) -> int:
        """Patches along a side of an image, g."""
        return self.config.image_size // self.clip.patch_size

    @property
    def bytes_at_work(self) -> int:
        """Bytes of memory, roughly, that an image takes on its way through the tower and the scoring."""
        clip, config, tokens, size = self.clip, self.config, self.grid**2 + 1, self.dtype.itemsize
        tower = 24 * tokens * clip.vision_width * size  # residual sums, norms, projections, an MLP, copies of them
        attention = clip.vision_heads * tokens**2 * (4 + size)
        kept = len(config.levels) * tokens * (clip.vision_width + clip.embed_dim) * size
        maps = config.image_size**2 * 4 * (6 * len(config.levels) + 8)
        return tower + attention + kept + maps

    @property
    def dtype(self) -> jnp.dtype:
        """The compute type."""
        return jnp.dtype(self.config.dtype)

    def image_score(self, prediction: Mapping[str, jax.Array], *, zero_shot: bool) -> Float[Array, " batch"]:
        """The score that `config.score` asks for, from what `predict` returned."""
        official = "score_zero" if zero_shot else "score_few"
        return prediction[official if self.config.score == "official" else f"score_{self.config.score}"]

    def _vision(self) -> VisionTower:
        config = self.config
        return VisionTower(self.clip, config.levels, config.activation, config.normalisation, self.dtype)

    def _text(self) -> TextTower:
        return TextTower(self.clip, self.config.activation, self.dtype)

    def _adapter(self, dropout: float = 0.0) -> "Adapter":
        return Adapter(self.clip, self.config, self.prompt_depth, dropout, self.dtype)

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Fresh trainable parameters, as boxes that carry logical axis names; `flax.core.meta.unbox` takes those off.

        The official checkpoints fix names and shapes, not how training starts: the draws here are ours.
        """
        clip, levels = self.clip, len(self.config.levels)
        patches = jnp.zeros((levels, 1, 1, clip.vision_width))
        dim = jnp.zeros((1, clip.embed_dim))
        text = jnp.zeros((1, 2, clip.embed_dim))
        return dict(self._adapter().init(key, patches, dim, text, method="init_all")["params"])

    def init_frozen(self, key: jax.Array) -> dict[str, Any]:
        """Random CLIP parameters, boxed like `init`'s: for shapes, for sharding rules and for training a tiny CLIP."""
        vision_key, text_key = jax.random.split(key)
        images = jnp.zeros((1, self.clip.image_size, self.clip.image_size, 3))
        ids = jnp.zeros((1, 2), jnp.int32)
        return {
            "vision": self._vision().init(vision_key, images)["params"],
            "text": self._text().init(text_key, ids, jnp.ones(1, jnp.int32), method="encode")["params"],
            "logit_scale": jnp.full((), INITIAL_TEMPERATURE, jnp.float32),
        }

    @_exact_products
    def features(self, frozen: Params, images: Float[Array, "batch side side 3"]) -> Features:
        """Run the frozen image tower on RGB images in [0, 1], S×S each."""
        patch_tokens, image_features = _apply(self._vision(), frozen["vision"], images)
        return Features(patch_tokens, image_features.astype(jnp.float32))

    @_exact_products
    def head(
        self,
        trainable: Params,
        frozen: Params,
        features: Features,
        *,
        dropout: float = 0.0,
        dropout_key: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        """All that is trained, from features to scores.

        Returns, by name: `class_tokens` (B, P, D), `query_tokens` (B, 2, D), `text_embeddings` (B, 2, D),
        `dense_features` (K, B, L, D), `query_features` (K, B, 2, D), `logits_query` and `logits_text` (K, B, L),
        each anomalous minus normal, and `scores_query` and `scores_text` (K, B) in [0, 1].
        `dropout` acts where `dropout_key` is given.
        """
        adapter = self._adapter(dropout)
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        (dense_features, bias), prompts = _apply(
            adapter, trainable, features.patch_tokens, features.image_features, method="tokens"
        )
        dense_features = split(dense_features, None, "batch", None, None)

        text = self._text()
        encoded = _apply(
            text, frozen["text"], self.templates, prompts.learnable, prompts.class_tokens, method="encode_prompted"
        )
        normed = _apply(adapter, trainable, encoded, method="norm")
        text_embeddings = l2_normalise(_apply(text, frozen["text"], normed, method="project"))
        text_embeddings = split(text_embeddings, "batch", None, None)

        patches = Shared(dense_features, (*reads(self.config.iqm_layers, self.config.iqm_heads), 2), bias)
        query_features = _apply(
            adapter, trainable, prompts.query_tokens, patches, text_embeddings, method="queries", rngs=rngs
        )
        # Two channels under a softmax are one difference under a sigmoid; only that difference is ever formed.
        query_axis = jnp.diff(l2_normalise(query_features), axis=-2)[..., 0, :]  # [level, batch, dim]
        text_axis = jnp.exp(trainable["prompt_temp"]) * jnp.diff(text_embeddings, axis=-2)[..., 0, :]  # [batch, dim]
        axes = jnp.stack([query_axis, jnp.broadcast_to(text_axis, query_axis.shape)], 2)  # [level, batch, 2, dim]
        logits = split(patches.unit_dot(axes), None, "batch", None, None)
        logits_query, logits_text = logits[..., 0], logits[..., 1]
        return {
            "class_tokens": prompts.class_tokens,
            "query_tokens": prompts.query_tokens,
            "text_embeddings": text_embeddings,
            "dense_features": patches.tokens(),
            "query_features": query_features,
            "logits_query": logits_query,
            "logits_text": logits_text,
            "scores_query": jax.nn.sigmoid(logits_query).mean(-1),
            "scores_text": jax.nn.sigmoid(logits_text).mean(-1),
        }

    @_exact_products
    def maps(self, logits: Float[Array, "level batch patch"]) -> Float[Array, "level batch side side"]:
        """Anomalous channel in [0, 1] at S×S: bilinear upsampling with aligned corners, then the sigmoid."""
        grid, up = self.grid, upsampling_matrix(self.grid, self.config.image_size)
        logits = logits.reshape(*logits.shape[:-1], grid, grid)
        return jax.nn.sigmoid(split(jnp.einsum("Yy,kbyx,Xx->kbYX", up, logits, up), None, "batch", None, None))

    @_exact_products
    def predict(self, outputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Maps and scores from what `head` returned.

        Returns `maps_query`, `maps_text` (K, B, S, S) in [0, 1]; `segmentation` (B, S, S) in [0, 1], fused and
        blurred; `score_zero` (B) in [0, 2K], the official zero-shot image score; `score_few` (B) in [0, 2], the
        official few-shot one; `score_mean`, `score_max` and `score_top` (B) in [0, 1], the segmentation's mean, its
        maximum and the mean of its highest hundredth.
        """
        config = self.config
        maps_query, maps_text = self.maps(outputs["logits_query"]), self.maps(outputs["logits_text"])
        query, text = maps_query.mean(0), maps_text.mean(0)
        blur = blur_matrix(config.image_size, config.sigma)
        fused = config.fusion_weight * query + (1 - config.fusion_weight) * text
        segmentation = jnp.minimum(jnp.einsum("Yy,byx,Xx->bYX", blur, fused, blur), 1.0)  # rounding may pass it
        pixels = segmentation.reshape(segmentation.shape[0], -1)
        return {
            "maps_query": maps_query,
            "maps_text": maps_text,
            "segmentation": segmentation,
            "score_mean": pixels.mean(-1),
            "score_max": pixels.max(-1),
            "score_top": jax.lax.top_k(pixels, -(-pixels.shape[-1] // 100))[0].mean(-1),
            "score_zero": (outputs["scores_query"] + outputs["scores_text"]).sum(0),
            "score_few": (text + query).mean((1, 2)),
        }


def _apply(module: nn.Module, params: Params, *args: Any, **settings: Any) -> Any:
    return module.apply({"params": params}, *args, **settings)


class Adapter(nn.Module):
    """Owns every trainable parameter; its methods are the three trained stretches between frozen ones."""

    clip: ClipConfig
    config: ModelConfig
    prompt_depth: int
    dropout: float
    dtype: jnp.dtype

    def setup(self) -> None:
        """Declare the parts; their names are those of the trainable tree."""
        config, dim = self.config, self.clip.embed_dim
        self.dense = LevelDense(dim, self.dtype)
        self.prompts = PromptTokens(
            dim, config.prompt_len, config.learnable_tokens, self.prompt_depth, config.use_global
        )
        self.prompt_temp = parameter(self, "prompt_temp", nn.initializers.constant(INITIAL_TEMPERATURE), (), ())
        self.iqm = Iqm(dim, config.iqm_layers, config.iqm_heads, config.iqm_width, self.dropout, self.dtype)

    def tokens(self, patch_tokens: jax.Array, image_features: jax.Array):
        """Dense features (K, B, L, D) with their bias apart, and prompt tokens."""
        return self.dense(patch_tokens), self.prompts(image_features)

    def norm(self, x: jax.Array) -> jax.Array:
        """The trained norm inside the text tower's end."""
        return self.prompts.norm(x)

    def queries(self, query_tokens: jax.Array, dense_features: Shared, text_embeddings: jax.Array) -> jax.Array:
        """Query features (K, B, 2, D)."""
        return self.iqm(query_tokens, dense_features, text_embeddings).astype(jnp.float32)

    def init_all(self, patch_tokens: jax.Array, image_features: jax.Array, text_embeddings: jax.Array) -> None:
        """Touch every parameter once."""
        (dense_features, bias), prompts = self.tokens(patch_tokens, image_features)
        patches = Shared(dense_features, reads(self.config.iqm_layers, self.config.iqm_heads), bias)
        self.queries(prompts.query_tokens, patches, self.norm(text_embeddings))


class LevelDense(nn.Module):
    """One Dense layer per feature level, W → D, in one batched product."""

    dim: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, patch_tokens: Float[Array, "level batch patch width"]
    ) -> tuple[Float[Array, "level batch patch dim"], Float[Array, "level 1 1 dim"]]:
        """Apply each level's own layer, but for its bias, which is for `Shared` to add."""
        levels, width = patch_tokens.shape[0], patch_tokens.shape[-1]
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=-2, out_axis=-1, batch_axis=(0,))
        kernel = parameter(self, "kernel", init, (levels, width, self.dim), (None, "embed", None))
        bias = parameter(self, "bias", nn.initializers.zeros, (levels, self.dim), (None, None))
        x = jax.vmap(product)(patch_tokens.astype(self.dtype), kernel.astype(self.dtype))
        return x, bias[:, None, None].astype(self.dtype)


def upsampling_matrix(grid: int, side: int) -> Float[np.ndarray, "side grid"]:
    """Bilinear interpolation from `grid` to `side` points with aligned corners, along one axis."""
    position = np.arange(side) * ((grid - 1) / max(side - 1, 1))
    distance = np.abs(position[:, None] - np.arange(grid))
    return np.maximum(0, 1 - distance).astype(np.float32)


def blur_matrix(side: int, sigma: float) -> Float[np.ndarray, "side side"]:
    """Gaussian blur along one axis, truncated at 4 σ, edges mirrored about the pixel edge (SciPy's `reflect`)."""
    if sigma == 0:
        return np.eye(side, dtype=np.float32)
    radius = int(4 * sigma + 0.5)
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    weights /= weights.sum()
    source = (np.arange(side)[:, None] + offsets) % (2 * side)
    source = np.where(source < side, source, 2 * side - 1 - source)
    matrix = np.zeros((side, side))
    np.add.at(matrix, (np.arange(side)[:, None], source), weights)
    return matrix.astype(np.float32)

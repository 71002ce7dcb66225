"""The primitives under every module: Einsum, Dense, LayerNorm, activations and the pre-norm transformer block.

Kernels keep their head axes apart and carry logical axis names, so that a mesh can be laid over them elsewhere.
Towers, prompts and the query module are built on these in their own files.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import meta
from flax.linen import spmd
from jaxtyping import Array, Float

from iqe_jax.cpu import on_amd

T = TypeVar("T")
Initializer = Callable[..., jax.Array]
# (queries, keys, values), each [..., tokens, heads, head_dim] → attended values of the queries' shape.
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def _in_float32(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """`function`, rounded to the type of its argument once, at its end."""
    return lambda x: function(x.astype(jnp.float32)).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    # Written with erf, as the official code's is: jax.nn.gelu takes erfc, which costs twice as much.
    "gelu": _in_float32(lambda x: x * 0.5 * (1 + jax.lax.erf(x * np.float32(0.5**0.5)))),
    "quick_gelu": _in_float32(lambda x: x * jax.nn.sigmoid(1.702 * x)),
}
# Of programs that run the image tower. Without Triton among the candidates, XLA gives an NVIDIA GPU's products to
# cuBLAS along with the biases and residuals that are added to them. Without YNN, it gives a CPU's to Eigen, which is as
# quick or quicker with an image's rows (see `_cpu_product`). Without the last, a CPU adds up a row in one pass, not in
# windows of 32. Other compilers take no notice.
TOWER_OPTIONS = {
    "xla_gpu_enable_triton_gemm": False,
    "xla_cpu_experimental_ynn_fusion_type": "",
    "xla_disable_hlo_passes": "tree_reduction_rewriter",
}
fan_in_normal = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


def parameter(
    module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...], axes: tuple[str | None, ...]
) -> jax.Array:
    """A float32 parameter of `module`, each of its axes named for the sharding rules or None."""
    if module.has_variable("params", name):  # Flax would trace `init` to compare shapes: an eighth of all tracing
        return cast(jax.Array, meta.unbox(module.get_variable("params", name)))
    return cast(jax.Array, module.param(name, nn.with_logical_partitioning(init, axes), shape))


def split(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x`, with its axes named for the sharding rules; the same `x` where no mesh is active."""
    return spmd.with_logical_constraint(x, axes)


def whole() -> bool:
    """Whether all arrays lie on one device: no mesh is active, or one of a single device."""
    return jax.sharding.get_abstract_mesh().size <= 1


def linear(equation: str, x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """`einsum(equation, x, kernel) + bias`, as a product of matrices where the kernel's axes may be merged.

    A bias has all axes of the kernel that are not contracted.
    Contracted over several axes, as the way back of a kernel with heads is, XLA transposes the kernel in memory first.
    Added to several axes, a bias is written down in full on a GPU, of whose product it is a part when added to one.
    On several devices the axes stay apart, since merging them would move what is split.
    """
    inputs, out = equation.split("->")
    left, right = inputs.removeprefix("...").split(",")[0].removeprefix("..."), inputs.split(",")[1]
    if not whole() or not right.startswith(left) or f"...{right.removeprefix(left)}" != out:
        y = jnp.einsum(equation, x, kernel)
        return y if bias is None else y + bias
    lead, size = x.shape[: x.ndim - len(left)], math.prod(kernel.shape[: len(left)])
    y = product(x.reshape(*lead, size), kernel.reshape(size, -1))
    y = y if bias is None else y + bias.reshape(-1)
    return y.reshape(*lead, *kernel.shape[len(left) :])


def product(a: Float[Array, "... inner"], b: Float[Array, "inner outer"]) -> Float[Array, "... outer"]:
    """`a @ b`, in the form that is quick where the program will run."""
    lead, apart = a.shape[:-1], False
    if whole():  # one axis of rows, or the way back contracts over several, for which XLA transposes one side in memory
        a = a.reshape(-1, a.shape[-1])
        rows, outer = a.shape[0], b.shape[1]
        if isinstance(rows, int):  # an exported program may not know them
            apart = outer % 1024 == 0 and rows >= (256 if outer % 4096 == 0 else 1024) and on_amd()
    if apart or a.dtype != jnp.float32:
        y = jax.lax.platform_dependent(a, b, cpu=partial(_cpu_product, apart=apart), default=jnp.matmul)
    else:
        y = a @ b
    return y.reshape(*lead, b.shape[-1])


def _cpu_product(a: jax.Array, b: jax.Array, *, apart: bool) -> jax.Array:
    """`a @ b`; `apart` keeps rows of the result from lying a multiple of 4 KB apart, at the price of a copy of `b`.

    Such rows share the few places that a cache has for them, which takes much of its speed from Eigen on AMD's CPUs. On
    Intel's it takes none, and the copy is for nothing.
    """
    outer = b.shape[1]
    if apart:
        # Padded with something of `a`, so not before that is there: XLA would pad the kernels of all layers first, and
        # keep them. What comes of the padding is cut off.
        b = jax.lax.pad(b, jax.lax.stop_gradient(a[0, 0]), ((0, 0, 0), (0, 16, 0)))
    # XLA has a CPU's own instructions for bfloat16 only where the result is float32, so it is there first.
    y = jnp.matmul(a, b, preferred_element_type=jnp.float32)
    return y[..., :outer].astype(a.dtype)


def where_nvidia(form: Callable[..., T], otherwise: Callable[..., T], *arrays: jax.Array) -> T:
    """`form(*arrays)` where the program is lowered for an NVIDIA GPU, else `otherwise(*arrays)`.

    Both are traced only where JAX has a GPU.
    """
    if jax.default_backend() != "gpu":
        return otherwise(*arrays)
    return jax.lax.platform_dependent(*arrays, cuda=form, default=otherwise)


def precision(array: jax.Array) -> jax.lax.Precision | None:
    """Of products with `array`. By name, as the way back is traced where the model's default is no longer in force."""
    return jax.lax.Precision.HIGHEST if array.dtype == jnp.float32 else None


class Einsum(nn.Module):
    """`einsum(equation, x, kernel) + bias`: a linear map with any number of named axes.

    The bias has the kernel's axes that the result keeps.
    """

    equation: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32
    kernel_init: Initializer = fan_in_normal

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Apply to `x`, computing in `dtype`; parameters stay in float32."""
        kernel = parameter(self, "kernel", self.kernel_init, self.shape, self.axes)
        bias = None
        if self.use_bias:
            kept = len(self.equation.split("->...")[1])
            shape, axes = self.shape[-kept:], self.axes[-kept:]
            bias = parameter(self, "bias", nn.initializers.zeros, shape, axes).astype(self.dtype)
        return linear(self.equation, x.astype(self.dtype), kernel.astype(self.dtype), bias)


def dense(in_dim: int, out_dim: int, axes: tuple[str | None, str | None], *, bias: bool = True, **settings) -> Einsum:
    """A Dense layer, `[..., in_dim] → [..., out_dim]`, as an Einsum; `settings` are Einsum's own."""
    return Einsum("...i,io->...o", (in_dim, out_dim), axes, use_bias=bias, **settings)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, computed in float32 and returned in `dtype`."""

    eps: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... dim"]) -> Float[Array, "... dim"]:
        """Normalise `x`; the shape is kept."""
        dim = x.shape[-1]
        scale = parameter(self, "scale", nn.initializers.ones, (dim,), ("embed",))
        bias = parameter(self, "bias", nn.initializers.zeros, (dim,), ("embed",))
        x = x.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + self.eps) * scale + bias).astype(self.dtype)


def l2_normalise(x: Float[Array, "... dim"]) -> Float[Array, "... dim"]:
    """Scale the last axis to unit length, in float32."""
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def capability() -> float:
    """The compute capability of the default device where that is an NVIDIA GPU, else 0.

    What a kernel needs of it is asked while a program is traced, as JAX itself does for cuDNN's.
    """
    if jax.default_backend() != "gpu":
        return 0.0
    found = str(getattr(jax.devices()[0], "compute_capability", ""))  # AMD's is a name
    return float(found) if found.replace(".", "").isdigit() else 0.0


def few_logits(
    query: Float[Array, "*batch query heads head_dim"], key: Float[Array, "*#batch token heads head_dim"]
) -> Float[Array, "*batch token query heads"]:
    """Products of every query with every key, unscaled, in float32, for a handful of either.

    Written as sums, which are fused with what is around them: products of two rows are slow to start on a GPU.
    """
    query, key = query.astype(jnp.float32), key.astype(jnp.float32)
    return (query[..., None, :, :, :] * key[..., :, None, :, :]).sum(-1)


def few_attended(
    weights: Float[Array, "*batch token query heads"], value: Float[Array, "*#batch token heads head_dim"]
) -> Float[Array, "*batch query heads head_dim"]:
    """Sums of the values by `weights`, as `few_logits` has them, in the values' type."""
    attended = weights.astype(jnp.float32)[..., None] * value.astype(jnp.float32)[..., :, None, :, :]
    return attended.sum(-4).astype(value.dtype)


class Qkv(nn.Module):
    """Queries, keys and values of all heads, from one kernel [width, 3, heads, head_dim]."""

    width: int
    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... tokens width"]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Project; each comes as [..., tokens, heads, head_dim]."""
        shape, axes = (self.width, 3, self.heads, self.width // self.heads), ("embed", None, "heads", "head_dim")
        kernel = parameter(self, "kernel", fan_in_normal, shape, axes).astype(self.dtype)
        bias = parameter(self, "bias", nn.initializers.zeros, shape[1:], axes[1:]).astype(self.dtype)
        return where_nvidia(_three_products, _one_product, x.astype(self.dtype), kernel, bias)


def _one_product(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    qkv = linear("...w,wche->...che", x, kernel, bias)  # [..., tokens, 3, heads, head_dim]
    query, key, value = jnp.moveaxis(qkv, -3, 0)
    return query, key, value


def _three_products(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `_one_product`: a GPU's attention wants the three apart, and cutting up a product is a pass over it."""
    query, key, value = (linear("...w,whe->...he", x, kernel[:, i], bias[i]) for i in range(3))
    return query, key, value


class SelfAttention(nn.Module):
    """Multi-head projections around a given `attend`; also returns the keys and values for others to attend to."""

    width: int
    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "... tokens width"], attend: Attend
    ) -> tuple[Float[Array, "... tokens width"], tuple[jax.Array, jax.Array]]:
        """Project, attend, project back. Keys and values come as [..., tokens, heads, head_dim]."""
        head_dim = self.width // self.heads
        query, key, value = Qkv(self.width, self.heads, self.dtype, name="qkv")(x)
        out = Einsum(
            "...he,hew->...w",
            (self.heads, head_dim, self.width),
            ("heads", "head_dim", "embed"),
            dtype=self.dtype,
            name="out",
        )(attend(query, key, value))
        return out, (key, value)


class Mlp(nn.Module):
    """Two Dense layers, four times as wide in the middle, as in every CLIP transformer."""

    width: int
    activation: str
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        """Apply to each token by itself."""
        hidden = dense(self.width, 4 * self.width, ("embed", "mlp"), name="fc", dtype=self.dtype)(x)
        hidden = ACTIVATIONS[self.activation](hidden)
        return dense(4 * self.width, self.width, ("mlp", "embed"), name="proj", dtype=self.dtype)(hidden)


class Block(nn.Module):
    """One pre-norm residual block of a CLIP tower: attention, then MLP."""

    width: int
    heads: int
    activation: str
    dtype: jnp.dtype = jnp.float32

    def __call__(
        self, x: Float[Array, "... tokens width"], attend: Attend
    ) -> tuple[Float[Array, "... tokens width"], tuple[jax.Array, jax.Array]]:
        """Return the new tokens, and this block's keys and values.

        Blocks that are given the same `attend` are traced once for all of them.
        """
        if self.is_initializing():
            return self.forward(x, attend)
        return _traced_once(self.clone(parent=None, name=None), attend, self.variables["params"], x)

    @nn.compact
    def forward(
        self, x: Float[Array, "... tokens width"], attend: Attend
    ) -> tuple[Float[Array, "... tokens width"], tuple[jax.Array, jax.Array]]:
        """As `__call__`, traced here; for an `attend` that holds arrays of what is being traced."""
        attention = SelfAttention(self.width, self.heads, self.dtype, name="attn")
        attended, key_value = attention(LayerNorm(dtype=self.dtype, name="ln_1")(x), attend)
        x = _written(x + attended)
        hidden = LayerNorm(dtype=self.dtype, name="ln_2")(x)
        return _written(x + Mlp(self.width, self.activation, self.dtype, name="mlp")(hidden)), key_value


def _written(x: jax.Array) -> jax.Array:
    """`x`, which an NVIDIA GPU writes down: left to itself, XLA adds it up again for each of its readers."""
    return where_nvidia(jax.lax.optimization_barrier, lambda x: x, x)


@partial(jax.jit, static_argnums=(0, 1))
def _traced_once(
    block: Block, attend: Attend, params: Mapping[str, Any], x: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return block.apply({"params": params}, x, attend, method="forward")  # pyright: ignore[reportReturnType]

"""How programs that run the image tower are compiled: a large one, on a CPU, by oneDNN's matrix products.

All other programs are compiled as JAX does by itself. What they compute is written where they are.
"""

import platform
from collections.abc import Callable
from functools import cache
from typing import Any

import jax

from iqe_jax.models.iqe_clip import IqeClip

# Products of large float32 matrices take less time than in XLA's own library. Each product by itself: where oneDNN is
# given what stands before a product as well, jaxlib 0.10 ends the process on forms it does not know.
ONEDNN = {
    "xla_cpu_use_onednn": True,
    "xla_cpu_experimental_onednn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
}
# Such programs cannot be kept on disk and are compiled at each start, which takes longer than a small tower does.
LEAST_WIDTH = 512


def tower_options(model: IqeClip) -> dict[str, Any] | None:
    """Compiler options of programs with the image tower of `model` on the default backend; None for JAX's own.

    Measured on x86 alone, so others are left as they are, as is a jaxlib that does not know the options.
    """
    large = model.clip.vision_width >= LEAST_WIDTH and model.dtype == "float32"
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return ONEDNN if large and x86 and jax.default_backend() == "cpu" and _known() else None


@cache
def _known() -> bool:
    try:
        jax.jit(lambda x: x, compiler_options=ONEDNN).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


class TowerProgram:
    """`jax.jit(function, **settings)`, compiled with `tower_options` of the model, `function`'s first argument."""

    def __init__(self, function: Callable[..., Any], **settings: Any):
        """Take what jax.jit takes."""
        self._plain = jax.jit(function, **settings)
        self._onednn = jax.jit(function, compiler_options=ONEDNN, **settings)

    def __call__(self, model: IqeClip, *args: Any, **kwargs: Any) -> Any:
        """Run it, compiled before where it is the first time."""
        return self._of(model)(model, *args, **kwargs)

    def lower(self, model: IqeClip, *args: Any, **kwargs: Any) -> Any:
        """As that of a jitted function, for the devices that `args` lie on, which may be described ones."""
        shardings = {x.sharding for x in jax.tree.leaves(args) if getattr(x, "sharding", None) is not None}
        elsewhere = any(d.platform != jax.default_backend() for s in shardings for d in s.device_set)
        return (self._plain if elsewhere else self._of(model)).lower(model, *args, **kwargs)

    def _of(self, model: IqeClip) -> Any:
        return self._plain if tower_options(model) is None else self._onednn

"""Few-shot on the rendered brain phantoms, k = 4: the whole road on any machine, offline, in minutes.

`--data.dataset liver|resc|oct17|chest|his` takes another phantom set. What it scores says nothing about real data.
"""

from iqe_jax.cache import cache_dir
from iqe_jax.config import Config, DataConfig, ModelConfig
from iqe_jax.data.phantoms import CLIP_DIR

# The shipped tiny CLIP at its native side; the blur keeps its size relative to the image (8 px of 240).
MODEL = ModelConfig(
    clip=str(CLIP_DIR), image_size=96, levels=(2, 4, 6), iqm_layers=2, iqm_heads=4, iqm_width=512, sigma=3.2
)


def config() -> Config:
    """The published training setting on a small model."""
    return Config(model=MODEL, data=DataConfig(root=cache_dir() / "phantoms", phantoms=True, shots=4))

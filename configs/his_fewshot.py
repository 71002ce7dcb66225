"""Few-shot on HIS, k = 4: `--data.shots 2|8|16` for the paper's other settings."""

from iqe_jax.config import Config, DataConfig


def config() -> Config:
    """The published setting: ViT-L/14-336 at 240 pixels, 50 epochs of batch 16."""
    return Config(data=DataConfig(dataset="his", shots=4))

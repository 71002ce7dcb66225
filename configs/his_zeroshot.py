"""Zero-shot on HIS: trained on the test splits of the other five sets."""

from iqe_jax.config import Config, DataConfig


def config() -> Config:
    """The published setting: ViT-L/14-336 at 240 pixels, 50 epochs of batch 16."""
    return Config(data=DataConfig(dataset="his", shots=0))

"""Zero-shot on the rendered brain phantoms: trained on the test splits of the other five phantom sets."""

import dataclasses

from configs.phantom_fewshot import config as few_shot
from iqe_jax.config import Config


def config() -> Config:
    """As phantom_fewshot, but without an image of the target set."""
    base = few_shot()
    return dataclasses.replace(base, data=dataclasses.replace(base.data, shots=0))

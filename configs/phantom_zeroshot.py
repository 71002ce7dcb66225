"""Zero-shot on the rendered brain phantoms: trained on the test splits of the other five phantom sets."""

import dataclasses

from configs.phantom_fewshot import config as few_shot
from iqe_jax.config import Config


def config() -> Config:
    """As phantom_fewshot, but without an image of the target set, and one pass over the other five."""
    base = few_shot()
    data, train = dataclasses.replace(base.data, shots=0), dataclasses.replace(base.train, epochs=1)
    return dataclasses.replace(base, data=data, train=train)

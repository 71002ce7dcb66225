"""Few-shot on a set of your own: `python train.py --config custom_fewshot --data.root my_scans`.

`my_scans` holds `valid/` and `test/`, each with `good/` and `Ungood/`, masks or not: see docs/data.md. Say what is seen
with `--model.templates "a photo of a normal knee <|class|>." "a photo of a torn knee <|class|>."`.
"""

from pathlib import Path

from iqe_jax.config import Config, DataConfig


def config() -> Config:
    """The published setting with k = 4, on a folder that is itself the set."""
    return Config(data=DataConfig(root=Path("my_scans"), dataset="custom", shots=4))

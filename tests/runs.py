"""Run directories as a finished training leaves them, as far as prediction needs them, without training."""

import json
from pathlib import Path
from typing import Any

import jax
from flax.core import meta

from iqe_jax.config import Config, DataConfig, ModelConfig, to_json
from iqe_jax.data.phantoms import CLIP_DIR
from iqe_jax.weights import load_model, save_adapter

LAST = {"rule": "last", "step": 7, "support": ["good/miller_anna.png"], "finished_at": 7}
# On the CLIP that ships with the package: starts fast, without torch.
SMALL = {"clip": str(CLIP_DIR), "image_size": 32, "levels": (1, 2), "iqm_layers": 1, "iqm_heads": 4, "iqm_width": 64}


def write_run(
    folder: Path, settings: dict[str, Any], adapter: Any, kept: dict[str, Any], data: DataConfig | None = None
) -> Path:
    """Write a run directory of a model with these settings and weights."""
    folder.mkdir()
    config = Config("brain_fewshot", model=ModelConfig(**settings), data=data or DataConfig())
    (folder / "config.json").write_text(to_json(config))
    (folder / "kept.json").write_text(json.dumps(kept))
    save_adapter(adapter, folder / "adapter.safetensors")
    return folder


def small_run(folder: Path) -> Path:
    """A run of a small model with drawn weights."""
    settings = {**SMALL, "start": "clip"}
    model, _ = load_model(ModelConfig(**settings))
    return write_run(folder, settings, meta.unbox(model.init(jax.random.key(0))), LAST)

"""Fixtures shared by the tests: the golden model, a small data set in the real layout, and a cache of their own."""

import os
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # the entry scripts

from tests.parity import golden

# Tests and the processes they start take CPU devices, of which there are as many as they ask for, also where a GPU or
# TPU is. docs/gpu.md has those that can run on a GPU.
jax.config.update("jax_platforms", os.environ.setdefault("JAX_PLATFORMS", "cpu"))

GOLDEN = dict(np.load(Path(__file__).parent / "parity" / "tiny.npz"))


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """A cache folder of this session's own, so that tests neither see nor leave anything in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IQE_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def quick_compile():
    """Programs are compiled without most optimisations, in processes started too: half the time, and the same results.

    For files in which compiling is most of the time. Those that compare with numbers from elsewhere compile as users
    do, and so do the runs of one process that are killed and go on bit for bit.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()  # or a later file would find these programs


@pytest.fixture(scope="session")
def golden_files(tmp_path_factory):
    """The golden weights as users have them: an OpenAI state dict and an official adapter checkpoint."""
    import torch

    folder = tmp_path_factory.mktemp("golden")
    clip, adapter = golden.state_dicts(golden.TINY)
    torch.save({name: torch.from_numpy(np.array(value)) for name, value in clip.items()}, folder / "clip.pt")
    nested = {
        name: {n: torch.from_numpy(np.array(v)) for n, v in value.items()}
        if isinstance(value, dict)
        else torch.from_numpy(np.array(value))
        for name, value in adapter.items()
    }
    torch.save(nested, folder / "adapter.pth")
    return folder / "clip.pt", folder / "adapter.pth"


@pytest.fixture(scope="session")
def golden_settings(golden_files):
    """The ModelConfig fields of the golden model."""
    sizes = {"image_size": 40, "levels": (1, 2, 3, 4), "iqm_layers": 2, "iqm_heads": 4, "iqm_width": 96}
    return {"clip": str(golden_files[0]), **sizes}


@pytest.fixture(scope="session")
def golden_model(golden_files, golden_settings):
    """(model, frozen, trainable) of the golden file, converted from the official formats."""
    from iqe_jax.config import ModelConfig
    from iqe_jax.weights import load_adapter, load_model

    model, frozen = load_model(ModelConfig(**golden_settings))
    return model, frozen, load_adapter(model, golden_files[1])


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory):
    """Three small sets in the real layout, 48 pixels a side: brain and liver with masks, chest without."""
    root = tmp_path_factory.mktemp("sets")
    for number, (folder, has_masks) in enumerate({"Brain_AD": True, "Liver_AD": True, "Chest_AD": False}.items()):
        draw = np.random.default_rng(number)
        for split, count in {"valid": 6, "test": 10}.items():
            write_split(root / folder / split, draw, count, has_masks)
    return root


def write_split(folder: Path, draw: np.random.Generator, count: int, has_masks: bool) -> None:
    """`count` normal images of noise, and as many with a bright square in them."""
    for part in ("good", "Ungood"):
        (folder / part / "img").mkdir(parents=True)
        for i in range(count):
            image = draw.integers(60, 120, (48, 48, 3), np.uint8)
            mask = np.zeros((48, 48), np.uint8)
            if part == "Ungood":
                y, x = draw.integers(4, 30, 2)
                mask[y : y + 12, x : x + 12] = 255
                image[mask > 0] += 100
            Image.fromarray(image).save(folder / part / "img" / f"{i:03d}.png")
            if part == "Ungood" and has_masks:
                (folder / part / "anomaly_mask").mkdir(exist_ok=True)
                Image.fromarray(mask).save(folder / part / "anomaly_mask" / f"{i:03d}.png")

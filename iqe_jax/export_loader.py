"""Runs the exported model in this folder. Needs jax, which brings NumPy, and nothing else.

predict = load("FOLDER")
scores, anomaly_maps = predict(images)
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax import export

HERE = Path(__file__).parent
sys.path.append(str(HERE / "vendor"))  # flatbuffers, which jax.export reads programs with; an installed one goes before


def load(folder: str | Path = HERE) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """The model in `folder` as a function: images (B, S, S, 3) in [0, 1] → scores (B,) and maps (B, S, S) in [0, 1].

    Every new B is compiled once; fill the last batch up to the size of the others.
    """
    folder = Path(folder)
    size = json.loads((folder / "model.json").read_text(encoding="utf-8"))["image_size"]
    weights = read_safetensors(folder / "weights.safetensors")
    call = jax.jit(export.deserialize(bytearray((folder / "program.jax_export").read_bytes())).call)

    def predict(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images = np.asarray(images, np.float32)
        if images.ndim != 4 or images.shape[1:] != (size, size, 3) or len(images) == 0:
            raise ValueError(f"images have shape {images.shape}; expected (batch, {size}, {size}, 3)")
        if not (np.isfinite(images).all() and images.min() >= 0 and images.max() <= 1):
            raise ValueError(f"images have values from {images.min()} to {images.max()}; expected [0, 1]")
        scores, maps = call(weights, images)
        return np.asarray(scores), np.asarray(maps)

    return predict


def read_safetensors(path: Path) -> dict[str, jax.Array]:
    """The float32 arrays of a .safetensors file, by name: 8 bytes of length, a JSON header, raw values."""
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
    header.pop("__metadata__", None)
    values = np.memmap(path, np.uint8, "r", offset=start)
    return {
        name: jax.numpy.asarray(values[slice(*at["data_offsets"])].view("<f4").reshape(at["shape"]))
        for name, at in header.items()
    }

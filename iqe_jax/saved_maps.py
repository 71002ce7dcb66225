"""Segmentations as files beside the run, one per test image, written as they come so that none pile up in memory.

maps/good/NAME.png   by the image's own name; its ending stays in it where two images differ in nothing else
maps/about.json      what the numbers mean
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from iqe_jax.checkpoint import write_whole
from iqe_jax.data.bmad import Sample

LEVELS = 65535  # of a 16-bit PNG
_SUFFIX = {"png16": ".png", "npz": ".npz"}
_ABOUT = {
    "png16": f"16-bit grey PNG; segmentation in [0, 1] = value / {LEVELS}, rounded to the nearest",
    "npz": 'NumPy archive, read with numpy.load(FILE)["segmentation"]: float32 in [0, 1]',
}
_LONGEST = 240  # bytes of a file name; file systems take 255
_BYTES = {"png16": 2, "npz": 4}  # a pixel, uncompressed


class MapFiles:
    """Writes segmentations of `samples` below `directory`/maps: called with one batch after the other, by its start."""

    def __init__(self, directory: Path, samples: Sequence[Sample], size: int, form: str):
        """Make the folders for maps (size, size), `form` png16 or npz.

        Raises OSError before anything is written when the disk cannot hold the maps uncompressed.
        """
        self._folder, self._form = directory / "maps", form
        self._names = file_names([sample.name for sample in samples], form)
        self._folder.mkdir(parents=True, exist_ok=True)
        needed, free = len(samples) * size**2 * _BYTES[form], shutil.disk_usage(self._folder).free
        if needed > free:
            raise OSError(
                f"{self._folder} may need {needed / 1e9:.1f} GB for {len(samples)} maps and has {free / 1e9:.1f} GB "
                "free; make room, give another --run-dir, or leave out --save-maps"
            )
        for part in sorted({sample.name.split("/")[0] for sample in samples}):
            (self._folder / part).mkdir(exist_ok=True)
        about = {
            "format": _ABOUT[form],
            "side": size,
            "pixels": "of the image resized to side × side, as the model saw",
        }
        write_whole(self._folder / "about.json", json.dumps(about, indent=2, ensure_ascii=False) + "\n")

    def __call__(self, first: int, maps: Float[np.ndarray, "batch side side"]) -> None:
        """Write `maps`, which are those of the images from number `first` on."""
        for name, segmentation in zip(self._names[first : first + len(maps)], maps, strict=True):
            write_map(self._folder / name, segmentation, self._form)


def file_names(names: Sequence[str], form: str) -> list[str]:
    """Where the maps of the images `names` (good/FILE or ungood/FILE, all different) lie below maps/.

    The ending of the image gives way to that of the map, unless two of them would then be called the same. A name too
    long for the file system is cut, with a digest of all of it in place of the rest.
    """
    stems = [name.rpartition(".")[0] or name for name in names]
    return [_cut(name) + _SUFFIX[form] for name in (stems if len(set(stems)) == len(stems) else names)]


def _cut(name: str) -> str:
    part, file = name.split("/", 1)
    raw = os.fsencode(file)
    if len(raw) <= _LONGEST:
        return name
    return f"{part}/{raw[: _LONGEST - 20].decode(errors='ignore')}~{hashlib.blake2b(raw, digest_size=8).hexdigest()}"


def write_map(path: Path, segmentation: Float[np.ndarray, "side side"], form: str) -> None:
    """One segmentation in [0, 1], whole or not at all, in place of one that is there."""
    from PIL import Image

    temporary = path.with_name(f".{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        if form == "png16":
            levels = np.round(np.clip(segmentation, 0, 1) * LEVELS).astype(np.uint16)
            Image.fromarray(levels).save(file, "PNG")
        else:
            np.savez_compressed(file, segmentation=segmentation.astype(np.float32))
    temporary.replace(path)

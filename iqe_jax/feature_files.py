"""Features on disk: shards, which are folders with a .npy file for each array. What is in them is features.py's."""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np


class OnDisk:
    """One array of features on disk, shard by shard; `array[index]` is the row of one image, read when it is used."""

    def __init__(self, shards: Sequence[Path], dtype: np.dtype):
        """Look at the files `shards`, which hold rows of `dtype`, all but the last equally many.

        Raises OSError, ValueError or EOFError where one is not there or damaged.
        """
        self._files = []
        for path in shards:
            rows = np.load(path, mmap_mode="r").view(dtype)
            self._files.append((path, rows.shape, rows.offset))
        self._rows, self._dtype = self._files[0][1][0], dtype

    def __getitem__(self, index: int | np.integer) -> np.ndarray:
        # Mapped for the one row: a map takes one of the files that a process may have open, and shards may be more.
        path, shape, offset = self._files[index // self._rows]
        return np.memmap(path, self._dtype, "r", offset, shape)[index % self._rows]


def write(shard: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write one shard, a folder with a file for each array, so that it is there whole or not at all."""
    temporary = shard.with_name(f".{shard.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array)
        try:
            temporary.rename(shard)
        except OSError as error:
            if not shard.is_dir():  # else another run of the same settings was quicker
                raise OSError(error.errno, f"{error.strerror}, on renaming a folder", str(shard)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_whole(shard: Path, types: Mapping[str, np.dtype]) -> bool:
    """Whether a shard is there with all its arrays, none of them cut short. Raises OSError where it cannot be read."""
    try:
        for name, dtype in types.items():
            OnDisk([shard / f"{name}.npy"], dtype)
    except (FileNotFoundError, NotADirectoryError, ValueError, EOFError):
        return False
    return True


def check_room(folder: Path, needed: float, title: str) -> None:
    """Raise OSError where `folder` has less than `needed` bytes free for the features of `title`."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"the features of {title} need {needed / 1e9:.1f} GB in {folder}, which has {free / 1e9:.1f} GB free; "
            "make room, set $IQE_JAX_CACHE to another disk, or halve them with --train.feature-dtype bfloat16"
        )

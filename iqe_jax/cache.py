"""Where the project keeps what it can make again: kept features, phantoms, compiled programs, prepared data sets.

One folder per user; everything below it may be deleted while no run uses it, and is rebuilt on the next use.
"""

import os
from pathlib import Path


def cache_dir() -> Path:
    """The per-user cache folder: $IQE_JAX_CACHE, else $XDG_CACHE_HOME/iqe_jax, else ~/.cache/iqe_jax. Not created."""
    if override := os.environ.get("IQE_JAX_CACHE"):
        return Path(override)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "iqe_jax"

"""Frozen features: the image tower's outputs, computed once and kept in memory or on disk.

Few-shot keeps those of the augmented support images, zero-shot those of whole test splits; evaluation may keep them
too or stream them. What is kept on disk is found again only by the digest of weights, preprocessing and files.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Float, Int

from iqe_jax import weights
from iqe_jax.cache import cache_dir
from iqe_jax.checkpoint import write_whole
from iqe_jax.config import Config, DataConfig
from iqe_jax.data.bmad import Sample
from iqe_jax.data.pipeline import image_batches
from iqe_jax.models.iqe_clip import Features, IqeClip, Params
from iqe_jax.progress import track
from iqe_jax.train_state import Batch

SAVE_EVERY = 16  # batches between two notes of how far the features on disk have come

run_tower = jax.jit(IqeClip.features, static_argnums=0)


@dataclass(frozen=True)
class FeatureSet:
    """Kept features of n images. Arrays may be memory-mapped; `masks` (0 or 1) is None for sets that have none."""

    patch_tokens: Float[np.ndarray, "image level patch width"]
    image_features: Float[np.ndarray, "image dim"]
    masks: Int[np.ndarray, "image side side"] | None
    labels: Float[np.ndarray, " image"]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def batch(self, indices: Int[np.ndarray, " batch"], weight: Float[np.ndarray, " batch"]) -> Batch:
        """The images at `indices` as one batch of NumPy arrays."""
        masks = None if self.masks is None else self.masks[indices].astype(np.float32)
        return Batch(self.patch_tokens[indices], self.image_features[indices], masks, self.labels[indices], weight)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All images in order; the last batch is padded with weight 0."""
        for start in range(0, len(self), batch_size):
            indices = np.arange(start, start + batch_size)
            yield self.batch(np.minimum(indices, len(self) - 1), (indices < len(self)).astype(np.float32))


def stream(
    model: IqeClip, frozen: Params, samples: Sequence[Sample], batch_size: int, data: DataConfig
) -> Iterator[Batch]:
    """Batches of images in order, their features computed on the way and not kept."""
    has_masks = any(sample.mask for sample in samples)
    batches = image_batches(
        samples,
        model.config.image_size,
        batch_size,
        workers=data.workers,
        processes=data.processes,
        with_masks=has_masks,
    )
    for images in batches:
        features = run_tower(model, frozen, images["image"])
        masks = images["mask"] if has_masks else None
        patch_tokens = jnp.moveaxis(features.patch_tokens, 0, 1)
        yield Batch(patch_tokens, features.image_features, masks, images["label"], images["weight"])


def of_arrays(
    model: IqeClip,
    frozen: Params,
    images: Float[np.ndarray, "image side side 3"],
    masks: Float[np.ndarray, "image side side"] | None,
    labels: Float[np.ndarray, " image"],
    config: Config,
) -> FeatureSet:
    """Features of images already in memory, kept in memory; masks are binarised at > 0.5."""
    size, dtype = config.train.batch_size, _dtype(config)
    features: list[Features] = []
    for start in track(range(0, len(images), size), "Image tower"):
        batch = images[start : start + size]
        padded = np.concatenate([batch, np.zeros((size - len(batch), *batch.shape[1:]), batch.dtype)])
        out = run_tower(model, frozen, padded)
        features.append(jax.tree.map(np.asarray, out))
    patch_tokens = np.concatenate([f.patch_tokens.swapaxes(0, 1) for f in features])[: len(images)].astype(dtype)
    image_features = np.concatenate([f.image_features for f in features])[: len(images)]
    binary = None if masks is None else (masks > 0.5).astype(np.uint8)
    return FeatureSet(patch_tokens, image_features, binary, labels.astype(np.float32))


def of_samples(
    model: IqeClip, frozen: Params, samples: Sequence[Sample], config: Config, *, title: str, budget: float
) -> FeatureSet:
    """Features of image files, in memory or on disk as `config.train.features` and `budget` (bytes left) say.

    Raises OSError before any work when the disk has no room for them.
    """
    clip, size, dtype = model.clip, model.config.image_size, _dtype(config)
    has_masks = any(sample.mask for sample in samples)
    shapes: dict[str, tuple[tuple[int, ...], np.dtype]] = {
        "patch_tokens": ((len(samples), len(model.config.levels), model.grid**2, clip.vision_width), dtype),
        "image_features": ((len(samples), clip.embed_dim), np.dtype(np.float32)),
    }
    if has_masks:
        shapes["masks"] = ((len(samples), size, size), np.dtype(np.uint8))
    needed = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in shapes.values())
    where = config.train.features
    if where == "auto":
        where = "memory" if needed <= budget else "disk"

    labels = np.array([sample.label for sample in samples], np.float32)
    fill = partial(_fill, model, frozen, samples, config, title)
    if where == "memory":
        arrays = {name: np.empty(shape, dtype) for name, (shape, dtype) in shapes.items()}
        fill(arrays, 0, lambda done: None)
    else:
        arrays = _on_disk(_key(model, frozen, samples, config), shapes, needed, title, fill)
    return FeatureSet(arrays["patch_tokens"], arrays["image_features"], arrays.get("masks"), labels)


def _fill(
    model: IqeClip,
    frozen: Params,
    samples: Sequence[Sample],
    config: Config,
    title: str,
    arrays: dict[str, np.ndarray],
    start: int,
    save: Callable[[int], None],
) -> None:
    """Write the features of `samples[start:]` into `arrays`, telling `save` now and then how many are done."""
    size = config.train.batch_size
    batches = stream(model, frozen, samples[start:], size, config.data)
    total = -(-(len(samples) - start) // size)
    for batch in track(batches, f"Image tower, {title}", total=total):
        stop = min(start + size, len(samples))
        count = stop - start
        arrays["patch_tokens"][start:stop] = np.asarray(batch.patch_tokens)[:count]
        arrays["image_features"][start:stop] = np.asarray(batch.image_features)[:count]
        if "masks" in arrays and batch.masks is not None:
            arrays["masks"][start:stop] = np.asarray(batch.masks)[:count] > 0.5
        start = stop
        if stop % (SAVE_EVERY * size) == 0 or stop == len(samples):
            save(stop)


def _on_disk(
    key: str,
    shapes: dict[str, tuple[tuple[int, ...], np.dtype]],
    needed: int,
    title: str,
    fill: Callable[[dict[str, np.ndarray], int, Callable[[int], None]], None],
) -> dict[str, np.ndarray]:
    """The arrays under `key` in the cache, filled from where an earlier call was stopped; memory-mapped, read-only."""
    folder = cache_dir() / "features" / key
    count = shapes["image_features"][0][0]
    progress = folder / "done.json"
    done = json.loads(progress.read_text())["images"] if progress.exists() else 0
    if done < count:
        folder.mkdir(parents=True, exist_ok=True)
        present = sum(path.stat().st_size for path in folder.glob("*.npy"))
        free = shutil.disk_usage(folder).free
        if needed - present > free:
            raise OSError(
                f"the features of {title} need {needed / 1e9:.1f} GB in {folder}, which has {free / 1e9:.1f} GB free; "
                "make room, set $IQE_JAX_CACHE to another disk, or halve them with --train.feature-dtype bfloat16"
            )

        def save(images: int) -> None:
            for array in arrays.values():
                array.flush()
            write_whole(progress, json.dumps({"images": images}))

        arrays = {}
        for name, (shape, dtype) in shapes.items():
            mode = "r+" if done else "w+"
            stored = np.dtype(np.uint16) if dtype == ml_dtypes.bfloat16 else dtype
            file = np.lib.format.open_memmap(folder / f"{name}.npy", mode, stored, shape)
            arrays[name] = file.view(dtype) if stored != dtype else file
        fill(arrays, done, save)
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in shapes}
    return {name: array.view(shapes[name][1]) for name, array in arrays.items()}


def _key(model: IqeClip, frozen: Params, samples: Sequence[Sample], config: Config) -> str:
    """Digest of all that the features depend on: weights, preprocessing, and the files by path, size and time."""
    settings = model.config
    hasher = hashlib.blake2b(digest_size=16)
    hasher.update(weights.digest(frozen["vision"]).encode())
    preprocessing = (settings.image_size, settings.levels, settings.activation, settings.normalisation, settings.dtype)
    hasher.update(repr((preprocessing, config.train.feature_dtype)).encode())
    for sample in samples:
        for path in (sample.image, sample.mask):
            if path is not None:
                status = path.stat()
                hasher.update(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}\n".encode())
    return hasher.hexdigest()


def _dtype(config: Config) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if config.train.feature_dtype == "bfloat16" else np.float32)

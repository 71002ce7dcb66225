"""Frozen features: the image tower's outputs, computed once and kept in memory or on disk.

Few-shot keeps those of augmented support images; zero-shot those of whole test splits, on disk in shards, each written
whole by one process and read by all. They are found again only by the digest of weights, preprocessing and files.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Float, Int

from iqe_jax import processes, weights
from iqe_jax.cache import cache_dir
from iqe_jax.config import Config, DataConfig
from iqe_jax.data.bmad import Sample
from iqe_jax.data.pipeline import image_batches
from iqe_jax.feature_files import OnDisk, check_room, is_whole, write
from iqe_jax.models.iqe_clip import IqeClip, Params
from iqe_jax.models.layers import TOWER_OPTIONS
from iqe_jax.progress import track
from iqe_jax.sharding import Layout, behind, reader_groups
from iqe_jax.train_state import Batch

SHARD = 64  # images in one folder on disk: beside the batches at work all that a stopped process computes again
FORM = 1  # to be raised where other numbers come of the same weights and files: what was kept before is not taken then

Check = Callable[[], object]  # called between two batches; may raise to stop
Arrays = dict[str, np.ndarray]


@partial(jax.jit, static_argnames=("model", "layout"), compiler_options=TOWER_OPTIONS)
def run_tower(
    model: IqeClip, frozen: Params, images: jax.Array, layout: Layout
) -> tuple[Float[jax.Array, "level batch patch width"], Float[jax.Array, "batch dim"]]:
    """Features of a batch of images, split over the mesh as the batch is."""
    features = model.features(frozen, images)
    found = (features.patch_tokens, features.image_features)
    return jax.lax.with_sharding_constraint(found, (layout.batch_at(1), layout.batch))


@dataclass(frozen=True)
class FeatureSet:
    """Kept features of n images. `masks` (0 or 1) is None for sets that have none."""

    patch_tokens: "Float[np.ndarray, 'image level patch width'] | OnDisk"
    image_features: Float[np.ndarray, "image dim"]
    masks: "Int[np.ndarray, 'image side side'] | OnDisk | None"
    labels: Float[np.ndarray, " image"]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    @property
    def in_memory(self) -> int:
        """Bytes of the patch tokens, which are nearly all, where they are in memory; 0 where they are on disk."""
        return self.patch_tokens.nbytes if isinstance(self.patch_tokens, np.ndarray) else 0

    def batch(self, indices: Int[np.ndarray, " batch"], weight: Float[np.ndarray, " batch"]) -> Batch:
        """The images at `indices` as one batch of NumPy arrays."""
        tokens = np.stack([self.patch_tokens[i] for i in indices], 1)
        masks = None if self.masks is None else np.stack([self.masks[i] for i in indices]).astype(np.float32)
        return Batch(tokens, self.image_features[indices], masks, self.labels[indices], weight)

    def batches(self, batch_size: int, layout: Layout) -> Iterator[Batch]:
        """All images in order, laid out; the last batch is padded with weight 0."""
        size = layout.padded(batch_size)
        for start in range(0, len(self), size):
            indices = start + layout.rows(size)
            local = self.batch(np.minimum(indices, len(self) - 1), (indices < len(self)).astype(np.float32))
            yield local.placed(layout, size)


def stream(
    model: IqeClip,
    frozen: Params,
    samples: Sequence[Sample],
    batch_size: int,
    data: DataConfig,
    layout: Layout,
) -> Iterator[Batch]:
    """Laid-out batches of images in order, features computed on the way; a process decodes its devices' rows alone."""
    size = layout.padded(batch_size)
    starts = range(0, len(samples), size)
    local = [_at(samples, start + row) for start in starts for row in layout.rows(size)]
    has_masks = any(sample.mask for sample in samples)
    return _stream(model, frozen, local, size, has_masks, data, layout, regions=has_masks)


def _at(samples: Sequence[Sample], index: int) -> Sample | None:
    return samples[index] if index < len(samples) else None


def _stream(
    model: IqeClip,
    frozen: Params,
    local: Sequence[Sample | None],
    size: int,
    has_masks: bool,
    data: DataConfig,
    layout: Layout,
    *,
    regions: bool = False,
) -> Iterator[Batch]:
    """Batches of `size` from this process's rows of all of them, one batch after the other; None is padding."""
    batches = image_batches(
        local,
        model.config.image_size,
        len(layout.rows(size)),
        workers=data.workers,
        processes=data.processes,
        with_masks=has_masks,
        with_regions=regions,
    )
    for images in batches:
        with layout.active():
            features = run_tower(model, frozen, layout.place(images["image"], size), layout)
        masks = images["mask"] if has_masks else None
        rest = layout.place((masks, images["label"], images["weight"], images.get("region")), size)
        yield Batch(features[0], features[1], *rest)


def of_arrays(
    model: IqeClip,
    frozen: Params,
    images: Float[np.ndarray, "image side side 3"],
    masks: Float[np.ndarray, "image side side"] | None,
    labels: Float[np.ndarray, " image"],
    config: Config,
    layout: Layout,
) -> FeatureSet:
    """Features of images already in memory, kept in memory of every process; masks are binarised at > 0.5."""
    size, dtype = at_once(model, config, layout, gathered=True), kept_dtype(config)

    def batches() -> Iterator[dict[str, jax.Array]]:
        for start in track(range(0, len(images), size), "Image tower"):
            batch = images[start : start + size]
            local = batch[np.minimum(layout.rows(size), len(batch) - 1)]
            with layout.active():
                tokens, pooled = run_tower(model, frozen, layout.place(local, size), layout)
            kept = {"patch_tokens": jnp.moveaxis(tokens, 0, 1).astype(dtype), "image_features": pooled}
            yield layout.whole(kept)

    arrays = _joined(behind(batches()), len(images))
    binary = None if masks is None else (masks > 0.5).astype(np.uint8)
    return FeatureSet(arrays["patch_tokens"], arrays["image_features"], binary, labels.astype(np.float32))


def _joined(batches: Iterable[Mapping[str, Any]], count: int) -> Arrays:
    """The first `count` rows of batches that come one after the other, of which no more than one is held besides."""
    whole: Arrays = {}
    first = 0
    for batch in batches:
        for name, array in batch.items():
            rows = np.asarray(array)
            if name not in whole:
                whole[name] = np.empty((count, *rows.shape[1:]), rows.dtype)
            into = whole[name][first : first + len(rows)]
            into[:] = rows[: len(into)]
        first += len(batch["image_features"])
    return whole


def at_once(model: IqeClip, config: Config, layout: Layout, *, gathered: bool = False) -> int:
    """Images that the tower and the scoring take at once, on all devices, `gathered` where all processes get them."""
    size = layout.at_once(config.eval.batch_size, model.bytes_at_work)
    return layout.gathered_at_once(size, kept_bytes(model, config, masks=True)) if gathered else size


def size_in_bytes(model: IqeClip, samples: Sequence[Sample], config: Config) -> int:
    """Bytes that the kept features and masks of `samples` take."""
    return len(samples) * kept_bytes(model, config, masks=any(sample.mask for sample in samples))


def kept_bytes(model: IqeClip, config: Config, *, masks: bool) -> int:
    """Bytes that are kept of one image, of a set with masks or without."""
    settings = model.config
    tokens = len(settings.levels) * model.grid**2 * model.clip.vision_width * kept_dtype(config).itemsize
    return tokens + model.clip.embed_dim * 4 + (settings.image_size**2 if masks else 0)


def of_samples(
    model: IqeClip,
    frozen: Params,
    samples: Sequence[Sample],
    config: Config,
    layout: Layout,
    *,
    title: str,
    budget: float,
    check: Check = lambda: None,
) -> FeatureSet:
    """Features of image files, in memory or on disk as `config.train.features` and `budget` (bytes left) say.

    Raises OSError before any work when the disk has no room for them, and ValueError when a process does not see what
    another has written.
    """
    needed = size_in_bytes(model, samples, config)
    where = config.train.features
    if where == "auto":
        where = "memory" if needed <= budget else "disk"
    labels = np.array([sample.label for sample in samples], np.float32)
    if where == "disk":
        return _on_disk(model, frozen, samples, config, layout, needed, title, check, labels)

    size = at_once(model, config, layout, gathered=True)
    batches = stream(model, frozen, samples, size, config.data, layout)
    total = -(-len(samples) // size)

    def gathered() -> Iterator[dict[str, jax.Array]]:
        for batch in track(batches, f"Image tower, {title}", total=total):
            check()
            yield layout.whole(_arrays(batch, kept_dtype(config)))

    arrays = _joined(behind(gathered()), len(samples))
    return FeatureSet(arrays["patch_tokens"], arrays["image_features"], arrays.get("masks"), labels)


def _arrays(batch: Batch, dtype: np.dtype) -> dict[str, jax.Array]:
    """What is kept of a batch, image first."""
    arrays = {"patch_tokens": jnp.moveaxis(jnp.asarray(batch.patch_tokens), 0, 1).astype(dtype)}
    arrays["image_features"] = jnp.asarray(batch.image_features)
    if batch.masks is not None:
        arrays["masks"] = (jnp.asarray(batch.masks) > 0.5).astype(jnp.uint8)
    return arrays


def _on_disk(
    model: IqeClip,
    frozen: Params,
    samples: Sequence[Sample],
    config: Config,
    layout: Layout,
    needed: int,
    title: str,
    check: Check,
    labels: np.ndarray,
) -> FeatureSet:
    """The features in the cache, with those shards computed first that are not there yet."""
    key = key_of(model, layout.gather(frozen["vision"]), samples, config)
    if others := processes.same_everywhere(key.encode()):
        raise ValueError(
            f"processes {others} see other files of {title} than process 0, by path, size or time; put the data where "
            "all processes share it, or use --train.features memory"
        )
    folder = cache_dir() / "features" / key
    shards = [folder / f"{number:05d}" for number in range(-(-len(samples) // SHARD))]
    # Each process looks for itself, as file systems show new files to others late; what one misses is made again.
    types = {"patch_tokens": kept_dtype(config), "image_features": np.dtype(np.float32)}
    if any(sample.mask for sample in samples):
        types["masks"] = np.dtype(np.uint8)
    with processes.together(f"look for the features of {title}"):
        whole = [is_whole(shard, types) for shard in shards]
    there = processes.everywhere(np.array(whole))
    missing = [shard for shard, done in zip(shards, there, strict=True) if not done]
    if missing:
        with processes.together(f"keep the features of {title}"):
            folder.mkdir(parents=True, exist_ok=True)
            if processes.is_main():
                for shard in missing:  # one that is damaged makes room
                    if not is_whole(shard, types):
                        shutil.rmtree(shard, ignore_errors=True)
            check_room(folder, needed * len(missing) / len(shards), title)
        _fill(model, frozen, samples, config, layout, missing, title, check)
        processes.barrier("features")
    with processes.together(f"read the features of {title}"):
        if lost := next((shard for shard in shards if not processes.seen(shard)), None):
            raise ValueError(
                f"{lost} is not there, though another process wrote it: $IQE_JAX_CACHE must be a folder that all "
                "processes share, or use --train.features memory"
            )
        image_features = np.concatenate([np.load(shard / "image_features.npy") for shard in shards])
        del types["image_features"]
        found = {name: OnDisk([shard / f"{name}.npy" for shard in shards], dtype) for name, dtype in types.items()}
    return FeatureSet(found["patch_tokens"], image_features, found.get("masks"), labels)


def _fill(
    model: IqeClip,
    frozen: Params,
    samples: Sequence[Sample],
    config: Config,
    layout: Layout,
    missing: Sequence[Path],
    title: str,
    check: Check,
) -> None:
    """Compute the shards `missing`, dealt out to the processes, which all take equally many steps."""
    groups = reader_groups(layout)
    own = next(i for i, group in enumerate(groups) if jax.process_index() in group)
    writes = groups[own][0] == jax.process_index()
    size = at_once(model, config, layout)
    rows = len(layout.rows(size))

    def images_of(shard: Path) -> Sequence[Sample]:
        first = int(shard.name) * SHARD
        return samples[first : first + SHARD]

    dealt = [missing[i :: len(groups)] for i in range(len(groups))]
    steps = max(-(-sum(len(images_of(shard)) for shard in shards) // rows) for shards in dealt)
    local: list[Sample | None] = [sample for shard in dealt[own] for sample in images_of(shard)]
    local += [None] * (steps * rows - len(local))
    has_masks = any(sample.mask for sample in samples)

    queue = list(dealt[own])
    buffer: list[Arrays] = []
    batches = _stream(model, frozen, local, size, has_masks, config.data, layout)
    batches = track(batches, f"Image tower, {title}", total=steps)
    for arrays in behind(_arrays(batch, kept_dtype(config)) for batch in batches):
        check()
        buffer.append({name: layout.local(x) for name, x in arrays.items()})
        while queue and sum(len(part["image_features"]) for part in buffer) >= (count := len(images_of(queue[0]))):
            whole = {name: np.concatenate([part[name] for part in buffer]) for name in buffer[0]}
            shard = queue.pop(0)
            if writes:
                write(shard, {name: array[:count] for name, array in whole.items()})
            buffer = [{name: array[count:] for name, array in whole.items()}]


def key_of(model: IqeClip, vision: Params, samples: Sequence[Sample], config: Config, variants: str = "") -> str:
    """Digest of all that the features depend on: weights, preprocessing, and the files by path, size and time."""
    settings = model.config
    hasher = hashlib.blake2b(digest_size=16)
    hasher.update(weights.digest(vision).encode())
    preprocessing = (settings.image_size, settings.levels, settings.activation, settings.normalisation, settings.dtype)
    hasher.update(repr((FORM, preprocessing, variants, kept_dtype(config).name, SHARD)).encode())
    for sample in samples:
        for path in (sample.image, sample.mask):
            if path is not None:
                status = path.stat()
                hasher.update(os.fsencode(path.resolve()) + f" {status.st_size} {status.st_mtime_ns}\n".encode())
    return hasher.hexdigest()


def kept_dtype(config: Config) -> np.dtype:
    """The type that patch tokens are kept in: bfloat16 where that is asked for, or all that the tower computes."""
    asked = (config.train.feature_dtype, config.model.dtype)
    return np.dtype(ml_dtypes.bfloat16 if "bfloat16" in asked else np.float32)

"""What a run trains on: the augmented support images of few-shot, the other sets' test splits of zero-shot.

Brings together samples (data/), frozen features (features.py) and the order of batches; the loop is in trainer.py.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from iqe_jax import features, processes
from iqe_jax.cache import cache_dir
from iqe_jax.config import Config
from iqe_jax.data import phantoms
from iqe_jax.data.bmad import Sample, find_folder, load_split
from iqe_jax.data.pipeline import FewShotBatches, IndexBatch, LeaveOneOutBatches, image_batches, results_ahead
from iqe_jax.data.supports import draw_support, held_out, read_support
from iqe_jax.data.transforms import AUGMENTATIONS, augment
from iqe_jax.feature_files import write
from iqe_jax.features import Check, FeatureSet
from iqe_jax.models.iqe_clip import IqeClip, Params
from iqe_jax.progress import console
from iqe_jax.sharding import Layout
from iqe_jax.train_state import Batch

AHEAD = 4  # batches that are gathered before their turn
FEW = 64  # images that are told apart by all their bytes
NORMALS_ONLY = (
    "every term of the loss is then least when all is called normal, so nothing would be learnt. Add some anomalous "
    "images, or train on other sets (--data.shots 0 --data.sources …): for these, normal images alone are enough to "
    "set a threshold by"
)


@dataclass(frozen=True)
class Plan:
    """The image files of a run, by role. Reading them has not begun; all that can be missing has been looked for."""

    training: dict[str, list[Sample]]
    """By set: few-shot the support, zero-shot whole test splits."""
    selection: dict[str, list[Sample]]
    """By rule, what weights are chosen on: the held-out part of the target's valid pool, or for paper the test set."""

    @property
    def names(self) -> list[str]:
        """Names of all training images."""
        return [sample.name for samples in self.training.values() for sample in samples]

    @property
    def samples(self) -> list[Sample]:
        """All images that will be read, of training and then of the choice of weights."""
        roles = (self.training, self.selection)
        return [sample for role in roles for samples in role.values() for sample in samples]

    @cached_property
    def digest(self) -> str:
        """A word for which images are trained on, set by set and in which order.

        By name and size, and by content where they are as few as support images are; not by place and time, as a run
        may go on on another machine.
        """
        return digest_of(self.training, whole=len(self.names) <= FEW)

    def order(self, config: Config) -> FewShotBatches | LeaveOneOutBatches:
        """Which images each step sees, known from the step's number alone."""
        seed, size = config.train.seed, config.train.batch_size
        if config.zero_shot:
            return LeaveOneOutBatches([len(samples) for samples in self.training.values()], size, seed)
        (support,) = self.training.values()
        return FewShotBatches(len(support) * AUGMENTATIONS, size, seed)


def digest_of(named: Mapping[str, Sequence[Sample]], *, whole: bool = False) -> str:
    """A word for which images these are, in their order: by names and sizes, or, where `whole`, names and content."""
    hasher = hashlib.blake2b(digest_size=8)
    for name, samples in named.items():
        for sample in samples:
            hasher.update(os.fsencode(f"{name} {sample.name}\n"))
            for path in filter(None, (sample.image, sample.mask)):
                hasher.update(path.read_bytes() if whole else f"{path.stat().st_size}\n".encode())
    return hasher.hexdigest()


def render_phantoms(config: Config) -> None:
    """Make the phantom sets that `config` needs, where it asks for phantoms and they are not there."""
    if config.data.phantoms:
        needed = {config.data.dataset, *(config.data.sources if config.zero_shot else ())}
        phantoms.make_phantoms(config.data.root, [name for name in phantoms.SETS if name in needed])


def plan(config: Config, rules: Sequence[str] | None = None) -> Plan:
    """Find the images of a run that follows `rules`, or those of the config.

    Raises FileNotFoundError or ValueError, saying what is missing or too few and what to do.
    """
    data, rules = config.data, config.rules if rules is None else rules
    if config.zero_shot:
        sources = [name for name in data.sources if name != data.dataset]
        if not sources:
            raise ValueError(
                f"data.sources is {data.sources}: besides the target {data.dataset} none is left to train on"
            )
        _check_apart(data.root, data.dataset, sources)
        training = {name: load_split(data.root, name, "test") for name in sources}
        if not any(sample.label for samples in training.values() for sample in samples):
            raise ValueError(f"the test splits of {', '.join(sources)} hold no anomalous image: {NORMALS_ONLY}")
        support = []
    else:
        valid = load_split(data.root, data.dataset, "valid")
        if not any(sample.label for sample in valid):
            raise ValueError(f"the valid split of {data.dataset} holds no anomalous image: {NORMALS_ONLY}")
        if data.support_list:
            support = read_support(data.support_list, valid, row=data.support_row)
            named = [sum(sample.label == label for sample in support) for label in (0, 1)]
            if named != [data.shots, data.shots]:
                raise ValueError(
                    f"row {data.support_row} of {data.support_list} names {named[0]} normal and {named[1]} anomalous "
                    f"images, but data.shots is {data.shots}; give the list of that k, or --data.shots {named[0]}"
                )
        else:
            support = draw_support(valid, data.shots, config.train.seed)
        training = {data.dataset: support}

    selection = {}
    if "valid" in rules:
        selection["valid"] = held_out(load_split(data.root, data.dataset, "valid"), support)
        classes = [sum(sample.label == label for sample in selection["valid"]) for label in (0, 1)]
        if min(classes) == 0:
            asked = "train.keep is valid" if config.train.keep == "valid" else "eval.protocols has valid"
            raise ValueError(
                f"{asked}, but data.shots {data.shots} leaves {classes[0]} normal and {classes[1]} of the "
                f"anomalous images of {data.dataset}'s valid pool to choose by; use fewer shots or --train.keep last"
            )
    if "paper" in rules:
        selection["paper"] = load_split(data.root, data.dataset, "test")
        if len({sample.label for sample in selection["paper"]}) < 2:
            raise ValueError(
                f"the test split of {data.dataset} has images of one class only: the rule paper cannot choose by it, "
                "use --train.keep last"
            )
    return Plan(training, selection)


def _check_apart(root: Path, target: str, sources: Sequence[str]) -> None:
    """Raise ValueError where a source is the target's folder under another name, whose test images must not train."""
    try:
        place = find_folder(root, target).resolve()
    except FileNotFoundError:  # training needs no target: it may be elsewhere
        return
    if same := [name for name in sources if find_folder(root, name).resolve() == place]:
        raise ValueError(
            f"data.sources has {', '.join(same)}, found in {place}, which is the target {target} itself: name the "
            "target as they do, or give as data.root the folder that has all sets beside each other"
        )


def load(
    config: Config, plan: Plan, model: IqeClip, frozen: Params, layout: Layout, check: Check = lambda: None
) -> list[FeatureSet]:
    """The features of `plan.training`, one set after the other in its order."""
    if not config.zero_shot:
        (support,) = plan.training.values()
        return [_support_features(config, support, model, frozen, layout)]
    sets, budget = [], config.train.feature_memory_gb * 1e9
    for name, samples in plan.training.items():
        kept = features.of_samples(model, frozen, samples, config, layout, title=name, budget=budget, check=check)
        budget -= kept.in_memory
        sets.append(kept)
    return sets


def _support_features(
    config: Config, support: Sequence[Sample], model: IqeClip, frozen: Params, layout: Layout
) -> FeatureSet:
    """Features of the augmented support, in memory; read from the cache where an earlier run has left them there.

    With `train.features` memory nothing is read or left. Others of few-shot runs make room in the cache, but one that
    cannot be written to costs the next run the same work, not this one its features.
    """
    if config.train.features == "memory":
        return _augmented_features(config, support, model, frozen, layout)
    vision, variants = layout.gather(frozen["vision"]), f"{AUGMENTATIONS} augmentations"
    folder = cache_dir() / "features" / features.key_of(model, vision, support, config, variants)
    found = _read(folder, config, masks=any(sample.mask for sample in support))
    # Where one process lacks them all compute, as they share the image tower's work.
    if processes.everywhere(np.array([found is not None]))[0]:
        assert found is not None
        return found
    found = _augmented_features(config, support, model, frozen, layout)
    if processes.is_main():
        arrays = _arrays(found)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(folder, ignore_errors=True)  # one that could not be read
            needed, limit = sum(array.nbytes for array in arrays.values()), config.train.feature_disk_gb
            if _room(folder.parent, needed, limit):
                write(folder, arrays)
            else:
                console.print(
                    f"The features are not kept for the next run: {needed / 1e9:.2g} GB is more than the {limit:g} of "
                    "--train.feature-disk-gb",
                    markup=False,
                )
        except OSError as error:
            console.print(f"The features are not kept for the next run: {error}", markup=False)
    return found


def _arrays(kept: FeatureSet) -> dict[str, Any]:
    """The arrays that there are, by name."""
    return {name: array for name, array in vars(kept).items() if array is not None}


def _room(root: Path, needed: int, limit: float) -> bool:
    """Whether `needed` bytes fit in `limit` GB, those kept by few-shot runs being removed as far as it takes.

    Such a run reads them whole, so none can still need what is removed. Zero-shot's, in shards, are left alone.
    """
    if needed > limit * 1e9:
        return False
    read_last = sorted(root.glob("*/labels.npy"), key=lambda labels: labels.stat().st_mtime)
    sizes = {labels.parent: sum(path.stat().st_size for path in labels.parent.iterdir()) for labels in read_last}
    total = needed + sum(sizes.values())
    for folder, size in sizes.items():
        if total <= limit * 1e9:
            break
        shutil.rmtree(folder, ignore_errors=True)
        total -= size
    return True


def _augmented_features(
    config: Config, support: Sequence[Sample], model: IqeClip, frozen: Params, layout: Layout
) -> FeatureSet:
    size = config.model.image_size
    has_masks = any(sample.mask for sample in support)
    (batch,) = image_batches(support, size, len(support), workers=0, with_masks=has_masks)
    images, masks = augment(batch["image"], batch["mask"])
    labels = np.tile(batch["label"], len(images) // len(support))
    return features.of_arrays(model, frozen, images, masks if has_masks else None, labels, config, layout)


def _read(folder: Path, config: Config, *, masks: bool) -> FeatureSet | None:
    """The features in `folder`, or None where it does not hold them whole."""
    try:
        arrays = {path.stem: np.load(path) for path in folder.glob("*.npy")}
        tokens = arrays.pop("patch_tokens").view(features.kept_dtype(config))
        found = FeatureSet(tokens, arrays["image_features"], arrays["masks"] if masks else None, arrays["labels"])
    except (OSError, ValueError, EOFError, KeyError):
        return None
    with contextlib.suppress(OSError):  # of a cache that can only be read
        os.utime(folder / "labels.npy")  # was read now, says its time: see `_room`
    return found


def batch_at(
    sets: Sequence[FeatureSet],
    order: FewShotBatches | LeaveOneOutBatches,
    step: int,
    rows: Int[np.ndarray, " rows"],
) -> Batch:
    """The `rows` of the batch that optimiser step `step` (from 0) trains on; rows past its end have weight 0."""
    chosen = _chosen(order, step, rows)
    return sets[chosen.set_index].batch(chosen.indices, chosen.weight)


def _chosen(order: FewShotBatches | LeaveOneOutBatches, step: int, rows: Int[np.ndarray, " rows"]) -> IndexBatch:
    """What `rows` of the batch of step `step` are; those past its end are its first image, with weight 0."""
    chosen = order[step]
    there = rows < len(chosen.indices)
    rows = np.where(there, rows, 0)
    return IndexBatch(chosen.set_index, chosen.indices[rows], chosen.weight[rows] * there.astype(np.float32))


def batches_ahead(
    sets: Sequence[FeatureSet],
    order: FewShotBatches | LeaveOneOutBatches,
    start: int,
    total: int,
    rows: Int[np.ndarray, " rows"],
) -> Iterator[tuple[int, Batch]]:
    """Steps `start` … `total` with the `rows` of their batches, which threads gather ahead of their use."""
    with ThreadPoolExecutor(2, "batches") as pool:
        jobs = ((0, partial(batch_at, sets, order, step, rows)) for step in range(start, total))
        yield from zip(range(start, total), results_ahead(pool, jobs, AHEAD), strict=True)


def on_devices(sets: Sequence[FeatureSet], layout: Layout) -> list[Batch] | None:
    """All features of each set on every device, where they fit in its `budget`; None where they do not.

    Nor on CPUs, which have no other memory than the host's. All processes must ask, and get the same.
    """
    arrays = [_arrays(kept) for kept in sets]
    if not all(isinstance(x, np.ndarray) for own in arrays for x in own.values()):
        return None
    if sum(x.nbytes for own in arrays for x in own.values()) > layout.budget:
        return None
    placed = []
    for own in arrays:
        own |= {"patch_tokens": np.moveaxis(own["patch_tokens"], 1, 0), "weight": np.ones_like(own["labels"])}
        own = layout.put(own, dict.fromkeys(own, layout.replicated))
        rest = own["labels"], own["weight"]
        placed.append(Batch(own["patch_tokens"], own["image_features"], own.get("masks"), *rest))
    return placed


def batches_of(
    kept: Sequence[Batch], order: FewShotBatches | LeaveOneOutBatches, start: int, total: int, layout: Layout, size: int
) -> Iterator[tuple[int, Batch]]:
    """Steps `start` … `total` with their batches of `size`, taken on the devices from what `on_devices` gave."""
    # By name, as XLA names where an array lies in its own way, and the step was compiled for ours.
    take = [jax.jit(_taken, out_shardings=own.map(lambda _, axis: layout.batch_at(axis))) for own in kept]
    for step in range(start, total):
        chosen = _chosen(order, step, layout.rows(size))
        rows = layout.place((chosen.indices, chosen.weight), size)
        yield step, take[chosen.set_index](kept[chosen.set_index], *rows)


def _taken(kept: Batch, indices: Int[jax.Array, " batch"], weight: Float[jax.Array, " batch"]) -> Batch:
    batch: Any = kept.map(lambda x, axis: jnp.take(jnp.asarray(x), indices, axis, mode="clip"))
    masks = None if batch.masks is None else batch.masks.astype(jnp.float32)
    return batch.replace(masks=masks, weight=weight)

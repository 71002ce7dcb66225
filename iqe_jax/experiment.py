"""What train.py does, one seed after the other, and what --dry-run prints.

Everything that can be missing is looked for before the first image is read.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import jax
from rich.console import Console

from iqe_jax import features, processes, training_data
from iqe_jax.checkpoint import RunDirectory, other_than
from iqe_jax.config import Config, to_json
from iqe_jax.data.bmad import Sample, load_split
from iqe_jax.data.pipeline import check_files
from iqe_jax.data.transforms import AUGMENTATIONS
from iqe_jax.footprint import evaluation_footprints, footprint_table, train_footprint
from iqe_jax.models.iqe_clip import IqeClip, Params
from iqe_jax.processes import Preemption
from iqe_jax.progress import console
from iqe_jax.sharding import Layout, make_layout
from iqe_jax.trainer import Trainer
from iqe_jax.weights import describe, load_model


@dataclass(frozen=True)
class Trained:
    """A model with all its weights, laid out; `others` are those that further rules keep."""

    model: IqeClip
    frozen: Params
    trainable: Params
    others: dict[str, Params] = field(default_factory=dict)


def run_training(config: Config) -> Trained:
    """Train the run of `config` to its end, or load it where that was reached before; of several seeds the last."""
    layout = make_layout(config.mesh)
    with Preemption() as preemption:
        first, *rest = seeds(config)
        trained = train_run(first, layout, preemption)
        for run in rest:
            del trained  # its weights make room for the next run's
            trained = train_run(run, layout, preemption)
        return trained


def seeds(config: Config) -> Iterator[Config]:
    """The runs that `config.eval.seeds` asks for, each with a config of its own; a support list gives row after row."""
    count = config.eval.seeds
    for i in range(count):
        seed = config.train.seed + i
        data, train = config.data, dataclasses.replace(config.train, seed=seed)
        if data.support_list:
            data = dataclasses.replace(data, support_row=data.support_row + i)
        run_dir = config.run_dir / f"seed{seed}" if config.run_dir and count > 1 else config.run_dir
        alone = dataclasses.replace(config.eval, seeds=1)
        yield dataclasses.replace(config, data=data, train=train, eval=alone, run_dir=run_dir)


def train_run(config: Config, layout: Layout, preemption: Preemption) -> Trained:
    """One run, of one seed, brought to its end or loaded where that was reached before."""
    render(config)
    with processes.together("start training"):
        run = RunDirectory(config)
        plan = training_data.plan(config, run.rules)
    processes.agree("settings or training images", f"{plan.digest} {to_json(config)}")
    processes.agree("images to choose weights by", training_data.digest_of(plan.selection))
    run.agree()
    if run.finished_at is None:
        look_at(plan.samples)
    model, frozen = load_model(config.model, layout)
    with processes.together("begin the run"):
        trainer = Trainer(config, model, frozen, plan, layout, preemption)
    if run.finished_at == trainer.total:
        others = other_than((run.kept or {}).get("trained_on", {}), trainer.trained_on)
        if "clip" in others:
            raise ValueError(
                f"{run.path} was trained with other CLIP weights than {config.model.clip} holds now; bring those back, "
                "or start again with another --run-dir"
            )
        note = ", on other training images than are here now" if others else ""
        console.print(f"{run.path} is trained already, {trainer.total} steps{note}")
        return _kept(trainer)
    protocol = "zero-shot" if config.zero_shot else f"few-shot, k = {config.data.shots}"
    console.print(
        f"Training {config.name} ({protocol}) on {len(plan.names)} images of {', '.join(plan.training)}, "
        f"{trainer.total} steps, in {run.path}"
    )
    trainer.train()
    return _kept(trainer)


def _kept(trainer: Trainer) -> Trained:
    others = {rule: trainer.load_kept(rule) for rule in trainer.config.rules[1:]}
    return Trained(trainer.model, trainer.frozen, trainer.load_kept(), others)


def dry_run(config: Config, *, scoring: bool = False) -> None:
    """Look at the images of a run, compile its programs, and print what they need on each device; nothing is run.

    Where evaluate.py asks, for `scoring`, and a given adapter is all that is scored, training is left out. Weights are
    not loaded where their sizes are known. Raises as `run_training` does for what is missing, and ValueError where the
    mesh does not fit the model.
    """
    render(config)
    layout = make_layout(config.mesh)
    with processes.together("find what training needs"):
        run = RunDirectory(config)
        scored = load_split(config.data.root, config.data.dataset, "test") if scoring else []
        plan = None if scoring and config.model.adapter and not run.begun else training_data.plan(config)
        read = [*scored, *(valid_pool(config) if scoring else ()), *(plan.samples if plan else ())]
        model = describe(config.model)
    look_at(read)
    console.print("Compiling, which for a full-size model takes minutes")
    programs = evaluation_footprints(model, config, layout, masks=not scored or _has_masks(scored))
    kept = None
    if plan is not None:
        masks = any(map(_has_masks, plan.training.values()))
        programs = [train_footprint(model, config, layout, masks=masks), *programs]
        kept = _kept_features(config, plan, model, layout)
    if processes.is_main():
        title = f"{config.name} on {layout.mesh.size} devices, {dict(layout.mesh.shape)}"
        Console().print(footprint_table(title, programs, features=kept))


def _kept_features(config: Config, plan: training_data.Plan, model: IqeClip, layout: Layout) -> tuple[str, int]:
    """Where the features of the images of training, and of choosing weights, are kept, in words, and their bytes."""
    repeated = 1 if config.zero_shot else AUGMENTATIONS
    size = sum(features.size_in_bytes(model, samples * repeated, config) for samples in plan.training.values())
    chosen_by = sum(features.size_in_bytes(model, samples, config) for samples in plan.selection.values())
    # Those of augmented images are always in memory; whole splits are where there is room.
    splits, kept = chosen_by + (size if config.zero_shot else 0), config.train.features
    where = f"in the memory of each process{' and each device' if size <= layout.budget else ''}"
    if not config.zero_shot and kept != "memory":
        where += ", and once on disk for the next run"
    if splits and (kept == "disk" or (kept == "auto" and splits > config.train.feature_memory_gb * 1e9)):
        what = "on disk" if kept == "disk" else "on disk, as far as --train.feature-memory-gb is passed"
        where = what if config.zero_shot else f"{where}; those that weights are chosen by {what}"
    return where, size + chosen_by


def _has_masks(samples: list[Sample]) -> bool:
    return any(sample.mask for sample in samples)


def valid_pool(config: Config) -> list[Sample]:
    """The images that an evaluation is calibrated on; none where there is no such split, which is no error there."""
    try:
        return load_split(config.data.root, config.data.dataset, "valid")
    except (FileNotFoundError, ValueError):
        return []


def look_at(samples: Sequence[Sample]) -> None:
    """Look at the headers of image files, each process at its share of them; raises ValueError naming bad ones."""
    with processes.together("use the images"):
        check_files(samples[jax.process_index() :: jax.process_count()])


def render(config: Config) -> None:
    """Make the phantoms that are missing: process 0 first, the others where they do not see what it made."""
    for turn in (True, False):
        with processes.together("render the phantoms"):
            if processes.is_main() == turn:
                training_data.render_phantoms(config)

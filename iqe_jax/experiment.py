"""What train.py and evaluate.py do: find data and weights first, then train, score and report.

Everything that can be missing is looked for before the first image is read.
"""

from dataclasses import dataclass

import jax
import numpy as np
from rich.console import Console

from iqe_jax import calibration, features, processes, report, training_data
from iqe_jax.checkpoint import RunDirectory
from iqe_jax.config import Config, to_json
from iqe_jax.data.bmad import Sample, load_split
from iqe_jax.data.supports import held_out
from iqe_jax.data.transforms import AUGMENTATIONS
from iqe_jax.evaluator import evaluate
from iqe_jax.footprint import evaluation_footprints, footprint_table, train_footprint
from iqe_jax.models.iqe_clip import IqeClip, Params
from iqe_jax.processes import Preemption
from iqe_jax.progress import console, track
from iqe_jax.sharding import Layout, make_layout
from iqe_jax.trainer import Trainer
from iqe_jax.weights import describe, load_adapter, load_model


@dataclass(frozen=True)
class Trained:
    """A model with all its weights, laid out."""

    model: IqeClip
    frozen: Params
    trainable: Params


def run_training(config: Config) -> Trained:
    """Train the run of `config` to its end, or load it where that was reached before."""
    with Preemption() as preemption:
        return _train(config, make_layout(config.mesh), preemption)


def _train(config: Config, layout: Layout, preemption: Preemption) -> Trained:
    _render(config)
    with processes.together("start training"):
        run = RunDirectory(config)
        plan = training_data.plan(config)
    if others := processes.same_everywhere(f"{plan.digest} {to_json(config)}".encode()):
        raise ValueError(f"processes {others} have other settings or training images than process 0")
    with processes.together("load the weights"):
        model, frozen = load_model(config.model, layout)
        trainer = Trainer(config, model, frozen, plan, layout, preemption)
    if run.finished_at == trainer.total:
        console.print(f"{run.path} is trained already, {trainer.total} steps")
        return Trained(model, frozen, trainer.load_kept())
    protocol = "zero-shot" if config.zero_shot else f"few-shot, k = {config.data.shots}"
    console.print(
        f"Training {config.name} ({protocol}) on {len(plan.names)} images of {', '.join(plan.training)}, "
        f"{trainer.total} steps, in {run.path}"
    )
    return Trained(model, frozen, trainer.train())


def dry_run(config: Config) -> None:
    """Look for the images of a run, compile its programs, and print what they need on each device; nothing is run.

    Weights are not loaded where their sizes are known. Raises as `run_training` does for what is missing, and
    ValueError where the mesh does not fit the model.
    """
    _render(config)
    layout = make_layout(config.mesh)
    with processes.together("find what training needs"):
        RunDirectory(config)
        plan = training_data.plan(config)
        model = describe(config.model)
    console.print("Compiling, which for a full-size model takes minutes")
    programs = [train_footprint(model, config, layout), *evaluation_footprints(model, config, layout)]
    if config.zero_shot:
        sizes = [features.size_in_bytes(model, samples, config) for samples in plan.training.values()]
        held = config.train.features == "memory" or sum(sizes) <= config.train.feature_memory_gb * 1e9
        where = "in the memory of each process" if held else "on disk, as far as --train.feature-memory-gb is passed"
    else:
        samples = [sample for own in plan.training.values() for sample in own]
        sizes = [features.size_in_bytes(model, samples * AUGMENTATIONS, config)]
        where = "in the memory of each process"
    if processes.is_main():
        title = f"{config.name} on {layout.mesh.size} devices, {dict(layout.mesh.shape)}"
        Console().print(footprint_table(title, programs, features=(where, sum(sizes))))


def run_evaluation(config: Config) -> dict[str, float]:
    """Score the target's test set, print the table, write metrics.json, scores.csv and heat maps; returns the metrics.

    Raises FileNotFoundError or ValueError, saying what to do, when data or weights are not there, or when a
    zero-shot run has not been trained.
    """
    with Preemption() as preemption:
        return _evaluate(config, make_layout(config.mesh), preemption)


def _evaluate(config: Config, layout: Layout, preemption: Preemption) -> dict[str, float]:
    _render(config)
    with processes.together("start evaluating"):
        run = RunDirectory(config)
        samples = load_split(config.data.root, config.data.dataset, "test")
    if config.model.adapter:
        with processes.together("load the weights"):
            model, frozen = load_model(config.model, layout)
            adapter = load_adapter(model, config.model.adapter)
        trained = Trained(model, frozen, layout.put(adapter, jax.tree.map(lambda _: layout.replicated, adapter)))
        kept = {"rule": "given", "adapter": config.model.adapter}
    else:
        if run.finished_at is None and config.zero_shot:
            raise FileNotFoundError(
                f"no trained adapter in {run.path}; train it first: python train.py with the same arguments "
                f"(--config {config.name} …), or give one with --model.adapter"
            )
        if run.finished_at is None:
            console.print(f"No trained adapter in {run.path}: training it first")
        trained = _train(config, layout, preemption)
        kept = RunDirectory(config).kept or {}
    shown = _shown(samples, config.eval.heatmaps)
    size = config.eval.batch_size
    batches = features.stream(trained.model, trained.frozen, samples, size, config.data, layout)
    evaluation = evaluate(
        trained.model,
        trained.trainable,
        trained.frozen,
        track(batches, f"Scoring {config.data.dataset}", total=-(-len(samples) // layout.padded(size))),
        zero_shot=config.zero_shot,
        layout=layout,
        keep_maps=shown,
        check=preemption.check,
    )
    run.claim()
    with processes.together("write the results"):
        if processes.is_main():
            report.write(config, run.path, samples, evaluation, kept)
    calibrate(config, run, trained, layout, preemption)
    return evaluation.metrics


def calibrate(config: Config, run: RunDirectory, trained: Trained, layout: Layout, preemption: Preemption) -> None:
    """Score the target's valid pool without the support images, and fit and keep what scores mean; print one line.

    A target without such images is not calibrated, which is said and no error.
    """
    try:
        with processes.together("find the images to calibrate on"):
            pool = load_split(config.data.root, config.data.dataset, "valid")
            support = [] if config.zero_shot else training_data.plan(config).training[config.data.dataset]
            samples = held_out(pool, support)
    except (FileNotFoundError, ValueError) as missing:
        console.print(f"Not calibrated: {missing}")
        return
    if not samples:
        console.print("Not calibrated: no valid images are left beside the support")
        return
    batches = features.stream(trained.model, trained.frozen, samples, config.eval.batch_size, config.data, layout)
    evaluation = evaluate(
        trained.model,
        trained.trainable,
        trained.frozen,
        batches,
        zero_shot=config.zero_shot,
        layout=layout,
        check=preemption.check,
    )
    fitted = calibration.fit(evaluation.scores, evaluation.labels)
    with processes.together("write the calibration"):
        if processes.is_main():
            fitted.save(run.path)
    console.print(fitted.summary())


def _render(config: Config) -> None:
    """Make the phantoms that are missing: process 0 first, the others where they do not see what it made."""
    for turn in (True, False):
        with processes.together("render the phantoms"):
            if processes.is_main() == turn:
                training_data.render_phantoms(config)


def _shown(samples: list[Sample], count: int) -> list[int]:
    """Test images whose heat maps are written: evenly spread, half of each class."""
    labels = np.array([sample.label for sample in samples])
    chosen: list[int] = []
    for label, share in ((1, count - count // 2), (0, count // 2)):
        places = np.flatnonzero(labels == label)
        if len(places):
            chosen += places[np.unique(np.linspace(0, len(places) - 1, min(share, len(places)), dtype=int))].tolist()
    return chosen

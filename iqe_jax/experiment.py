"""What train.py and evaluate.py do: find data and weights first, then train, score and report.

Everything that can be missing is looked for before the first image is read.
"""

from dataclasses import dataclass

import numpy as np

from iqe_jax import features, report, training_data
from iqe_jax.checkpoint import RunDirectory
from iqe_jax.config import Config
from iqe_jax.data.bmad import Sample, load_split
from iqe_jax.evaluator import evaluate
from iqe_jax.models.iqe_clip import IqeClip, Params
from iqe_jax.progress import console, track
from iqe_jax.trainer import Trainer
from iqe_jax.weights import load_adapter, load_model


@dataclass(frozen=True)
class Trained:
    """A model with all its weights."""

    model: IqeClip
    frozen: Params
    trainable: Params


def run_training(config: Config) -> Trained:
    """Train the run of `config` to its end, or load it where that was reached before."""
    run = RunDirectory(config)
    training_data.render_phantoms(config)
    plan = training_data.plan(config)
    model, frozen = load_model(config.model)
    trainer = Trainer(config, model, frozen, plan)
    if run.finished_at == trainer.total:
        console.print(f"{run.path} is trained already, {trainer.total} steps")
        return Trained(model, frozen, run.load(model))
    protocol = "zero-shot" if config.zero_shot else f"few-shot, k = {config.data.shots}"
    console.print(
        f"Training {config.name} ({protocol}) on {len(plan.names)} images of {', '.join(plan.training)}, "
        f"{trainer.total} steps, in {run.path}"
    )
    return Trained(model, frozen, trainer.train())


def run_evaluation(config: Config) -> dict[str, float]:
    """Score the target's test set, print the table, write metrics.json, scores.csv and heat maps; returns the metrics.

    Raises FileNotFoundError or ValueError, saying what to do, when data or weights are not there, or when a
    zero-shot run has not been trained.
    """
    run = RunDirectory(config)
    training_data.render_phantoms(config)
    samples = load_split(config.data.root, config.data.dataset, "test")
    if config.model.adapter:
        model, frozen = load_model(config.model)
        trained = Trained(model, frozen, load_adapter(model, config.model.adapter))
        kept = {"rule": "given", "adapter": config.model.adapter}
    else:
        if run.finished_at is None and config.zero_shot:
            raise FileNotFoundError(
                f"no trained adapter in {run.path}; train it first: python train.py with the same arguments "
                f"(--config {config.name} …), or give one with --model.adapter"
            )
        if run.finished_at is None:
            console.print(f"No trained adapter in {run.path}: training it first")
        trained = run_training(config)
        kept = run.kept or {}
    shown = _shown(samples, config.eval.heatmaps)
    size = config.eval.batch_size
    batches = features.stream(trained.model, trained.frozen, samples, size, config.data)
    evaluation = evaluate(
        trained.model,
        trained.trainable,
        trained.frozen,
        track(batches, f"Scoring {config.data.dataset}", total=-(-len(samples) // size)),
        zero_shot=config.zero_shot,
        keep_maps=shown,
    )
    run.claim()
    report.write(config, run.path, samples, evaluation, kept)
    return evaluation.metrics


def _shown(samples: list[Sample], count: int) -> list[int]:
    """Test images whose heat maps are written: evenly spread, half of each class."""
    labels = np.array([sample.label for sample in samples])
    chosen: list[int] = []
    for label, share in ((1, count - count // 2), (0, count // 2)):
        places = np.flatnonzero(labels == label)
        if len(places):
            chosen += places[np.unique(np.linspace(0, len(places) - 1, min(share, len(places)), dtype=int))].tolist()
    return chosen

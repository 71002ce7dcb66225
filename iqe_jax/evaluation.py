"""What evaluate.py does: train where that is still to be done, score the test set, calibrate, and report.

Everything that can be missing is looked for before the first image is read. Training is the business of experiment.py.
"""

import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np

from iqe_jax import calibration, features, processes, report, report_page, training_data, weights
from iqe_jax.checkpoint import RunDirectory
from iqe_jax.config import Config, to_json
from iqe_jax.data.bmad import SETS, Sample, load_split
from iqe_jax.data.phantoms import MARK
from iqe_jax.data.supports import held_out
from iqe_jax.evaluator import Evaluation, evaluate_each
from iqe_jax.experiment import Trained, look_at, render, seeds, train_run, valid_pool
from iqe_jax.models.iqe_clip import Params
from iqe_jax.processes import Preemption
from iqe_jax.progress import console, track
from iqe_jax.report_figures import most_wrong
from iqe_jax.saved_maps import MapFiles
from iqe_jax.sharding import Layout, make_layout
from iqe_jax.weights import chosen_on, load_adapter, load_model


def run_evaluation(config: Config) -> dict[str, float]:
    """Score the target's test set, print the table, write metrics.json, scores.csv and pictures; returns the metrics.

    Where the config asks for them, report.html and all segmentations are written too.

    Of several seeds it writes a summary too, and returns the means. Raises FileNotFoundError or ValueError, saying what
    to do, when data or weights are not there, or when a zero-shot run has not been trained.
    """
    runs, layout = list(seeds(config)), make_layout(config.mesh)
    if len(runs) > 1 and config.model.adapter and not all(weights.begun(run.directory) for run in runs):
        raise ValueError(
            f"eval.seeds is {len(runs)}, but model.adapter gives the weights, which score the same with every seed; "
            "leave one of the two out, or train these seeds from that adapter first: python train.py with the same "
            "arguments"
        )
    with Preemption() as preemption:
        found = [_evaluate(run, layout, preemption) for run in runs]
    if len(runs) == 1:
        return found[0]
    if processes.is_main():
        summaries = [json.loads((run.directory / "metrics.json").read_text()) for run in runs]
        report.write_seeds(seeds_file(config), summaries)
    return {name: float(np.mean([metrics[name] for metrics in found])) for name in found[0]}


def seeds_file(config: Config) -> Path:
    """Where the summary over the seeds of `config` is written: beside their run directories."""
    first, last = config.train.seed, config.train.seed + config.eval.seeds - 1
    if config.run_dir:
        return config.run_dir / f"seeds{first}-{last}.json"
    return config.directory.with_name(f"{config.data.dataset}-k{config.data.shots}-seeds{first}-{last}.json")


def _evaluate(config: Config, layout: Layout, preemption: Preemption) -> dict[str, float]:
    render(config)
    with processes.together("start evaluating"):
        run = RunDirectory(config)
        samples = load_split(config.data.root, config.data.dataset, "test")
        phantoms = (config.data.root / MARK).exists()
        if (spec := SETS.get(config.data.dataset)) and len(samples) != spec.test and not phantoms:
            console.print(
                f"These are {len(samples)} test images, the published set {config.data.dataset} has {spec.test}: "
                "figures cannot be set beside published ones"
            )
        given = config.model.adapter if not run.begun else None  # else the run was trained from it
        if given and len(config.rules) > 1:
            raise ValueError("eval.protocols compares weights that a run keeps, but model.adapter gives the weights")
        pool = valid_pool(config)
    read = training_data.digest_of({"test": samples, "valid": pool})
    processes.agree("settings or images to score", f"{read} {to_json(config)}")
    run.agree()
    look_at([*samples, *pool])
    if given:
        model, frozen = load_model(config.model, layout)
        with processes.together("load the adapter"):
            adapter = load_adapter(model, given)
            seen = chosen_on(given)
        processes.agree(f"weights in {given}", weights.digest(adapter))
        trained = Trained(model, frozen, layout.put(adapter, jax.tree.map(lambda _: layout.replicated, adapter)))
        known = {"rule": "given", "adapter": given}
        facts = {"given": {**known, "chosen_on_test_data": True} if seen else known}
    else:
        if run.finished_at is None and config.zero_shot:
            raise FileNotFoundError(
                f"no trained adapter in {run.path}; train it first: python train.py with the same arguments "
                f"(--config {config.name} …), or give one with --model.adapter"
            )
        if run.finished_at is None:
            console.print(f"No trained adapter in {run.path}: training it first")
        trained = train_run(config, layout, preemption)
        with processes.together("read what training has kept"):
            processes.seen(run.path / "kept.json")
            run = RunDirectory(config)
        run.agree()
        facts = {rule: {"rule": rule, **(run.facts(rule) or {})} for rule in config.rules}
    shown = _shown(samples, config.eval.heatmaps)
    page = phantoms if config.eval.report is None else config.eval.report
    whole = page and len(samples) <= report_page.GALLERY
    files, form = None, config.eval.save_maps
    if form != "none":
        run.claim()
        with processes.together("make room for the maps"):
            files = MapFiles(run.path, samples, config.model.image_size, form) if processes.is_main() else None

    def save(first: int, maps: np.ndarray) -> None:
        with processes.together("write the maps"):
            if files is not None:
                files(first, maps)

    own, *rest = facts
    run.claim()
    fitted = calibrate(config, run, trained, facts[own], layout, preemption)
    evaluations = _score(
        trained,
        {own: trained.trainable, **trained.others},
        samples,
        config,
        layout,
        f"Scoring {config.data.dataset}",
        keep_maps=range(len(samples)) if whole else shown,
        on_maps=save if form != "none" else None,
        check=preemption.check,
    )
    with processes.together("write the results"):
        if processes.is_main():
            others = {rule: (evaluations[rule], facts[rule]) for rule in rest}
            pictures = {i: evaluations[own].maps[i] for i in shown}
            evaluation = dataclasses.replace(evaluations[own], maps=pictures)
            report.write(config, run.path, samples, evaluation, facts[own], others, fitted)
    if page:
        _write_page(config, run, samples, evaluations[own], trained, layout, preemption)
    return evaluations[own].metrics


def _score(
    trained: Trained,
    adapters: Mapping[str, Params],
    samples: list[Sample],
    config: Config,
    layout: Layout,
    title: str,
    **options: Any,
) -> dict[str, Evaluation]:
    """`evaluate_each` on image files, with progress; `options` are its own."""
    size, zero_shot = features.at_once(trained.model, config, layout), config.zero_shot
    if options.get("on_maps"):
        size = layout.gathered_at_once(size, 4 * config.model.image_size**2)
    batches = features.stream(trained.model, trained.frozen, samples, size, config.data, layout)
    batches = track(batches, title, total=-(-len(samples) // size))
    return evaluate_each(
        trained.model, adapters, trained.frozen, batches, zero_shot=zero_shot, layout=layout, **options
    )


def _write_page(
    config: Config,
    run: RunDirectory,
    samples: list[Sample],
    evaluation: Evaluation,
    trained: Trained,
    layout: Layout,
    preemption: Preemption,
) -> None:
    """report.html. Maps that were not kept, as in large test sets, come from a second pass over those images alone."""
    chosen = most_wrong(evaluation.scores, evaluation.labels)[: report_page.GALLERY]
    maps = evaluation.maps
    if not set(chosen) <= set(maps):
        few, own = [samples[i] for i in chosen], {"": trained.trainable}
        options = {"keep_maps": range(len(few)), "check": preemption.check}
        again = _score(trained, own, few, config, layout, "Maps for the report", **options)[""]
        maps = {chosen[i]: found for i, found in again.maps.items()}
    parts = {"the adapter": trained.trainable, "CLIP": trained.frozen}
    digests = {name: weights.digest(layout.gather(tree)) for name, tree in parts.items()}
    with processes.together("write the report"):
        if processes.is_main():
            devices, count = jax.devices(), jax.process_count()
            origin = report_page.provenance(
                config,
                digests,
                command=shlex.join(sys.orig_argv),
                device=f"{len(devices)} × {devices[0].device_kind} ({devices[0].platform}), {count} process",
                date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            )
            path = report_page.write(config, run.path, samples, {i: maps[i] for i in chosen}, origin, evaluation.pixels)
            console.print(f"The report is {path}")


def calibrate(
    config: Config,
    run: RunDirectory,
    trained: Trained,
    facts: Mapping[str, Any],
    layout: Layout,
    preemption: Preemption,
) -> calibration.Calibration | None:
    """Score the target's valid pool without the support images, and fit and keep what scores mean; print one line.

    The threshold is for the sensitivity or specificity that was asked of an earlier calibration of the run. `facts` say
    how the weights were chosen. A target without such images, or weights that were chosen on them, are not calibrated,
    which is said and no error.
    """
    if facts["rule"] == "valid":
        console.print("Not calibrated: the valid images have chosen the weights, so scores on them look too good")
        return None
    try:
        with processes.together("find the images to calibrate on"):
            pool = load_split(config.data.root, config.data.dataset, "valid")
            support = [] if config.zero_shot else training_data.plan(config).training[config.data.dataset]
            # Also of a run whose pool has grown since: what it was trained on, by its own record.
            recorded = [sample for sample in pool if sample.name in (run.kept or {}).get("support", ())]
            samples = held_out(pool, [*support, *recorded])
    except (FileNotFoundError, ValueError) as missing:
        console.print(f"Not calibrated: {missing}")
        return None
    if not samples:
        console.print("Not calibrated: no valid images are left beside the support")
        return None
    own = {"": trained.trainable}
    evaluation = _score(trained, own, samples, config, layout, "Scoring valid images", check=preemption.check)[""]
    fitted = calibration.fit(evaluation.scores, evaluation.labels, **calibration.target_of(run.path))
    fitted = dataclasses.replace(fitted, chosen_on_test_data=report.on_test_data(facts))
    with processes.together("write the calibration"):
        if processes.is_main():
            fitted.save(run.path)
    console.print(fitted.summary())
    return fitted


def _shown(samples: list[Sample], count: int) -> list[int]:
    """Test images whose heat maps are written: evenly spread, half of each class."""
    labels = np.array([sample.label for sample in samples])
    chosen: list[int] = []
    for label, share in ((1, count - count // 2), (0, count // 2)):
        places = np.flatnonzero(labels == label)
        if len(places):
            chosen += places[np.unique(np.linspace(0, len(places) - 1, min(share, len(places)), dtype=int))].tolist()
    return chosen

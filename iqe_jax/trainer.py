"""Trains the adapter: few-shot on the target's support, zero-shot on the other sets, resuming where a run was stopped.

Data comes from training_data.py, one step from train_state.py, files go through checkpoint.py; this is the loop.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from iqe_jax import features, processes, training_data, weights
from iqe_jax.checkpoint import Checkpoints, RunDirectory, write_whole
from iqe_jax.config import Config
from iqe_jax.evaluator import evaluate
from iqe_jax.features import FeatureSet
from iqe_jax.metrics import defined
from iqe_jax.models.iqe_clip import IqeClip, Params
from iqe_jax.processes import Preempted, Preemption
from iqe_jax.progress import Meter, console
from iqe_jax.sharding import Layout
from iqe_jax.train_state import (
    Batch,
    TrainState,
    batch_shapes,
    compile_ahead,
    create,
    rows_of_step,
    shapes_laid_out,
    train_step,
)
from iqe_jax.weights import chosen_on, load_adapter

FLUSH_SECONDS = 60.0  # after which TensorBoard gets to see what was logged


@dataclass
class Trainer:
    """One run: what it is made of, and `train`, which brings it to its end."""

    config: Config
    model: IqeClip
    frozen: Params
    plan: training_data.Plan
    layout: Layout
    preemption: Preemption

    def __post_init__(self) -> None:
        """Open the run directory; raises ValueError if a run with other settings is there."""
        self.run = RunDirectory(self.config)
        self.order = self.plan.order(self.config)
        settings = self.config.train
        self.total = settings.steps or settings.epochs * self.order.steps_per_epoch
        self._shapes = shapes_laid_out(self.model, settings.rates, self.layout)

    @cached_property
    def trained_on(self) -> dict[str, str]:
        """What the weights come of besides the settings, each in a word. All processes have to ask."""
        # Some of its values tell CLIP from any other, in no time.
        return {"images": self.plan.digest, "clip": weights.digest(self.layout.gather(self.frozen), first=64)}

    def train(self) -> Params:
        """Train to the end, from the latest checkpoint if there is one; returns the kept weights, laid out.

        Raises Preempted, the state being saved, when told to stop, and FloatingPointError
        naming step and batch when a loss or gradient is not finite; the checkpoints
        written until then stay.
        """
        start_from = self.config.model.adapter
        initial = load_adapter(self.model, start_from) if start_from else None
        # What starts from weights that were chosen on test data has seen it too.
        self._seen = chosen_on(start_from) if start_from else None
        self.run.claim()
        with self.run.alone():
            with Checkpoints(self.run) as checkpoints:
                state = self._to_the_end(checkpoints, initial)
            if "last" in self.run.rules:
                self.run.keep(self.layout.gather(state.trainable), "last", chosen_on=self._seen, step=int(state.step))
            support = [] if self.config.zero_shot else self.plan.names
            self.run.finish(self.total, support=support, trained_on=self.trained_on)
        return self.load_kept()

    def _to_the_end(self, checkpoints: Checkpoints, initial: Params | None) -> TrainState:
        state = checkpoints.restore(self._shapes, self.trained_on)
        step = 0 if state is None else int(state.step)
        if step > self.total:
            raise ValueError(
                f"{self.run.path} has come to step {step} already, past the {self.total} asked for; "
                "give this run another --run-dir"
            )
        if step > 0:
            console.print(f"Going on from step {step} of {self.total} in {self.run.path}")
        compiled = self._compile_ahead(step) if step < self.total else None
        if state is None:
            state = create(self.model, self.config.train, self.frozen, self.layout, initial)
        if step < self.total:
            check = self.preemption.check
            sets = training_data.load(self.config, self.plan, self.model, self.frozen, self.layout, check)
            selection = self._selection_features(sets)
            if compiled is not None:
                compiled.wait()
            state = self._loop(state, checkpoints, sets, selection)
        return state

    def _compile_ahead(self, step: int) -> threading.Event | None:
        """Compile step `step` (from 0) while the state is made, images are decoded and the image tower runs.

        None where processes are several: those have to compile one and the same at a time.
        """
        if jax.process_count() > 1:
            return None
        settings, layout = self.config.train, self.layout
        first = list(self.plan.training.values())[self.order[step].set_index]
        size = rows_of_step(settings, layout)
        masks = any(sample.mask for sample in first)
        batch = batch_shapes(self.model, layout, size, features.kept_dtype(self.config), masks=masks)
        text, dropout = {"text": self.frozen["text"]}, self._dropout(step)
        return compile_ahead(
            self._shapes, text, batch, model=self.model, config=settings, dropout=dropout, layout=layout
        )

    def _dropout(self, step: int) -> float:
        """Dropout of step `step` (from 0)."""
        settings = self.config.train
        return settings.dropout if step // self.order.steps_per_epoch < settings.dropout_epochs else 0.0

    def load_kept(self, rule: str | None = None) -> Params:
        """The weights kept by `rule`, or the run's own, laid out."""
        with processes.together("load the trained weights"):
            kept = self.run.load(self.model, rule)
        return self.layout.put(kept, jax.tree.map(lambda x: x.sharding, self._shapes.trainable))

    def _selection_features(self, sets: list[FeatureSet]) -> dict[str, FeatureSet]:
        """Features of the images that weights are chosen by, by rule; kept, as they are scored again and again."""
        budget, kept = self.config.train.feature_memory_gb * 1e9, {}
        if self.config.zero_shot:  # else those of training are in memory whatever they take
            budget -= sum(images.in_memory for images in sets)
        for rule, samples in self.plan.selection.items():
            settings = {"title": rule, "budget": budget, "check": self.preemption.check}
            kept[rule] = features.of_samples(self.model, self.frozen, samples, self.config, self.layout, **settings)
            budget -= kept[rule].in_memory
        return kept

    def _loop(
        self, state: TrainState, checkpoints: Checkpoints, sets: list[FeatureSet], selection: dict[str, FeatureSet]
    ) -> TrainState:
        """All steps that are left, with a log line each, checkpoints, and the choice of weights between epochs."""
        settings, per_epoch, start = self.config.train, self.order.steps_per_epoch, int(state.step)
        text = {"text": self.frozen["text"]}
        pending: tuple[int, dict[str, jax.Array]] | None = None
        with _Log(self.run.path, start) as log, Meter("Training", self.total, start) as meter:

            def settle() -> None:
                """Wait for the step that was started last, and write its losses down."""
                nonlocal pending
                if pending is not None:
                    step, metrics = pending
                    losses = {name: float(value) for name, value in metrics.items()}
                    log.write(step, (step - 1) // per_epoch, losses, lambda: self._describe(step - 1))
                    meter.update(step, f"loss {losses['loss']:.3f}")
                    pending = None

            for step, batch in self._batches(sets, start):
                dropout = self._dropout(step)
                state, metrics = train_step(
                    state, text, batch, model=self.model, config=settings, dropout=dropout, layout=self.layout
                )
                settle()  # while this step runs, the one before it is written down
                pending, epoch, last = (step + 1, metrics), (step + 1) / per_epoch, step + 1 == self.total
                if selection and (last or epoch % settings.eval_every == 0):
                    settle()
                    for rule, images in selection.items():
                        self._choose(state, rule, images, log)
                # Last, so that whatever a checkpoint is resumed from has been chosen from and is known to be finite.
                stop = self.preemption.reached()
                if last or stop or epoch % settings.checkpoint_every == 0:
                    settle()
                    checkpoints.save(state, self.trained_on)
                if stop and not last:
                    raise Preempted(f"told to stop; step {step + 1} of {self.total} is saved")
            settle()
        return state

    def _batches(self, sets: list[FeatureSet], start: int) -> Iterator[tuple[int, Batch]]:
        """The steps from `start` on with their batches: taken on the devices, or gathered in threads ahead of use."""
        size = rows_of_step(self.config.train, self.layout)
        kept = training_data.on_devices(sets, self.layout)
        if kept is not None:
            return training_data.batches_of(kept, self.order, start, self.total, self.layout, size)
        local = training_data.batches_ahead(sets, self.order, start, self.total, self.layout.rows(size))
        return ((step, batch.placed(self.layout, size)) for step, batch in local)

    def _describe(self, step: int) -> str:
        """The images that step `step` (from 0) trained on, in words."""
        chosen = self.order[step]
        name, samples = list(self.plan.training.items())[chosen.set_index]
        # Augmented images follow one another augmentation by augmentation, so the remainder is the image.
        images = {samples[i % len(samples)].name for i in chosen.indices[chosen.weight > 0]}
        return f"a batch of {name} with {', '.join(sorted(images))}"

    def _choose(self, state: TrainState, rule: str, images: FeatureSet, log: "_Log") -> None:
        """Keep the present weights by `rule` if they beat those it keeps by image plus pixel AUROC."""
        batches = images.batches(features.at_once(self.model, self.config, self.layout), self.layout)
        zero_shot = self.config.zero_shot
        found = evaluate(self.model, state.trainable, self.frozen, batches, zero_shot=zero_shot, layout=self.layout)
        metrics = defined(found.metrics)
        log.write_selection(int(state.step), rule, metrics)
        kept = self.run.facts(rule)
        if kept is None or _selection_score(metrics) > _selection_score(kept["metrics"]):
            trainable, step = self.layout.gather(state.trainable), int(state.step)
            seen = self.config.data.dataset if rule == "paper" else self._seen
            self.run.keep(trainable, rule, chosen_on=seen, step=step, metrics=metrics)


def _selection_score(metrics: dict[str, Any]) -> float:
    return metrics["image_auroc"] + (metrics.get("pixel_auroc") or 0.0)  # None where all masks are empty


class _Log:
    """metrics.jsonl and TensorBoard, of process 0. Opened at step `start`, it drops what was written past it."""

    def __init__(self, path: Path, start: int):
        self._file, self._start, self._path = path / "metrics.jsonl", start, path
        self._clock = time.perf_counter()

    def __enter__(self) -> "_Log":
        with processes.together("go on with the log"):
            if processes.is_main():
                self._open()
        return self

    def _open(self) -> None:
        text, kept = self._file.read_text(errors="replace") if self._file.exists() else "", ""
        for number, line in enumerate(text.splitlines(keepends=True), 1):
            if line.endswith("\n") and self._step(line, number) <= self._start:
                kept += line
        if kept != text:
            write_whole(self._file, kept)
        self._lines = self._file.open("a", buffering=1)

    def _step(self, line: str, number: int) -> int:
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError) as fault:
            raise ValueError(f"{self._file}, line {number}, is damaged ({fault}): remove that line") from fault

    @cached_property
    def _board(self) -> "_Board":
        """Opened on first use, when a step is running beside it: its import takes as long as JAX's."""
        return _Board(self._path / "tensorboard", self._start + 1)

    def __exit__(self, *_: object) -> None:
        if processes.is_main():
            self._lines.close()
            if "_board" in vars(self):
                self._board.close()

    def write(self, step: int, epoch: int, losses: dict[str, float], where: Callable[[], str]) -> None:
        """One line for `step`, or FloatingPointError if its numbers are not finite."""
        if not np.isfinite(list(losses.values())).all():
            raise FloatingPointError(
                f"step {step}: {', '.join(f'{name} is {value}' for name, value in losses.items())}, on {where()}; "
                f"training stopped, the checkpoints in {self._path / 'checkpoints'} are from before. Look at these "
                "images, or lower --train.learning-rate"
            )
        if not processes.is_main():
            return
        now = time.perf_counter()
        line = {"step": step, "epoch": epoch, **losses, "seconds": round(now - self._clock, 4)}
        self._clock = now
        self._lines.write(json.dumps(line) + "\n")
        for name, value in losses.items():
            self._board.write(f"train/{name}", value, step)

    def write_selection(self, step: int, rule: str, metrics: dict[str, float | None]) -> None:
        """One line of what the weights after `step` score on the images that `rule` chooses by."""
        if not processes.is_main():
            return
        mark = {"chosen_on_test_data": True} if rule == "paper" else {}
        self._lines.write(json.dumps({"step": step, rule: metrics, **mark}) + "\n")
        for name, value in metrics.items():
            if value is not None:
                self._board.write(f"{rule}{'_chosen_on_test_data' if mark else ''}/{name}", value, step)


class _Board:
    """TensorBoard's file of events, from step `first` on: what an earlier start had logged past it is to be forgotten.

    Written by the loop itself. The thread of tensorboardX's SummaryWriter dies of a full disk without a word, and what
    is given to it from then on waits for ever. Raises OSError, naming the folder.
    """

    def __init__(self, folder: Path, first: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

        self._folder, self._flushed, self._event = folder, time.monotonic(), Event
        folder.mkdir(parents=True, exist_ok=True)
        self._file = EventsWriter(str(folder / "events"))
        self._add(step=first, session_log=SessionLog(status=SessionLog.START))

    def write(self, name: str, value: float, step: int) -> None:
        """One figure of `step`."""
        from tensorboardX.summary import scalar

        self._add(step=step, summary=scalar(name, value))

    def _add(self, **content: Any) -> None:
        with self._said():
            self._file.write_event(self._event(wall_time=time.time(), **content))
            if time.monotonic() > self._flushed + FLUSH_SECONDS:
                self._file.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        """Write what is still held."""
        with self._said():
            self._file.close()

    @contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._folder)) from error

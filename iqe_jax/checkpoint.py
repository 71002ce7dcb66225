"""The run directory: resolved config, Orbax checkpoints to resume from, the kept adapter, and logs.

config.json          every setting of the run
checkpoints/STEP/    state of the trainable part, the latest two
adapter.safetensors  the weights that are kept; convert.adapter turns them into an official .pth
adapter-RULE.safetensors  those that another rule keeps, where several are followed
kept.json            which weights those are, how they were chosen, and whether training is over
metrics.jsonl        losses of every step; tensorboard/ holds the same
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from iqe_jax import processes
from iqe_jax.config import Config, Rule, read, to_json
from iqe_jax.models.iqe_clip import IqeClip, Params
from iqe_jax.train_state import TrainState
from iqe_jax.weights import begun, load_adapter, save_adapter

# Settings that may differ between a run and its continuation: they change where, how long or how fast, not what.
FREE = {
    "run_dir",
    "name",
    "eval",
    "mesh",
    "data.workers",
    "data.processes",
    "train.epochs",
    "train.steps",
    "train.checkpoint_every",
    "train.features",
    "train.feature_memory_gb",
    "train.feature_disk_gb",
    "train.accumulate",
    "train.remat",
}


_TRAINED_ON = {"images": "training images", "clip": "CLIP weights"}


def other_than(before: Mapping[str, Any], now: Mapping[str, str]) -> dict[str, str]:
    """What a run is trained on that is not what it was before: `images`, `clip`, each with what it is called."""
    return {name: called for name, called in _TRAINED_ON.items() if before.get(name) != now[name]}


class RunDirectory:
    """One run's files. Opening it creates nothing; `claim` does, once the work is known to be possible."""

    def __init__(self, config: Config):
        """Look at `config.directory`. Raises ValueError if a run with other settings is there, or a damaged one."""
        self.config, self.rules = config, config.rules
        self.path = config.directory
        self.kept = read_facts(self.path)
        """What kept.json says: `rule` and `step`, later `metrics` of the choice, the same of `others` by rule,
        `support`, `trained_on` and `finished_at`."""
        stored = self.path / "config.json"
        if stored.exists():
            before = read(stored)
            different = _differences(before, config)
            if different:
                raise ValueError(
                    f"{self.path} holds a run with other settings ({'; '.join(different)}); "
                    "give this one another --run-dir, or remove that directory"
                )
            if self.begun:
                self._follow(before.rules)

    def _follow(self, rules: tuple[Rule, ...]) -> None:
        """Go on with the rules that training was begun with."""
        if missing := [rule for rule in self.config.rules if rule not in rules]:
            raise ValueError(
                f"{self.path} was trained without --eval.protocols {' '.join(missing)}, and a choice of weights cannot "
                "be made afterwards; give this run another --run-dir, or remove that directory"
            )
        self.rules = rules

    @property
    def begun(self) -> bool:
        """Whether training has left anything here."""
        return begun(self.path)

    def agree(self) -> None:
        """Raise ValueError on all processes where one sees another state of the run than process 0."""
        processes.agree(f"files in {self.path}, which must be on a disk that all share,", repr((self.begun, self.kept)))

    def claim(self) -> None:
        """Create the directory and write the resolved config. Raises ValueError if not all processes see it then."""
        with processes.together(f"write to {self.path}"):
            if processes.is_main():
                self.path.mkdir(parents=True, exist_ok=True)
                others = tuple(rule for rule in self.rules if rule != self.config.train.keep)
                asked = dataclasses.replace(self.config.eval, protocols=others) if others else self.config.eval
                write_whole(self.path / "config.json", to_json(dataclasses.replace(self.config, eval=asked)))
        with processes.together("share the run directory"):
            if not processes.seen(self.path / "config.json"):
                raise ValueError(f"{self.path}, written by process 0, is not there; --run-dir must be on a shared disk")

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Train in the claimed directory. Raises ValueError where another command does."""
        with contextlib.ExitStack() as stack:
            with processes.together(f"begin in {self.path}"):
                if processes.is_main():
                    stack.enter_context(alone_in(self.path, "give this run another --run-dir"))
            yield

    def adapter(self, rule: str) -> Path:
        """The file of the weights that `rule` keeps."""
        return self.path / ("adapter.safetensors" if rule == self.config.train.keep else f"adapter-{rule}.safetensors")

    def facts(self, rule: str) -> dict[str, Any] | None:
        """What is known of the weights that `rule` keeps; None before there are any."""
        kept = self.kept or {}
        if kept.get("rule") == rule:
            return {name: value for name, value in kept.items() if name != "others"}
        return kept.get("others", {}).get(rule)

    def keep(self, trainable: Params, rule: str, *, chosen_on: str | None = None, **facts: Any) -> None:
        """Make `trainable`, on the host, the weights that `rule` keeps, and note what is known of them.

        `chosen_on` names the set whose test data they were chosen on; file and note are marked with it.
        """
        if processes.is_main():
            save_adapter(trainable, self.adapter(rule), chosen_on=chosen_on)
        if chosen_on:
            facts["chosen_on_test_data"] = True
        kept = {name: value for name, value in (self.kept or {}).items() if name != "finished_at"}
        others = kept.get("others", {})
        if rule == self.config.train.keep:
            kept = {"rule": rule, **facts}
        else:
            others = {name: facts if name == rule else others[name] for name in self.rules if name in {*others, rule}}
        self._note({**kept, "others": others} if others else kept)

    def finish(self, total: int, **facts: Any) -> None:
        """Note that training has come to its end after `total` steps."""
        self._note({**(self.kept or {}), **facts, "finished_at": total})
        processes.barrier("finished")

    def _note(self, facts: dict[str, Any]) -> None:
        self.kept = facts
        if processes.is_main():
            write_whole(self.path / "kept.json", json.dumps(facts, indent=2, allow_nan=False) + "\n")

    @property
    def finished_at(self) -> int | None:
        """The step at which training ended; None before."""
        return (self.kept or {}).get("finished_at")

    def load(self, model: IqeClip, rule: str | None = None) -> Params:
        """The weights kept by `rule`, or the run's own. Raises FileNotFoundError or ValueError when they are not there
        or do not fit.
        """
        path = self.adapter(rule or self.config.train.keep)
        processes.seen(path)
        return load_adapter(model, path)


class Checkpoints:
    """Orbax checkpoints below a run directory, written in the background, each process its own part.

    One holds the TrainState, which has the random key in it, and `position`: where the order of batches has come to.
    """

    def __init__(self, run: RunDirectory):
        """The checkpoints of `run`, which are opened when one is read or written: importing Orbax takes a while."""
        self._path = (run.path / "checkpoints").resolve()
        self._opened: Any = None
        if jax.process_count() > 1:  # they open them together, whatever each of them sees
            self._manager()

    def _manager(self) -> Any:
        if self._opened is None:
            import orbax.checkpoint as ocp

            self._opened = ocp.CheckpointManager(self._path, options=ocp.CheckpointManagerOptions(max_to_keep=2))
        return self._opened

    def __enter__(self) -> "Checkpoints":
        """Use as a context: leaving waits for the last write."""
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the last write and let go."""
        if self._opened is not None:
            self._opened.close()

    def restore(self, shapes: TrainState, trained_on: dict[str, str]) -> TrainState | None:
        """The latest checkpoint, laid out as `shapes` say, or None where there is none.

        `trained_on` says in words which images, in which order, and which CLIP. Raises ValueError naming the checkpoint
        when it cannot be read, does not fit, or was made on others.
        """
        if self._opened is None and not self._path.exists():
            return None
        manager = self._manager()
        step = manager.latest_step()
        if step is None:
            return None
        from orbax.checkpoint import args

        state = args.StandardRestore(_not_empty(shapes))  # pyright: ignore
        items = args.Composite(state=state, position=args.JsonRestore())  # pyright: ignore
        try:
            restored = manager.restore(step, args=items)
        except Exception as error:  # Orbax raises many kinds for a damaged checkpoint
            raise ValueError(
                f"checkpoint {self._path / str(step)} cannot be restored ({error}); "
                "remove that folder to go on from the one before it, or start again without it"
            ) from error
        if others := other_than(restored["position"], trained_on):
            raise ValueError(
                f"checkpoint {self._path / str(step)} was made on other {' and '.join(others.values())} than are here "
                "now; bring those back, or start again with another --run-dir"
            )
        return jax.tree.map(lambda shape, x: _empty(shape) if x is None else x, shapes, restored["state"])

    def save(self, state: TrainState, trained_on: dict[str, str]) -> None:
        """Start to write `state` under its step, if it is not there yet. Raises OSError where it has no room."""
        step, manager = int(state.step), self._manager()
        if step != manager.latest_step():
            from orbax.checkpoint import args

            manager.wait_until_finished()  # the one before takes its room
            with processes.together("write a checkpoint"):  # else Orbax's threads fill the screen before they give up
                self._check_room(step, sum(x.nbytes for x in jax.tree.leaves(state)))
            position = args.JsonSave({"step": step, **trained_on})  # pyright: ignore
            kept = args.StandardSave(_not_empty(state))  # pyright: ignore
            manager.save(step, args=args.Composite(state=kept, position=position))

    def _check_room(self, step: int, needed: int) -> None:
        free = shutil.disk_usage(self._path).free
        if needed > free:
            raise OSError(
                f"the checkpoint of step {step} needs {needed / 1e6:.0f} MB in {self._path}, which has "
                f"{free / 1e6:.0f} MB free; make room, and the same command goes on from what is saved"
            )


def _not_empty(state: TrainState) -> TrainState:
    """Arrays of no values, as prompts of no learnable tokens are, left out: Orbax refuses them."""
    return jax.tree.map(lambda x: x if math.prod(x.shape) else None, state)


def _empty(shape: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.make_array_from_callback(shape.shape, shape.sharding, lambda _: np.zeros(shape.shape, shape.dtype))


def read_facts(directory: Path) -> dict[str, Any] | None:
    """A run's kept.json, None before there is one. Raises ValueError naming it where it is damaged."""
    path = directory / "kept.json"
    if not path.exists():
        return None
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as fault:
        raise ValueError(
            f"{path} is damaged ({fault}): bring it back, or remove {path.parent} and begin again"
        ) from fault


def _differences(stored: Config, asked: Config) -> list[str]:
    """Settings in which two configs differ and may not."""
    found = []
    for field in dataclasses.fields(Config):
        old, new = getattr(stored, field.name), getattr(asked, field.name)
        if field.name in FREE or old == new:
            continue
        for inner in dataclasses.fields(old):
            name = f"{field.name}.{inner.name}"
            before, now = getattr(old, inner.name), getattr(new, inner.name)
            if name not in FREE and before != now:
                found.append(f"{name} was {before}, now {now}")
    return found


@contextlib.contextmanager
def alone_in(folder: Path, otherwise: str) -> Iterator[None]:
    """Keep other commands that ask for the same out of `folder`; where the file system has no locks, nobody is.

    Raises ValueError where another command is in it; `otherwise` says what to do but wait.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as fault:
                raise ValueError(f"another command is at work in {folder}: wait for it, or {otherwise}") from fault
        yield
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all; file names in it keep the bytes that are no UTF-8."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text, "utf-8", "surrogateescape", newline="")
    temporary.replace(path)

"""The run directory: resolved config, Orbax checkpoints to resume from, the kept adapter, and logs.

config.json          every setting of the run
checkpoints/STEP/    state of the trainable part, the latest two
adapter.safetensors  the weights that are kept; convert.adapter turns them into an official .pth
kept.json            which weights those are, how they were chosen, and whether training is over
metrics.jsonl        losses of every step; tensorboard/ holds the same
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from iqe_jax.config import Config, from_json, to_json
from iqe_jax.models.iqe_clip import IqeClip, Params
from iqe_jax.train_state import TrainState
from iqe_jax.weights import load_adapter, save_adapter

# Settings that may differ between a run and its continuation: they change where, how long or how fast, not what.
FREE = {
    "run_dir",
    "name",
    "eval",
    "data.workers",
    "data.processes",
    "train.epochs",
    "train.steps",
    "train.checkpoint_every",
    "train.features",
    "train.feature_memory_gb",
}


class RunDirectory:
    """One run's files. Opening it creates nothing; `claim` does, once the work is known to be possible."""

    def __init__(self, config: Config):
        """Look at `config.directory`. Raises ValueError if a run with other settings is there."""
        self.config = config
        self.path = config.directory
        stored = self.path / "config.json"
        if stored.exists():
            different = _differences(from_json(stored.read_text()), config)
            if different:
                raise ValueError(
                    f"{self.path} holds a run with other settings ({'; '.join(different)}); "
                    "give this one another --run-dir, or remove that directory"
                )

    def claim(self) -> None:
        """Create the directory and write the resolved config."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.path / "config.json", to_json(self.config))

    @property
    def kept(self) -> dict[str, Any] | None:
        """What kept.json says: `rule` and `step`, later `metrics` of the choice, `support` and `finished_at`."""
        path = self.path / "kept.json"
        return json.loads(path.read_text()) if path.exists() else None

    def keep(self, trainable: Params, **facts: Any) -> None:
        """Make `trainable` the kept weights, and note what is known of them."""
        save_adapter(trainable, self.path / "adapter.safetensors")
        write_whole(self.path / "kept.json", json.dumps(facts, indent=2) + "\n")

    def finish(self, total: int, **facts: Any) -> None:
        """Note that training has come to its end after `total` steps."""
        facts = {**(self.kept or {}), **facts, "finished_at": total}
        write_whole(self.path / "kept.json", json.dumps(facts, indent=2) + "\n")

    @property
    def finished_at(self) -> int | None:
        """The step at which training ended; None before."""
        return (self.kept or {}).get("finished_at")

    def load(self, model: IqeClip) -> Params:
        """The kept weights. Raises FileNotFoundError or ValueError when they are not there or do not fit."""
        return load_adapter(model, self.path / "adapter.safetensors")


class Checkpoints:
    """Orbax checkpoints of a TrainState below a run directory, written in the background."""

    def __init__(self, run: RunDirectory):
        """Open the checkpoints of `run`."""
        import orbax.checkpoint as ocp

        self._args = ocp.args
        self._manager = ocp.CheckpointManager(
            (run.path / "checkpoints").resolve(), options=ocp.CheckpointManagerOptions(max_to_keep=2)
        )

    def __enter__(self) -> "Checkpoints":
        """Use as a context: leaving waits for the last write."""
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the last write and let go."""
        self._manager.close()

    def restore(self, like: TrainState) -> TrainState:
        """The latest checkpoint, laid out as `like`, or `like` itself where there is none.

        Raises ValueError naming the checkpoint when it cannot be read or does not fit.
        """
        step = self._manager.latest_step()
        if step is None:
            return like
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        try:
            return self._manager.restore(step, args=self._args.StandardRestore(abstract))  # pyright: ignore
        except Exception as error:  # Orbax raises many kinds for a damaged checkpoint
            raise ValueError(
                f"checkpoint {self._manager.directory / str(step)} cannot be restored ({error}); "
                "remove that folder to go on from the one before it, or start again without it"
            ) from error

    def save(self, state: TrainState) -> None:
        """Start to write `state` under its step, if it is not there yet."""
        step = int(state.step)
        if step != self._manager.latest_step():
            self._manager.save(step, args=self._args.StandardSave(state))  # pyright: ignore[reportCallIssue]


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


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)

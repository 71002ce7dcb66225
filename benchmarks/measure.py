"""What a measurement is: timed calls taken in turns, rows of a table, and targets that hold or do not.

What is measured is for the other files to say.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax

Key = TypeVar("Key")


@dataclass(frozen=True)
class Row:
    """One thing measured: seconds of each repeat of a call on `images` images, which takes `flops` in all, if known."""

    section: str
    name: str
    seconds: tuple[float, ...]
    images: int | None = None
    flops: float | None = None
    note: str = ""

    @property
    def median(self) -> float:
        """The middle of the repeats, in seconds."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Target:
    """A figure that has to hold. It is missed by `value` above `limit`, or below it where `at_least` is set."""

    name: str
    value: float
    limit: float
    at_least: bool = False
    unit: str = ""

    @property
    def held(self) -> bool:
        """Whether the figure holds."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        sign = "≥" if self.at_least else "≤"
        value = f"{self.value:.3g}{self.unit}"
        return f"{'pass' if self.held else 'MISS'}  {self.name}: {value} (target {sign} {self.limit:g}{self.unit})"


@dataclass
class Report:
    """All rows and targets of a run, in order, and the matrix-product rate in FLOP/s that fractions are of."""

    repeats: int
    turn: float = 0.0  # seconds that a turn takes at least; this and the next are those of `in_turns`
    ahead: bool = False
    rows: list[Row] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    matrix_rate: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, section: str, name: str, seconds: list[float], **about: Any) -> Row:
        """Note one row down, and give it back."""
        row = Row(section, name, tuple(seconds), **about)
        self.rows.append(row)
        return row

    def target(self, name: str, value: float, limit: float, **about: Any) -> None:
        """Note one target down."""
        self.targets.append(Target(name, value, limit, **about))

    def find(self, section: str, name: str) -> Row | None:
        """The row of that section and name, if it was measured in this run."""
        return next((row for row in self.rows if (row.section, row.name) == (section, name)), None)


def in_turns(
    calls: Mapping[Key, Callable[[], Any]], repeats: int, turn: float = 0.0, ahead: bool = False
) -> dict[Key, list[float]]:
    """Seconds a call of each, `repeats` times, taken in turns after one that compiles and warms up.

    In turns, so that a machine that slows down on the way slows them all down. A turn is one call, or as many as take
    `turn` seconds: training and evaluation go on and on, and one short call by itself says little. `ahead` is for a
    device of its own: as they do, each call is given to it before the last is waited for.
    """
    for call in calls.values():
        jax.block_until_ready(call())
    times: dict[Key, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start, done, running = time.perf_counter(), 0, None
            while not done or time.perf_counter() - start < turn:
                given = call()
                jax.block_until_ready(running if ahead else given)
                running, done = given, done + 1
            jax.block_until_ready(running)
            times[name].append((time.perf_counter() - start) / done)
    return times


def flops_of(compiled: Any) -> float:
    """FLOPs of a compiled program as its compiler counts them; NaN where it does not."""
    cost = compiled.cost_analysis() or {}
    return float(cost.get("flops", float("nan")))

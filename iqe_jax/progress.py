"""Progress with time left: a bar in a terminal, a line now and then in a log. Results go to standard output."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")

LINE_EVERY = 30.0  # seconds between two lines where there is no terminal

console = Console(stderr=True, soft_wrap=True)


class Meter:
    """How far one piece of long work has come, and how long the rest will take."""

    def __init__(self, title: str, total: int | None, done: int = 0):
        """Work of `total` steps, None if that is not known, of which `done` were done before."""
        self._title, self._total, self._first = title, total, done
        self._start = self._said = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), "left")
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task(title, total=total, completed=done)

    def __enter__(self) -> "Meter":
        """Show the bar."""
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take the bar away."""
        self._bar.stop()

    def update(self, done: int, note: str = "") -> None:
        """`done` steps are done; `note` says in a few words how it goes."""
        description = f"{self._title}, {note}" if note else self._title
        self._bar.update(self._task, completed=done, description=description)
        now = time.monotonic()
        if not console.is_terminal and now - self._said > LINE_EVERY:
            self._said = now
            left = ""
            if self._total:
                seconds = (now - self._start) / max(done - self._first, 1) * (self._total - done)
                left = f" of {self._total}, {seconds / 60:.0f} min left"
            console.print(f"{description}: {done}{left}")


def track(items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
    """Yield `items`, metering how many have been used."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # pyright: ignore[reportArgumentType]
    with Meter(title, total) as meter:
        for done, item in enumerate(items, 1):
            yield item
            meter.update(done)

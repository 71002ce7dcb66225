"""The processes of a run: how they find each other, agree on errors, and stop together when the machine is taken away.

One process needs none of it and pays nothing. Where arrays lie is the business of sharding.py.
"""

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from iqe_jax.progress import console

T = TypeVar("T")

NEWS_SECONDS = 70.0  # after which NFS, by its defaults, has asked again whether a file is there that was not before
MESSAGE = 2000  # bytes of an error that the other processes get to see


class Preempted(Exception):
    """The machine is being taken away (SIGTERM, or a notice of preemption); what can be saved has been."""


def start(
    distributed: bool,
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
    timeout: int = 300,
) -> None:
    """Join the other processes; to be called before jax looks for devices.

    On SLURM, Open MPI and Cloud TPU all but `distributed` is found out by itself. Raises ValueError when it is not, for
    a place among processes without `distributed`, or when process 0 cannot be reached within `timeout` seconds; where
    another is missing, jax ends all that are there.
    """
    if not distributed:
        if (coordinator, count, index) != (None, None, None):
            raise ValueError("--coordinator, --processes and --process-id say how processes meet: add --distributed")
        return
    # jax ends a process that waits in vain with a trace of its own, so what it waits for is said, or tried, before.
    if not index:
        where = f" at {coordinator}" if coordinator else ""
        console.print(f"Waiting up to {timeout} s for {count or 'all'} processes{where}")
    elif coordinator is not None:
        _reach(coordinator, index, timeout)
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=min(timeout, 100),
            shutdown_timeout_seconds=min(timeout, 60),
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"process {'?' if index is None else index} on {socket.gethostname()} could not join the others at "
            f"{coordinator or 'a coordinator that was to be found out'}: {str(error).strip().splitlines()[0]}. Start "
            "all at once; by hand give each --distributed --coordinator HOST:PORT --processes N --process-id I"
        ) from error
    if not is_main():
        console.quiet = True


def _reach(coordinator: str, index: int, timeout: int) -> None:
    """Wait until process 0 listens at `coordinator`. Raises ValueError when it does not within `timeout` seconds."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"--coordinator is {coordinator}; expected HOST:PORT")
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise ValueError(
                    f"process {index} on {socket.gethostname()} did not find process 0 at {coordinator} within "
                    f"{timeout} s ({error}); start all processes at once, and give each the same --coordinator"
                ) from error
        time.sleep(0.2)


def is_main() -> bool:
    """Whether this is process 0, the one that writes files that are not sharded."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextmanager
def together(what: str) -> Iterator[None]:
    """Work that every process does by itself: where one fails, all raise, saying which process failed and why.

    Raises ValueError with all messages; with one process the error passes through as it is.
    """
    if jax.process_count() == 1:
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        failure = error
    said = np.zeros(MESSAGE, np.uint8)
    if failure is not None:
        text = f"on {socket.gethostname()}: {failure}".encode(errors="backslashreplace")[:MESSAGE]
        said[: len(text)] = np.frombuffer(text, np.uint8)
    messages = [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in _allgather(said)]
    if failed := [f"process {i} {message}" for i, message in enumerate(messages) if message]:
        raise ValueError(f"could not {what}:\n  " + "\n  ".join(failed)) from failure


def same_everywhere(value: bytes) -> list[int]:
    """The processes whose `value` differs from process 0's, compared by content."""
    import hashlib

    digests = _allgather(np.frombuffer(hashlib.blake2b(value, digest_size=16).digest(), np.uint8))
    return [i for i, digest in enumerate(digests) if (digest != digests[0]).any()]


def agree(what: str, value: str) -> None:
    """Raise ValueError on all processes where a `value` differs from process 0's; `what` says what that is of."""
    if others := same_everywhere(value.encode(errors="surrogateescape")):
        raise ValueError(f"processes {others} have other {what} than process 0")


def seen(path: Path) -> bool:
    """Whether a file or folder is there, which another process has just made where several share a disk.

    NFS may tell of it only after a while, or when its folder is read.
    """
    end = time.monotonic() + NEWS_SECONDS
    while not path.exists():
        if jax.process_count() == 1 or time.monotonic() > end:
            return False
        time.sleep(0.2)
        with suppress(OSError):
            next(path.parent.iterdir(), None)
    return True


def everywhere(flags: np.ndarray) -> np.ndarray:
    """Elementwise, whether a flag is set on every process."""
    return np.asarray(_allgather(flags).all(0))


def least(number: int) -> int:
    """The smallest `number` that a process has, each of up to 64 bits."""
    said = _allgather(np.array([number], np.int64).view(np.uint8))  # bytes: JAX would make 32 bits of 64
    return int(said.view(np.int64).min())


def in_turn(x: T) -> T:
    """`x`, waited for where several processes share CPUs: two programs exchanging at once can lock there."""
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        jax.block_until_ready(x)
    return x


def _allgather(x: np.ndarray) -> np.ndarray:
    """`x` of every process, stacked."""
    if jax.process_count() == 1:
        return x[None]
    return np.asarray(multihost_utils.process_allgather(x[None], tiled=True))


class Preemption:
    """Listens for SIGTERM while it is entered; `reached` tells at a common point whether any process has heard it."""

    _calls = 0  # of this program, as jax's service wants numbers that only rise

    def __init__(self) -> None:
        self._heard = False

    def __enter__(self) -> "Preemption":
        # jax's own service listens where there are several processes, and makes them agree on where to stop.
        self._before: dict[int, Any] = {}
        if jax.process_count() > 1:
            self._ignore_hangup()
        else:
            self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._heard = True
        self._ignore_hangup()

    def _ignore_hangup(self) -> None:
        """Of a machine that is taken away the terminal hangs up at the same time, which would end what is saving."""
        if hasattr(signal, "SIGHUP") and signal.SIGHUP not in self._before:
            self._before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def reached(self) -> bool:
        """Whether to save and stop now. All processes have to ask equally often."""
        Preemption._calls += 1
        if jax.process_count() > 1:
            return bool(multihost_utils.reached_preemption_sync_point(Preemption._calls))
        return self._heard

    def check(self) -> None:
        """Raise Preempted if it is time to stop."""
        if self.reached():
            raise Preempted(f"told to stop (SIGTERM), process {os.getpid()}")

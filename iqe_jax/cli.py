"""The command line that the entry scripts share: `--config NAME`, dotted overrides, processes, one-line errors."""

import errno
import gc
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from iqe_jax.cache import cache_dir
from iqe_jax.config import Config, check, load, names

T = TypeVar("T")

_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
PREEMPTED = 75  # exit status of a run that was told to stop and saved itself: EX_TEMPFAIL, "try again"


@dataclass(frozen=True)
class Launch:
    """How this process is started; no part of the experiment."""

    distributed: bool = False
    """This is one process of several. On SLURM, Open MPI and Cloud TPU the rest is found out by itself."""
    coordinator: str | None = None
    """HOST:PORT that process 0 is reached at, where that is not found out."""
    processes: int | None = None
    """Number of processes, where that is not found out."""
    process_id: int | None = None
    """Number of this process, from 0, where that is not found out."""
    timeout: int = 300
    """Seconds to wait for the other processes before giving up."""
    dry_run: bool = False
    """Look at all files that are needed, compile, print the bytes per device, and stop."""


def parse(argv: Sequence[str], *, program: str, description: str) -> tuple[Launch, Config]:
    """Read a command line such as `--config brain_fewshot --train.steps 100` into a checked Config.

    Exits with one message on an unknown recipe, field or value; `--help` explains every field.
    """
    return parse_with(Launch(), argv, program=program, description=description)


def parse_with(
    options: T, argv: Sequence[str], *, program: str, description: str, recipe: str | None = None
) -> tuple[T, Config]:
    """As `parse`, with the flags of another dataclass than Launch; `options` holds their defaults.

    A command that picks the `recipe` by itself takes no --config.
    """
    name, rest = (recipe, list(argv)) if recipe else _take_config(list(argv))
    if recipe is None:
        description += f"\n\nThe recipe is picked by --config NAME, which is required, one of: {', '.join(names())}."
    if name is None and not {"-h", "--help"} & set(argv):
        raise SystemExit(f"{program}: --config NAME is required, one of: {', '.join(names())}")
    with user_errors(program):
        command_line = _command_line(type(options))
        line = tyro.cli(
            command_line,
            args=rest,
            default=command_line(options, Config() if name is None else load(name)),
            prog=program,
            description=description,
        )
        check(line.config)
    return line.options, line.config


def _command_line(options: type) -> Any:
    """The dataclass whose fields are the flags of `options` and the overrides of Config."""
    own = Annotated[options, tyro.conf.arg(name=""), tyro.conf.FlagCreatePairsOff]
    config = Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    return make_dataclass("_CommandLine", [("options", own), ("config", config, field(default_factory=Config))])


def _take_config(argv: list[str]) -> tuple[str | None, list[str]]:
    """The value of --config, and the arguments without it."""
    for i, argument in enumerate(argv):
        if argument == "--config" and i + 1 < len(argv):
            return argv[i + 1], argv[:i] + argv[i + 2 :]
        if argument.startswith("--config="):
            return argument.removeprefix("--config="), argv[:i] + argv[i + 1 :]
    return None, argv


@contextmanager
def started(launch: Launch, program: str) -> Iterator[None]:
    """Join the other processes, then turn what goes wrong into one line: see `user_errors`."""
    # Imports and tracing make hundreds of thousands of objects that stay. Python by itself looks for garbage among them
    # after every 700, which makes a start noticeably longer.
    gc.set_threshold(100_000)
    with user_errors(program):
        import jax

        from iqe_jax import processes

        # The first start of a recipe compiles for many seconds; every later one, a resumed one too, finds it done.
        if getattr(jax.config, "jax_compilation_cache_dir", None) is None:  # else the user has chosen one
            jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "programs"))
            # The many that compile in less than a second add up to several, and are read in milliseconds.
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        processes.start(
            launch.distributed, launch.coordinator, launch.processes, launch.process_id, timeout=launch.timeout
        )
        try:
            yield
        except processes.Preempted as stop:
            print(f"{program}: {stop}; the same command goes on from there", file=sys.stderr)
            raise SystemExit(PREEMPTED) from stop


@contextmanager
def user_errors(program: str) -> Iterator[None]:
    """Turn an error about a file, a field or a value into one line and exit status 1.

    The traceback is for those who ask for it, with IQE_JAX_TRACEBACK=1.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(f"\n{program}: stopped; the same command goes on from what is saved") from None
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("IQE_JAX_TRACEBACK"):
            raise
        raise SystemExit(f"{program}: {error}{_advice(error)}") from error


def _advice(error: Exception) -> str:
    """What to do besides where a file cannot be written to the cache, which may lie elsewhere."""
    name = error.filename if isinstance(error, OSError) and error.errno in _UNWRITABLE else None
    if isinstance(name, str | os.PathLike) and Path(name).absolute().is_relative_to(cache_dir().absolute()):
        return "; set $IQE_JAX_CACHE to a folder that can be written to and has room"
    return ""

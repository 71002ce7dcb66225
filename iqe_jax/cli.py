"""The command line that the entry scripts share: `--config NAME`, dotted overrides, one-line errors."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from iqe_jax.config import Config, check, load, names


def parse(argv: Sequence[str], *, program: str, description: str) -> Config:
    """Read a command line such as `--config brain_fewshot --train.steps 100` into a checked Config.

    Exits with one message on an unknown recipe, field or value; `--help` explains every field.
    """
    import tyro

    name, rest = _take_config(list(argv))
    description += f"\n\n--config NAME picks a recipe and is required. NAME is one of: {', '.join(names())}."
    if name is None and not {"-h", "--help"} & set(argv):
        raise SystemExit(f"{program}: --config NAME is required, one of: {', '.join(names())}")
    with user_errors(program):
        config = tyro.cli(
            Config,
            args=rest,
            default=Config() if name is None else load(name),
            prog=program,
            description=description,
            config=(tyro.conf.FlagConversionOff,),
        )
        check(config)
    return config


def _take_config(argv: list[str]) -> tuple[str | None, list[str]]:
    """The value of --config, and the arguments without it."""
    for i, argument in enumerate(argv):
        if argument == "--config" and i + 1 < len(argv):
            return argv[i + 1], argv[:i] + argv[i + 2 :]
        if argument.startswith("--config="):
            return argument.removeprefix("--config="), argv[:i] + argv[i + 1 :]
    return None, argv


@contextmanager
def user_errors(program: str) -> Iterator[None]:
    """Turn an error about a file, a field or a value into one line and exit status 1.

    The traceback is for those who ask for it, with IQE_JAX_TRACEBACK=1.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(f"\n{program}: stopped; the same command goes on from the last checkpoint") from None
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("IQE_JAX_TRACEBACK"):
            raise
        raise SystemExit(f"{program}: {error}") from error

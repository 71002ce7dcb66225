"""How the commands in this package end: with one line that says what is wrong, not with a traceback."""

import sys
from collections.abc import Callable

import tyro


def run(main: Callable[..., None], name: str) -> None:
    """Call `main` as the command line of `python -m name` says; its documented errors end it with status 1."""
    try:
        tyro.cli(main, prog=f"python -m {name}")
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")

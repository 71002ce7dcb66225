"""Chooses the few labelled images of few-shot training: from a published list, or by a seeded draw.

Works on samples that bmad.py listed; opens no image.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from iqe_jax.data.bmad import Sample

_ROW = re.compile(r"^\s*([na])\s*-\s*(\d+)\s*:(.*)$")


def read_support(list_file: Path, valid: Sequence[Sample], *, row: int = 0) -> list[Sample]:
    """The samples that a published list (`k-shot.txt`) names: those of its line `n-ROW`, then those of `a-ROW`.

    Names are file names without folders, separated by white space; a folder before a name is ignored.

    Raises:
      FileNotFoundError: there is no such list.
      ValueError: a line that is not of this form, a row that is not there or stands there twice, a name that stands
        twice in a row, or names of no image of `valid` (all of them are named).
    """
    if not list_file.is_file():
        raise FileNotFoundError(
            f"no support list at {list_file}: expected lines 'n-0: a.png b.png' and 'a-0: c.png d.png'"
        )
    rows: dict[tuple[str, int], list[str]] = {}
    for number, line in enumerate(list_file.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        match = _ROW.match(line)
        if match is None:
            raise ValueError(
                f"{list_file}, line {number}: expected 'n-0: a.png b.png' or 'a-0: c.png d.png', found {line.strip()!r}"
            )
        key = (match[1], int(match[2]))
        if key in rows:
            raise ValueError(f"{list_file}, line {number}: row '{key[0]}-{key[1]}' stands there twice")
        rows[key] = [re.split(r"[/\\]", name)[-1] for name in match[3].split()]
    chosen, unknown = [], []
    for label, kind in enumerate("na"):
        names = rows.get((kind, row), [])
        if not names:
            there = ", ".join(f"{k}-{i}" for k, i in sorted(rows, key=lambda r: (r[1], -ord(r[0]))) if rows[k, i])
            raise ValueError(f"{list_file} has no row '{kind}-{row}' with names in it; its rows are {there or 'none'}")
        if len(set(names)) < len(names):
            raise ValueError(f"{list_file}, row '{kind}-{row}': {_twice(names)} stand there twice")
        by_name = {s.image.name: s for s in valid if s.label == label}
        unknown += [f"{kind}-{row}: {name}" for name in names if name not in by_name]
        chosen += [by_name[name] for name in names if name in by_name]
    if unknown:
        raise ValueError(
            f"{list_file} names {len(unknown)} files that are not among the valid images: {', '.join(unknown)}"
        )
    return chosen


def draw_support(valid: Sequence[Sample], k: int, seed: int) -> list[Sample]:
    """k normal samples, then k anomalous, drawn from `valid`: the same for the same names and seed on every machine.

    Draws with one seed are nested: those of k = 2 are the first two of each kind of k = 4. The order of `valid` does
    not matter.

    Raises:
      ValueError: k is not positive, or there are fewer than k images of a kind.
    """
    if k < 1:
        raise ValueError(f"k is {k}: a support set needs at least one image of each kind")
    pools = [[s for s in valid if s.label == label] for label in (0, 1)]
    if min(map(len, pools)) < k:
        raise ValueError(
            f"{k} normal and {k} anomalous images were asked for, but there are {len(pools[0])} and {len(pools[1])}"
        )
    # Sorting by a hash of seed and name is a shuffle that no library's random stream, and no further file, can change.
    return [s for pool in pools for s in sorted(pool, key=lambda s: _hash(seed, s.name))[:k]]


def held_out(valid: Sequence[Sample], support: Sequence[Sample]) -> list[Sample]:
    """The samples of `valid` that are not in `support`, in their order.

    Raises:
      ValueError: a support sample is not in `valid`.
    """
    taken, all_names = {s.name for s in support}, {s.name for s in valid}
    if strange := sorted(taken - all_names):
        raise ValueError(f"not among the valid images: {', '.join(strange)}")
    return [s for s in valid if s.name not in taken]


def _twice(names: list[str]) -> str:
    return ", ".join(sorted({n for n in names if names.count(n) > 1}))


def _hash(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogateescape")).digest()

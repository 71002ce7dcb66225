"""The engine under every conversion: a table of rules, read in both directions, that checks before it converts.

A rule says which tensors of a foreign checkpoint make up which array of ours, and how their axes are laid out. Sizes
are not told to the engine: it reads them from the tensors themselves and reports *everything* that does not fit in
one message. The tables live in clip_names.py and adapter.py, reading and writing files in files.py.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, product
from typing import Any

import numpy as np

LISTED = 12  # problems of one kind written out in a message; the rest are counted
_FIELD = re.compile(r"\{(\w+)\}")

Axes = tuple[tuple[str, ...], ...]
Sizes = dict[str, int]


@dataclass(frozen=True)
class Rule:
    """`names` (theirs) ↔ `path` (ours, `a/b/c`), with the axes of each in `layout`.

    `layout` reads like `(heads 64) dim -> dim heads 64`: theirs left, ours right, axes in brackets merged into one,
    numbers literal, a prime telling two axes of one size apart. A field such as `{blocks}` in a name stands for an
    index. Where the path has it too, the rule repeats; where it has not, or where there are several names, each name
    holds one slice of the first axis on the left.
    """

    names: str | tuple[str, ...]
    path: str
    layout: str

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """The name patterns, always as a tuple."""
        return (self.names,) if isinstance(self.names, str) else self.names

    @cached_property
    def repeated(self) -> str | None:
        """The field over which the whole rule repeats."""
        return next(iter(_FIELD.findall(self.path)), None)

    @cached_property
    def joined(self) -> str | None:
        """The field over which tensors are stacked into one array of ours."""
        return next((f for f in _FIELD.findall(self.sources[0]) if f != self.repeated), None)

    @cached_property
    def axes(self) -> tuple[Axes, Axes]:
        """The axes of the (joined) foreign tensor and of ours, each a tuple of groups."""
        left, right = (_parse(side) for side in self.layout.split("->"))
        if sorted(_flat(left)) != sorted(_flat(right)):
            raise ValueError(f"layout {self.layout!r} of {self.path} has different axes left and right")
        return left, right

    @cached_property
    def piece(self) -> Axes:
        """The axes of one foreign tensor: where several are joined, the first axis is theirs to share."""
        left = self.axes[0]
        if len(self.sources) == 1 and self.joined is None:
            return left
        first = left[0][1:]
        return (first, *left[1:]) if first else left[1:]


@dataclass(frozen=True)
class Table:
    """All rules of one format. `derive` adds the sizes that follow from others, raising ValueError where none do.

    `ignored` are regular expressions of names that may be in a file and mean nothing to us.
    """

    what: str
    rules: tuple[Rule, ...]
    derive: Callable[[Sizes], Sizes] = lambda sizes: {}
    ignored: tuple[str, ...] = ()


def to_ours(tensors: Mapping[str, Any], table: Table, origin: str) -> tuple[dict[str, Any], Sizes]:
    """Convert a foreign state dict to our nested tree of float32 arrays; returns it with the sizes found.

    `origin` names the file in messages. Raises one ValueError that lists all tensors which are missing, left over,
    misshapen, not floating point or not finite.
    """
    tensors = {k: v for k, v in tensors.items() if not any(re.fullmatch(p, k) for p in table.ignored)}
    arrays, sizes = _check(tensors, table, origin, ours=False)
    tree = {}
    for names, path, rule in _expand(table, sizes):
        pieces = [arrays[name] for name in names]
        array = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        tree[path] = _move(array.reshape(_shape(_split(rule.axes[0]), sizes)), *rule.axes, sizes)
    return unflatten(tree), sizes


def to_theirs(tree: Mapping[str, Any], table: Table, origin: str) -> tuple[dict[str, np.ndarray], Sizes]:
    """The way back: our tree to a foreign state dict of float32 arrays. Checks and raises as `to_ours` does."""
    arrays, sizes = _check(flatten(tree), table, origin, ours=True)
    tensors = {}
    for names, path, rule in _expand(table, sizes):
        left, right = rule.axes
        array = _move(arrays[path].reshape(_shape(_split(right), sizes)), right, left, sizes)
        shape = _shape(rule.piece, sizes)
        for name, piece in zip(names, array.reshape(len(names), *shape), strict=True):
            tensors[name] = np.array(piece, order="C")
    return tensors, sizes


def check_ours(tree: Mapping[str, Any], table: Table, origin: str) -> tuple[dict[str, Any], Sizes]:
    """Check a tree of ours against the table; returns it in float32, and its sizes. Raises as `to_ours` does."""
    arrays, sizes = _check(flatten(tree), table, origin, ours=True)
    return unflatten(arrays), sizes


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts to one dict with `a/b/c` keys."""
    flat = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """One dict with `a/b/c` keys to nested dicts."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def _check(found: Mapping[str, Any], table: Table, origin: str, *, ours: bool) -> tuple[dict[str, np.ndarray], Sizes]:
    """Read the sizes, hold every tensor against them, and raise once for all that is wrong."""
    raw = {name: np.asarray(value) for name, value in found.items()}
    sizes = _count(raw, table, ours)
    _measure(raw, table, ours, sizes)
    problems: dict[str, list[str]] = {"sizes": [], "missing": [], "left over": [], "misshapen": [], "not usable": []}
    try:
        sizes |= table.derive(sizes)
    except ValueError as error:
        problems["sizes"].append(str(error))

    expected = {}
    for names, path, rule in _expand(table, sizes):
        axes = rule.axes[1] if ours else rule.piece
        expected.update(dict.fromkeys([path] if ours else names, axes))
    arrays = {}
    for name, axes in expected.items():
        shape = _known_shape(axes, sizes)
        if name not in raw:
            problems["missing"].append(f"{name} {_show(axes, shape)}")
        elif not (np.issubdtype(raw[name].dtype, np.floating) or raw[name].dtype.name == "bfloat16"):
            problems["not usable"].append(f"{name} holds {raw[name].dtype}, expected floating point")
        elif raw[name].ndim != len(axes) or (shape and raw[name].shape != shape):
            problems["misshapen"].append(f"{name} expected {_show(axes, shape)}, found {list(raw[name].shape)}")
        else:
            with np.errstate(over="ignore"):  # what float32 cannot hold is reported below, as infinite
                arrays[name] = raw[name].astype(np.float32, copy=False)
            if bad := arrays[name].size - int(np.isfinite(arrays[name]).sum()):
                problems["not usable"].append(f"{name} has {bad} of {arrays[name].size} values not finite")
    problems["left over"] = [f"{name} {list(raw[name].shape)}" for name in raw if name not in expected]

    if total := sum(map(len, problems.values())):
        lines = [f"{origin} does not fit {table.what}: {total} problem{'s' * (total > 1)}"]
        for kind, entries in problems.items():
            lines += [f"  {kind} ({len(entries)}):"] * bool(entries) + [f"    {entry}" for entry in entries[:LISTED]]
            lines += [f"    … and {len(entries) - LISTED} more"] * (len(entries) > LISTED)
        raise ValueError("\n".join(lines))
    return arrays, sizes


def _patterns(rule: Rule, ours: bool) -> list[re.Pattern[str]]:
    # Three digits at most: a stray name with a huge index is left over, not a reason to miss a billion tensors.
    index = r"(?P<\1>0|[1-9][0-9]{0,2})"
    texts = [rule.path] if ours else rule.sources
    return [re.compile(re.sub(r"\\\{(\w+)\\\}", index, re.escape(text))) for text in texts]


def _count(found: Mapping[str, np.ndarray], table: Table, ours: bool) -> Sizes:
    """How often each field repeats: the highest index plus one; at least once, so that what is absent is missed."""
    counts: Sizes = {}
    for rule in table.rules:
        fields = [rule.repeated] if ours else [rule.repeated, rule.joined]
        for field in filter(None, fields):
            counts.setdefault(field, 1)
            for pattern in _patterns(rule, ours):
                for match in filter(None, map(pattern.fullmatch, found)):
                    counts[field] = max(counts[field], int(match[field]) + 1)
    return counts


def _measure(found: Mapping[str, np.ndarray], table: Table, ours: bool, sizes: Sizes) -> None:
    """Settle each named size by vote of all tensors with an axis of just that size: one odd tensor is outvoted."""
    votes: dict[str, Counter[int]] = {}
    for names, path, rule in _expand(table, {f: sizes.get(f, 1) for f in _fields(table)}):
        axes = rule.axes[1] if ours else rule.piece
        for name in [path] if ours else names:
            if name not in found or found[name].ndim != len(axes):
                continue
            for group, length in zip(axes, found[name].shape, strict=True):
                if len(group) == 1 and not group[0].isdigit():
                    votes.setdefault(group[0].rstrip("'"), Counter())[length] += 1
    sizes.update({axis: count.most_common(1)[0][0] for axis, count in votes.items()})


def _fields(table: Table) -> set[str]:
    return {f for rule in table.rules for f in (rule.repeated, rule.joined) if f}


def _expand(table: Table, sizes: Sizes) -> list[tuple[list[str], str, Rule]]:
    """Every rule with its indices filled in: (their names, our path, rule)."""
    expanded = []
    for field, group in groupby(table.rules, lambda rule: rule.repeated):  # block by block, as files have it
        for i, rule in product(range(sizes[field] if field else 1), list(group)):
            index = {field: i} if field else {}
            joined = [{rule.joined: k} for k in range(sizes.get(rule.joined, 1))] if rule.joined else [{}]
            names = [source.format(**index, **more) for more in joined for source in rule.sources]
            expanded.append((names, rule.path.format(**index), rule))
    return expanded


def _parse(side: str) -> Axes:
    return tuple(tuple(group.strip("()").split()) for group in re.findall(r"\([^)]*\)|\S+", side))


def _flat(axes: Axes) -> list[str]:
    return [axis for group in axes for axis in group]


def _split(axes: Axes) -> Axes:
    return tuple((axis,) for axis in _flat(axes))


def _length(axis: str, sizes: Sizes) -> int:
    return int(axis) if axis.isdigit() else sizes[axis.rstrip("'")]


def _shape(axes: Axes, sizes: Sizes) -> tuple[int, ...]:
    return tuple(math.prod(_length(axis, sizes) for axis in group) for group in axes)


def _known_shape(axes: Axes, sizes: Sizes) -> tuple[int, ...] | None:
    known = all(axis.isdigit() or axis.rstrip("'") in sizes for axis in _flat(axes))
    return _shape(axes, sizes) if known else None


def _show(axes: Axes, shape: tuple[int, ...] | None) -> str:
    return str(list(shape)) if shape is not None else "[" + ", ".join("·".join(group) for group in axes) + "]"


def _move(array: np.ndarray, old: Axes, new: Axes, sizes: Sizes) -> np.ndarray:
    """Permute an array whose axes are those of `old`, one by one, and merge them into the groups of `new`."""
    order = [_flat(old).index(axis) for axis in _flat(new)]
    # Not np.ascontiguousarray, which turns a scalar into a vector.
    return np.asarray(array.transpose(order), order="C").reshape(_shape(new, sizes))

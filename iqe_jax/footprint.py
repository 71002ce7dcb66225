"""What the real programs need, found by compiling them: bytes per device, work, and traffic between devices.

Arguments are shapes with shardings, so nothing is drawn, loaded or run, and the devices need not be here: those of a
TPU topology will do. What the figures mean for speed is for scaling.py to say.
"""

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from rich.table import Table

from iqe_jax.config import Config
from iqe_jax.evaluator import evaluation_step
from iqe_jax.features import at_once, kept_dtype, run_tower
from iqe_jax.models.iqe_clip import IqeClip
from iqe_jax.sharding import Layout, laid_out
from iqe_jax.train_state import batch_shapes, rows_of_step, shapes_laid_out, step_program, step_settings
from iqe_jax.weights import frozen_shardings

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Collective:
    """One exchange between devices, counted once wherever it stands: one inside a loop runs more often than that.

    `bytes` are those of the whole buffer on one device: what is reduced, what is there after gathering or before
    scattering. `group` is the number of devices that take part together, `op` the operation it was made for.
    """

    kind: str
    bytes: int
    group: int
    shapes: tuple[str, ...]
    op: str


@dataclass(frozen=True)
class Footprint:
    """One compiled program; all figures are per device.

    `parts` splits what has to be in memory around the program by what it is: `frozen`, `trainable`, `optimiser` and
    `batch`, computed from shapes and shardings. A program may take only some of these as `arguments`. `flops` are as
    written, however many passes the device makes of a product. `code` and `peak` may be 0 where a compiler does not
    say. Work and traffic are those of one of the `parts_of_batch`, since compilers count a loop once.
    """

    name: str
    devices: int
    batch_size: int
    parts: Mapping[str, int]
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    peak: int
    flops: float
    accessed: float
    collectives: tuple[Collective, ...]
    seconds: float
    parts_of_batch: int = 1

    @property
    def needed(self) -> int:
        """Bytes of memory while the program runs, with parameters that are there without being its arguments."""
        held = max(self.arguments, sum(self.parts.values()))
        return held + max(self.outputs - self.aliased, 0) + self.temporaries + self.code

    def by_kind(self) -> dict[str, tuple[int, int]]:
        """Number and bytes of the collectives of each kind there is."""
        found = {kind: [c.bytes for c in self.collectives if c.kind == kind] for kind in KINDS}
        return {kind: (len(sizes), sum(sizes)) for kind, sizes in found.items() if sizes}


def train_footprint(model: IqeClip, config: Config, layout: Layout, *, masks: bool = True) -> Footprint:
    """The train step on kept features, of a set with masks or without. Raises ValueError as `Layout.shardings`."""
    train = config.train
    size = rows_of_step(train, layout)
    settings = step_settings(model, train, train.dropout, layout)
    state = shapes_laid_out(model, settings["rates"], layout)
    frozen = _frozen(model, layout)
    batch = batch_shapes(model, layout, size, kept_dtype(config), masks=masks)
    parts = {
        "frozen": held_bytes(frozen),
        "trainable": held_bytes(state.trainable),
        "optimiser": held_bytes(state.opt_state),
        "batch": held_bytes(batch),
    }
    with layout.active():
        lowered = step_program.lower(state, {"text": frozen["text"]}, batch, **settings)
    return replace(_compile("train step", lowered, parts, layout, size), parts_of_batch=train.accumulate)


def evaluation_footprints(
    model: IqeClip, config: Config, layout: Layout, *, masks: bool = True
) -> tuple[Footprint, Footprint]:
    """The two programs of an evaluation: the image tower and the scoring of one batch of its features."""
    size = at_once(model, config, layout)
    side = model.config.image_size
    trainable = shapes_laid_out(model, config.train.rates, layout).trainable
    frozen = _frozen(model, layout)
    images = jax.ShapeDtypeStruct((size, side, side, 3), jnp.float32, sharding=layout.batch)
    batch = batch_shapes(model, layout, size, model.dtype, masks=masks)
    parts = {"frozen": held_bytes(frozen), "trainable": held_bytes(trainable)}
    with layout.active():
        tower = run_tower.lower(model, frozen, images, layout)
        scoring = evaluation_step.lower(model, trainable, frozen, batch, config.zero_shot, layout)
    return (
        _compile("image tower", tower, parts | {"batch": held_bytes(images)}, layout, size),
        _compile("scoring", scoring, parts | {"batch": held_bytes(batch)}, layout, size),
    )


def held_bytes(tree: Any) -> int:
    """Bytes per device of a tree of shapes with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize for x in leaves)


def _frozen(model: IqeClip, layout: Layout) -> dict[str, Any]:
    return laid_out(jax.eval_shape(model.init_frozen, jax.random.key(0)), frozen_shardings(model, layout))


def _compile(name: str, lowered: Any, parts: Mapping[str, int], layout: Layout, size: int) -> Footprint:
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    devices = layout.mesh.size
    return Footprint(
        name,
        devices,
        size,
        parts,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
        getattr(memory, "peak_memory_in_bytes", 0),
        cost.get("flops", 0.0),
        cost.get("bytes accessed", 0.0),
        collectives(compiled.as_text(), devices),
        seconds,
    )


_LINE = re.compile(rf"^\s*(?:ROOT )?%?[\w.-]+ = ([^\"\n]*?) ({'|'.join(KINDS)})(-start)?\((.*)$", re.MULTILINE)
_SHAPE = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\]")


def collectives(text: str, devices: int) -> tuple[Collective, ...]:
    """The collectives of a compiled program's text. A pair of start and done counts once, as does one channel."""
    found, channels = [], set()
    for match in _LINE.finditer(text):
        results, kind, asynchronous, rest = match.groups()
        # An exchange that goes on behind other work may stand in several computations, under one channel.
        channel = re.search(r"channel_id=(\d+)", rest)
        if channel is not None:
            if (kind, channel[1]) in channels:
                continue
            channels.add((kind, channel[1]))
        shapes = [(dtype, dims) for dtype, dims in _SHAPE.findall(re.sub(r"\{[^{}]*\}", "", results))]
        if asynchronous and kind != "all-reduce":  # what goes in, what comes out, and counters
            shapes = [shape for shape in shapes if shape not in (("u32", ""), ("s32", ""))]
            shapes = shapes[len(shapes) // 2 :]
        group = _group(rest, devices) if kind != "collective-permute" else 2
        size = sum(_bytes(dtype, dims) for dtype, dims in shapes) * (group if kind == "reduce-scatter" else 1)
        op = re.search(r'op_name="([^"]*)"', rest)
        names = tuple(f"{dtype}[{dims}]" for dtype, dims in shapes)
        found.append(Collective(kind, size, group, names, op[1] if op else ""))
    return tuple(found)


def _bytes(dtype: str, dims: str) -> int:
    bits = re.match(r"[a-z]+(\d+)", dtype)
    return math.prod(int(n) for n in dims.split(",") if n) * (1 if bits is None else -(-int(bits[1]) // 8))


def _group(attributes: str, devices: int) -> int:
    """How many devices exchange with one another: all of them where no groups are named."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return listed[1].count(",") + 1
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(counted[1])
    if named := re.search(r"replica_groups=(?:@?\w*)\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        used = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part) if part else sizes[name] for name, part in used)
    return devices


def footprint_table(title: str, footprints: Sequence[Footprint], *, features: tuple[str, int] | None = None) -> Table:
    """What each program needs on one device, in MB; `features` names the place of the kept ones and their bytes."""
    table = Table(title=title)
    table.add_column("per device", no_wrap=True)
    for footprint in footprints:
        table.add_column(f"{footprint.name}, {footprint.batch_size} images", justify="right")
    rows = {
        "frozen parameters": [f.parts["frozen"] for f in footprints],
        "trainable parameters": [f.parts["trainable"] for f in footprints],
        "optimiser": [f.parts.get("optimiser") for f in footprints],
        "batch": [f.parts["batch"] for f in footprints],
        "activations and other temporaries": [f.temporaries for f in footprints],
        "program": [f.code for f in footprints],
    }
    for name, sizes in rows.items():
        table.add_row(name, *("–" if size is None else in_bytes(size) for size in sizes))
    table.add_section()
    table.add_row("needed while it runs", *(in_bytes(f.needed) for f in footprints))
    counted = [f"{f.flops / 1e9:,.1f}" + (" a micro-batch" if f.parts_of_batch > 1 else "") for f in footprints]
    table.add_row("GFLOPs", *counted)
    table.add_row("seconds to compile", *(f"{f.seconds:.0f}" for f in footprints))
    if features is not None:
        table.caption = f"Kept features: {in_bytes(features[1])}, {features[0]}"
    return table


def in_bytes(size: float) -> str:
    """A size for reading, in the decimal units that disks and chips are sold by."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:,.{2 if unit == 'GB' else 1}f} {unit}"
    return f"{size:.0f} B"

"""How the programs scale: predicted for TPU slices that are not here, or measured on the devices that are.

`python -m iqe_jax.scaling --config brain_zeroshot --topology v5e:4x4 v5e:16x16` compiles the real train step and
evaluation with the TPU compiler and sets their work and traffic against the chip's documented figures; nothing runs on
a TPU. `--measure` runs the train step. Both are weak scaling, with the same images per chip at every size, and leave
a table on screen and as Markdown, JSON and a plot.
"""

import importlib.metadata
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.core import meta
from rich.console import Console
from rich.table import Table

from iqe_jax import cli
from iqe_jax.chips import CHIPS, PASSES, Chip, seconds_to_exchange
from iqe_jax.config import Config
from iqe_jax.features import kept_dtype
from iqe_jax.footprint import Footprint, evaluation_footprints, in_bytes, train_footprint
from iqe_jax.models.iqe_clip import IqeClip
from iqe_jax.progress import console
from iqe_jax.sharding import Layout, make_layout
from iqe_jax.train_state import Batch, create, train_step
from iqe_jax.weights import describe, frozen_shardings

PROGRAM = "python -m iqe_jax.scaling"
PREDICTED = "PREDICTED: compiled for TPUs, set against documented figures; nothing ran on a TPU"
MEASURED = "MEASURED"
# What the TPU compiler asks of its surroundings where there is no TPU.
_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


@dataclass(frozen=True)
class Options:
    """What is compiled or measured."""

    topology: tuple[str, ...] = ()
    """TPU slices to predict for: v4, v5e, v5p, v6e or tpu7x, and chips along each side, as in v5e:16x16."""
    measure: bool = False
    """Run the train step on 1, 2, 4, … of the devices that are here, in place of predicting."""
    per_chip: int = 16
    """Images per chip and step; of a chip that JAX shows as two devices each takes half."""
    repeats: int = 5
    """Timed runs of which --measure takes the median."""
    out: Path = Path("runs/scaling")
    """Folder for scaling.json, scaling.md and scaling.png."""


@dataclass(frozen=True)
class Row:
    """One program at one size. Times are seconds per step.

    `efficiency` is throughput per chip against one chip's, measured against the fewest that the mesh fits;
    `efficiency_flops` is the same if memory were never waited for.
    """

    chip: str
    program: str
    chips: int
    mesh: dict[str, int]
    batch: int
    images_per_second: float
    efficiency: float
    efficiency_flops: float | None = None
    compute: float | None = None
    communication: float | None = None
    memory: int | None = None
    memory_has: float | None = None
    flops: float | None = None
    collectives: dict[str, tuple[int, int]] | None = None
    compile_seconds: float | None = None
    seconds: float | None = None


def topology_devices(name: str) -> list[Any]:
    """The devices of a TPU slice that is not here, for compiling only.

    Raises ValueError on a name that is none, and when the TPU compiler is not installed.
    """
    from jax.experimental import topologies

    if not re.fullmatch(rf"({'|'.join(CHIPS)}):[1-9]\d*(x[1-9]\d*)*", name):
        raise ValueError(f"--topology {name}: expected one of {', '.join(CHIPS)} and its sides, such as v5e:4x4")
    try:
        import libtpu  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        wanted = (name.partition(";")[0].strip() for name in importlib.metadata.requires("jax") or ())
        compiler = next((name for name in wanted if name.startswith("libtpu")), "libtpu")
        raise ValueError(f"the TPU compiler is not installed: pip install '{compiler}' (docs/scaling.md)") from None
    os.environ.update({**_NO_TPU, **os.environ})
    try:
        cores = "megacore" if name[:2] == "v4" else "default"  # on a v4 a chip's two cores are one device
        return list(topologies.get_topology_desc(name, "tpu", chip_config_name=cores).devices)
    except Exception as error:  # the compiler's own, of no one class
        raise ValueError(f"--topology {name}: {error}") from error


def predict(model: IqeClip, config: Config, topologies: Sequence[str], per_chip: int) -> Iterator[Row]:
    """A row for training and one for evaluation of each slice, as they are compiled."""
    alone: dict[str, list[list[Footprint]]] = {}
    for name in topologies:
        devices = topology_devices(name)
        kind, sides = name.split(":")
        chip, chips = CHIPS[kind], math.prod(int(side) for side in sides.split("x"))
        part = len(devices) // chips  # some chips are two devices
        chip = replace(chip, flops=chip.flops / part, memory=chip.memory / part, bandwidth=chip.bandwidth / part)
        layout = make_layout(config.mesh, devices)
        programs = _compiled(model, config, layout, per_chip / part, name)
        single = programs
        # Where only the batch is split, a chip of many does what a single one does, and exchanges on top.
        if _split(config) > 1:
            if kind not in alone:
                first = make_layout(replace(config.mesh, data=1, fsdp=1, tensor=1), devices[:1])
                alone[kind] = _compiled(model, config, first, per_chip / part, f"one chip of {kind}")
            single = alone[kind]
        mesh = {axis: int(n) for axis, n in layout.mesh.shape.items()}
        for found, one in zip(programs, single, strict=True):
            yield predicted_row(found, one, chip, chips, mesh, PASSES[config.model.dtype])


def _compiled(model: IqeClip, config: Config, layout: Layout, each: float, name: str) -> list[list[Footprint]]:
    """The programs for `each` images a device."""
    size = layout.padded(math.ceil(each * layout.mesh.size))
    config = replace(config, train=replace(config.train, batch_size=size), eval=replace(config.eval, batch_size=size))
    console.print(f"{name}: compiling the train step for {size} images, {config.model.dtype} …")
    train = train_footprint(model, config, layout)
    console.print(f"{name}: {train.seconds:.0f} s; compiling the evaluation …")
    evaluation = evaluation_footprints(model, config, layout)
    console.print(f"{name}: {sum(f.seconds for f in evaluation):.0f} s")
    return [[train], list(evaluation)]


def predicted_row(
    found: list[Footprint], one: list[Footprint], chip: Chip, chips: int, mesh: dict[str, int], passes: int
) -> Row:
    """What the programs `found` take on each chip; `one` are those of a single chip, which exchanges nothing."""

    def compute(programs: list[Footprint], *, memory: bool = True) -> float:
        flops = [f.flops * passes / chip.flops for f in programs]
        return sum(map(max, flops, [f.accessed / chip.bandwidth if memory else 0.0 for f in programs]))

    links = [seconds_to_exchange(c, chip.links) for f in found for c in f.collectives]
    own, exchange, batch = compute(found), sum(links), found[0].batch_size
    devices = found[0].devices

    def efficiency(*, memory: bool) -> float:
        rate = batch / (compute(found, memory=memory) + exchange) / devices
        return rate / (one[0].batch_size / compute(one, memory=memory) / one[0].devices)

    kinds: dict[str, tuple[int, int]] = {}
    for footprint in found:
        for kind, (count, size) in footprint.by_kind().items():
            before = kinds.get(kind, (0, 0))
            kinds[kind] = (before[0] + count, before[1] + size)
    return Row(
        chip=chip.name,
        program="train step" if len(found) == 1 else "evaluation",
        chips=chips,
        mesh=mesh,
        batch=batch,
        images_per_second=batch / (own + exchange),
        efficiency=efficiency(memory=True),
        efficiency_flops=efficiency(memory=False),
        compute=own,
        communication=exchange,
        memory=max(f.needed for f in found),
        memory_has=chip.memory,
        flops=sum(f.flops for f in found),
        collectives=kinds,
        compile_seconds=sum(f.seconds for f in found),
    )


def measure(model: IqeClip, config: Config, per_chip: int, repeats: int) -> Iterator[Row]:
    """A row for the train step on 1, 2, 4, … of the devices here: random weights and features, the median time."""
    devices, first = jax.devices(), None
    for count in [2**i for i in range(len(devices).bit_length()) if 2**i % _split(config) == 0]:
        layout = make_layout(config.mesh, devices[:count])
        size = layout.padded(per_chip * count)
        console.print(f"{count} × {devices[0].device_kind}: {size} images a step …")
        seconds = _timed(model, replace(config, train=replace(config.train, batch_size=size)), layout, size, repeats)
        first = first or size / seconds / count
        yield Row(
            chip=devices[0].device_kind,
            program="train step",
            chips=count,
            mesh={axis: int(n) for axis, n in layout.mesh.shape.items()},
            batch=size,
            images_per_second=size / seconds,
            efficiency=size / seconds / count / first,
            seconds=seconds,
        )


def _split(config: Config) -> int:
    return config.mesh.fsdp * config.mesh.tensor


def _timed(model: IqeClip, config: Config, layout: Layout, size: int, repeats: int) -> float:
    """The median time of a step, after two that compile and settle."""
    draw, settings = np.random.default_rng(config.train.seed), model.config
    drawn = jax.jit(lambda key: meta.unbox(model.init_frozen(key)), out_shardings=frozen_shardings(model, layout))
    with layout.active():
        frozen = drawn(jax.random.key(config.train.seed))
    state = create(model, config.train, frozen, layout)

    rows, side = layout.rows(size), settings.image_size
    shape = (len(settings.levels), len(rows), model.grid**2, model.clip.vision_width)
    tokens = draw.standard_normal(shape, np.float32).astype(kept_dtype(config))
    pooled = draw.standard_normal((len(rows), model.clip.embed_dim), np.float32)
    labels = np.arange(size, dtype=np.float32)[rows] % 2
    masks = (draw.random((len(rows), side, side)) > 0.84).astype(np.float32)
    batch = Batch(tokens, pooled, masks, labels, np.ones_like(labels)).placed(layout, size)
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        state, metrics = train_step(
            state, {"text": frozen["text"]}, batch, model=model, config=config.train, dropout=0.0, layout=layout
        )
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def _cells(row: Row) -> dict[str, str]:
    """A row as it is printed, by column."""
    mesh = " × ".join(f"{name} {n}" for name, n in row.mesh.items() if n > 1) or "one chip"
    start = {"program": row.program, "chip": row.chip, "chips": str(row.chips), "mesh": mesh}
    end = {"efficiency": f"{row.efficiency:.1%}", "images/s": f"{row.images_per_second:,.0f}"}
    if row.seconds is not None:
        return start | {"batch": str(row.batch), "ms a step, median": f"{1e3 * row.seconds:.2f}"} | end
    assert row.memory and row.memory_has and row.flops and row.compute is not None
    assert row.collectives is not None and row.communication is not None and row.efficiency_flops is not None
    exchanged = ", ".join(f"{n} {kind}, {in_bytes(size)}" for kind, (n, size) in row.collectives.items()) or "none"
    return start | {
        "HBM a chip": f"{in_bytes(row.memory)} of {row.memory_has / 1e9:.0f} GB",
        "GFLOPs a chip": f"{row.flops / 1e9:,.0f}",
        "collectives": exchanged,
        "compute": f"{1e3 * row.compute:.2f} ms",
        "communication": f"{1e3 * row.communication:.3f} ms",
        "efficiency": end["efficiency"],
        "if memory were free": f"{row.efficiency_flops:.1%}",
        "images/s": end["images/s"],
    }


def write(rows: Sequence[Row], title: str, notes: Sequence[str], about: Mapping[str, Any], out: Path) -> None:
    """Print the table and leave scaling.json, scaling.md and scaling.png in `out`.

    Raises ValueError, with all else written, when Matplotlib is not installed.
    """
    cells = [_cells(row) for row in rows]
    table = Table(*cells[0], title=title, caption="\n".join(notes), caption_justify="left")
    for row in cells:
        table.add_row(*row.values())
    Console(width=None if console.is_terminal else 200).print(table)  # a log is as wide as need be
    out.mkdir(parents=True, exist_ok=True)
    content = {"title": title, **about, "notes": list(notes), "rows": [asdict(row) for row in rows]}
    (out / "scaling.json").write_text(json.dumps(content, indent=2) + "\n")
    lines = ["| " + " | ".join(cells[0]) + " |", "|" + "---|" * len(cells[0])]
    lines += ["| " + " | ".join(row.values()) + " |" for row in cells]
    (out / "scaling.md").write_text("\n".join([f"**{title}**", "", *lines, "", *(f"- {n}" for n in notes)]) + "\n")
    _plot(rows, title, out / "scaling.png")


def _plot(rows: Sequence[Row], title: str, path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(f"no {path.name}: Matplotlib is not installed; pip install '.[plot]'") from None
    least = 1 if rows[0].seconds is None else min(row.chips for row in rows)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for chip, program in dict.fromkeys((row.chip, row.program) for row in rows):
        points = {r.chips: 100 * r.efficiency for r in rows if (r.chip, r.program) == (chip, program)}
        points.setdefault(least, 100.0)
        axes.plot(sorted(points), [points[n] for n in sorted(points)], "o-", label=f"{chip}, {program}")
    axes.set(xscale="log", ylim=(0, 105), xlabel="chips", ylabel=f"efficiency, % of images/s a chip of {least}")
    axes.set_xticks(sizes := sorted({least, *(row.chips for row in rows)}), [str(n) for n in sizes])
    axes.minorticks_off()
    axes.set_title(title, fontsize=9, wrap=True)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main(argv: list[str]) -> None:
    """Predict or measure what `argv` asks for."""
    options, config = cli.parse_with(Options(), argv, program=PROGRAM, description=(__doc__ or "").partition("\n\n")[2])
    with cli.user_errors(PROGRAM):
        if options.measure == bool(options.topology):
            raise ValueError("give either --topology or --measure")
        if options.per_chip < 1 or options.repeats < 1:
            raise ValueError("--per-chip and --repeats must be above 0")
        size, parts = options.per_chip * _split(config), config.train.accumulate
        if options.measure and size % parts:
            raise ValueError(f"train.accumulate is {parts}; it must divide the {size} images of a step")
        if not options.measure:
            if parts > 1:
                raise ValueError("compilers count a loop once: with train.accumulate above 1 there is only --measure")
            jax.config.update("jax_platforms", "cpu")  # else the compiler's library would look for TPUs to run on
        model = describe(config.model)
        about: dict[str, Any] = {"config": config.name, "dtype": config.model.dtype, "per_chip": options.per_chip}
        if options.measure:
            if not (rows := list(measure(model, config, options.per_chip, options.repeats))):
                raise ValueError("too few devices here for mesh.fsdp × mesh.tensor")
            title, notes = f"{MEASURED} on {rows[0].chip}, {config.name}, {config.model.dtype}", []
            if jax.devices()[0].platform == "cpu":
                notes = ["Devices of a CPU share its cores, so this says nothing about scaling."]
            about["kind"] = "measured"
        else:
            rows = list(predict(model, config, options.topology, options.per_chip))
            title = f"{PREDICTED}. {config.name}, {config.model.dtype}, {options.per_chip} images a chip"
            notes = _notes(config)
            about |= {"kind": "predicted", "chips": {name: asdict(chip) for name, chip in CHIPS.items()}}
        write(rows, title, notes, about, options.out)
        console.print(f"Written to {options.out}")


def _notes(config: Config) -> list[str]:
    passes = PASSES[config.model.dtype]
    work = f"FLOPs × {passes} passes ÷ peak" if passes > 1 else "FLOPs ÷ peak"
    return [
        f"compute is the larger of {work} and bytes accessed ÷ HBM bandwidth; the compiler counts all bytes that "
        "operations touch, near memory too, so this is likely too long and the efficiency too good",
        "communication is ring traffic ÷ link bandwidth, none of it behind the compute, without latency and input",
        "the column “if memory were free” lets only FLOPs take time on the chip, the other extreme",
    ]


if __name__ == "__main__":
    main(sys.argv[1:])

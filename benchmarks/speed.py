"""How fast it is: `python -m benchmarks.speed` measures every part, against PyTorch where that is there.

Prints one table and the figures that have to hold, and leaves speed.json, speed.md and speed.png. Seconds are medians
of several repeats, taken in turns with those they are compared with; fractions are of the matrix-product rate that the
same run measured.
"""

import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import tyro
from rich.console import Console
from rich.table import Table

Part = Literal["tower", "attention", "text", "iqm", "head", "inference", "training"]
Section = Literal["matrix", Part, "pixels", "input", "imports", "start"]
MODEL_SECTIONS = set(get_args(Part))
# Seconds of a turn at full size. On a CPU that is about one of the tower's calls, and several training steps.
TURN, TURN_ON_DEVICE = 6.0, 1.0


@dataclass(frozen=True)
class Options:
    """What is measured."""

    size: Literal["tiny", "full"] = "tiny"
    """full: ViT-L/14-336 at 240 pixels, a quarter of an hour on two cores and 10 GB. tiny: the phantoms' model, to see
    that all of it runs."""
    device: Literal["cpu", "gpu", "tpu"] = "cpu"
    """Where it runs."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type of both sides."""
    batch: int = 8
    """Images per call; 0 takes as many as fit in memory, up to 1024, or 16 of the tiny model."""
    only: tuple[Section, ...] = ()
    """Sections to measure, all where none is given."""
    repeats: int = 5
    """Timed calls of each, of which the table has the median."""
    threads: int = 2
    """Threads of PyTorch and of decoding; JAX takes all cores it is given."""
    pixels: int | None = None
    """Pixels that the pixel metrics count, 200 million at full size."""
    profile: bool = False
    """On a GPU, also where the time of the tower and of a training step goes, by kind of kernel."""
    out: Path = Path("runs/speed")
    """Folder for speed.json, speed.md and speed.png."""


def run(options: Options) -> Any:
    """Measure what `options` asks for; returns the Report."""
    import jax

    from benchmarks import inputs, model_parts, peers, pixels, starts
    from benchmarks.measure import Report
    from iqe_jax.config import load
    from iqe_jax.progress import console
    from iqe_jax.sharding import make_layout
    from iqe_jax.weights import describe

    jax.config.update("jax_platforms", {"gpu": "cuda"}.get(options.device, options.device))
    full = options.size == "full"
    wanted: set[str] = set(options.only or get_args(Section))
    on_cpu = options.device == "cpu"
    report = Report(options.repeats, (TURN if on_cpu else TURN_ON_DEVICE) if full else 0.0, not on_cpu)
    report.facts |= machine(options)
    torch = peers.torch_or_none(options.threads)
    if torch is not None:
        report.facts["torch"] = torch.__version__
    config = load("brain_fewshot" if full else "phantom_fewshot")
    config = replace(config, model=replace(config.model, dtype=options.dtype))
    if not full:
        config = replace(config, model=replace(config.model, start="random"))
    model = describe(config.model)
    if "matrix" in wanted:
        console.print("Matrix product …")
        size = (4096 if on_cpu else 8192) if full else 512
        model_parts.matrix_rate(report, model, size, torch, options.device)
    parts = None
    if wanted & (MODEL_SECTIONS | {"input"}):
        console.print("Drawing weights, compiling …")
        layout = make_layout(config.mesh, jax.devices()[:1])
        batch = options.batch or model_parts.batch_for_memory(model, jax.devices()[0], 1024 if full else 16)
        parts = model_parts.Parts(model, config, layout, batch, options.device, options.profile)
        report.facts["batch"] = batch
    if parts is not None and wanted & MODEL_SECTIONS:
        console.print(f"{', '.join(sorted(wanted & MODEL_SECTIONS))}: {parts.batch} images a call …")
        model_parts.measure(parts, report, torch, wanted)
    if parts is not None and "input" in wanted:
        console.print("Input …")
        inputs.decoding(report, config.model.image_size, parts.batch, options.threads)
        inputs.kept_features(parts, report, 12 if full else 4)
    parts = None
    if "pixels" in wanted:
        console.print("Pixel metrics …")
        count = options.pixels or (200_000_000 if full else 1_000_000)
        pixels.measure(report, count, min(count, 20_000_000), pixels.BATCH if full else 4)
    if "imports" in wanted:
        console.print("Imports …")
        starts.imports(report)
    if "start" in wanted:
        console.print("First and second start of evaluate.py …")
        starts.first_steps(report, [] if full else ["--model.iqm-layers", "1", "--train.epochs", "1"])
    return report


def machine(options: Options) -> dict[str, Any]:
    """What the figures were made with."""
    import jax

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "size": options.size,
        "dtype": options.dtype,
        "device": jax.devices()[0].device_kind,
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
    }


def cells(row: Any, rate: float | None) -> dict[str, str]:
    """A row as it is printed, by column."""

    def each(seconds: float) -> str:
        return f"{seconds / (row.images or 1):.3g}"

    known = row.flops is not None and not math.isnan(row.flops)
    speed = row.flops / row.median if known else None
    return {
        "part": row.section,
        "what": row.name,
        "images": str(row.images or "–"),
        "s an image, or s": each(row.median),
        "spread": f"{each(min(row.seconds))} – {each(max(row.seconds))}",
        "GFLOP/s": f"{speed / 1e9:,.0f}" if speed else "–",
        "of the matrix product": f"{speed / rate:.0%}" if speed and rate else "–",
    }


def write(report: Any, out: Path) -> None:
    """Print the table and the targets, and leave speed.json, speed.md and speed.png in `out`."""
    shown = [cells(row, report.matrix_rate) for row in report.rows]
    title = ", ".join(f"{name} {value}" for name, value in report.facts.items() if not isinstance(value, dict | float))
    table = Table(*shown[0], title=title)
    for row in shown:
        table.add_row(*row.values())
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table)
    for target in report.targets:
        console.print(str(target), style=None if target.held else "bold red", highlight=False)
    out.mkdir(parents=True, exist_ok=True)
    content = {
        **report.facts,
        "matrix_product_flops": report.matrix_rate,
        "rows": [asdict(row) | {"median": row.median} for row in report.rows],
        "targets": [asdict(target) | {"held": target.held} for target in report.targets],
    }
    (out / "speed.json").write_text(json.dumps(content, indent=2, default=str) + "\n")
    lines = [f"**{title}**", "", "| " + " | ".join(shown[0]) + " |", "|" + "---|" * len(shown[0])]
    lines += ["| " + " | ".join(row.values()) + " |" for row in shown]
    for part, times in report.facts.get("kernels", {}).items():
        lines += ["", f"| {part}, by kernel | ms a call | share |", "|---|---|---|"]
        lines += [f"| {kind} | {1e3 * s:.2f} | {s / times['all']:.1%} |" for kind, s in times.items()]
    (out / "speed.md").write_text("\n".join([*lines, "", *(f"- {target}" for target in report.targets)]) + "\n")
    plot(report, title, out / "speed.png")


def plot(report: Any, title: str, path: Path) -> None:
    """Bars of seconds per image of every part that has images, ours beside its peer's."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit(f"no {path.name}: Matplotlib is not installed; pip install '.[plot]'") from None
    rows = [row for row in report.rows if row.images]
    figure = Figure(figsize=(9, 1.5 + 0.35 * max(len(rows), 1)), layout="constrained")
    axes = figure.add_subplot()
    names = [f"{row.section}: {row.name}" for row in rows]
    values = [row.median / row.images for row in rows]
    colours = ["tab:orange" if row.name in ("PyTorch",) or "scikit" in row.name else "tab:blue" for row in rows]
    axes.barh(names, values, color=colours)
    axes.set(xscale="log", xlabel="seconds per image")
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_title(title, fontsize=7, wrap=True)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write."""
    description = (__doc__ or "").replace("\n\n", "\n")
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.speed", description=description)
    if options.batch < 0 or options.repeats < 1 or options.threads < 1:
        raise SystemExit("--batch must not be negative, --repeats and --threads must be above 0")
    if options.profile and options.device != "gpu":
        raise SystemExit(f"--profile reads a GPU's kernels, --device is {options.device}; add --device gpu")
    write(run(options), options.out)
    print(f"Written to {options.out}")


if __name__ == "__main__":
    main()

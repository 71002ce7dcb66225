"""The paper's table in one command: `python -m iqe_jax.reproduce --data.root data`, or `--phantoms` to try it.

Every set and protocol is a process of its own, which makes its runs, one for each seed, in run directories; so memory
is bounded and what was finished is never done again. Tables are written anew after each.
"""

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iqe_jax import cli
from iqe_jax.checkpoint import write_whole
from iqe_jax.config import Config, from_json, to_json
from iqe_jax.data.bmad import SETS as PUBLISHED_SETS
from iqe_jax.progress import console, track
from iqe_jax.reproduce_tables import as_csv, as_latex, as_markdown

_CELL = "reproduce"  # what the process of a cell calls itself where it tells of an error
SETS = ("brain", "liver", "resc", "oct17", "chest", "his")

DESCRIPTION = """The paper's table: every set, zero-shot and by number of shots, over several seeds, with intervals,
time and peak memory, as table.md, .csv, .json and .tex. Stopped, the same command goes on where it was. Settings of
the experiments can be overridden as for train.py, and hold for all of them. Without --shots and --zero-shot all of the
paper's are run: zero-shot and k = 2, 4, 8, 16.

The recipes are the published ones, with --phantoms those of the phantoms, so there is no --config; and --out and
--seeds stand for --run-dir and --eval.seeds."""

# Image and pixel AUROC in %, as MVFA-AD's README gives them: of its paper, and of its published code.
SOURCE = "README.md of github.com/MediaBrain-SJTU/MVFA-AD at commit 44b4c02c, columns Paper and Inplementation"
PUBLISHED: dict[tuple[str, int], dict[str, tuple[float, float]]] = {
    ("his", 0): {"image_auroc": (77.90, 76.90)},
    ("chest", 0): {"image_auroc": (71.11, 71.11)},
    ("oct17", 0): {"image_auroc": (95.40, 95.40)},
    ("brain", 0): {"image_auroc": (78.63, 79.80), "pixel_auroc": (90.27, 89.68)},
    ("liver", 0): {"image_auroc": (76.24, 81.18), "pixel_auroc": (97.85, 97.93)},
    ("resc", 0): {"image_auroc": (83.31, 88.99), "pixel_auroc": (92.05, 90.44)},
    ("his", 4): {"image_auroc": (82.71, 82.71)},
    ("chest", 4): {"image_auroc": (81.95, 81.95)},
    ("oct17", 4): {"image_auroc": (99.38, 99.38)},
    ("brain", 4): {"image_auroc": (92.44, 92.31), "pixel_auroc": (97.30, 97.30)},
    ("liver", 4): {"image_auroc": (81.18, 81.18), "pixel_auroc": (99.73, 99.69)},
    ("resc", 4): {"image_auroc": (96.18, 96.18), "pixel_auroc": (98.97, 98.97)},
}


@dataclass(frozen=True)
class Options:
    """What the table has; flags of this command alone."""

    shots: tuple[int, ...] = ()
    """Few-shot: numbers k of normal and of anomalous support images."""
    zero_shot: bool = False
    """Zero-shot, each set with an adapter trained on the others."""
    seeds: int = 5
    """Runs of each, with seeds and support draws from train.seed on."""
    sets: tuple[str, ...] = SETS
    """Target sets."""
    out: Path = Path("reproduced")
    """Folder of the run directories and the tables."""
    phantoms: bool = False
    """The rendered phantom sets in place of the real ones: shows that all works, and says nothing about real data."""


@dataclass(frozen=True)
class Cell:
    """A target set under a protocol: its runs differ in their seeds alone."""

    dataset: str
    shots: int
    runs: tuple[Config, ...]

    @property
    def name(self) -> str:
        """As in file names."""
        return f"{self.dataset}-k{self.shots}"

    @property
    def protocol(self) -> str:
        """As in tables."""
        return f"k = {self.shots}" if self.shots else "zero-shot"


def cells(argv: Sequence[str]) -> tuple[Options, list[Cell]]:
    """What a command line asks for. Exits with one message where it asks for what is not there."""
    program = "python -m iqe_jax.reproduce"

    def parse(recipe: str) -> tuple[Options, Config]:
        return cli.parse_with(Options(), argv, program=program, description=DESCRIPTION, recipe=recipe)

    options, config = parse("phantom_fewshot" if "--phantoms" in argv else "brain_fewshot")
    if unknown := [name for name in options.sets if name not in SETS]:
        raise SystemExit(f"{program}: --sets has {unknown[0]}; there are {', '.join(SETS)}")
    if config.run_dir is not None or config.eval.seeds != 1:
        raise SystemExit(f"{program}: --run-dir and --eval.seeds are for train.py and evaluate.py; here --out, --seeds")
    if options.seeds < 1 or min(options.shots, default=1) < 1:
        raise SystemExit(f"{program}: --seeds and --shots must be above 0; --zero-shot stands for no shots")
    shots = ([0] if options.zero_shot else []) + list(options.shots) or [0, 2, 4, 8, 16]
    found = []
    for k in shots:
        kind = "fewshot" if k else "zeroshot"
        for name in options.sets:
            _, config = parse(f"{'phantom' if options.phantoms else name}_{kind}")
            found.append(Cell(name, k, tuple(_runs(config, name, k, options))))
    return options, found


def _runs(config: Config, dataset: str, shots: int, options: Options) -> Iterator[Config]:
    from iqe_jax.experiment import seeds

    data, train = dataclasses.replace(config.data, dataset=dataset, shots=shots), config.train
    if options.phantoms and not shots:  # small, and the same for all seeds
        train = dataclasses.replace(train, features="disk")
    several = dataclasses.replace(config.eval, seeds=options.seeds)
    for run in seeds(dataclasses.replace(config, data=data, train=train, eval=several)):
        run_dir = options.out / "runs" / f"{dataset}-k{shots}-seed{run.train.seed}"
        yield dataclasses.replace(run, run_dir=run_dir)


# ---------------------------------------------------------------------------- running


def finished(run: Config) -> bool:
    """Whether a run was made to its end, the one asked for now, as `cost.json` says, which is written last."""
    path = run.directory / "cost.json"
    if not path.exists():
        return False
    try:
        return json.loads(path.read_text())["length"] == [run.train.epochs, run.train.steps]
    except (ValueError, KeyError, TypeError) as fault:
        raise ValueError(f"{path} is damaged ({fault}): remove it, the run is then scored again") from fault


def run_cell(path: Path) -> None:
    """Make the runs that a file of configs lists and that are not finished. This is the process of one cell."""
    from iqe_jax.evaluation import run_evaluation
    from iqe_jax.experiment import run_training

    threading.Thread(target=_stop_with_parent, daemon=True).start()
    for run in [from_json(json.dumps(config)) for config in json.loads(path.read_text())]:
        if finished(run):
            continue
        resumed, start = run.directory.exists(), time.perf_counter()
        run_training(run)
        run_evaluation(run)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        cost = {"seconds": round(time.perf_counter() - start, 1), "resumed": resumed, "peak_bytes": peak}
        cost["length"] = [run.train.epochs, run.train.steps]
        write_whole(run.directory / "cost.json", json.dumps(cost) + "\n")


def _stop_with_parent() -> None:
    """Stop, as on SIGTERM, when the process that started this one is no more: then its end of the pipe closes."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


def _start(cell: Cell, out: Path) -> None:
    """Make the runs of a cell in a process of their own. Raises ValueError with its last words when it fails."""
    listed, log = out / "runs" / f"{cell.name}.json", out / "runs" / f"{cell.name}.log"
    write_whole(listed, json.dumps([json.loads(to_json(run)) for run in cell.runs], indent=2) + "\n")
    with log.open("a") as file:
        line = [sys.executable, "-m", "iqe_jax.reproduce", "--cell", str(listed)]
        with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT) as process:
            try:
                while process.poll() is None:  # not wait, which would close the pipe that tells the child of us
                    time.sleep(0.1)
            finally:
                process.terminate()
            code = process.returncode
    if code == cli.PREEMPTED:
        raise SystemExit(code)
    if code:
        raise ValueError(f"{cell.dataset}, {cell.protocol}: {_last_words(log.read_text())} (all of it in {log})")


def _last_words(log: str) -> str:
    """The error that a cell ended with, which may have several lines, or the last line where it told of none."""
    _, found, told = f"\n{log.strip()}".rpartition(f"\n{_CELL}: ")
    return told if found and "Traceback" not in told else log.strip().rpartition("\n")[2]


# ---------------------------------------------------------------------------- tables


def rows(options: Options, listed: Sequence[Cell]) -> list[dict[str, Any]]:
    """The table as data: a row for each cell, rule and the runs that are finished; None where there are none yet."""
    from iqe_jax.report import seeds_summary

    found = []
    for cell in listed:
        done = [run for run in cell.runs if finished(run)]
        row: dict[str, Any] = {"set": cell.dataset, "protocol": cell.protocol, "runs": len(done)}
        row["published"] = None if options.phantoms else PUBLISHED.get((cell.dataset, cell.shots))
        row["published_images"] = None if options.phantoms else PUBLISHED_SETS[cell.dataset].test
        if not done:
            rule = cell.runs[0].rules[0]
            found.append({**row, "weights": rule, "chosen_on_test_data": rule == "paper", "metrics": None})
            continue
        costs = [json.loads((run.directory / "cost.json").read_text()) for run in done]
        row["seconds"] = sum(cost["seconds"] for cost in costs) / len(costs)
        row["resumed"] = any(cost["resumed"] for cost in costs)
        row["peak_bytes"] = max(cost["peak_bytes"] for cost in costs)
        summary = seeds_summary([json.loads((run.directory / "metrics.json").read_text()) for run in done])
        row["images"] = sum(summary["images"].values())
        for rule, figures in summary["rules"].items():
            marks = {"weights": rule, "chosen_on_test_data": figures["chosen_on_test_data"], "data": summary["data"]}
            metrics = {name: figure for name, figure in figures.items() if isinstance(figure, dict)}
            found.append({**row, **marks, "metrics": metrics})
    return found


def write_tables(options: Options, listed: Sequence[Cell], command: str) -> None:
    """table.json, .csv, .md and .tex of the runs that are finished."""
    found = {
        "phantoms": options.phantoms,
        "command": command,
        "published_source": None if options.phantoms else SOURCE,
        "rows": rows(options, listed),
    }
    for suffix, text in {
        "json": json.dumps(found, indent=2) + "\n",
        "csv": as_csv(found),
        "md": as_markdown(found),
        "tex": as_latex(found),
    }.items():
        write_whole(options.out / f"table.{suffix}", text)


def look_ahead(options: Options, listed: Sequence[Cell]) -> None:
    """Raise FileNotFoundError or ValueError for a set that is not there or has files that are no images, or a run that
    has other settings.
    """
    from iqe_jax.checkpoint import RunDirectory
    from iqe_jax.data.bmad import load_split
    from iqe_jax.data.pipeline import check_files

    roots = {cell.dataset: cell.runs[0].data.root for cell in listed}
    if not options.phantoms:  # those are rendered where they are missing
        tests = {name: load_split(root, name, "test") for name, root in roots.items()}
        for samples in tests.values():
            check_files(samples)
    for cell in listed:
        for run in cell.runs:
            RunDirectory(run)


def main(argv: list[str]) -> None:
    """Make the table that `argv` asks for, or with `--cell FILE` the runs of one cell of it."""
    if argv[:1] == ["--cell"]:
        with cli.started(cli.Launch(), _CELL):
            run_cell(Path(argv[1]))
        return
    options, listed = cells(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(cli.PREEMPTED))
    command = " ".join(["python -m iqe_jax.reproduce", *argv])
    with cli.user_errors("reproduce"):
        look_ahead(options, listed)
        (options.out / "runs").mkdir(parents=True, exist_ok=True)
        left = [cell for cell in listed if not all(map(finished, cell.runs))]
        runs = sum(len(cell.runs) for cell in listed)
        there = runs - sum(not finished(run) for cell in left for run in cell.runs)
        console.print(f"{runs} runs in {options.out}, {there} of them finished before")
        write_tables(options, listed, command)
        for cell in track(left, "Sets and protocols"):
            console.print(f"{cell.dataset}, {cell.protocol}, {len(cell.runs)} seeds")
            try:
                _start(cell, options.out)
            finally:
                write_tables(options, listed, command)
    print((options.out / "table.md").read_text())


if __name__ == "__main__":
    main(sys.argv[1:])

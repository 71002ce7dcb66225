"""Cold start: imports, and the time from the command line to the first training step, first and second time.

Each start is a process of its own with a cache of its own, in which the second finds what the first compiled. Phantoms
are rendered before, so that neither pays for them.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import Report
from iqe_jax.cache import cache_dir
from iqe_jax.data import phantoms

ROOT = Path(__file__).parents[1]
PATIENCE = 300  # seconds to wait for a first step


def imports(report: Report) -> None:
    """Importing the package against importing what it stands on."""
    times: dict[str, list[float]] = {"import jax, flax": [], "import iqe_jax": [], "import iqe_jax, load": []}
    code = {name: name for name in times} | {"import iqe_jax, load": "import iqe_jax; iqe_jax.load"}
    for turn in range(report.repeats + 1):  # the first one only brings files into memory
        for name, taken in times.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code[name]], check=True, cwd=ROOT, env=environment())
            if turn:
                taken.append(time.perf_counter() - start)
    rows = {name: report.add("start", name, taken) for name, taken in times.items()}
    base = rows["import jax, flax"].median
    report.target("import iqe_jax and load ÷ import jax, flax", rows["import iqe_jax, load"].median / base, 1.5)


def first_steps(report: Report, arguments: list[str]) -> None:
    """`evaluate.py --config phantom_fewshot` to its first training step, with an empty cache and with a filled one."""
    root = phantoms_here()
    taken: dict[str, list[float]] = {"first": [], "second": []}
    for _ in range(max(1, report.repeats // 2)):
        with tempfile.TemporaryDirectory() as folder:
            for name, times in taken.items():
                times.append(_to_first_step(Path(folder), name, ["--data.root", str(root), *arguments]))
    rows = [
        report.add("start", f"evaluate.py, {name} start, to its first step", times) for name, times in taken.items()
    ]
    report.target("second start ÷ first start", rows[1].median / rows[0].median, 1 / 3)


def phantoms_here() -> Path:
    """The folder of the brain phantoms, rendered now where they are not there yet."""
    root = cache_dir() / "phantoms"
    phantoms.make_phantoms(root, ["brain"])
    return root


def environment(**more: str) -> dict[str, str]:
    """Surroundings in which a process of its own finds the package."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **more}


def _to_first_step(folder: Path, name: str, arguments: list[str]) -> float:
    """Seconds until the first line of metrics.jsonl is there; the process is ended then."""
    run = folder / name
    command = [sys.executable, str(ROOT / "evaluate.py"), "--config", "phantom_fewshot", "--run-dir", str(run)]
    with (folder / f"{name}.log").open("w") as log:
        start = time.perf_counter()
        process = subprocess.Popen(
            [*command, *arguments],
            cwd=ROOT,
            env=environment(IQE_JAX_CACHE=str(folder / "cache")),
            stdout=log,
            stderr=log,
        )
        try:
            metrics = run / "metrics.jsonl"
            while not (metrics.exists() and metrics.stat().st_size):
                if process.poll() is not None or time.perf_counter() - start > PATIENCE:
                    said = (folder / f"{name}.log").read_text()[-2000:]
                    raise RuntimeError(f"evaluate.py came to no first step; it said:\n{said}")
                time.sleep(0.005)
            return time.perf_counter() - start
        finally:
            process.kill()
            process.wait()

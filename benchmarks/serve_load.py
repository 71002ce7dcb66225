"""The service under load: `python benchmarks/serve_load.py RUN`. 64 clients for a minute, on this machine only.

Starts `python -m iqe_jax.serve RUN` on a free port of 127.0.0.1, lets clients post test images of the run's data set as
fast as they are answered, and ends it. Before and after, with the service idle, the Detector's own throughput on the
same files is measured, so that both are of one run. The service, its clients and the Detector share the machine.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


@dataclass(frozen=True)
class Options:
    """How much load."""

    run: Annotated[Path, tyro.conf.Positional]
    """Directory of a finished run whose test images are at hand."""
    clients: int = 64
    """Connections that post at a time."""
    seconds: float = 60
    """How long they do; at most 600."""
    images: int = 64
    """Different images that are posted."""
    json: Path | None = None
    """File for the figures."""


@dataclass
class Outcome:
    """What the clients saw."""

    status: Counter[int] = field(default_factory=Counter)
    """Answers by HTTP status; 0 counts connections that broke."""
    latency: list[float] = field(default_factory=list)
    """Seconds per scored image."""
    memory: list[int] = field(default_factory=list)
    """Resident bytes of the service after each tenth of the time."""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Processor time that the service took meanwhile, on all cores."""

    @property
    def failed(self) -> int:
        """Requests that were neither answered (200) nor refused by a limit (503)."""
        return sum(n for status, n in self.status.items() if status not in (200, 503))


async def load(port: int, bodies: Sequence[bytes], clients: int, seconds: float, process: int) -> Outcome:
    """Post `bodies`, PNG files, to /predict over `clients` connections for `seconds`; then stop."""
    from iqe_jax.batching import resident_bytes

    outcome, start = Outcome(), time.perf_counter()
    cpu = cpu_seconds(process)

    async def client(number: int) -> None:
        streams = None
        count = number
        while time.perf_counter() - start < seconds:
            body = bodies[count % len(bodies)]
            count += 1
            asked = time.perf_counter()
            try:
                streams = streams or await asyncio.open_connection("127.0.0.1", port)
                status = await _post(*streams, body)
            except (OSError, EOFError, ValueError):
                status, streams = 0, None
            outcome.status[status] += 1
            if status == 200:
                outcome.latency.append(time.perf_counter() - asked)
            else:
                await asyncio.sleep(0.2)
        if streams:
            streams[1].close()

    async def memory() -> None:
        for tenth in range(1, 11):
            await asyncio.sleep(max(0, start + seconds * tenth / 10 - time.perf_counter()))
            outcome.memory.append(resident_bytes(process) or 0)

    await asyncio.gather(memory(), *(client(number) for number in range(clients)))
    outcome.seconds, outcome.cpu_seconds = time.perf_counter() - start, cpu_seconds(process) - cpu
    return outcome


def cpu_seconds(process: int) -> float:
    """Processor time that a process has taken so far; 0 where /proc does not tell."""
    stat = Path(f"/proc/{process}/stat")
    if not stat.exists():
        return 0.0
    user, system = stat.read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


async def _post(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> int:
    head = "POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    await writer.drain()
    lines = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
    length = next(int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:"))
    await reader.readexactly(length)
    return int(lines[0].split()[1])


def start_service(run: Path, *flags: str) -> tuple[subprocess.Popen[str], int]:
    """The service in a process of its own, on a free port, once it listens. Raises ValueError when it does not."""
    command = [sys.executable, "-m", "iqe_jax.serve", str(run), "--port", "0", "--log", "none", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("Serving on "):
            return process, int(line.split()[2].rpartition(":")[2])
    raise ValueError(f"the service did not start: {''.join(said)}")


def detector_rate(run: Path, files: list[Path], seconds: float = 8) -> dict[str, float]:
    """Images per second of the Detector, in full batches, from files and of arrays that are ready; and milliseconds of
    processor time per image, all cores together, which other work on the machine moves less.
    """
    import iqe_jax

    detector = iqe_jax.load(run)
    batch = [files[i % len(files)] for i in range(detector.batch_size)]
    arrays = detector.prepare(batch)[0]
    rates = {}
    for name, images in (("files", batch), ("arrays", arrays)):
        detector(images)
        count, start, cpu = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - start < seconds:
            detector(images)
            count += len(images)
        rates[name] = count / (time.perf_counter() - start)
        rates[f"cpu_ms_{name}"] = 1000 * (time.process_time() - cpu) / count
    return rates


def mean_batch(port: int) -> float:
    """Images per batch since the service started, from its /metrics."""
    from urllib.request import urlopen

    with urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        lines = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if line[0] != "#")
    return float(lines["iqe_jax_batch_size_sum"]) / float(lines["iqe_jax_batch_size_count"])


def main(options: Options) -> None:
    """Measure, put under load, measure again, and print."""
    from iqe_jax.config import from_json
    from iqe_jax.data.bmad import load_split

    config = from_json((options.run / "config.json").read_text())
    samples = load_split(config.data.root, config.data.dataset, "test")
    files = [samples[i].image for i in np.linspace(0, len(samples) - 1, options.images, dtype=int)]
    before = detector_rate(options.run, files)
    process, port = start_service(options.run)
    try:
        bodies = [path.read_bytes() for path in files]
        seconds = min(options.seconds, 600)
        asyncio.run(load(port, bodies, options.clients, min(2, seconds), process.pid))  # warm
        outcome = asyncio.run(load(port, bodies, options.clients, seconds, process.pid))
        batch = mean_batch(port)
    finally:
        process.terminate()
        code = process.wait(60)
    after = detector_rate(options.run, files)
    rate = outcome.status[200] / outcome.seconds
    detector = {name: (before[name] + after[name]) / 2 for name in before}
    quantiles = np.quantile(outcome.latency, (0.5, 0.95, 0.99)) if outcome.latency else [float("nan")] * 3
    found = {
        "options": {"clients": options.clients, "seconds": round(outcome.seconds, 1), "images": options.images},
        "answered": outcome.status[200],
        "refused_503": outcome.status[503],
        "failed": outcome.failed,
        "images_per_second": rate,
        "detector_images_per_second": {"before": before, "after": after},
        "share_of_detector": {name: rate / detector[name] for name in ("files", "arrays")},
        "cpu_ms": 1000 * outcome.cpu_seconds / max(outcome.status[200], 1),
        "mean_batch": batch,
        "latency_seconds": dict(zip(("median", "p95", "p99"), map(float, quantiles), strict=True)),
        "resident_mb": [round(value / 1e6, 1) for value in outcome.memory],
        "exit_status": code,
    }
    print(f"{options.clients} clients, {outcome.seconds:.1f} s, images of {config.model.image_size} px, batch 16")
    print(f"answered {found['answered']}, refused (503) {found['refused_503']}, failed {found['failed']}")
    print(f"service   {rate:7.1f} images/s, {batch:.1f} images a batch, {found['cpu_ms']:.1f} ms of processor an image")
    for name in ("files", "arrays"):
        value, cpu = detector[name], detector[f"cpu_ms_{name}"]
        between = f"{before[name]:.1f} before, {after[name]:.1f} after"
        share = f"the service has {rate / value:.0%} of it"
        print(f"Detector  {value:7.1f} images/s from {name} ({between}), {cpu:.1f} ms; {share}")
    print(f"latency   median {quantiles[0]:.3f} s, 95 % {quantiles[1]:.3f} s, 99 % {quantiles[2]:.3f} s")
    print(f"memory    {' '.join(f'{value:.0f}' for value in found['resident_mb'])} MB after each tenth of the time")
    print(f"exit status on SIGTERM {code}")
    if options.json:
        options.json.write_text(json.dumps(found | {"run": asdict(config)["name"]}, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

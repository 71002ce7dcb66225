"""Images of many requests run together: a queue before the Detector, and the figures that /metrics shows.

`Batcher` belongs to one event loop; the model runs in one thread of its own, so the loop goes on taking requests while
a batch is computed, and what arrives meanwhile makes the next one. HTTP is the business of service.py.
"""

import asyncio
import copy
import queue
import threading
import time
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from iqe_jax.detector import Detector, Prediction

Result = tuple[float, Float[np.ndarray, "side side"]]


@dataclass(frozen=True)
class Limits:
    """What one request, and all together, may ask for."""

    max_mb: float = 64
    """Megabytes of one upload."""
    max_megapixels: float = 25
    """Megapixels of one frame; a volume may have four times as many voxels."""
    max_frames: int = 512
    """Frames or slices of one scan."""
    max_requests: int = 128
    """Scans inside at a time, read, waiting or computed; more are told to come back."""
    max_total_mb: float = 512
    """Megabytes of all uploads and of the volumes unpacked from them, inside at a time."""
    upload_seconds: float = 60
    """Seconds in which an upload has to arrive."""
    batch_size: int = 16
    """Images run at once."""
    wait_ms: float = 5
    """Milliseconds that an image waits for others when the model is idle."""
    decoders: int = 2
    """Threads that open scans and draw pictures."""


class Histogram:
    """Counts of values by upper bound, as Prometheus wants them."""

    def __init__(self, bounds: tuple[float, ...]):
        self.bounds, self.counts, self.total = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def lines(self, name: str) -> list[str]:
        """Prometheus's text form: cumulative buckets, sum and count."""
        cumulative = np.cumsum(self.counts).tolist()
        labels = [f"{bound:g}" for bound in self.bounds] + ["+Inf"]
        buckets = [f'{name}_bucket{{le="{le}"}} {count}' for le, count in zip(labels, cumulative, strict=True)]
        return [*buckets, f"{name}_sum {self.total:.6f}", f"{name}_count {cumulative[-1]}"]


class Meters:
    """What the service counts since its start; no file name and nothing of an image is in it."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.images = 0
        self.batches = Histogram((1, 2, 4, 8, 16, 32, 64))
        self.seconds = Histogram((0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30))

    def text(self, *, queue: int, inside: int) -> str:
        """All of it in Prometheus's text format, version 0.0.4."""
        found: list[str] = []

        def write(name: str, kind: str, what: str, *lines: str) -> None:
            name = f"iqe_jax_{name}"
            found.extend([f"# HELP {name} {what}", f"# TYPE {name} {kind}"])
            found.extend(lines if kind == "histogram" else (f"{name}{line}" for line in lines))

        requests = [f'{{path="{p}",status="{s}"}} {n}' for (p, s), n in sorted(self.requests.items())]
        write("requests_total", "counter", "Requests answered, by path and status.", *requests)
        refused = sum(n for (_, status), n in self.requests.items() if status in (413, 503))
        failed = sum(n for (_, status), n in self.requests.items() if status == 500)
        write("refusals_total", "counter", "Requests refused by a limit (413, 503).", f" {refused}")
        write("failures_total", "counter", "Requests that failed by a fault of the service (500).", f" {failed}")
        write("images_total", "counter", "Images and slices scored.", f" {self.images}")
        write("queue_length", "gauge", "Images that wait for a batch.", f" {queue}")
        write("requests_inside", "gauge", "Scans being read, waited for or answered.", f" {inside}")
        write("batch_size", "histogram", "Images per batch.", *self.batches.lines("iqe_jax_batch_size"))
        seconds = self.seconds.lines("iqe_jax_request_seconds")
        write("request_seconds", "histogram", "Time to answer a scan that was scored.", *seconds)
        if (resident := resident_bytes()) is not None:
            write("resident_memory_bytes", "gauge", "Memory of the process.", f" {resident}")
        return "\n".join(found) + "\n"


def resident_bytes(process: int | str = "self") -> int | None:
    """Resident memory of a process; None where /proc does not tell."""
    import resource

    statm = Path(f"/proc/{process}/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else None


class Batcher:
    """Collects prepared images and runs them through the Detector, up to `batch_size` at once.

    Batches of 1, 4, 16, … images are compiled, so that a lone image does not pay for a full batch and none runs with
    more than three quarters of padding. `wait` is the time in seconds that a batch waits to be joined when the model is
    idle; a busy model needs none, since images gather while it works.
    """

    def __init__(self, detector: Detector, batch_size: int, wait: float, meters: Meters):
        sizes = [4**i for i in range(10) if 4**i < batch_size] + [batch_size]
        self._detectors = [_sized(detector, size) for size in sizes]
        self._batch_size, self._wait, self._meters = batch_size, wait, meters
        self._queue: queue.SimpleQueue[tuple[np.ndarray, asyncio.Future[Result]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    async def start(self) -> None:
        """Compile every batch size, then begin to work."""
        loop = asyncio.get_running_loop()
        side = self._detectors[0].model.config.image_size
        for detector in self._detectors:
            images = np.zeros((detector.batch_size, side, side, 3), np.float32)
            await loop.run_in_executor(None, detector, images)
        self._thread = threading.Thread(target=self._work, args=(loop,), name="model", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """Stop working; whoever asks has been answered by then."""
        if self._thread is not None:
            self._queue.put(None)
            await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    @property
    def waiting(self) -> int:
        """Images that wait for a batch."""
        return self._queue.qsize()

    async def predict(self, images: list[np.ndarray]) -> list[Result]:
        """Scores and maps (S, S) of images (S, S, 3) in [0, 1]."""
        futures = [asyncio.get_running_loop().create_future() for _ in images]
        for image, future in zip(images, futures, strict=True):
            self._queue.put((image, future))
        return list(await asyncio.gather(*futures))

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        """The model's thread. It takes batches by itself: waiting for the loop would leave the model idle meanwhile."""
        while (first := self._queue.get()) is not None:
            batch = [first]
            if self._queue.qsize() < self._batch_size - 1:
                time.sleep(self._wait)
            while len(batch) < self._batch_size and not self._queue.empty():
                if (following := self._queue.get()) is None:  # told to stop: after this batch
                    self._queue.put(None)
                    break
                batch.append(following)
            images = np.stack([image for image, _ in batch])
            detector = next(d for d in self._detectors if d.batch_size >= len(images))
            futures = [future for _, future in batch]
            try:
                found = detector(images)
            except Exception as fault:  # memory, say: these requests fail, the service goes on
                loop.call_soon_threadsafe(_fail, futures, fault)
                continue
            self._meters.batches.add(len(batch))
            self._meters.images += len(batch)
            loop.call_soon_threadsafe(_deliver, futures, found)


def _fail(futures: list[asyncio.Future[Result]], fault: Exception) -> None:
    for future in futures:
        if not future.done():
            future.set_exception(fault)


def _deliver(futures: list[asyncio.Future[Result]], found: Prediction) -> None:
    for future, score, anomaly_map in zip(futures, found.score, found.anomaly_map, strict=True):
        if not future.done():  # else its client has gone
            future.set_result((float(score), anomaly_map))


def _sized(detector: Detector, batch_size: int) -> Detector:
    """The same detector, weights shared, that runs `batch_size` images at once."""
    other = copy.copy(detector)
    other.batch_size = batch_size
    return other

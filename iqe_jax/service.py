"""What the HTTP service does with one request: read the upload, open the scan, score its frames, draw pictures.

Batches are made in batching.py, which has the limits too; addresses, and who may ask, are in web.py. Nothing is stored,
not even in a temporary file.
"""

import asyncio
import base64
import io
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from fastapi import HTTPException, Query, Request
from jaxtyping import Float
from PIL import Image
from pydantic import BaseModel
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from iqe_jax.batching import Batcher, Limits, Meters
from iqe_jax.calibration import Calibration
from iqe_jax.data.scans import Scan, ScanError, TooLargeError, open_scan, printable
from iqe_jax.detector import Detector
from iqe_jax.scan_maps import LEVELS, picture

T = TypeVar("T")
Picture = Literal["image", "map", "overlay"]
Log = Callable[[str], object]

SHOWN_SIDE = 1024  # pixels of the longer side of pictures sent back
RAW = ("application/octet-stream", "application/dicom", "application/gzip", "application/x-gzip")


class Frame(BaseModel):
    """What is said of one frame. Pictures are PNG in base64, where they were asked for."""

    index: int
    score: float
    probability: float | None
    decision: Literal["normal", "anomalous"] | None
    height: int
    width: int
    image: str | None = None
    map: str | None = None
    overlay: str | None = None


class Result(BaseModel):
    """What is said of a scan: that of its most anomalous frame, and all frames in order."""

    kind: Literal["image", "dicom", "nifti"]
    notes: list[str]
    frame: int
    score: float
    probability: float | None
    decision: Literal["normal", "anomalous"] | None
    frames: list[Frame]


@dataclass(frozen=True)
class View:
    """How values of the file become grey levels, and which way a volume is cut."""

    window: tuple[float, float] | None
    axis: int


def view(
    centre: Annotated[
        float | None, Query(allow_inf_nan=False, description="window centre, in the file's units")
    ] = None,
    width: Annotated[float | None, Query(gt=0, allow_inf_nan=False, description="window width")] = None,
    axis: Annotated[int, Query(ge=0, le=2, description="axis that a NIfTI volume is cut across")] = 2,
) -> View:
    """The View of a request. Raises HTTPException where a window is half given."""
    if (centre is None) != (width is None):
        raise HTTPException(422, "centre and width of a window go together: give both or neither")
    return View(None if centre is None or width is None else (centre, width), axis)


class Service:
    """One model behind its limits; its addresses are in web.py."""

    def __init__(
        self,
        detector: Detector,
        calibrated: Calibration | None,
        limits: Limits,
        log_name: Log | None,
        prevalence: float | None = None,
    ):
        self.detector, self.calibrated, self.limits = detector, calibrated, limits
        self.meters = Meters()
        self.batcher = Batcher(detector, limits.batch_size, limits.wait_ms / 1000, self.meters)
        self.inside, self.bytes, self.lock = 0, 0, threading.Lock()
        self._log_name, self._prevalence = log_name, prevalence
        self._decoders = ThreadPoolExecutor(limits.decoders, "decoder")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Compile, then work until left."""
        await self.batcher.start()
        try:
            yield
        finally:
            await self.batcher.stop()
            self._decoders.shutdown()

    async def analyse(
        self, request: Request, view: View, pictures: Sequence[Picture], only: int | None = None, best: bool = False
    ) -> Result:
        """Score a request's scan, all frames or `only` one; pictures of all frames, or of the `best` alone.

        Raises HTTPException for everything that is the client's fault, and where a limit is met.
        """
        start, limits = time.perf_counter(), self.limits
        if self.inside >= limits.max_requests:
            raise busy(f"{self.inside} scans are inside already")
        self.inside += 1
        upload = _Upload(self)
        try:
            data, name = await upload.read(request)
            pixels = int(limits.max_megapixels * 1e6)
            scan = await self._aside(
                lambda: open_scan(
                    data, name=name, window=view.window, axis=view.axis, max_pixels=pixels, hold=upload.hold
                )
            )
            if len(scan) > limits.max_frames:
                raise HTTPException(413, f"the scan has {len(scan)} frames, more than the {limits.max_frames} allowed")
            if only is not None and only >= len(scan):
                raise HTTPException(422, f"the scan has {len(scan)} frames, there is no frame {only}")
            frames = await self._frames(scan, range(len(scan)) if only is None else [only], pictures, best)
        except TooLargeError as fault:
            raise HTTPException(413, str(fault)) from None
        except _NoRoomError as fault:
            raise busy(str(fault)) from None
        except ScanError as fault:
            raise HTTPException(422, str(fault)) from None
        finally:
            upload.release()
            self.inside -= 1
        seconds = time.perf_counter() - start
        self.meters.seconds.add(seconds)
        if self._log_name is not None:
            self._log_name(f"{printable(name)}: {len(frames)} frames, {1000 * seconds:.0f} ms")
        top = max(frames, key=lambda frame: frame.score)
        said = {name: getattr(top, name) for name in ("score", "probability", "decision")}
        return Result(kind=scan.kind, notes=list(scan.notes), frame=top.index, frames=frames, **said)

    async def _frames(self, scan: Scan, which: Sequence[int], pictures: Sequence[Picture], best: bool) -> list[Frame]:
        frames: list[Frame] = []
        top: tuple[Frame, np.ndarray] | None = None
        # No more than a batch at a time: the frames of a volume are many times its file.
        for first in range(0, len(which), self.limits.batch_size):
            part = which[first : first + self.limits.batch_size]
            prepared = await self._aside(lambda part=part: [self._prepare(scan, index) for index in part])
            found = await self.batcher.predict([image for image, _ in prepared])
            drawn = []
            for index, (score, anomaly_map), (_, (height, width)) in zip(part, found, prepared, strict=True):
                frame = Frame(index=index, score=score, height=height, width=width, **self._said(score))
                frames.append(frame)
                if not best:
                    drawn.append((frame, anomaly_map))
                elif top is None or score > top[0].score:
                    top = frame, anomaly_map
            if pictures and drawn:
                await self._aside(lambda drawn=drawn: [_draw(scan, frame, found, pictures) for frame, found in drawn])
        if pictures and top is not None:
            frame, anomaly_map = top
            await self._aside(lambda: _draw(scan, frame, anomaly_map, pictures))
        return frames

    def _prepare(self, scan: Scan, index: int) -> tuple[Float[np.ndarray, "side side 3"], tuple[int, int]]:
        frame = scan.frame(index)
        return self.detector.prepare(frame)[0][0], frame.shape[:2]

    def _said(self, score: float) -> dict[str, Any]:
        """Probability and decision, as far as the run's calibration gives them."""
        scores = np.array([score])
        probability = self.calibrated and self.calibrated.probability(scores, self._prevalence)
        decision = self.calibrated and self.calibrated.decision(scores)
        return {
            "probability": None if probability is None else float(probability[0]),
            "decision": None if decision is None else ("anomalous" if decision[0] else "normal"),
        }

    async def _aside(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._decoders, work)


def _draw(scan: Scan, frame: Frame, anomaly_map: Float[np.ndarray, "side side"], pictures: Sequence[Picture]) -> None:
    """Put the pictures that are asked for into `frame`."""
    if "map" in pictures:
        values = np.round(np.clip(anomaly_map, 0, 1) * LEVELS).astype(np.uint16)
        frame.map = _png(Image.fromarray(values))
    if "image" not in pictures and "overlay" not in pictures:
        return
    shown = Image.fromarray(np.round(scan.frame(frame.index) * 255).astype(np.uint8))
    shown.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    if "image" in pictures:
        frame.image = _png(shown)
    if "overlay" in pictures:
        frame.overlay = _png(Image.fromarray(picture(np.asarray(shown), anomaly_map)))


def _png(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=3)
    return base64.b64encode(file.getvalue()).decode()


def busy(why: str) -> HTTPException:
    """The refusal of a request for which there is no room now."""
    return HTTPException(503, f"{why}; come back in a second", {"Retry-After": "1"})


class _NoRoomError(ScanError):
    """Memory is full now."""


class _InMemory(MultiPartParser):
    """Starlette's parser, which would write what is over 1 MB into a temporary file."""

    spool_max_size = 2**40


class _Upload:
    """The bytes of one request and of its volume, counted into those of all requests until released."""

    def __init__(self, service: Service):
        self._service, self._held = service, 0
        self._most = int(service.limits.max_total_mb * 1e6)

    def release(self) -> None:
        """Give the room back."""
        self._count(-self._held)

    def hold(self, size: int) -> None:
        """Count a volume of `size` bytes in, from any thread. Raises ScanError where there is no room for it."""
        if size > self._most:
            raise TooLargeError(f"the volume takes {size / 1e6:.0f} MB, more than the {self._most / 1e6:g} allowed")
        if self._count(size) > self._most:
            raise _NoRoomError(f"scans of {self._most / 1e6:g} MB are inside already")

    def _count(self, size: int) -> int:
        with self._service.lock:
            self._held += size
            self._service.bytes += size
            return self._service.bytes

    async def read(self, request: Request) -> tuple[bytes, str]:
        """The scan and the name its file has, without folders. Raises HTTPException."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        form = kind == "multipart/form-data"
        if not (form or kind in ("", *RAW) or kind.startswith("image/")):
            raise HTTPException(415, f"expected a form with a file, or an image; not {printable(kind)[:80]}")
        try:
            async with asyncio.timeout(self._service.limits.upload_seconds):
                body = await self._body(request)
        except TimeoutError:
            raise HTTPException(408, f"the upload took over {self._service.limits.upload_seconds:g} s") from None
        except ClientDisconnect:
            raise HTTPException(400, "the upload broke off") from None
        return await _from_form(request, body) if form else (body, "upload")

    async def _body(self, request: Request) -> bytes:
        limits = self._service.limits
        at_most = int(limits.max_mb * 1e6)
        declared = request.headers.get("content-length", "")
        large = HTTPException(413, f"the upload is larger than the {limits.max_mb:g} MB allowed")
        if declared.isdecimal() and int(declared) > at_most:
            raise large
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            inside = self._count(len(chunk))
            if len(body) > at_most:
                raise large
            if inside > self._most:
                raise busy(f"scans of {limits.max_total_mb:g} MB are inside already")
        return bytes(body)


async def _from_form(request: Request, body: bytes) -> tuple[bytes, str]:
    """The one file of a form, its field `file`."""

    async def stream() -> AsyncIterator[bytes]:
        yield body

    try:
        parser = _InMemory(request.headers, stream(), max_files=1, max_fields=20)  # pyright: ignore[reportArgumentType]
        form = await parser.parse()
    except (MultiPartException, ValueError, KeyError, LookupError, AssertionError) as fault:
        raise HTTPException(422, "the form is broken, or has several files: send one, as field file") from fault
    try:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise HTTPException(422, "the form has no file in its field file")
        return await file.read(), re.split(r"[\\/]", file.filename or "upload")[-1][:200]
    finally:
        await form.close()

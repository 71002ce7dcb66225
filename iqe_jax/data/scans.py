"""Opens a user's scan of whatever kind as frames of RGB in [0, 1]: PNG, JPEG, TIFF, BMP, DICOM, NIfTI.

What a file is, its content tells and not its name. Here are the plain images, the limits and the one kind of error; the
two medical formats have files of their own (dicom.py, nifti.py), imported when the first such file is met. Resizing to
the model's side is the detector's work, writing maps back is scan_maps.py's.
"""

import gzip
import io
import logging
import re
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Literal

import numpy as np
from jaxtyping import Float, Float32
from PIL import Image, UnidentifiedImageError

from iqe_jax.data.transforms import white_is_zero

if TYPE_CHECKING:
    from iqe_jax.data.nifti import Geometry

Frame = Float32[np.ndarray, "height width 3"]
Window = tuple[float, float]

MAX_PIXELS = 100_000_000
"""Pixels that one frame may have; a NIfTI volume, which is held as it is stored, may have four times as many voxels."""
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".dcm", ".dicom", ".nii", ".gz"})
"""Endings of files that may be scans; a DICOM file may also have none."""
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP")  # Pillow reads more, some by starting other programs
_HEAD = 4096  # bytes that tell what a file is


class ScanError(ValueError):
    """A file that cannot be used; the message is one line that names it, what is wrong and what to do."""


class TooLargeError(ScanError):
    """A file whose header promises more pixels than may be opened."""


@dataclass(frozen=True)
class Source:
    """The bytes of a file, on disk or in memory, and what messages call it."""

    content: Path | bytes
    name: str

    def open(self) -> BinaryIO:
        """The bytes from their beginning."""
        return io.BytesIO(self.content) if isinstance(self.content, bytes) else self.content.open("rb")

    @property
    def size(self) -> int:
        """Number of bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


@dataclass(frozen=True)
class Scan:
    """An open scan: `len(scan)` frames, read one at a time by `scan.frame(i)`.

    Any thread may ask for frames; those of one scan are decoded one after the other.
    """

    name: str
    kind: Literal["image", "dicom", "nifti"]
    count: int
    size: tuple[int, int]
    """Height and width of a frame; of a TIFF's pages, which may differ, of the first."""
    read: Callable[[int], Frame]
    notes: tuple[str, ...] = ()
    """What was assumed of the file, a sentence each."""
    geometry: "Geometry | None" = None
    """NIfTI: how frames lie in the volume, enough to write a map back."""
    header: Any = None
    """DICOM: the pydicom Dataset without its pixels."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __len__(self) -> int:
        """Number of frames: pages of a TIFF, frames of a DICOM file, slices of a volume."""
        return self.count

    def frame(self, index: int) -> Frame:
        """Frame `index`, from 0, as RGB in [0, 1] at its own resolution; grey ones have three equal channels.

        Raises ScanError, a ValueError, where it is damaged, and IndexError where there is none.
        """
        if not 0 <= index < self.count:
            raise IndexError(f"{self.name} has {self.count} frames, there is no frame {index}")
        with self._lock:
            return self.read(index)


def open_scan(
    source: str | Path | bytes,
    *,
    name: str | None = None,
    window: Window | None = None,
    axis: int = 2,
    max_pixels: int = MAX_PIXELS,
    hold: Callable[[int], object] = lambda size: None,
) -> Scan:
    """Open a file of any kind that is read. Headers are looked at now; pixels are decoded when a frame is asked for.

    How stored values become [0, 1]: 8-bit and colour images as they are; 16-bit grey images by value / 65535; DICOM and
    NIfTI as dicom.py and nifti.py say. `window` takes the place of all that where a pixel has one value of more than
    8 bits, and of any grey DICOM or NIfTI value: centre − width/2 becomes 0, centre + width/2 becomes 1.

    Args:
      source: the path of a file, or its bytes.
      name: what messages call it; by default its path. Unprintable characters are never shown as they are.
      window: centre and width in the units that the file gives, such as Hounsfield's.
      axis: NIfTI: the axis that slices are cut across: 0 left to right, 1 back to front, 2 feet to head.
      max_pixels: pixels that a frame may have, and a quarter of the voxels that a volume may have.
      hold: told how many bytes of memory a volume may take while it is open, before it does; may raise ScanError.

    Raises:
      ScanError: a ValueError: the file is not there, empty, damaged, too large, of another kind, or not usable.
    """
    source = source if isinstance(source, bytes) else Path(source)
    called = printable(name if name is not None else str(source) if isinstance(source, Path) else "upload")
    if window is not None and not (np.isfinite(window).all() and window[1] > 0):
        raise ScanError(f"window is {window[0]:g} {window[1]:g}; expected a centre and a width above 0")
    if axis not in (0, 1, 2):
        raise ScanError(f"axis is {axis}; expected 0, 1 or 2")
    at = Source(source, called)
    if isinstance(source, Path) and not source.is_file():
        raise ScanError(f"{called} is {'no regular file' if source.exists() else 'not there'}: expected a scan")
    with faults(called, "cannot be read: it is damaged, cut short, or of another kind; get it again"):
        if at.size == 0:
            raise ScanError(f"{called} is empty (0 bytes): get it again")
        with at.open() as file:
            kind = _kind(file.read(_HEAD), called)
    if kind == "dicom":
        from iqe_jax.data import dicom

        return dicom.open_dicom(at, window, max_pixels)
    if kind == "nifti":
        from iqe_jax.data import nifti

        return nifti.open_nifti(at, window, axis, 4 * max_pixels, hold)
    return _open_image(at, window, max_pixels)


def _kind(head: bytes, name: str) -> Literal["image", "dicom", "nifti"]:
    """What the first bytes of a file say it is."""
    if head[128:132] == b"DICM":
        return "dicom"
    if _is_nifti(head):
        return "nifti"
    if head[:2] == b"\x1f\x8b":
        try:
            inner = zlib.decompressobj(31).decompress(head, 1024)  # never more than that, whatever it would become
        except zlib.error:
            raise ScanError(f"{name} is a gzip file that is damaged: get it again") from None
        if _is_nifti(inner):
            return "nifti"
        raise ScanError(f"{name} is a gzip file with no NIfTI volume in it: unpack it and give what is inside")
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06") or head[257:262] == b"ustar":
        raise ScanError(f"{name} is an archive: unpack it and give the folder")
    if _is_dicom_without_preamble(head) or name.lower().endswith((".dcm", ".dicom")):
        return "dicom"
    return "image"


def _is_dicom_without_preamble(head: bytes) -> bool:
    """Whether a file begins, as old ones do, with an element of groups 2 or 8: its tag, then its type or length."""
    typed = re.match(rb"[A-Z]{2}", head[4:6]) is not None or 0 < int.from_bytes(head[4:8], "little") < len(head)
    return typed and head[:2] in (b"\x02\0", b"\x08\0")


def _is_nifti(head: bytes) -> bool:
    one = head[:4] in (b"\x5c\x01\0\0", b"\0\0\x01\x5c") and head[344:348] in (b"n+1\0", b"ni1\0")
    return one or (head[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c") and head[4:8] in (b"n+2\0", b"ni2\0"))


# ---------------------------------------------------------------------------- plain images


def _open_image(source: Source, window: Window | None, max_pixels: int) -> Scan:
    """PNG, JPEG and BMP are one frame, a TIFF has one per page. EXIF rotation is not applied, transparency dropped."""
    held = source
    with _image_faults(source.name), source.open() as file, Image.open(file, formats=_FORMATS) as image:
        size = (image.height, image.width)
        check_size(source.name, *size, max_pixels)
        count = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
        if count > 1 and isinstance(source.content, Path):
            held = Source(source.content.read_bytes(), source.name)
    # Pages form a chain: an image that stays open walks on where it is, a new one would start at the first again.
    pages = Image.open(held.open(), formats=_FORMATS) if count > 1 else None

    def read(index: int) -> Frame:
        with _image_faults(source.name):
            if pages is None:
                with source.open() as file, Image.open(file, formats=_FORMATS) as image:
                    return _image_frame(image, source.name, window, max_pixels)
            pages.seek(index)
            return _image_frame(pages, source.name, window, max_pixels)

    return Scan(source.name, "image", count, size, read)


def _image_frame(image: Image.Image, name: str, window: Window | None, max_pixels: int) -> Frame:
    check_size(name, image.height, image.width, max_pixels)
    image.load()
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float32)
        check_finite(name, int(np.count_nonzero(~np.isfinite(values))))
        inverted = white_is_zero(image)
        if window is not None:
            shown = linear(values, window)
            return grey(1 - shown if inverted else shown)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ScanError(
                f"{name} holds values from {values.min():g} to {values.max():g}, whose range is not known: give "
                "--window CENTRE WIDTH, or save it with 8 or 16 bits"
            )
        return grey((65535 - values if inverted else values) / np.float32(65535))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB gives the same colours, and a warning
    return np.asarray(image.convert("RGB"), np.float32) / np.float32(255)


@contextmanager
def _image_faults(name: str) -> Iterator[None]:
    with faults(name, "cannot be read: it is damaged or cut short; get it again"):
        try:
            yield
        except UnidentifiedImageError:
            raise ScanError(
                f"{name} is of no kind that is read: expected PNG, JPEG, TIFF, BMP, DICOM or NIfTI"
            ) from None
        except Image.DecompressionBombError:
            most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
            raise TooLargeError(
                f"{name} says it has more than {most} pixels, the most that is opened: it is damaged, or has to be cut "
                "or made smaller"
            ) from None


# ---------------------------------------------------------------------------- what all kinds share


def linear(values: Float[np.ndarray, "..."], window: Window) -> Float32[np.ndarray, "..."]:
    """Values through a window: centre − width/2 becomes 0, centre + width/2 becomes 1 (DICOM's LINEAR_EXACT)."""
    centre, width = window
    return np.clip((values - centre) / width + 0.5, 0, 1).astype(np.float32)


def robust(values: Float[np.ndarray, "..."]) -> Window:
    """The window from the 0.5th to the 99.5th percentile; from least to largest where these are equal."""
    low, high = np.percentile(values, (0.5, 99.5))
    if not high > low:
        low, high = float(values.min()), float(values.max())
    width = float(high - low) or 1.0  # of one value only, that is 0
    return float(low) + width / 2, width


def grey(values: Float[np.ndarray, "height width"]) -> Frame:
    """One channel as three."""
    return np.repeat(values.astype(np.float32)[..., None], 3, -1)


def check_size(name: str, height: int, width: int, max_pixels: int) -> None:
    """Raise ScanError where a header promises more pixels than may be allocated, or none."""
    if height < 1 or width < 1:
        raise ScanError(f"{name} is {height}×{width} pixels: there is nothing in it")
    if height * width > max_pixels:
        raise TooLargeError(_too_large(name, f"{height}×{width} pixels, more than the {max_pixels} allowed"))


def _too_large(name: str, what: str) -> str:
    return f"{name} says it has {what}: the file is damaged, or --max-megapixels has to be raised"


def check_finite(name: str, bad: int) -> None:
    """Raise ScanError where values are not finite."""
    if bad:
        raise ScanError(
            f"{name} has {bad} values that are NaN or infinite: replace them, for instance with the background"
        )


def printable(name: str) -> str:
    r"""A file name with what would break or colour a line of text, and bytes that are no UTF-8, as \n, \u202e, \xff."""

    def shown(c: str) -> str:
        if c.isprintable():
            return c
        if "\udc80" <= c <= "\udcff":  # how Python holds such a byte
            return f"\\x{ord(c) - 0xDC00:x}"
        return c.encode("unicode_escape", "surrogatepass").decode()

    return "".join(map(shown, name))


@contextmanager
def faults(name: str, message: str) -> Iterator[None]:
    """Turn whatever a decoder raises into a ScanError, and keep what it warns of to itself.

    The decoder's own words are left out: they may hold paths, and of DICOM files what stands in their headers.
    """
    try:
        with Quiet():
            yield
    except ScanError:
        raise
    except Exception as fault:
        if isinstance(fault, OSError) and fault.strerror and not isinstance(fault, gzip.BadGzipFile):
            raise ScanError(f"{name} cannot be opened: {fault.strerror}") from None
        raise ScanError(f"{name} {message}") from None


class Quiet:
    """No warnings, and no log lines of the decoders, while any thread is inside.

    pydicom warns and logs with the value it finds odd, which may be a patient's. `warnings.catch_warnings` alone is
    wrong where several threads use it.
    """

    _lock: ClassVar = threading.Lock()
    _inside: ClassVar[int] = 0
    _kept: ClassVar[Any] = None
    _loggers: ClassVar = [logging.getLogger(name) for name in ("pydicom", "nibabel.global")]

    def __enter__(self) -> None:
        with Quiet._lock:
            if Quiet._inside == 0:
                Quiet._kept = warnings.catch_warnings()
                Quiet._kept.__enter__()
                warnings.simplefilter("ignore")
                for logger in Quiet._loggers:
                    logger.disabled = True
            Quiet._inside += 1

    def __exit__(self, *_: object) -> None:
        with Quiet._lock:
            Quiet._inside -= 1
            if Quiet._inside == 0:
                Quiet._kept.__exit__(None, None, None)
                for logger in Quiet._loggers:
                    logger.disabled = False

"""NIfTI volumes (.nii, .nii.gz) as slices, and maps of slices back into the volume's own geometry.

Kept apart from scans.py because nibabel is imported here; nothing else imports this module at its top.

The header's orientation is brought to the nearest canonical one, RAS+ (first axis to the patient's right, second to the
front, third to the head), and slices are numbered along it. They are shown as radiologists do: front or head up, the
patient's right on the left, and sagittal slices with the front on the left.
"""

import gzip
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import nibabel
import numpy as np
from jaxtyping import Float, Shaped
from nibabel.fileholders import FileHolder
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

from iqe_jax.data.scans import (
    Frame,
    Scan,
    ScanError,
    Source,
    TooLargeError,
    Window,
    check_finite,
    faults,
    grey,
    linear,
    robust,
)

_HEADER_AT_MOST = 2**24  # bytes before the voxels, extensions included
_SAMPLE = 2_000_000  # voxels that percentiles are taken of, evenly spread


@dataclass(frozen=True)
class Geometry:
    """How the frames of a scan lie in its volume."""

    header: Any
    """The nibabel header of the file."""
    affine: Float[np.ndarray, "4 4"]
    """Voxel indices to millimetres, as the header has it."""
    shape: tuple[int, ...]
    """Shape of the stored array: three axes, or fewer or more of which the rest have length 1."""
    orientation: Float[np.ndarray, "3 2"]
    """nibabel's orientation of the stored axes."""
    axis: int

    def frame(self, volume: Shaped[np.ndarray, "x y z"], index: int) -> Shaped[np.ndarray, "height width"]:
        """One slice of a canonical volume as it is shown."""
        return np.take(volume, index, self.axis)[::-1, ::-1].T

    def canonical(self, stored: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "x y z"]:
        """A stored array turned to RAS+; a view."""
        return apply_orientation(stored.reshape(_three(self.shape), order="F"), self.orientation)

    def stored(self, frames: Shaped[np.ndarray, "frame height width"]) -> Shaped[np.ndarray, "..."]:
        """All frames as one array of the shape and orientation of the file; the inverse of the above."""
        volume = np.moveaxis(frames.transpose(0, 2, 1)[:, ::-1, ::-1], 0, self.axis)
        back = ornt_transform(axcodes2ornt("RAS"), self.orientation)
        return apply_orientation(volume, back).reshape(self.shape, order="F")


def open_nifti(
    source: Source, window: Window | None, axis: int, max_voxels: int, hold: Callable[[int], object]
) -> Scan:
    """Open a volume as slices across `axis`.

    Values are those of the header's slope and intercept. They become [0, 1] through `window`, else through the window
    from the 0.5th to the 99.5th percentile of the whole volume, of two million voxels evenly spread where it has more.

    Raises ScanError where the file is damaged, has several volumes, colours or complex values, more than `max_voxels`
    voxels, or values that are not finite.
    """
    name = source.name
    with faults(name, "cannot be read as NIfTI: it is damaged or cut short; get it again"):
        with _unpacked(source) as file:
            stored, image = _stored(file, name, max_voxels, hold)
        affine = np.asarray(image.affine, float)
        orientation = io_orientation(affine) if np.isfinite(affine).all() else np.full((3, 2), np.nan)
        if np.isnan(orientation).any():
            raise ScanError(f"{name} has an orientation in its header that is none: set its sform or qform")
        geometry = Geometry(image.header, affine, stored.shape, orientation, axis)
        slope, intercept = (float(x) for x in (image.dataobj.slope, image.dataobj.inter))
        _check(name, stored, slope, intercept)
        sample = stored.ravel(order="K")[:: max(1, stored.size // _SAMPLE)].astype(np.float64) * slope + intercept
        chosen = window or robust(sample)
    volume = geometry.canonical(stored)
    notes = () if _has_orientation(image.header) else (f"{name} gives no orientation: taken as nibabel's default, LAS",)

    def read(index: int) -> Frame:
        with faults(name, "cannot be read as NIfTI: it is damaged or cut short; get it again"):
            return grey(linear(geometry.frame(volume, index).astype(np.float64) * slope + intercept, chosen))

    width, height = (n for a, n in enumerate(volume.shape) if a != axis)
    return Scan(name, "nifti", volume.shape[axis], (height, width), read, notes, geometry)


@contextmanager
def _unpacked(source: Source) -> Iterator[BinaryIO]:
    with source.open() as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not packed:
            yield file
            return
        with gzip.GzipFile(fileobj=file) as inner:
            yield cast(BinaryIO, inner)


def _stored(file: BinaryIO, name: str, max_voxels: int, hold: Callable[[int], object]) -> tuple[np.ndarray, Any]:
    """The stored array, mapped from disk where it can be, and the nibabel image; sizes are checked before."""
    one = int.from_bytes(file.read(4), "little") in (348, int.from_bytes(b"\0\0\x01\x5c", "little"))
    file.seek(0)
    kind: Any = nibabel.Nifti1Image if one else nibabel.Nifti2Image
    header = kind.header_class.from_fileobj(file, check=False)
    shape = tuple(int(n) for n in header.get_data_shape())
    file.seek(0)
    if not shape or min(shape) < 1 or len(shape) > 7:
        raise ScanError(f"{name} has shape {shape}: there is nothing in it")
    voxels = int(np.prod(np.array(shape, object)))
    if voxels > max_voxels:
        raise TooLargeError(
            f"{name} says it has {' × '.join(map(str, shape))} voxels, more than the {max_voxels} allowed: the file is "
            "damaged, or --max-megapixels has to be raised"
        )
    if max(shape[3:], default=1) > 1:
        raise ScanError(
            f"{name} has {' × '.join(map(str, shape))} voxels, several volumes: give one volume, for instance what "
            "nibabel's four_to_three or fslsplit make of it"
        )
    dtype = header.get_data_dtype()
    if dtype.fields or dtype.kind not in "iuf":
        raise ScanError(f"{name} has voxels of type {dtype}: expected one real number each")
    if header["magic"].item().rstrip(b"\0") in (b"ni1", b"ni2"):
        raise ScanError(f"{name} is the header of a pair .hdr and .img: save both as one .nii")
    if not 0 <= float(header["vox_offset"]) <= _HEADER_AT_MOST:
        raise ScanError(f"{name} says its voxels begin at byte {float(header['vox_offset']):g}: the file is damaged")
    hold(voxels * dtype.itemsize)  # no more than that, and less where the file is mapped
    image = kind.from_file_map({"image": FileHolder(fileobj=cast(Any, file))})
    return image.dataobj.get_unscaled(), image


def _three(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:3], 1, 1)[:3]


def _check(name: str, stored: np.ndarray, slope: float, intercept: float) -> None:
    """Raise ScanError where values are not finite, looking at one slab at a time."""
    check_finite(name, int(np.count_nonzero(~np.isfinite([slope, intercept]))))
    if stored.dtype.kind == "f":
        check_finite(name, sum(int(np.count_nonzero(~np.isfinite(slab))) for slab in stored.T))


def _has_orientation(header: Any) -> bool:
    return int(header["qform_code"]) > 0 or int(header["sform_code"]) > 0

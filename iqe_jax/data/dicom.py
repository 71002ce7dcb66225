"""DICOM files, single and multi-frame, as frames of RGB in [0, 1].

Kept apart from scans.py because pydicom is imported here; nothing else imports this module at its top. Decoding, lookup
tables and windows are pydicom's; what is decided here is which of them apply to a frame:

1. Stored values through the modality table, or rescale slope and intercept (of an enhanced file: the frame's own).
2. `window` where one is given; else the file's VOI lookup table, else its first window centre and width under its VOI
   LUT function; else, of at most 8 unsigned bits, the whole range; else the 0.5th to the 99.5th percentile of the
   frame, padding left out.
3. MONOCHROME1 is inverted. RGB and YBR are taken over their whole range, PALETTE COLOR through its tables.

No message holds anything that stands in a header, save sizes and the name of a compression.
"""

import zlib
from typing import Any, BinaryIO

import numpy as np
import pydicom
from jaxtyping import Float32
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi, apply_windowing
from pydicom.pixels.utils import get_expected_length, get_nr_frames, pixel_array
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
)

from iqe_jax.data.scans import (
    Frame,
    Scan,
    ScanError,
    Source,
    Window,
    check_finite,
    check_size,
    faults,
    grey,
    linear,
    robust,
)

_INFLATED_AT_MOST = 2**29  # bytes of a deflated file
_DECODERS = "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg pyjpegls"
_PER_FRAME = ("PixelValueTransformationSequence", "FrameVOILUTSequence")
_COPIED = (
    *("PhotometricInterpretation", "PixelRepresentation", "BitsStored", "PixelPaddingValue", "RescaleSlope"),
    *("RescaleIntercept", "ModalityLUTSequence", "VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction"),
)


def open_dicom(source: Source, window: Window | None, max_pixels: int) -> Scan:
    """Open a DICOM file; see the top of this file for how values become [0, 1].

    Raises ScanError where it is damaged, has no image, more than `max_pixels` pixels in a frame, or a compression for
    which no decoder is installed.
    """
    name = source.name
    with faults(name, "cannot be read as DICOM: it is damaged, cut short, or of another kind; get it again"):
        whole, header = _header(source)
        if header.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
            raise ScanError(f"{name} is a DICOMDIR, an index of other files: give those, or their folder")
        if "Rows" not in header or "Columns" not in header:
            raise ScanError(f"{name} is a DICOM file with no image in it: leave it out")
        size = (int(header.Rows), int(header.Columns))
        check_size(name, *size, max_pixels)
        syntax = UID(header.file_meta.TransferSyntaxUID)
        _check_decoder(name, syntax)
        count = get_nr_frames(header, warn=False)
        if whole is None and not syntax.is_compressed and (missing := get_expected_length(header) - source.size) > 0:
            raise ScanError(
                f"{name} lacks at least {missing} bytes of its {count} frames: it is cut short; get it again"
            )
        if int(header.SamplesPerPixel) not in (1, 3):
            raise ScanError(f"{name} has {int(header.SamplesPerPixel)} values per pixel: expected 1 or 3")

    cause = f", or a kind of {_named(syntax)} that needs another decoder ({_DECODERS})" if syntax.is_compressed else ""

    def read(index: int) -> Frame:
        with faults(
            name, f"has a frame {index} that cannot be decoded: it is damaged or cut short{cause}; get it again"
        ):
            if whole is not None:
                stored = pixel_array(whole, index=index)
            else:
                with source.open() as file:
                    stored = pixel_array(file, index=index)
            return _frame(name, stored, header, index, window)

    return Scan(name, "dicom", count, size, read, header=header)


def _header(source: Source) -> tuple[Dataset | None, Dataset]:
    """The whole dataset where frames cannot be read from the file one by one, and the dataset without pixels."""
    if deflated := _is_deflated(source):
        _check_inflated(source)
    with source.open() as file:
        header = pydicom.dcmread(file, stop_before_pixels=True, force=True)
    if not deflated and "TransferSyntaxUID" in header.file_meta:
        return None, header
    with source.open() as file:
        whole = pydicom.dcmread(file, force=True)
    for dataset in (whole, header):
        if "TransferSyntaxUID" not in dataset.file_meta:
            implicit, little = dataset.original_encoding
            syntax = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
            dataset.file_meta.TransferSyntaxUID = syntax
    return whole, header


def _is_deflated(source: Source) -> bool:
    with source.open() as file:
        if file.read(132)[128:] != b"DICM":
            return False
        return _meta(file).get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian


def _meta(file: BinaryIO) -> Dataset:
    """The file meta group, which is never compressed; `file` is left where the rest begins."""
    return read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag.group != 2)


def _check_inflated(source: Source) -> None:
    """Inflate a deflated file in pieces and count, as pydicom would do it at once without bound."""
    with source.open() as file:
        file.seek(132)
        _meta(file)
        unpacking, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while not unpacking.eof and (packed := unpacking.unconsumed_tail or file.read(2**16)):
            total += len(unpacking.decompress(packed, 2**20))
            if total > _INFLATED_AT_MOST:
                raise ScanError(
                    f"{source.name} unpacks to more than {_INFLATED_AT_MOST} bytes: damaged, or made to harm"
                )


def _check_decoder(name: str, syntax: UID) -> None:
    """Raise ScanError where the file's compression is known and nothing installed decodes it, or is not known."""
    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:
        available = False
    if not available:
        raise ScanError(
            f"{name} is stored as {_named(syntax)}, for which no decoder is installed: {_DECODERS}, or save it "
            "uncompressed"
        )


def _named(syntax: UID) -> str:
    """The name of a transfer syntax; of an unknown one not what the file says."""
    return syntax.name if syntax.name != str(syntax) else "a compression that pydicom does not know"


def _frame(name: str, stored: np.ndarray, header: Dataset, index: int, window: Window | None) -> Frame:
    kind = header.PhotometricInterpretation
    if kind == "PALETTE COLOR":
        coloured = apply_color_lut(stored, header)[..., :3]
        return _coloured(coloured, 8 * coloured.dtype.itemsize)
    if stored.ndim == 3:
        return _coloured(stored, int(header.BitsStored))
    values = _grey(name, stored, _of_frame(header, index), window)
    return grey(1 - values if kind == "MONOCHROME1" else values)


def _coloured(stored: np.ndarray, bits: int) -> Frame:
    return np.clip(stored / np.float32(2**bits - 1), 0, 1).astype(np.float32)


def _of_frame(header: Dataset, index: int) -> Dataset:
    """What bears on the values of one frame: of the whole file, of what its frames share, of the frame itself."""
    own = Dataset()
    own.file_meta = header.file_meta  # tells the byte order of tables
    for keyword in _COPIED:
        if keyword in header:
            own.add(header[keyword])
    shared = header.get("SharedFunctionalGroupsSequence") or []
    frames = header.get("PerFrameFunctionalGroupsSequence") or []
    for group in (*shared[:1], *frames[index : index + 1]):
        for sequence in _PER_FRAME:
            for item in (group.get(sequence) or [])[:1]:
                for element in item:
                    own.add(element)
    return own


def _grey(name: str, stored: np.ndarray, own: Dataset, window: Window | None) -> Float32[np.ndarray, "height width"]:
    values = apply_modality_lut(stored, own)
    if values.dtype.kind == "f":
        check_finite(name, int(np.count_nonzero(~np.isfinite(values))))
    if window is not None:
        return linear(values, window)
    if own.get("VOILUTSequence"):
        entries, first, bits = own.VOILUTSequence[0].LUTDescriptor
        # Some files declare fewer bits than their table's entries have.
        table = apply_voi(np.arange(first, first + (entries or 2**16)), own)
        bits = max(bits, int(table.max()).bit_length())
        return (apply_voi(_whole_numbers(values), own) / (2**bits - 1)).astype(np.float32)
    if (voi := _window(own)) is not None:
        return apply_windowing(values, voi).astype(np.float32)
    eight_bits = int(own.get("BitsStored", 16)) <= 8 and int(own.get("PixelRepresentation", 0)) == 0
    # Slope 1 and intercept 0 make a new array that is the same.
    if eight_bits and "ModalityLUTSequence" not in own and np.array_equal(values, stored):
        return (stored / (2 ** int(own.BitsStored) - 1)).astype(np.float32)
    real = values[stored != own.PixelPaddingValue] if own.get("PixelPaddingValue") is not None else values
    return linear(values, robust(real if real.size else values))


def _whole_numbers(values: np.ndarray) -> np.ndarray:
    """Rescaled values, which pydicom gives as floats, as indices into a table."""
    return np.round(values).astype(np.int32) if values.dtype.kind == "f" else values


def _window(own: Dataset) -> Dataset | None:
    """The first window of the file as a dataset under which pydicom's output runs from 0 to 1, if it has a usable one.

    A width below 1, which LINEAR does not allow but files with small rescale slopes have, is taken as LINEAR_EXACT.
    """
    centre, width = (_first(own.get(keyword)) for keyword in ("WindowCenter", "WindowWidth"))
    if centre is None or width is None or not (np.isfinite([centre, width]).all() and width > 0):
        return None
    voi: Any = Dataset()
    voi.PhotometricInterpretation, voi.PixelRepresentation, voi.BitsStored = "MONOCHROME2", 0, 1
    voi.WindowCenter, voi.WindowWidth = centre, width
    function = str(own.get("VOILUTFunction") or "LINEAR").upper()
    known = function if function in ("LINEAR_EXACT", "SIGMOID") else "LINEAR"
    voi.VOILUTFunction = "LINEAR_EXACT" if known == "LINEAR" and width < 1 else known
    return voi


def _first(value: Any) -> float | None:
    """The first of the values of an element, which may have one, several or none."""
    if value is None or isinstance(value, str):
        return None
    if hasattr(value, "__len__"):
        return float(value[0]) if len(value) else None
    return float(value)

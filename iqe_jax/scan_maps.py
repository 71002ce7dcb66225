"""Writes anomaly maps back to where scans came from: pictures, NIfTI volumes, DICOM Secondary Captures.

All at the scan's own resolution and in its own geometry. What is mapped, and when, is prediction.py's to say.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, UInt8, UInt16
from PIL import Image

from iqe_jax.data.scans import Quiet, Scan, ScanError
from iqe_jax.report import overlay

LEVELS = 65535  # a volume's map is kept as whole numbers of this many steps, which NIfTI's slope turns back
_ROWS = 256  # of a picture that are coloured at a time
_OF_PATIENT_AND_STUDY = (
    *("SpecificCharacterSet", "PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex"),
    *("StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName"),
    *("StudyDescription", "Laterality", "BodyPartExamined", "BurnedInAnnotation"),
    *("LossyImageCompression", "PatientOrientation"),
)
_REQUIRED = {  # that may be empty; of the modules of a Secondary Capture
    **dict.fromkeys(("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime"), ""),
    **dict.fromkeys(("StudyID", "AccessionNumber", "ReferringPhysicianName", "PatientOrientation", "Laterality"), ""),
}


@dataclass(frozen=True)
class Origin:
    """What a Secondary Capture says of its making."""

    weights: str
    """Fingerprint of the run; with the source's it makes UIDs, so that the same map never gets two."""
    redact: bool
    """Leave out patient, study and source."""
    nonce: str
    """Random word that UIDs are made from where they may not be traced to the source."""


def resized(
    anomaly_map: Float[np.ndarray, "side side"], height: int, width: int
) -> Float32[np.ndarray, "height width"]:
    """A map at a frame's own size, by bilinear interpolation between pixel centres."""
    image = Image.fromarray(np.asarray(anomaly_map, np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    return np.clip(np.asarray(image), 0, 1)


def picture(
    pixels: UInt8[np.ndarray, "height width 3"], anomaly_map: Float[np.ndarray, "side side"]
) -> UInt8[np.ndarray, "height width 3"]:
    """A frame with its map laid over it, in the colours and on the fixed scale of the report."""
    height, width = pixels.shape[:2]
    full, shown = resized(anomaly_map, height, width), np.empty_like(pixels)
    for top in range(0, height, _ROWS):
        rows = slice(top, top + _ROWS)
        shown[rows] = overlay(pixels[rows].astype(np.float32) / 255, full[rows])
    return shown


def write_picture(path: Path, shown: UInt8[np.ndarray, "height width 3"]) -> None:
    """Save a picture as PNG."""
    Image.fromarray(shown).save(path)


@contextmanager
def _header_that(scan: Scan, cannot: str) -> Iterator[None]:
    """Turn whatever nibabel or pydicom make of an odd header into a ScanError; their words may hold a patient's."""
    try:
        with Quiet():
            yield
    except OSError:
        raise
    except Exception:
        raise ScanError(f"{scan.name} has a header that {cannot}") from None


def write_volume(path: Path, scan: Scan, maps: UInt16[np.ndarray, "slice height width"]) -> None:
    """The maps of all slices as a NIfTI volume of the scan's shape, affine and units; 0 … 65535 stands for 0 … 1.

    Raises ScanError where the scan's header is such that it cannot be written again.
    """
    with _header_that(scan, "no map can be given: use --no-heatmaps"):
        _write_volume(path, scan, maps)


def _write_volume(path: Path, scan: Scan, maps: UInt16[np.ndarray, "slice height width"]) -> None:
    import nibabel

    geometry = scan.geometry
    assert geometry is not None
    kind: Any = nibabel.Nifti2Image if geometry.header["sizeof_hdr"] == 540 else nibabel.Nifti1Image
    header = geometry.header.copy()
    header.set_data_dtype(np.uint16)
    image = kind(np.ascontiguousarray(geometry.stored(maps)), geometry.affine, header)
    # Given an affine, nibabel may rewrite the codes; a viewer has to lay the map over the scan by the same ones.
    image.header["qform_code"], image.header["sform_code"] = header["qform_code"], header["sform_code"]
    for field in ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z", "pixdim"):
        image.header[field] = geometry.header[field]
    for field in ("srow_x", "srow_y", "srow_z"):
        image.header[field] = geometry.header[field]
    for field in {"db_name", "aux_file", "intent_name"} & set(image.header.keys()):  # which may name a patient
        image.header[field] = b""
    image.header.extensions.clear()
    image.header.set_slope_inter(1 / LEVELS, 0)
    image.header["cal_min"], image.header["cal_max"] = 0, 1
    image.header["descrip"] = b"iqe-jax anomaly map, 0 to 1; not for diagnosis"
    nibabel.save(image, path)


def write_secondary_capture(
    path: Path, scan: Scan, index: int, shown: UInt8[np.ndarray, "height width 3"], score: float, origin: Origin
) -> None:
    """One frame's picture as a DICOM Secondary Capture in a series of its own of the source's study.

    Patient and study are the source's and the source is referred to, unless `origin.redact`. Raises ScanError where the
    source's header is such that they cannot be written again.
    """
    with _header_that(scan, "no Secondary Capture can be made of: use --dicom none"):
        made = _secondary_capture(scan, index, shown, score, origin)
        made.save_as(path, enforce_file_format=True)


def _secondary_capture(
    scan: Scan, index: int, shown: UInt8[np.ndarray, "height width 3"], score: float, origin: Origin
) -> Any:
    """The pydicom Dataset of a Secondary Capture (PS3.3 A.8.1)."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    source = scan.header
    made: Any = Dataset()
    for keyword in () if origin.redact else _OF_PATIENT_AND_STUDY:
        if keyword in source:
            made.add(source[keyword])
    for keyword, empty in _REQUIRED.items():
        if keyword not in made:
            setattr(made, keyword, empty)
    traced = not origin.redact and bool(source.get("SOPInstanceUID")) and bool(source.get("SOPClassUID"))
    file = [str(source.SOPInstanceUID), origin.weights] if traced else [origin.nonce, scan.name]
    series = [str(source.get("SeriesInstanceUID", file[0])), origin.weights] if traced else file
    if "StudyInstanceUID" not in made:
        made.StudyInstanceUID = generate_uid(entropy_srcs=[*file, "study"])
    made.SeriesInstanceUID = generate_uid(entropy_srcs=[*series, "series"])
    made.SOPInstanceUID = generate_uid(entropy_srcs=[*file, str(index)])
    made.SOPClassUID, made.Modality, made.ConversionType = SecondaryCaptureImageStorage, "OT", "WSD"
    made.SeriesNumber, made.InstanceNumber = 1000, (int(source.get("InstanceNumber") or 0) or 1) + index
    made.Manufacturer, made.ImageType = "iqe-jax", ["DERIVED", "SECONDARY"]
    made.SeriesDescription = "Anomaly heat map, not for diagnosis"
    made.DerivationDescription = (
        f"Anomaly heat map by iqe-jax (IQE-CLIP) laid over the source image; colours from blue, 0, to red, 1; "
        f"raw anomaly score {score:.6g}. Computed, not reviewed, not for diagnosis."
    )
    if traced:
        reference: Any = Dataset()
        reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = source.SOPClassUID, source.SOPInstanceUID
        if len(scan) > 1:
            reference.ReferencedFrameNumber = index + 1
        made.SourceImageSequence = [reference]
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.set_pixel_data(shown, "RGB", 8, generate_instance_uid=False)
    return made

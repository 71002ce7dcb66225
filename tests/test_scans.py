"""Reading scans: real DICOM and NIfTI files against values worked out here by hand, and hostile files of every kind."""

import gzip
import io
import logging
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

from iqe_jax.data import dicom
from iqe_jax.data.scans import Quiet, ScanError, open_scan
from iqe_jax.data.transforms import check_header, load_image

# What the two packages ship; nothing is downloaded.
DICOM = Path(pydicom.__path__[0]) / "data" / "test_files"
NIFTI = Path(nibabel.__path__[0]) / "tests" / "data"
DRAW = np.random.default_rng(0)


def only(path, **how):
    """The single frame of a scan, one channel of it where all are equal."""
    scan = open_scan(path, **how)
    assert len(scan) == 1
    frame = scan.frame(0)
    assert frame.dtype == np.float32
    assert frame.min() >= 0
    assert frame.max() <= 1
    return frame[..., 0] if (frame == frame[..., :1]).all() else frame


# ---------------------------------------------------------------------------- plain images


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_8_bit_images_are_what_training_reads(tmp_path, suffix, mode):
    path = tmp_path / f"a.{suffix}"
    pixels = DRAW.integers(0, 256, (32, 32, 3) if mode == "RGB" else (32, 32), np.uint8)
    Image.fromarray(pixels).save(path)
    frame = open_scan(path).frame(0)
    np.testing.assert_array_equal(frame, load_image(path, 32))
    np.testing.assert_array_equal(open_scan(str(path)).frame(0), frame)
    np.testing.assert_array_equal(open_scan(path.read_bytes()).frame(0), frame)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_images(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    values = DRAW.integers(0, 65536, (9, 7), np.uint16)
    values[0, :2] = 0, 65535
    Image.fromarray(values).save(path)
    np.testing.assert_allclose(only(path), values / 65535, atol=1e-7)
    window = np.clip((values.astype(float) - 2000) / 1000, 0, 1)  # 2000 … 3000
    np.testing.assert_allclose(only(path, window=(2500, 1000)), window, atol=1e-6)
    Image.fromarray((values >> 8).astype(np.uint8)).save(path)
    assert only(path, window=(2500, 1000)).max() > 0.9  # 8 bits need no window


def test_16_bit_tiffs_whose_zero_is_white(tmp_path):
    values = DRAW.integers(0, 65536, (9, 9), np.uint16)
    entries = [(256, 9), (257, 9), (258, 16), (259, 1), (262, 0), (273, 8), (277, 1), (278, 9), (279, values.nbytes)]
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", tag, 4, 1, n) for tag, n in entries)
    path = tmp_path / "a.tif"
    path.write_bytes(struct.pack("<2sHI", b"II", 42, 8 + values.nbytes) + values.tobytes() + directory + bytes(4))
    np.testing.assert_allclose(only(path), 1 - values / 65535, atol=1e-6)
    np.testing.assert_allclose(load_image(path, 9)[..., 0], 1 - values / 65535, atol=1 / 255)
    window = np.clip((values.astype(float) - 2000) / 1000, 0, 1)
    np.testing.assert_allclose(only(path, window=(2500, 1000)), 1 - window, atol=1e-6)


def test_pages_of_a_tiff(tmp_path):
    pages = [DRAW.integers(0, 65536, (5 + i, 6), np.uint16) for i in range(12)]
    first, *more = [Image.fromarray(page) for page in pages]
    first.save(tmp_path / "a.tif", save_all=True, append_images=more)
    scan = open_scan(tmp_path / "a.tif")
    assert len(scan) == 12
    for i in (11, 0, 5):
        np.testing.assert_allclose(scan.frame(i)[..., 1], pages[i] / 65535, atol=1e-7)
    with pytest.raises(IndexError, match="has 12 frames, there is no frame 12"):
        scan.frame(12)
    with pytest.raises(ScanError, match="16×6 pixels, more than the 90 allowed"):
        open_scan(tmp_path / "a.tif", max_pixels=90).frame(11)


def test_floats_need_a_window(tmp_path):
    path = tmp_path / "a.tif"
    values = DRAW.normal(size=(6, 6)).astype(np.float32)
    Image.fromarray(values).save(path)
    with pytest.raises(ScanError, match=r"a\.tif holds values from .* give --window"):
        only(path)
    np.testing.assert_allclose(only(path, window=(0, 4)), np.clip(values / 4 + 0.5, 0, 1), atol=1e-6)
    values[1, :3] = np.nan, np.inf, -np.inf
    Image.fromarray(values).save(path)
    with pytest.raises(ScanError, match=r"a\.tif has 3 values that are NaN or infinite"):
        only(path, window=(0, 4))


# ---------------------------------------------------------------------------- DICOM


def test_headers_of_images_and_masks_are_compared(tmp_path):
    values, _ = rescaled("MR_small.dcm")
    upper = changed(tmp_path, "MR_small.dcm", Rows=values.shape[0] // 2)
    Image.new("L", (values.shape[1], values.shape[0] // 2)).save(tmp_path / "mask.png")
    check_header(upper, tmp_path / "mask.png")
    with pytest.raises(ValueError, match=rf"MR_small\.dcm is {values.shape[0]}×.*mask\.png is {values.shape[0] // 2}×"):
        check_header(Path(DICOM / "MR_small.dcm"), tmp_path / "mask.png")


def rescaled(name):
    """Values of a small uncompressed grey file, from its last bytes, and its dataset."""
    data = pydicom.dcmread(DICOM / name)
    count = data.Rows * data.Columns
    stored = np.frombuffer(data.PixelData[: 2 * count], "<i2" if data.PixelRepresentation else "<u2")
    values = stored.reshape(data.Rows, data.Columns) * float(data.get("RescaleSlope", 1))
    return values + float(data.get("RescaleIntercept", 0)), data


def changed(tmp_path, name="CT_small.dcm", **elements):
    """A copy of a real file with other elements."""
    data = pydicom.dcmread(DICOM / name)
    for keyword, value in elements.items():
        setattr(data, keyword, value)
    data.save_as(tmp_path / "changed.dcm")
    return tmp_path / "changed.dcm"


def test_rescale_and_a_given_window():
    values, data = rescaled("CT_small.dcm")
    assert data.RescaleIntercept == -1024
    assert values.min() < 0
    expected = np.clip((values - (40 - 200)) / 400, 0, 1)
    np.testing.assert_allclose(only(DICOM / "CT_small.dcm", window=(40, 400)), expected, atol=1e-6)


def test_without_any_window_percentiles_of_the_frame():
    values, _ = rescaled("CT_small.dcm")
    low, high = np.percentile(values, [0.5, 99.5])
    np.testing.assert_allclose(only(DICOM / "CT_small.dcm"), np.clip((values - low) / (high - low), 0, 1), atol=1e-6)


def test_padding_counts_for_nothing(tmp_path):
    values, data = rescaled("CT_small.dcm")
    stored = data.pixel_array.copy()
    stored[:40] = -2000
    path = changed(tmp_path, PixelData=stored.tobytes(), PixelPaddingValue=-2000)
    low, high = np.percentile(values[40:], [0.5, 99.5])
    np.testing.assert_allclose(only(path)[40:], np.clip((values[40:] - low) / (high - low), 0, 1), atol=1e-6)
    stored[:] = -2000
    assert only(changed(tmp_path, PixelData=stored.tobytes(), PixelPaddingValue=-2000)).std() == 0


def linear(values, centre, width):
    """PS3.3 C.11.2.1.2.1, as the standard writes it, with an output from 0 to 1."""
    out = (values - (centre - 0.5)) / (width - 1) + 0.5
    out[values <= centre - 0.5 - (width - 1) / 2] = 0
    out[values > centre - 0.5 + (width - 1) / 2] = 1
    return out


def test_the_files_own_window():
    values, data = rescaled("MR_small.dcm")
    expected = linear(values, float(data.WindowCenter), float(data.WindowWidth))
    assert expected.std() > 0.1
    np.testing.assert_allclose(only(DICOM / "MR_small.dcm"), expected, atol=1e-6)


def test_window_functions_and_several_windows(tmp_path):
    values, _ = rescaled("CT_small.dcm")
    both = {"WindowCenter": [40, 1000], "WindowWidth": [400, 10]}
    np.testing.assert_allclose(only(changed(tmp_path, **both)), linear(values, 40, 400), atol=1e-6)
    path = changed(tmp_path, **both, VOILUTFunction="SIGMOID")
    np.testing.assert_allclose(only(path), 1 / (1 + np.exp(-4 * (values - 40) / 400)), atol=1e-6)
    path = changed(tmp_path, **both, VOILUTFunction="LINEAR_EXACT")
    np.testing.assert_allclose(only(path), np.clip((values - 40) / 400 + 0.5, 0, 1), atol=1e-6)
    path = changed(tmp_path, WindowCenter=0.25, WindowWidth=0.5, RescaleSlope=0.001, RescaleIntercept=-1)
    small = (values + 1024) * 0.001 - 1  # LINEAR allows no width below 1
    np.testing.assert_allclose(only(path), np.clip((small - 0.25) / 0.5 + 0.5, 0, 1), atol=1e-6)
    path = changed(tmp_path, WindowCenter=40, WindowWidth=0)  # no window at all, as some writers put it
    np.testing.assert_array_equal(only(path), only(DICOM / "CT_small.dcm"))


def test_a_voi_lookup_table(tmp_path):
    values, _ = rescaled("CT_small.dcm")
    table = Dataset()
    table.LUTDescriptor, table.LUTData = [2048, 0, 12], (4095 - np.arange(2048)).astype("<u2").tobytes()
    path = changed(tmp_path, VOILUTSequence=Sequence([table]))
    np.testing.assert_allclose(only(path), (4095 - np.clip(values, 0, 2047)) / 4095, atol=1e-6)

    # Rescaled values lie between the entries: the nearest one counts.
    stored = np.arange(14, dtype=np.int16).reshape(2, 7)
    part = {"Rows": 2, "Columns": 7, "RescaleSlope": 0.3, "RescaleIntercept": 0, "PixelData": stored.tobytes()}
    path = changed(tmp_path, **part, VOILUTSequence=Sequence([table]))
    np.testing.assert_allclose(only(path), (4095 - np.round(0.3 * stored)) / 4095, atol=1e-6)


def test_a_voi_lookup_table_of_more_bits_than_it_says(tmp_path):
    tables = []
    for bits in (12, 16):
        table = Dataset()
        table.LUTDescriptor, table.LUTData = [2048, 0, bits], (np.arange(2048) * 32 + 31).astype("<u2").tobytes()
        tables.append(only(changed(tmp_path, VOILUTSequence=Sequence([table]))))
    np.testing.assert_array_equal(tables[0], tables[1])


def test_a_rescaling_that_changes_nothing_does_not_stretch_8_bits(tmp_path):
    pixels = DRAW.integers(50, 90, (8, 8), np.uint8)
    frames = []
    for elements in ({}, {"RescaleSlope": 1, "RescaleIntercept": 0}):
        eight = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "PixelRepresentation": 0, "Rows": 8, "Columns": 8}
        path = changed(tmp_path, **eight, PixelData=pixels.tobytes(), RescaleSlope=None, RescaleIntercept=None)
        data = pydicom.dcmread(path)
        for keyword in ("RescaleSlope", "RescaleIntercept", "PixelPaddingValue", "WindowCenter", "WindowWidth"):
            if keyword in data:
                delattr(data, keyword)
        for keyword, value in elements.items():
            setattr(data, keyword, value)
        data["PixelData"].VR = "OB"
        data.save_as(path)
        frames.append(only(path))
    np.testing.assert_array_equal(frames[0], frames[1])
    np.testing.assert_allclose(frames[1], pixels / 255, atol=1e-6)


def eight_bits(tmp_path, pixels, **elements):
    """A DICOM file of 8 bits whose values nothing changes, but what `elements` say."""
    data = pydicom.dcmread(DICOM / "CT_small.dcm")
    for keyword in ("RescaleSlope", "RescaleIntercept", "PixelPaddingValue"):
        delattr(data, keyword)
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    data.Rows, data.Columns, data.PixelData = *pixels.shape, pixels.tobytes()
    data["PixelData"].VR = "OB"
    for keyword, value in elements.items():
        setattr(data, keyword, value)
    data.save_as(tmp_path / "eight.dcm")
    return tmp_path / "eight.dcm"


def test_8_bits_that_are_no_grey_levels_are_stretched(tmp_path):
    """Signed values, and those of a modality table, which here changes nothing."""
    pixels = np.arange(100, dtype=np.uint8).reshape(10, 10)
    low, high = np.percentile(pixels, [0.5, 99.5])
    stretched = np.clip((pixels - low) / (high - low), 0, 1)
    signed = (pixels.astype(np.int16) - 50).astype(np.int8)
    np.testing.assert_allclose(only(eight_bits(tmp_path, signed, PixelRepresentation=1)), stretched, atol=1e-6)
    table = Dataset()
    table.LUTDescriptor, table.ModalityLUTType = [100, 0, 16], "US"
    table.LUTData = np.arange(100, dtype="<u2").tobytes()
    path = eight_bits(tmp_path, pixels, ModalityLUTSequence=Sequence([table]))
    np.testing.assert_allclose(only(path), stretched, atol=1e-6)


def test_monochrome1_is_inverted(tmp_path):
    path = changed(tmp_path, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_allclose(only(path), 1 - only(DICOM / "CT_small.dcm"), atol=1e-6)
    real = DICOM / "dicomdirtests" / "77654033" / "CR1" / "6154"  # a real one, and a file without an ending
    stored = pydicom.dcmread(real)
    assert stored.PhotometricInterpretation == "MONOCHROME1"
    shown = linear(stored.pixel_array * 0.684 + 200, float(stored.WindowCenter), float(stored.WindowWidth))
    np.testing.assert_allclose(only(real), 1 - shown, atol=1e-6)


@pytest.mark.parametrize("kind", ["RLE", "bigendian", "implicit", "expb", "jp2klossless"])
def test_all_encodings_of_one_image_are_equal(kind):
    np.testing.assert_array_equal(only(DICOM / f"MR_small_{kind}.dcm"), only(DICOM / "MR_small.dcm"))


def test_colours(tmp_path):
    rgb = pydicom.dcmread(DICOM / "examples_rgb_color.dcm")
    pixels = np.frombuffer(rgb.PixelData, np.uint8)[: 240 * 320 * 3].reshape(240, 320, 3)
    np.testing.assert_allclose(only(DICOM / "examples_rgb_color.dcm"), pixels / 255, atol=1e-7)
    deep = np.arange(12 * 257, dtype=np.uint16).reshape(4, 257, 3)
    sixteen = {"BitsAllocated": 16, "BitsStored": 12, "HighBit": 11, "Rows": 4, "Columns": 257}
    path = changed(tmp_path, "examples_rgb_color.dcm", **sixteen, PixelData=deep.tobytes())
    np.testing.assert_allclose(only(path), deep / 4095, atol=1e-6)
    coded = {name: only(DICOM / f"SC_rgb_dcmtk_+eb+{name}.dcm") for name in ("cr", "cy+n1", "cy+s4")}
    coded["422"] = only(DICOM / "SC_ybr_full_422_uncompressed.dcm")
    for name, frame in coded.items():
        np.testing.assert_allclose(frame[5, 5], [1, 0, 0], atol=0.01, err_msg=name)  # the test card's first bar is red
    table = pydicom.dcmread(DICOM / "examples_palette.dcm")
    index = np.frombuffer(table.PixelData, np.uint8)[: 350 * 800].reshape(350, 800)
    red, blue = (
        np.frombuffer(getattr(table, f"{c}PaletteColorLookupTableData"), "<u2") / 65535 for c in ("Red", "Blue")
    )
    frame = only(DICOM / "examples_palette.dcm")
    np.testing.assert_allclose(frame[..., 0], red[index], atol=1e-6)
    np.testing.assert_allclose(frame[..., 2], blue[index], atol=1e-6)


def test_frames_of_one_file():
    scan = open_scan(DICOM / "examples_ybr_color.dcm")
    assert len(scan) == 30
    assert scan.kind == "dicom"
    stored = pydicom.dcmread(DICOM / "examples_ybr_color.dcm").pixel_array  # pydicom's own conversion of all at once
    for i in (0, 29):
        np.testing.assert_allclose(scan.frame(i), stored[i] / 255, atol=1e-6)
    dose = open_scan(DICOM / "rtdose.dcm")
    np.testing.assert_array_equal(open_scan(DICOM / "rtdose_rle.dcm").frame(14), dose.frame(14))


def test_frames_with_windows_of_their_own(tmp_path):
    stored = np.arange(200, dtype=np.uint16).reshape(2, 10, 10)
    frames = []
    for slope, centre in ((1, 50), (2, 300)):
        value, voi, group = Dataset(), Dataset(), Dataset()
        value.RescaleSlope, value.RescaleIntercept = slope, 0
        voi.WindowCenter, voi.WindowWidth, voi.VOILUTFunction = centre, 100, "LINEAR_EXACT"
        group.PixelValueTransformationSequence = Sequence([value])
        group.FrameVOILUTSequence = Sequence([voi])
        frames.append(group)
    data = pydicom.dcmread(DICOM / "CT_small.dcm")
    del data.RescaleSlope, data.RescaleIntercept
    data.NumberOfFrames, data.Rows, data.Columns, data.PixelRepresentation = 2, 10, 10, 0
    data.PerFrameFunctionalGroupsSequence, data.PixelData = Sequence(frames), stored.tobytes()
    data.save_as(tmp_path / "enhanced.dcm")
    scan = open_scan(tmp_path / "enhanced.dcm")
    for i, (slope, centre) in enumerate(((1, 50), (2, 300))):
        expected = np.clip((slope * stored[i].astype(float) - centre) / 100 + 0.5, 0, 1)
        np.testing.assert_allclose(scan.frame(i)[..., 0], expected, atol=1e-6)


def test_what_all_frames_share_and_what_one_has_of_its_own(tmp_path):
    def group(slope, centre):
        value, voi, both = Dataset(), Dataset(), Dataset()
        value.RescaleSlope, value.RescaleIntercept = slope, 0
        voi.WindowCenter, voi.WindowWidth, voi.VOILUTFunction = centre, 100, "LINEAR_EXACT"
        both.PixelValueTransformationSequence, both.FrameVOILUTSequence = Sequence([value]), Sequence([voi])
        return both

    stored = np.arange(200, dtype=np.uint16).reshape(2, 10, 10)
    data = pydicom.dcmread(DICOM / "CT_small.dcm")
    data.NumberOfFrames, data.Rows, data.Columns, data.PixelRepresentation = 2, 10, 10, 0
    data.SharedFunctionalGroupsSequence = Sequence([group(1, 50)])
    data.PerFrameFunctionalGroupsSequence = Sequence([Dataset(), group(2, 300)])
    data.PixelData = stored.tobytes()
    data.save_as(tmp_path / "enhanced.dcm")
    scan = open_scan(tmp_path / "enhanced.dcm")
    for i, (slope, centre) in enumerate(((1, 50), (2, 300))):
        expected = np.clip((slope * stored[i].astype(float) - centre) / 100 + 0.5, 0, 1)
        np.testing.assert_allclose(scan.frame(i)[..., 0], expected, atol=1e-6)


def test_files_without_ending_preamble_or_inflation(tmp_path):
    bare = tmp_path / "IM0001"
    bare.write_bytes((DICOM / "CT_small.dcm").read_bytes())
    np.testing.assert_array_equal(only(bare), only(DICOM / "CT_small.dcm"))
    data = pydicom.dcmread(DICOM / "CT_small.dcm")
    old = tmp_path / "old.dcm"
    with old.open("wb") as file:
        pydicom.dcmwrite(file, Dataset(data), implicit_vr=True, little_endian=True, enforce_file_format=False)
    assert old.read_bytes()[128:132] != b"DICM"
    np.testing.assert_array_equal(only(old), only(DICOM / "CT_small.dcm"))
    explicit = io.BytesIO()
    pydicom.dcmwrite(explicit, Dataset(data), implicit_vr=False, little_endian=True, enforce_file_format=False)
    for content in (old.read_bytes(), explicit.getvalue(), bare.read_bytes()[132:]):  # with no name to go by
        np.testing.assert_array_equal(open_scan(content).frame(0), open_scan(DICOM / "CT_small.dcm").frame(0))
    deflated = pydicom.dcmread(DICOM / "image_dfl.dcm")  # a real deflated one
    assert deflated.file_meta.TransferSyntaxUID == DeflatedExplicitVRLittleEndian
    np.testing.assert_allclose(only(DICOM / "image_dfl.dcm"), deflated.pixel_array / 255, atol=1e-6)


# ---------------------------------------------------------------------------- NIfTI


@pytest.mark.parametrize("name", ["anatomical.nii", "standard.nii.gz"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_are_canonical_and_go_back(name, axis):
    scan = open_scan(NIFTI / name, axis=axis)
    volume = nibabel.as_closest_canonical(nibabel.load(NIFTI / name))
    values = volume.get_fdata()
    assert len(scan) == values.shape[axis]
    low, high = np.percentile(values, [0.5, 99.5])
    for i in (0, len(scan) - 1):
        # Head or front up, the patient's right on the left: both in-plane axes run backwards.
        expected = np.flip(np.take(values, i, axis)).T
        expected = np.clip((expected - low) / (high - low), 0, 1)
        np.testing.assert_allclose(scan.frame(i)[..., 0], expected, atol=1e-5)
    frames = np.stack([scan.frame(i)[..., 0] for i in range(len(scan))])
    stored = nibabel.load(NIFTI / name)
    back = scan.geometry.stored(frames)
    assert back.shape == stored.shape
    np.testing.assert_allclose(back, np.clip((stored.get_fdata() - low) / (high - low), 0, 1), atol=1e-5)


def small_volume(path, dtype=np.int16, affine=None, values=None, slope=1, intercept=0):
    values = np.arange(2 * 3 * 4).reshape(2, 3, 4) if values is None else values
    image = nibabel.Nifti1Image(values.astype(dtype), np.diag([1.0, 1, 1, 1]) if affine is None else affine)
    image.header.set_slope_inter(slope, intercept)
    image.header.set_sform(image.affine, 1)
    nibabel.save(image, path)
    return path


def test_orientation_comes_from_the_header(tmp_path):
    """One head stored in all manner of ways gives the same slices."""
    same = nibabel.load(small_volume(tmp_path / "ras.nii"))
    expected = open_scan(tmp_path / "ras.nii", axis=2, window=(12, 24)).frame(1)
    # x = 0 is the patient's left here, so it is shown at the right; y = 0 is the back, shown at the bottom.
    np.testing.assert_allclose(expected[..., 0], np.flip(np.arange(24).reshape(2, 3, 4)[..., 1]).T / 24, atol=1e-6)
    for axes in ("LPS", "PIR", "SAL", "IRP"):
        turned = nibabel.orientations.ornt_transform(
            nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(axes)
        )
        nibabel.save(same.as_reoriented(turned), tmp_path / f"{axes}.nii.gz")
        assert nibabel.aff2axcodes(nibabel.load(tmp_path / f"{axes}.nii.gz").affine) == tuple(axes)
        scan = open_scan(tmp_path / f"{axes}.nii.gz", axis=2, window=(12, 24))
        np.testing.assert_array_equal(scan.frame(1), expected, err_msg=axes)


def test_slope_intercept_and_window_of_a_volume(tmp_path):
    path = small_volume(tmp_path / "a.nii", slope=2, intercept=-10)
    values = 2 * np.arange(24).reshape(2, 3, 4) - 10
    frame = open_scan(path, window=(10, 40)).frame(3)[..., 0]
    np.testing.assert_allclose(frame, np.clip((np.flip(values[..., 3]).T + 10) / 40, 0, 1), atol=1e-6)


def test_percentiles_of_a_large_volume_are_of_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr("iqe_jax.data.nifti._SAMPLE", 1000)
    values = np.broadcast_to(np.arange(40), (10, 10, 40))  # slices of one value each, stored one after the other
    scan = open_scan(small_volume(tmp_path / "a.nii", values=values))
    np.testing.assert_allclose(scan.frame(20), 20 / 39, atol=0.01)


def test_one_volume_with_a_fourth_axis_and_nifti2(tmp_path):
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4, 1)
    nibabel.save(nibabel.Nifti2Image(values, np.eye(4)), tmp_path / "a.nii.gz")
    scan = open_scan(tmp_path / "a.nii.gz", window=(12, 24))
    assert len(scan) == 4
    back = scan.geometry.stored(np.stack([scan.frame(i)[..., 0] for i in range(4)]))
    np.testing.assert_allclose(back, values / 24, atol=1e-6)


def test_a_volume_that_has_no_orientation_says_so(tmp_path):
    image = nibabel.Nifti1Image(np.zeros((2, 3, 4), np.int16), None)
    nibabel.save(image, tmp_path / "a.nii")
    assert "gives no orientation" in open_scan(tmp_path / "a.nii").notes[0]
    assert open_scan(small_volume(tmp_path / "b.nii")).notes == ()
    image.header["qform_code"] = 1  # one of the two is enough
    nibabel.save(image, tmp_path / "q.nii")
    assert open_scan(tmp_path / "q.nii").notes == ()
    assert open_scan(tmp_path / "a.nii").frame(0).max() == 0  # nothing but one value


# ---------------------------------------------------------------------------- broken and hostile


def png(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def bmp(width, height):
    return b"BM" + struct.pack("<IHHI", 100, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, *[0] * 6)


def tiff(width, height):
    tags = [(256, width), (257, height), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (278, height), (279, 8)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + bytes(4)


def nifti(shape, dtype=np.int16, data=b"", offset=352, magic=b"n+1", **fields):
    header = nibabel.Nifti1Header()
    header.set_data_dtype(dtype)
    header["dim"][: len(shape) + 1] = [len(shape), *shape]
    header["magic"], header["vox_offset"] = magic, offset
    for name, value in fields.items():
        header[name] = value
    return header.binaryblock + bytes(4) + data


def dicom_of(tmp_path, **elements):
    return changed(tmp_path, **elements).read_bytes()


def deflated_bomb():
    meta = pydicom.dcmread(DICOM / "image_dfl.dcm").file_meta
    head = (DICOM / "image_dfl.dcm").read_bytes()[: 132 + 12 + meta.FileMetaInformationGroupLength]
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return head + packer.compress(bytes(2**26)) + packer.flush()


def cut(name, keep):
    data = (DICOM / name).read_bytes()
    return data[: int(len(data) * keep)]


HOSTILE = {
    "nothing": ("a.png", lambda t: b"", r"is empty \(0 bytes\)"),
    "text": ("a.png", lambda t: b"hello, this is no image" * 10, "is of no kind that is read: expected PNG"),
    "a cut PNG": ("a.png", lambda t: png(10, 10)[:40], "is of no kind that is read|is damaged or cut short"),
    "PNG without pixels": ("a.png", lambda t: png(100, 100), "is damaged or cut short"),
    "a huge PNG": ("a.png", lambda t: png(100_000, 100_000), "pixels, the most that is opened|10000×10000"),
    "a huge BMP": ("a.bmp", lambda t: bmp(100_000, 100_000), "pixels, the most that is opened|100000×100000"),
    "a huge TIFF": (
        "a.tif",
        lambda t: tiff(100_000, 100_000),
        "pixels, the most that is opened|100000×100000",
    ),
    "a large TIFF": ("a.tif", lambda t: tiff(10_001, 10_000), "10000×10001 pixels, more than the 100000000 allowed"),
    "a zip": ("a.png", lambda t: b"PK\x03\x04" + bytes(100), "is an archive: unpack it"),
    "a gzip of zeros": ("a.nii.gz", lambda t: gzip.compress(bytes(2**26)), "gzip file with no NIfTI volume in it"),
    "broken gzip": ("a.nii.gz", lambda t: b"\x1f\x8b\x08\x00" + bytes(30), "gzip file"),
    "PostScript": ("a.png", lambda t: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is of no kind"),
    "no such DICOM": ("a.dcm", lambda t: b"\xff" * 400, "cannot be read as DICOM|no image in it"),
    "cut DICOM header": ("a.dcm", lambda t: cut("CT_small.dcm", 0.02), "no image in it|cannot be read as DICOM"),
    "cut DICOM pixels": ("a.dcm", lambda t: cut("CT_small.dcm", 0.5), r"lacks at least \d+ bytes of its 1 frames"),
    "cut RLE": ("a.dcm", lambda t: cut("MR_small_RLE.dcm", 0.6), "has a frame 0 that cannot be decoded"),
    "cut JPEG 2000": ("a.dcm", lambda t: cut("MR_small_jp2klossless.dcm", 0.5), "has a frame 0 that cannot be decoded"),
    "huge DICOM": ("a", lambda t: dicom_of(t, Rows=60000, Columns=60000), "60000×60000 pixels, more than"),
    "a billion frames": (
        "a",
        lambda t: dicom_of(t, NumberOfFrames=10**9),
        "lacks at least .* of its 1000000000 frames",
    ),
    "no rows": ("a", lambda t: dicom_of(t, Rows=0), "is 0×128 pixels: there is nothing in it"),
    "a report": ("a", lambda t: (DICOM / "reportsi.dcm").read_bytes(), "DICOM file with no image in it"),
    "an index": ("a", lambda t: (DICOM / "dicomdirtests" / "DICOMDIR").read_bytes(), "is a DICOMDIR"),
    "four values a pixel": (
        *("a", lambda t: dicom_of(t, SamplesPerPixel=4, PlanarConfiguration=0, Rows=32)),
        "has 4 values per pixel: expected 1 or 3",
    ),
    "JPEG-LS": (
        "a",
        lambda t: (DICOM / "MR_small_jpeg_ls_lossless.dcm").read_bytes(),
        "JPEG-LS .* no decoder is installed",
    ),
    "12-bit JPEG": ("a", lambda t: (DICOM / "JPEG-lossy.dcm").read_bytes(), r"JPEG Extended .* needs another decoder"),
    "deflated bomb": ("a", lambda t: deflated_bomb(), "unpacks to more than 16777216 bytes"),
    "several volumes": ("a.nii", lambda t: (NIFTI / "functional.nii").read_bytes(), "17 × 21 × 3 × 20 voxels, several"),
    "huge NIfTI": ("a.nii", lambda t: nifti((30_000, 30_000, 30_000)), "30000 × 30000 × 30000 voxels, more than"),
    "huge NIfTI in gzip": (
        *("a.nii.gz", lambda t: gzip.compress(nifti((30_000, 30_000, 30_000), data=bytes(2**26)))),
        "30000 × 30000 × 30000 voxels, more than",
    ),
    "cut NIfTI": ("a.nii", lambda t: nifti((20, 20, 20), data=bytes(100)), "cannot be read as NIfTI"),
    "cut NIfTI in gzip": (
        "a.nii.gz",
        lambda t: gzip.compress(nifti((20, 20, 20), data=DRAW.bytes(9000)))[:-20],
        "cannot be read as NIfTI",
    ),
    "empty axis": ("a.nii", lambda t: nifti((20, 0, 20)), r"has shape \(20, 0, 20\): there is nothing"),
    "far voxels": ("a.nii", lambda t: nifti((2, 2, 2), data=bytes(64), offset=2**30), "its voxels begin at byte"),
    "half of a pair": ("a.nii", lambda t: nifti((2, 2, 2), magic=b"ni1", data=bytes(64)), "is the header of a pair"),
    "an orientation that is none": (
        *("a.nii", lambda t: nifti((2, 2, 2), data=bytes(64), sform_code=1)),
        "has an orientation in its header that is none",
    ),
    "complex voxels": ("a.nii", lambda t: nifti((2, 2, 2), np.complex64, bytes(64)), "voxels of type complex64"),
    "NaN voxels": (
        *("a.nii", lambda t: nifti((2, 2, 2), np.float32, np.float32([1, np.nan, np.inf, *[0] * 5]).tobytes())),
        "has 2 values that are NaN or infinite",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("as_bytes", [False, True], ids=["file", "bytes"])
def test_broken_and_hostile_files_are_one_clear_error_in_little_memory(tmp_path, monkeypatch, what, as_bytes):
    name, make, message = HOSTILE[what]
    monkeypatch.setattr(dicom, "_INFLATED_AT_MOST", 2**24)
    path = tmp_path / name
    path.write_bytes(make(tmp_path))
    source = path.read_bytes() if as_bytes else path
    tracemalloc.start()
    try:
        with pytest.raises(ScanError, match=message) as raised:
            open_scan(source, name=name).frame(0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 48e6
    assert str(raised.value).startswith(name)
    assert "\n" not in str(raised.value)
    assert str(tmp_path) not in str(raised.value)


def test_errors_tell_nothing_of_a_patient(tmp_path, capfd, caplog):
    """What stands in a header must not come out by way of a message, a warning or a log, however odd it is."""
    path = changed(tmp_path, PatientName="SECRET^NAME", PatientID="SECRET-1", PhotometricInterpretation="SECRET KIND")
    data = bytearray(path.read_bytes())
    data[data.index(b"19970430") : data.index(b"19970430") + 8] = b"SECRET!!"  # a date that is none
    path.write_bytes(data)
    with pytest.raises(ScanError) as raised:
        open_scan(path).frame(0)
    told = str(raised.value) + capfd.readouterr().err + caplog.text
    assert "SECRET" not in told
    assert raised.value.__cause__ is None


def test_warnings_are_kept_back_until_the_last_thread_is_done():
    """Two decoders at work: the first to end must not let the other's warnings out, and then all is as before."""
    logger = logging.getLogger("pydicom")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        first, second = Quiet(), Quiet()
        first.__enter__(), second.__enter__()
        first.__exit__()
        warnings.warn("SECRET", stacklevel=1)
        assert logger.disabled
        second.__exit__()
        assert not told and not logger.disabled
        warnings.warn("heard", stacklevel=1)
    assert [str(warning.message) for warning in told] == ["heard"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../etc/passwd", "../../etc/passwd is of no kind"),
        ("a\nb\x1b[31m.png", r"a\nb\x1b[31m.png is of no kind"),
        ("\u202egnp.exe", r"\u202egnp.exe is of no kind"),
        ("a\udcff.png", r"a\xff.png is of no kind"),
    ],
)
def test_names_are_shown_and_never_followed(name, shown):
    with pytest.raises(ScanError) as raised:
        open_scan(b"no image at all", name=name).frame(0)
    assert str(raised.value).startswith(shown)
    str(raised.value).encode()


def test_what_is_no_file(tmp_path):
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(ScanError, match=r"is not there: expected a scan|is no regular file: expected a scan"):
            open_scan(path)
    for how, message in (
        ({"axis": 3}, "axis is 3"),
        ({"window": (0, 0)}, "window is 0 0"),
        ({"window": (1, np.nan)}, "nan"),
    ):
        with pytest.raises(ScanError, match=message):
            open_scan(DICOM / "CT_small.dcm", **how)


def test_limits_can_be_raised_and_lowered():
    assert only(DICOM / "CT_small.dcm", max_pixels=128 * 128).shape == (128, 128)
    with pytest.raises(ScanError, match="more than the 16383 allowed"):
        open_scan(DICOM / "CT_small.dcm", max_pixels=128 * 128 - 1)
    with pytest.raises(ScanError, match="33 × 41 × 25 voxels, more than the 200 allowed"):
        open_scan(NIFTI / "anatomical.nii", max_pixels=50)


def test_uncompressed_sizes_are_exact(tmp_path):
    """An uncompressed file that is whole passes, one byte less of pixels does not."""
    data = pydicom.dcmread(DICOM / "CT_small.dcm")
    assert data.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    whole = (DICOM / "CT_small.dcm").read_bytes()
    end = whole.index(data.PixelData) + len(data.PixelData)
    assert only(tmp_path / "a" if (tmp_path / "a").write_bytes(whole[:end]) else None).shape == (128, 128)
    (tmp_path / "b").write_bytes(whole[: end - 1])
    with pytest.raises(ScanError, match="b has a frame 0 that cannot be decoded"):
        only(tmp_path / "b")

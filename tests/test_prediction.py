"""From a folder of one's own to decisions: training on it, predicting scans of every kind, being killed, going on."""

import csv
import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image

import evaluate as evaluate_script
import iqe_jax
import predict as predict_script
import train as train_script
from iqe_jax import calibration, config, prediction, scan_maps
from iqe_jax.checkpoint import alone_in
from iqe_jax.data.phantoms import CLIP_DIR
from iqe_jax.data.scans import open_scan
from iqe_jax.detector import Detector, Prediction
from iqe_jax.ledger import Ledger, find, itemise
from iqe_jax.prediction import Options

pytestmark = pytest.mark.usefixtures("quick_compile")
ROOT = Path(__file__).parents[1]
DICOM = Path(pydicom.__path__[0]) / "data" / "test_files"
NIFTI = Path(nibabel.__path__[0]) / "tests" / "data"
# The smallest model that takes the tokenizer's road: the phantoms' CLIP at 48 pixels, one layer of query module.
SMALL = [
    "--model.clip",
    str(CLIP_DIR),
    "--model.image-size",
    "48",
    "--model.levels",
    "4",
    "6",
    "--model.iqm-layers",
    "1",
]
SMALL += ["--model.iqm-heads", "4", "--model.iqm-width", "64", "--model.score", "max", "--model.start", "clip"]
SMALL += ["--eval.heatmaps", "0", "--train.steps", "3"]
WORDS = ["--model.templates", "a photo of a healthy knee joint <|class|>.", "a photo of a knee with a tear <|class|>."]


def noise(draw, anomalous, size=48):
    image = draw.integers(8000, 20000, (size, size), np.uint16)
    if anomalous:
        y, x = draw.integers(4, size - 18, 2)
        image[y : y + 12, x : x + 12] += 40000
    return image


def save_dicom(path, values):
    data = pydicom.dcmread(DICOM / "CT_small.dcm")
    data.Rows, data.Columns, data.PixelRepresentation, data.PixelData = *values.shape, 0, values.tobytes()
    data.WindowCenter, data.WindowWidth, data.RescaleSlope, data.RescaleIntercept = 32768, 65536, 1, 0
    data.save_as(path)


@pytest.fixture(scope="module")
def own_set(tmp_path_factory):
    """A set of one's own, without masks: 16-bit PNG and TIFF, and DICOM."""
    root, draw = tmp_path_factory.mktemp("mine") / "Brain", np.random.default_rng(0)  # a name that a known set has too
    for split, count in {"valid": 14, "test": 3}.items():
        for part in ("good", "Ungood"):
            (root / split / part).mkdir(parents=True)
            for i in range(count):
                path = root / split / part / f"{i:02d}{('.png', '.tif', '.dcm')[i % 3]}"
                values = noise(draw, part == "Ungood")
                save_dicom(path, values) if path.suffix == ".dcm" else Image.fromarray(values).save(path)
    return root


@pytest.fixture(scope="module")
def run(own_set, tmp_path_factory):
    """A run trained on that set, evaluated and calibrated, by the command line."""
    run_dir = tmp_path_factory.mktemp("runs") / "knee"
    own = ["--config", "custom_fewshot", "--data.root", str(own_set), "--run-dir", str(run_dir), "--data.shots", "2"]
    evaluate_script.main([*own, *SMALL, *WORDS])
    return run_dir


def predict(run, out, *more):
    """Run predict.py; returns its exit status, or the message it stops with."""
    with pytest.raises(SystemExit) as stopped:
        predict_script.main([*map(str, more), "--run", str(run), "--out", str(out)])
    return stopped.value.code


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def eight_bit(frame):
    """A frame at the depth at which training resizes images, and predict.py too."""
    return np.round(frame * 255).astype(np.uint8)


def table(out):
    with (out / "scores.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------------- a set of one's own


def test_a_run_on_ones_own_set_is_trained_and_calibrated(run):
    summary = json.loads((run / "metrics.json").read_text())
    assert summary["dataset"] == "custom"
    assert summary["images"] == {"normal": 3, "anomalous": 3}
    logged = lines(run / "metrics.jsonl")
    assert len(logged) == 3
    assert "dice" not in logged[0]  # no masks
    fitted = calibration.load(run)
    assert len(fitted.labels) == 24  # the valid images without the support
    assert sum(fitted.labels) == 12
    assert fitted.threshold is not None


def test_training_and_prediction_read_a_file_alike(run, own_set):
    scores = {row["image"]: float(row["score"]) for row in table(run)}
    detector = iqe_jax.load(run)
    for path in sorted((own_set / "test").rglob("*.*")):
        part = {"good": "good", "Ungood": "ungood"}[path.parent.name]
        expected = scores[f"{part}/{path.name}"]
        assert detector(eight_bit(open_scan(path).frame(0))).score == pytest.approx(expected, abs=1e-5)
        assert detector(path).score == pytest.approx(expected, abs=1e-5)


def only_normal(root, own_set):
    for split in ("valid", "test"):
        shutil.copytree(own_set / split / "good", root / split / "good")
    return root


def test_normals_alone_train_nothing_and_that_is_said(tmp_path, own_set):
    root = only_normal(tmp_path / "knees", own_set)
    own = ["--config", "custom_fewshot", "--data.root", str(root), "--run-dir", str(tmp_path / "run"), *SMALL]
    with pytest.raises(
        SystemExit, match="valid split of custom holds no anomalous image: every term of the loss is then"
    ):
        evaluate_script.main(own)
    with pytest.raises(SystemExit, match="the test splits of knees hold no anomalous image"):
        train_script.main([*own, "--data.shots", "0", "--data.root", str(tmp_path), "--data.sources", "knees"])
    assert not (tmp_path / "run").exists()
    (root / "valid" / "Abnormal").mkdir()  # not a set of normals: a folder by a name that is not known
    with pytest.raises(SystemExit, match=r"no 'Ungood' folder in .*valid; it holds Abnormal, good"):
        evaluate_script.main(own)


def test_normals_alone_are_enough_for_a_threshold(tmp_path, own_set, run, capsys):
    """A trained adapter meets a set of normal images: no AUROC and no probability, but a threshold."""
    root = only_normal(tmp_path / "knees", own_set)
    arguments = ["--config", "custom_fewshot", "--data.root", str(root), "--run-dir", str(tmp_path / "run"), *SMALL]
    adapter = ["--data.shots", "0", "--model.adapter", str(run / "adapter.safetensors"), *WORDS]
    evaluate_script.main([*arguments, *adapter])
    shown = capsys.readouterr()
    assert "undefined (one class only)" in shown.out
    assert "no probability: it takes 10 normal and 10 anomalous images, there are 14 and 0" in shown.err
    fitted = calibration.load(tmp_path / "run")
    assert fitted.achieved["specificity"]["value"] >= 0.95
    assert iqe_jax.load(tmp_path / "run").zero_shot  # the given adapter is loaded with the run


# ---------------------------------------------------------------------------- scans of every kind


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """A folder of real and made scans: same names in two folders, odd names, bad files, and what is no scan."""
    root, draw = tmp_path_factory.mktemp("scans"), np.random.default_rng(1)
    (root / "a").mkdir()
    (root / "b" / "deep").mkdir(parents=True)
    (root / ".hidden").mkdir()
    for folder in ("a", "b", ".hidden"):
        Image.fromarray(noise(draw, folder == "a", 60)).save(root / folder / "same.png")
    Image.fromarray(noise(draw, True, 50)).save(root / "a" / "=cmd'.png")
    shutil.copy(DICOM / "CT_small.dcm", root / "b" / "deep" / "9.9.99.7")
    shutil.copy(DICOM / "SC_rgb_rle_2frame.dcm", root / "b")
    shutil.copy(DICOM / "dicomdirtests" / "DICOMDIR", root / "b")
    shutil.copy(NIFTI / "anatomical.nii", root / "b")
    shutil.copy(NIFTI / "functional.nii", root / "b")  # 4-D
    (root / "b" / "shortened.png").write_bytes((root / "a" / "same.png").read_bytes()[:900])
    (root / "b" / "notes.txt").write_text("no scan")
    (root / "b" / "archive.tar.gz").write_bytes(b"\x1f\x8b")
    return root


@pytest.fixture(scope="module")
def predicted(run, scans, tmp_path_factory):
    out = tmp_path_factory.mktemp("results") / "out"
    return predict(run, out, scans, "--dicom", "secondary-capture"), out


def test_every_frame_is_scored_and_bad_files_make_the_status(run, scans, predicted, capfd):
    status, out = predicted
    assert status == 3
    failed = {Path(line["file"]).name for line in lines(out / "failures.jsonl")}
    assert failed == {"shortened.png", "functional.nii"}
    rows = table(out)
    frames = {(Path(row["file"]).relative_to(scans).as_posix(), int(row["frame"])) for row in rows}
    once = {("a/same.png", 0), ("b/same.png", 0), ("a/=cmd'.png", 0), ("b/deep/9.9.99.7", 0)}
    assert frames == once | {("b/SC_rgb_rle_2frame.dcm", i) for i in range(2)} | {
        ("b/anatomical.nii", i) for i in range(25)
    }
    assert len(rows) == len(frames) == len(lines(out / "scores.jsonl"))
    detector, fitted = iqe_jax.load(run), calibration.load(run)
    for row in rows:
        expected = detector(eight_bit(open_scan(Path(row["file"])).frame(int(row["frame"])))).score
        assert float(row["score"]) == pytest.approx(expected, abs=2e-5)
        score = np.array([float(row["score"])])
        assert float(row["probability"]) == pytest.approx(fitted.probability(score)[0], abs=1e-4)
        assert (row["decision"] == "anomalous") == bool(fitted.decision(score)[0])
        assert (out / row["heatmap"]).exists()
    assert len(list((out / "heatmaps").iterdir())) == 6
    assert "SECRET" not in capfd.readouterr().err


def test_pictures_have_the_images_own_size_and_the_reports_colours(run, scans, predicted):
    _, out = predicted
    (row,) = [row for row in table(out) if row["file"].endswith("a/same.png")]
    frame = open_scan(Path(row["file"])).frame(0)
    anomaly_map = iqe_jax.load(run)(eight_bit(frame)).anomaly_map
    shown = np.asarray(Image.open(out / row["heatmap"]), int)
    assert shown.shape == (60, 60, 3)
    expected = scan_maps.picture(eight_bit(frame), anomaly_map)
    assert np.abs(shown - expected).max() <= 1


def test_a_volumes_map_lies_over_the_volume(run, scans, predicted):
    _, out = predicted
    path = scans / "b" / "anatomical.nii"
    source, scan = nibabel.load(path), open_scan(path)
    (name,) = {row["heatmap"] for row in table(out) if row["file"] == str(path)}
    made = nibabel.load(out / name)
    assert made.shape == source.shape
    np.testing.assert_array_equal(made.affine, source.affine)
    for field in ("pixdim", "qform_code", "sform_code", "xyzt_units", "srow_x"):
        np.testing.assert_array_equal(made.header[field], source.header[field], err_msg=field)
    values = np.asanyarray(made.dataobj)
    canonical = nibabel.as_closest_canonical(made).get_fdata()
    detector = iqe_jax.load(run)
    for i in (0, 13):
        expected = scan_maps.resized(detector(eight_bit(scan.frame(i))).anomaly_map, *scan.size)
        np.testing.assert_allclose(np.flip(canonical[..., i]).T, expected, atol=1e-3)
    assert values.std() > 0.001


def test_a_secondary_capture_belongs_to_the_study(scans, predicted):
    _, out = predicted
    source = pydicom.dcmread(scans / "b" / "deep" / "9.9.99.7")
    (path,) = (out / "dicom").glob("9.9.99-*.dcm")
    made = pydicom.dcmread(path)
    assert made.SOPClassUID.name == "Secondary Capture Image Storage"
    for keyword in ("PatientName", "PatientID", "StudyInstanceUID", "StudyDate", "AccessionNumber"):
        assert made[keyword].value == source.get(keyword, ""), keyword
    assert made.SourceImageSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
    assert len({made.SOPInstanceUID, made.SeriesInstanceUID, source.SOPInstanceUID, source.SeriesInstanceUID}) == 4
    assert "not for diagnosis" in made.DerivationDescription
    picture = np.asarray(Image.open(next((out / "heatmaps").glob("9.9.99-*.png"))))
    np.testing.assert_array_equal(made.pixel_array, picture)
    frames = sorted((out / "dicom").glob("SC_rgb_rle_2frame-*.dcm"))
    made = [pydicom.dcmread(frame) for frame in frames]
    assert [frame.SourceImageSequence[0].ReferencedFrameNumber for frame in made] == [1, 2]
    assert made[0].SeriesInstanceUID == made[1].SeriesInstanceUID
    assert made[0].SOPInstanceUID != made[1].SOPInstanceUID


def test_a_map_says_nothing_of_its_volumes_patient(tmp_path):
    for kind, fields in ((nibabel.Nifti1Image, ("db_name",)), (nibabel.Nifti2Image, ())):  # NIfTI-2 has no db_name
        image = kind(np.zeros((4, 5, 6), np.int16), np.eye(4))
        for field in (*fields, "aux_file", "intent_name", "descrip"):
            image.header[field] = b"SECRET"
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"SECRET^NAME"))
        nibabel.save(image, tmp_path / "scan.nii")
        scan = open_scan(tmp_path / "scan.nii")
        scan_maps.write_volume(tmp_path / "map.nii", scan, np.zeros((6, *scan.size), np.uint16))
        assert b"SECRET" in (tmp_path / "scan.nii").read_bytes()
        assert b"SECRET" not in (tmp_path / "map.nii").read_bytes()
        assert nibabel.load(tmp_path / "map.nii").header["sizeof_hdr"] == image.header["sizeof_hdr"]


def test_a_volume_that_no_map_can_be_given_is_skipped(run, tmp_path, monkeypatch):
    def refuse(*_):
        raise nibabel.spatialimages.HeaderDataError("SECRET is no field")

    monkeypatch.setattr("nibabel.save", refuse)
    assert predict(run, tmp_path / "out", NIFTI / "anatomical.nii") == 3
    (fault,) = lines(tmp_path / "out" / "failures.jsonl")
    assert "anatomical.nii has a header that no map can be given: use --no-heatmaps" in fault["error"]
    assert "SECRET" not in json.dumps(fault)


def test_redacted_objects_lead_to_no_study(tmp_path):
    scan = open_scan(DICOM / "CT_small.dcm")
    shown, made = np.zeros((128, 128, 3), np.uint8), {}
    for name, redact, nonce in (("plain", False, "x"), ("again", False, "y"), ("one", True, "x"), ("other", True, "y")):
        path = tmp_path / f"{name}.dcm"
        scan_maps.write_secondary_capture(path, scan, 0, shown, 0.5, scan_maps.Origin("weights", redact, nonce))
        made[name] = pydicom.dcmread(path)
        of_source = [scan.header[keyword].value for keyword in ("PatientID", "StudyInstanceUID", "SOPInstanceUID")]
        assert all((value.encode() in path.read_bytes()) != redact for value in of_source)
    uids = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
    assert all(made["plain"][uid].value == made["again"][uid].value for uid in uids)  # the same map, the same object
    # No UID that could be made again from the source's, to find out whose it is.
    assert all(made["one"][uid].value != made["other"][uid].value for uid in uids)


def test_a_source_may_have_no_number(tmp_path):
    scan = open_scan(DICOM / "CT_small.dcm")
    del scan.header.InstanceNumber
    origin = scan_maps.Origin("weights", False, "x")
    scan_maps.write_secondary_capture(tmp_path / "a.dcm", scan, 2, np.zeros((8, 8, 3), np.uint8), 0.5, origin)
    assert pydicom.dcmread(tmp_path / "a.dcm").InstanceNumber == 3


def test_results_of_other_settings_are_told_apart(run, tmp_path):
    options = Options(("a.png",), run, tmp_path)
    changes = {"axis": 0, "prevalence": 0.1, "heatmaps": False, "dicom": "secondary-capture", "redact": True}
    changes |= {"window": (40.0, 400.0)}
    found = [prediction._settings(options, "weights", None)]
    found += [
        prediction._settings(dataclasses.replace(options, **{name: value}), "weights", None)
        for name, value in changes.items()
    ]
    assert all(found.count(one) == 1 for one in found)
    assert prediction._settings(dataclasses.replace(options, batch_size=3, workers=1), "weights", None) == found[0]
    other = shutil.copytree(run, tmp_path / "run")
    assert prediction._fingerprint(other) == prediction._fingerprint(run)
    recipe = config.read(other / "config.json")
    blurred = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, sigma=1.0))
    (other / "config.json").write_text(config.to_json(blurred))
    assert prediction._fingerprint(other) != prediction._fingerprint(run)


def test_axis_and_limit_reach_the_files(run, tmp_path):
    volume = NIFTI / "anatomical.nii"
    assert predict(run, tmp_path / "out", volume, "--axis", "0", "--no-heatmaps") == 0
    assert len(table(tmp_path / "out")) == 33
    assert predict(run, tmp_path / "few", DICOM / "CT_small.dcm", "--max-megapixels", "0.016") == 3
    assert "128×128 pixels, more than the 16000 allowed" in lines(tmp_path / "few" / "failures.jsonl")[0]["error"]


def test_a_score_that_is_no_number_is_not_put_on_record(run, scans, tmp_path, monkeypatch):
    maps = np.zeros((1, 48, 48), np.float32)
    monkeypatch.setattr(Detector, "__call__", lambda *_: Prediction(np.array([np.nan]), maps))
    message = predict(run, tmp_path / "out", scans / "a" / "same.png")
    assert "scores are not finite, such as of " in message and "same.png" in message
    assert lines(tmp_path / "out" / "scores.jsonl") == []


def test_the_same_command_adds_nothing_and_other_settings_are_refused(run, scans, predicted, capfd):
    _, out = predicted
    before = (out / "scores.jsonl").read_bytes()
    assert predict(run, out, scans, "--dicom", "secondary-capture", "--batch-size", "3", "--workers", "1") == 3
    assert (out / "scores.jsonl").read_bytes() == before
    assert "6 of 8 files are done already" in capfd.readouterr().err.replace("\n", " ")
    message = predict(run, out, scans, "--window", "40", "400")
    assert f"{out} holds results of other settings (window was None, now [40.0, 400.0], dicom was" in message
    shutil.copytree(run, out.parent / "other")
    calibration.fit([0.1] * 12, [0] * 12).save(out.parent / "other")
    message = predict(out.parent / "other", out, scans, "--dicom", "secondary-capture")
    assert "other settings (other calibration)" in message


def test_files_of_others_are_not_overwritten(run, scans, tmp_path):
    ours = shutil.copytree(run, tmp_path / "run")
    before = (ours / "scores.csv").read_bytes()
    assert "holds scores.csv and no settings.json" in predict(run, ours, scans / "a")
    assert (ours / "scores.csv").read_bytes() == before
    key = tmp_path / "key.csv"
    more = ["--redact", "--no-heatmaps", "--redact-key", key]
    predict(run, tmp_path / "one", scans / "b", *more)
    before = key.read_bytes()
    assert "is there already and lists other files" in predict(run, tmp_path / "two", scans / "a", *more)
    assert key.read_bytes() == before
    assert predict(run, tmp_path / "one", scans / "b", *more) == 3  # the same list may be written again


def test_files_are_told_apart_by_where_they_lie(run, tmp_path, monkeypatch):
    out, more = tmp_path / "out", ("--no-heatmaps",)
    for i, folder in enumerate(("one", "other")):
        (tmp_path / folder).mkdir()
        Image.fromarray(noise(np.random.default_rng(i), False)).save(tmp_path / folder / "a.png")
        monkeypatch.chdir(tmp_path / folder)
        assert predict(run, out, "a.png", *more) == 0
    first, second = table(out)
    assert first["file"] == second["file"] == "a.png" and first["score"] != second["score"]
    path = tmp_path / "other" / "a.png"
    Image.fromarray(noise(np.random.default_rng(9), True)).save(path)
    assert predict(run, out, path, *more) == 0  # by another name, and changed
    changed, kept = table(out)
    assert changed["file"] == str(path) and changed["score"] not in (first["score"], second["score"])
    assert kept in (first, second) and len(lines(out / "scores.jsonl")) == 2


def test_one_command_at_a_time_has_a_folder_and_damage_is_named(run, scans, tmp_path):
    out, image = tmp_path / "out", scans / "a" / "same.png"
    out.mkdir()
    with alone_in(out, "wait"):
        assert "another command is at work in" in predict(run, out, image, "--no-heatmaps")
    assert predict(run, out, image, "--no-heatmaps") == 0
    (out / "scores.jsonl").write_text('{"key": "same"}\n')
    assert "scores.jsonl, line 1, is damaged (it has no file)" in predict(run, out, image, "--no-heatmaps")
    (out / "settings.json").write_text("[")
    assert "settings.json is damaged" in predict(run, out, image, "--no-heatmaps")


def test_a_folder_that_cannot_be_searched_is_named(scans, monkeypatch):
    real = os.scandir

    def scandir(path):
        if Path(path).name == "b":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(OSError, match=r"b cannot be searched: Permission denied; "):
        find([str(scans)], Path("out"))
    with pytest.raises(OSError, match=r"^a folder of PATH number 1 cannot be searched"):
        find([str(scans)], Path("out"), redact=True)


def test_strict_stops_at_the_first_bad_file(run, scans, tmp_path):
    message = predict(run, tmp_path / "out", scans / "b", "--strict", "--no-heatmaps")
    assert "functional.nii has 17 × 21 × 3 × 20 voxels" in message
    kept = {Path(line["file"]).name for line in lines(tmp_path / "out" / "scores.jsonl")}
    assert kept >= {"SC_rgb_rle_2frame.dcm"}  # what was done before is kept
    assert not (tmp_path / "out" / "heatmaps").exists()


def test_redacted_runs_name_nothing(run, scans, tmp_path, capfd):
    out = tmp_path / "out"
    more = ["--redact", "--redact-key", tmp_path / "key.csv", "--dicom", "secondary-capture"]
    assert predict(run, out, scans / "b", *more) == 3
    told = capfd.readouterr()
    names = [path.stem for path in (scans / "b").rglob("*.*")] + ["scans", "1CT1", "CompressedSamples"]
    written = [path.read_bytes().decode("latin1") for path in out.rglob("*") if path.is_file()]
    written += [str(path.relative_to(out)) for path in out.rglob("*")]
    for name in names:
        assert not [text for text in [told.out, told.err, *written] if name in text], name
    assert "skipped: file-0000" in told.err
    key = dict(csv.reader((tmp_path / "key.csv").read_text().splitlines()))
    assert key["file-00001"].endswith("SC_rgb_rle_2frame.dcm")
    assert {row["file"] for row in table(out)} < set(key)
    assert pydicom.dcmread(out / "dicom" / "file-00001-00000.dcm").PatientName == ""
    # A number stands for a place in the list, so another list may not go on with it.
    assert "other settings (other files)" in predict(run, out, scans / "b", scans / "a", *more)
    assert "PATH number 2 is not there" in predict(run, out, scans / "b", scans / "none.png", *more)


def test_prevalence_and_a_missing_calibration(run, scans, tmp_path, capfd):
    image = scans / "a" / "same.png"
    assert predict(run, tmp_path / "rare", image, "--prevalence", "0.01") == 0
    (row,) = table(tmp_path / "rare")
    expected = calibration.load(run).probability(np.array([float(row["score"])]), 0.01)[0]
    assert float(row["probability"]) == pytest.approx(expected, abs=1e-4)
    bare = tmp_path / "bare"
    shutil.copytree(run, bare)
    (bare / "calibration.json").unlink()
    assert predict(bare, tmp_path / "out", image) == 0
    assert "has no calibration: no probability, no decision" in capfd.readouterr().err.replace("\n", " ")
    (row,) = table(tmp_path / "out")
    assert (row["probability"], row["decision"]) == ("", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.png"], "none.png is not there, and no file matches it"),
        (["none/*.png"], r"none/\*.png is not there, and no file matches it"),
        (["empty"], "empty holds no scans"),
        ([], "nothing to predict"),
        (["a.png", "--batch-size", "0"], "--batch-size is 0"),
        (["a.png", "--max-megapixels", "inf"], "--max-megapixels is inf"),
        (["a.png", "--prevalence", "1"], "--prevalence is 1"),
        (["a.png", "--window", "40", "0"], "--window is 40 0"),
        (["a.png", "--redact-key", "k.csv"], "--redact-key is for runs with --redact"),
        (["a.png", "--run", "empty"], "--run empty is no run directory"),
        (["a.png", "--out", "a.png"], "File exists"),
    ],
)
def test_what_cannot_work_is_said_before_work(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    Image.new("L", (20, 20)).save("a.png")
    with pytest.raises(SystemExit, match=message):
        predict_script.main(["--run", str(run), "--out", "out", *arguments])
    assert not (tmp_path / "out").exists()


def test_finding_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b/2.png", "b/10.png", "a/x.nii.gz", "a/x.gz", "a/[odd] name.jpg", "a/c.txt", "out/heatmaps/z.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"x")
    Path("a/loop").symlink_to(tmp_path)
    out = Path("out")
    everything = ["a/[odd] name.jpg", "a/x.nii.gz", "b/10.png", "b/2.png"]
    assert [str(path) for path in find(["."], out)] == everything
    assert [str(path) for path in find(["b/2.png", "b", "./b/../b/2.png"], out)] == ["b/2.png", "b/10.png"]
    assert [str(path) for path in find(["**/*.png"], out)] == ["b/10.png", "b/2.png"]
    assert [str(path) for path in find(["a/[odd] name.jpg", "a/c.txt"], out)] == ["a/[odd] name.jpg", "a/c.txt"]
    monkeypatch.chdir("a")
    assert [str(path) for path in find(["../b/*.png"], out)] == ["../b/10.png", "../b/2.png"]
    monkeypatch.chdir("..")
    Path(".hidden/deep").mkdir(parents=True)
    Path(".hidden/deep/3.png").write_bytes(b"x")
    assert [str(path) for path in find([".hidden/**/*.png"], out)] == [".hidden/deep/3.png"]
    keys = [item.key for item in itemise([Path("a/[odd] name.jpg"), Path("b/2.png"), Path("b/10.png")], False)]
    assert keys[0].startswith("_odd__name-")
    os.utime("b/2.png", ns=(1, 1))  # another file by the same name
    assert itemise([Path("b/2.png")], False)[0].key != keys[1]


def test_masks_of_a_data_set_are_no_scans(tmp_path):
    named = ["good/img/1.png", "Ungood/img/2.png", "Ungood/label/2.png", "Ungood/anomaly_mask/2.png", "own/label/3.png"]
    for name in named:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = [str(path.relative_to(tmp_path)) for path in find([str(tmp_path)], tmp_path / "out")]
    assert found == ["Ungood/img/2.png", "good/img/1.png", "own/label/3.png"]
    assert len(find([str(tmp_path / "Ungood/anomaly_mask")], tmp_path / "out")) == 1  # it was asked for


def made_ledger(out, names, **settings):
    """The ledger of files by these names, which are there."""
    for name in names:
        Path(name).open("ab").close()
    return Ledger(out, {"redact": False, **settings}, itemise([Path(name) for name in names], False))


def test_no_name_of_a_file_is_a_formula_in_the_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["=1+1.png", "+1.png", "-1.png", "@1.png", "plain.png"]
    with made_ledger(Path("out"), names) as ledger:
        for item in ledger.items:
            ledger.add(item, [ledger.record(item, 0, 1, 0.5)])
        ledger.write_table()
    shown = [row["file"] for row in table(Path("out"))]
    assert shown == [*(f"./{name}" for name in names[:-1]), "plain.png"]


def test_a_file_cut_short_in_the_record_is_done_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with made_ledger(Path("out"), ["a.tif", "b.png"]) as ledger:
        first, second = ledger.items
        ledger.add(first, [ledger.record(first, i, 3, 0.5) for i in range(2)])  # of three frames
        ledger.add(second, [ledger.record(second, 0, 1, 0.5)])
    with made_ledger(Path("out"), ["a.tif", "b.png"]) as ledger:
        assert ledger.done == {second.key}
        assert {line["key"] for line in lines(Path("out") / "scores.jsonl")} == {second.key}


def test_a_record_that_a_full_disk_cut_short_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with made_ledger(Path("out"), ["a.png"]) as ledger:
        (item,) = ledger.items

        class Full:
            name = "scores.jsonl"
            write = staticmethod(lambda text: len(text) - 1)

        monkeypatch.setattr(ledger, "_scores", Full())
        with pytest.raises(OSError, match=r"No space left on device: 'scores\.jsonl'"):
            ledger.add(item, [ledger.record(item, 0, 1, 0.5)])
        assert not ledger.done


# ---------------------------------------------------------------------------- killed


def test_a_thousand_images_killed_and_resumed_are_each_there_once(run, tmp_path):
    draw = np.random.default_rng(2)
    (tmp_path / "in").mkdir()
    for i in range(990):
        Image.fromarray(draw.integers(0, 256, (24, 24), np.uint8)).save(tmp_path / "in" / f"{i:04d}.png")
    pages = [Image.fromarray(draw.integers(0, 256, (24, 24), np.uint8)) for _ in range(10)]
    pages[0].save(tmp_path / "in" / "0500b.tif", save_all=True, append_images=pages[1:])
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "predict.py"), str(tmp_path / "in"), "--run", str(run), "--out", str(out)]
    log, kills = tmp_path / "log", 0
    for least in (30, 400):
        with log.open("ab") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "PYTHONPATH": str(ROOT)})
        end = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < end:
            if (out / "scores.jsonl").exists() and (out / "scores.jsonl").read_bytes().count(b"\n") >= least:
                break
            time.sleep(0.005)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert kills == 2, log.read_text()
    assert 400 <= (out / "scores.jsonl").read_bytes().count(b"\n") < 1000
    assert not (out / "scores.csv").exists()
    with (out / "scores.jsonl").open("ab") as file:  # as if the kill had come in the middle of a write
        file.write(b'{"file": "half a li')
    assert predict(run, out, tmp_path / "in") == 0
    rows = table(out)
    expected = sorted([(f"{i:04d}.png", 0) for i in range(990)] + [("0500b.tif", i) for i in range(10)])
    assert [(Path(row["file"]).name, int(row["frame"])) for row in rows] == expected
    assert len(lines(out / "scores.jsonl")) == 1000
    assert len(list((out / "heatmaps").iterdir())) == 1000
    whole = predict(run, tmp_path / "whole", tmp_path / "in", "--no-heatmaps")
    assert whole == 0
    for one, other in zip(rows, table(tmp_path / "whole"), strict=True):
        assert one["file"] == other["file"]
        assert float(one["score"]) == pytest.approx(float(other["score"]), abs=2e-6)


def test_a_damaged_record_is_named(run, scans, tmp_path):
    image = scans / "a" / "same.png"
    assert predict(run, tmp_path, image) == 0
    (tmp_path / "scores.jsonl").write_text("{}\n")
    assert "scores.jsonl, line 1, is damaged" in predict(run, tmp_path, image)


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit):
        predict_script.main(["--help"])
    shown = capsys.readouterr().out
    for name in Options.__dataclass_fields__:
        flag = "PATH" if name == "paths" else "--no-heatmaps" if name == "heatmaps" else "--" + name.replace("_", "-")
        assert flag in shown

"""The exported folder: equal to the Detector in a process that has jax and nothing else, and honest about itself."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import jax
import numpy as np
import pytest
from PIL import Image

import iqe_jax
from iqe_jax import calibration, export, report
from iqe_jax.config import Config, DataConfig, ModelConfig
from iqe_jax.data.phantoms import MARK
from iqe_jax.data.transforms import load_image
from iqe_jax.detector import Detector
from iqe_jax.weights import save_adapter
from tests.runs import LAST, write_run

IMAGES = np.random.default_rng(0).random((5, 40, 40, 3), np.float32)


@pytest.fixture(scope="module")
def run(tmp_path_factory, golden_settings, golden_model):
    return write_run(tmp_path_factory.mktemp("run") / "golden", golden_settings, golden_model[2], LAST)


@pytest.fixture(scope="module")
def model(run):
    out = run.parent / "model"
    export.main([str(run), "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def only_jax(tmp_path_factory):
    """A folder of packages that holds jax and what it requires, and nothing else that is installed here."""
    import importlib.util

    folder = tmp_path_factory.mktemp("packages")
    for name in ("jax", "jaxlib", "numpy", "ml_dtypes", "opt_einsum", "scipy"):
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        source = Path(spec.origin).parent
        for part in (source, source.with_name(f"{name}.libs")):
            if part.exists():
                (folder / part.name).symlink_to(part)
    return folder


ALONE = """
import sys
sys.path += [{packages!r}, {model!r}]
import numpy as np
from loader import load

predict = load()
images = np.load({images!r})
score, anomaly_map = predict(images)
np.savez({out!r}, score=score, map=anomaly_map)
for bad, word in (
    *((images[0], "shape"), (images * 255, "values"), (images[:0], "shape"), (images * np.nan, "values")),
    (images - 0.5, "values"),
):
    try:
        predict(bad)
    except ValueError as error:
        assert word in str(error), error
    else:
        raise AssertionError(word)
for name in ("flax", "iqe_jax", "safetensors", "PIL", "jaxtyping"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(name)
"""


def test_with_jax_alone_it_gives_what_the_detector_gives(run, model, only_jax, tmp_path):
    np.save(tmp_path / "images.npy", IMAGES)
    paths = {"packages": only_jax, "model": model, "images": tmp_path / "images.npy", "out": tmp_path / "found.npz"}
    code = ALONE.format(**{name: str(path) for name, path in paths.items()})
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path, env={"PATH": ""}
    )
    assert done.returncode == 0, done.stderr
    found, expected = np.load(tmp_path / "found.npz"), iqe_jax.load(run)(IMAGES)
    np.testing.assert_allclose(found["score"], expected.score, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found["map"], expected.anomaly_map, rtol=0, atol=1e-5)
    assert np.ptp(expected.score) > 1e-3  # else equality would say little


def test_the_program_is_for_all_platforms_and_holds_no_weights(model):
    program = jax.export.deserialize(bytearray((model / "program.jax_export").read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert not program.disabled_safety_checks
    assert str(program.in_avals[-1].shape) == "(batch, 40, 40, 3)"
    text = program.mlir_module()
    # Full float32 products wherever it is run, and no call of a library that only one platform has.
    assert "HIGHEST" in text and "DEFAULT" not in text
    assert {part.split("(")[0] for part in text.split("custom_call @")[1:]} <= {"shape_assertion"}
    about = json.loads((model / "model.json").read_text())
    assert (
        about["files"]["program.jax_export"]["bytes"]
        < 4 * about["parameters"]
        < 1.1 * sum(file["bytes"] for file in about["files"].values())
    )


def test_only_the_words_of_the_templates_come_along(model, golden_model):
    from safetensors.numpy import load_file

    weights = load_file(model / "weights.safetensors")
    words = {word for ids in golden_model[0].templates.ids for word in ids}
    assert len(weights["frozen/text/token_embedding"]) == len(words)
    assert not any(name.startswith("/") or ".." in name for name in weights)


def test_it_says_what_it_is(model, tmp_path, monkeypatch):
    import hashlib

    about = json.loads((model / "model.json").read_text())
    assert about["image_size"] == 40
    assert about["score"]["definition"].endswith("in [0, 2]")
    assert about["weights"] == {
        "rule": "last",
        "step": 7,
        "chosen": "weights of the last step",
        "chosen_on_test_data": False,
    }
    for name, file in about["files"].items():
        assert hashlib.sha256((model / name).read_bytes()).hexdigest() == file["sha256"]
    card = (model / "README.md").read_text()
    assert "(batch, 40, 40, 3)" in card and "Not a medical device" in card and "test set" not in card
    monkeypatch.chdir(tmp_path)
    for bits in (np.uint8, np.uint16):
        pixels = np.random.default_rng(0).integers(0, np.iinfo(bits).max + 1, (57, 33), bits)
        Image.fromarray(pixels).save("scan.png")
        read: dict[str, np.ndarray] = {}
        exec(card.split("```python\n")[2].partition("```")[0], read)
        np.testing.assert_array_equal(read["images"][0], load_image(Path("scan.png"), 40))
    # Neither names of images, which may be patients', nor paths of this machine.
    everything = "".join(path.read_text() for path in (model / "model.json", model / "README.md"))
    assert "miller" not in everything and str(model.parent) not in everything


def test_weights_chosen_on_test_data_are_marked(tmp_path, golden_settings, golden_model, capsys, monkeypatch):
    monkeypatch.setattr(export, "_verify", lambda *_: None)  # takes seconds, and `model` has been through it
    kept = {"rule": "paper", "step": 3, "metrics": {"image_auroc": 0.9}, "finished_at": 7}
    settings = {**golden_settings, "score": "top"}
    run = write_run(tmp_path / "run", settings, golden_model[2], kept, DataConfig(shots=0))
    export.main([str(run), "--out", str(tmp_path / "model")])
    about = json.loads((tmp_path / "model" / "model.json").read_text())
    assert about["weights"]["chosen_on_test_data"]
    assert about["weights"]["metrics"] == {"image_auroc": 0.9}
    assert about["score"]["kind"] == "top"
    assert about["trained_on"] == ["liver", "resc", "oct17", "chest", "his"]
    assert "chosen on the test set" in (tmp_path / "model" / "README.md").read_text()
    assert "TEST SET" in capsys.readouterr().err


def test_the_mark_of_test_data_comes_from_the_weights_too(tmp_path, golden_settings, golden_model):
    # Training that began with marked weights, and a run that only scored such weights, have seen the test data as well.
    kept = {"rule": "last", "step": 3, "finished_at": 3}
    run = write_run(tmp_path / "run", golden_settings, golden_model[2], kept)
    assert not export.chosen(run, Config())["chosen_on_test_data"]
    (run / "kept.json").write_text(json.dumps({**kept, "chosen_on_test_data": True}))
    begun = export.chosen(run, Config())
    assert begun["chosen_on_test_data"] and "TEST SET" in begun["chosen"]

    (run / "kept.json").unlink()
    for chosen_on in (None, "brain"):
        path = tmp_path / f"{chosen_on}.safetensors"
        save_adapter(golden_model[2], path, chosen_on=chosen_on)
        given = export.chosen(run, Config(model=ModelConfig(adapter=str(path))))
        assert given["chosen_on_test_data"] == (chosen_on is not None) == ("TEST SET" in given["chosen"])


def test_phantoms_and_the_range_of_a_zero_shot_score_are_told(golden_model, tmp_path):
    weights = {"chosen": "c", "chosen_on_test_data": False}
    detector = Detector(*golden_model, zero_shot=True)
    recipe = Config(data=DataConfig(root=tmp_path, shots=0))
    about = export.describe(recipe, detector, weights, None)
    assert about["note"] is None and about["score"]["definition"].endswith("in [0, 8]")  # four levels, two branches
    (tmp_path / MARK).touch()
    about = export.describe(recipe, detector, weights, None)
    assert about["note"] == report.PHANTOMS
    assert report.PHANTOMS in export.model_card({**about, "parameters": 1})


def test_every_kind_of_score_is_defined(golden_model):
    model = golden_model[0]
    for kind in get_args(get_type_hints(ModelConfig)["score"]):
        one = dataclasses.replace(model, config=dataclasses.replace(model.config, score=kind))
        weights = {"chosen": "c", "chosen_on_test_data": False}
        about = export.describe(Config(), Detector(one, *golden_model[1:], zero_shot=False), weights, None)
        assert "in [0, " in about["score"]["definition"]


@pytest.mark.parametrize("images", [4, 30, 600])
def test_a_calibration_comes_along(golden_model, images):
    draw = np.random.default_rng(0)
    scores, labels = np.r_[draw.normal(0.3, 0.1, images), draw.normal(0.5, 0.1, images)], np.repeat([0, 1], images)
    fitted = calibration.fit(scores, labels)
    detector = Detector(*golden_model, zero_shot=False)
    about = export.describe(Config(), detector, {"chosen": "c", "chosen_on_test_data": False}, fitted)
    about = json.loads(json.dumps({**about, "parameters": 1}))
    rule, card = about["calibration"], export.model_card(about)
    assert "scores" not in rule and "labels" not in rule
    assert rule["threshold"] == fitted.threshold
    if images == 4:
        assert "no probability" in card and "no decision" in card
    else:
        assert f"score ≥ {fitted.threshold:.6g}" in card
        curve = rule["curve"]
        if images == 30:
            assert f"{curve['slope']:.6g} · score" in card
            again = 1 / (1 + np.exp(-(curve["slope"] * scores + curve["intercept"])))
        else:
            assert "linear interpolation" in card
            again = np.interp(scores, curve["x"], curve["y"])
        np.testing.assert_allclose(again, fitted.probability(scores), atol=1e-12)


def stopped(run: Path, out: Path) -> str:
    with pytest.raises(SystemExit) as stop:
        export.main([str(run), "--out", str(out)])
    return str(stop.value)


def test_a_folder_of_other_things_is_left_alone(run, tmp_path):
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "a.png").touch()
    assert "holds files that are no export" in stopped(run, tmp_path / "scans")
    (tmp_path / "scans" / "model.json").write_text("[]")
    assert "holds files that are no export" in stopped(run, tmp_path / "scans")
    assert "is a file" in stopped(run, tmp_path / "scans" / "a.png")
    assert {path.name for path in (tmp_path / "scans").iterdir()} == {"a.png", "model.json"}


def test_what_a_run_needs(run, tmp_path, golden_settings, golden_model):
    assert "is no run directory" in stopped(tmp_path, tmp_path / "model")
    unfinished = write_run(tmp_path / "run", golden_settings, golden_model[2], {"rule": "valid", "step": 3})
    assert "has not come to its end" in stopped(unfinished, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_an_earlier_export_is_replaced_whole_or_not_at_all(run, model, monkeypatch):
    (model / "left over").touch()
    before = (model / "model.json").read_text()

    def differs(*_):
        raise ValueError("the exported program differs")

    with monkeypatch.context() as patch:
        patch.setattr(export, "_verify", differs)
        assert "differs" in stopped(run, model)
    assert (model / "model.json").read_text() == before and (model / "left over").exists()
    with monkeypatch.context() as patch:
        patch.setattr(export, "_verify", lambda *_: None)
        export.main([str(run), "--out", str(model)])
    assert not (model / "left over").exists()
    assert {path.name for path in model.parent.iterdir()} == {"golden", "model"}  # nothing half-made stays


def test_a_program_that_differs_is_not_written(run, tmp_path, monkeypatch):
    monkeypatch.setitem(export.TOLERANCE, "float32", -1.0)
    assert "differs from the Detector" in stopped(run, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []

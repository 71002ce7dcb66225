"""What an evaluation writes, apart from the runs that test_training.py looks at: colours and undefined figures."""

import json

import numpy as np
from PIL import Image

from iqe_jax import config, report
from iqe_jax.data.bmad import Sample
from iqe_jax.data.phantoms import MARK
from iqe_jax.evaluator import Evaluation


def test_colours_are_on_a_fixed_scale():
    black = np.zeros((1, 5, 3), np.float32)
    shown = report.overlay(black, np.array([[0, 0.25, 0.5, 0.75, 1]], np.float32))
    assert shown.dtype == np.uint8
    np.testing.assert_array_equal(shown[0, 0], [0, 0, 40])
    np.testing.assert_array_equal(shown[0, -1], [110, 0, 0])
    np.testing.assert_array_equal(report.overlay(black, np.full((1, 5), 0.5, np.float32))[0, 3], shown[0, 2])


def test_phantoms_are_called_so_whatever_the_recipe(tmp_path, capsys):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    samples = [Sample(tmp_path / "a.png", None, label, "a.png") for label in (0, 1)]
    evaluation = Evaluation({"image_auroc": 0.9}, np.array([0.1, 0.5]), np.array([0.0, 1.0]), {})
    recipe = config.Config("brain_fewshot", data=config.DataConfig(root=tmp_path))
    for phantoms in (False, True):
        if phantoms:
            (tmp_path / MARK).touch()
        report.write(recipe, tmp_path, samples, evaluation, {"rule": "last", "step": 1})
        shown = " ".join(capsys.readouterr().out.split())
        data = json.loads((tmp_path / "metrics.json").read_text())["data"]
        assert ("says nothing about the real data set" in shown) == phantoms
        assert data == (report.PHANTOMS if phantoms else str(tmp_path))


def test_an_undefined_metric_is_null_and_said(tmp_path, capsys):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    sample = Sample(tmp_path / "a.png", None, 0, "good/a.png")
    evaluation = Evaluation({"image_auroc": float("nan")}, np.array([0.5]), np.array([0.0]), {0: np.zeros((8, 8))})
    recipe = config.Config("one", model=config.ModelConfig(image_size=8))
    report.write(recipe, tmp_path, [sample], evaluation, {"rule": "last", "step": 1})
    assert json.loads((tmp_path / "metrics.json").read_text())["metrics"] == {"image_auroc": None}
    assert "undefined (one class only)" in capsys.readouterr().out
    assert (tmp_path / "heatmaps" / "overview.png").exists()

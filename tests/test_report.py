"""What an evaluation writes, apart from the runs that test_training.py looks at: colours and undefined figures."""

import json

import numpy as np
from PIL import Image

from iqe_jax import config, report
from iqe_jax.data.bmad import Sample
from iqe_jax.data.phantoms import MARK
from iqe_jax.evaluator import Evaluation
from iqe_jax.metrics import bootstrap


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


def test_weights_by_three_rules_fit_in_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    names = ("image_auroc", "image_ap", "image_f1_max", "image_sensitivity_at_95_specificity")
    figures = dict.fromkeys(names, 0.1) | {"pixel_auroc": 0.2, "pixel_ap": None}
    intervals = {name: [0.25, 0.75] for name in names}
    summary = {
        **{"config": "brain_fewshot", "dataset": "brain", "protocol": "few-shot, k = 4", "seed": 0, "data": "data"},
        **{"image_score": "official", "images": {"normal": 2, "anomalous": 2}, "metrics": figures, "reductions": {}},
        "rules": {
            rule: {**figures, "intervals": intervals, "chosen": report.RULES[rule], "chosen_on_test_data": marked}
            for rule, marked in (("last", False), ("valid", False), ("paper", True))
        },
    }
    report.print_table(summary)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown
    words = " ".join(shown.replace("│", " ").replace("┃", " ").split())
    assert "last valid the TEST SET" in words
    assert "image AUROC 0.1000 0.1000 0.1000 [0.250, 0.750] [0.250, 0.750] [0.250, 0.750] " in words
    assert "at 95 % specificity [0.250, 0.750] [0.250, 0.750] [0.250, 0.750] " in words
    assert "pixel AP undefined undefined undefined (one class only) (one class only) (one class only) " in words


def test_each_choice_of_weights_has_the_intervals_of_its_own_scores(tmp_path):
    draw, labels = np.random.default_rng(0), np.repeat([0.0, 1.0], 8)
    samples = [Sample(tmp_path / f"{i}.png", None, int(label), f"{i}.png") for i, label in enumerate(labels)]
    last, valid = (Evaluation({"image_auroc": 0.5}, draw.random(16) + labels * by, labels, {}) for by in (0.1, 0.4))
    facts = [{"rule": "last", "step": 2}, {"rule": "valid", "step": 1}]
    others = {"valid": (valid, facts[1])}
    report.write(config.Config("two", data=config.DataConfig(root=tmp_path)), tmp_path, samples, last, facts[0], others)
    rules = json.loads((tmp_path / "metrics.json").read_text())["rules"]
    for name, evaluation in (("last", last), ("valid", valid)):
        expected = bootstrap(evaluation.scores, labels)
        assert None not in expected.values()
        assert {name: tuple(interval) for name, interval in rules[name]["intervals"].items()} == expected

"""Comparing runs: DeLong against a plain form and a bootstrap, Holm, pairing by name, marks, and what is refused."""

import csv
import json
import re

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from iqe_jax import compare
from iqe_jax.metrics import bootstrap_metrics, image_metrics
from iqe_jax.report import PHANTOMS, RULES

LABELS = np.array([0] * 40 + [1] * 30)


def draw_scores(seed, shift=1.0, runs=2):
    """Scores of several runs that agree in part, as runs on the same images do; with ties."""
    draw = np.random.default_rng(seed)
    shared = draw.normal(shift * LABELS, 1.0)
    return np.round(shared + draw.normal(0, 0.7, (runs, len(LABELS))), 1)


def write_run(folder, scores, labels=LABELS, *, names=None, rule="last", data="data", order=None, dataset="brain"):
    folder.mkdir(parents=True)
    names = names or [f"{'ungood' if label else 'good'}/{i:03d}.png" for i, label in enumerate(labels)]
    with (folder / "scores.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "label", "score"])
        rows.writerows((names[i], labels[i], scores[i]) for i in (range(len(names)) if order is None else order))
    about = {"config": "c", "dataset": dataset, "protocol": "few-shot, k = 4", "seed": 0, "data": data}
    (folder / "metrics.json").write_text(json.dumps({**about, "weights": {"rule": rule, "chosen": RULES[rule]}}))
    return folder


@pytest.fixture
def runs(tmp_path):
    scores = draw_scores(0, runs=3)
    return [write_run(tmp_path / name, row) for name, row in zip("abc", scores, strict=True)]


def plain_delong(scores, labels):
    """The definition: all pairs, O(n²)."""
    anomalous, normal = scores[:, labels == 1], scores[:, labels == 0]
    wins = (anomalous[:, :, None] > normal[:, None]) + 0.5 * (anomalous[:, :, None] == normal[:, None])
    auroc = wins.mean((1, 2))
    covariance = np.zeros((len(scores), len(scores)))
    for r in range(len(scores)):
        for s in range(len(scores)):
            for axis in (2, 1):  # over the normal ones for each anomalous image, and the other way round
                a, b = wins[r].mean(axis - 1) - auroc[r], wins[s].mean(axis - 1) - auroc[s]
                covariance[r, s] += (a * b).sum() / (len(a) - 1) / len(a)
    return auroc, covariance


@pytest.mark.parametrize("seed", range(3))
def test_delong_is_its_definition(seed):
    scores = draw_scores(seed, runs=3)
    auroc, covariance = compare.delong(scores, LABELS)
    expected_auroc, expected = plain_delong(scores, LABELS)
    np.testing.assert_allclose(auroc, expected_auroc, atol=1e-12)
    np.testing.assert_allclose(covariance, expected, atol=1e-12)
    np.testing.assert_allclose(auroc, [roc_auc_score(LABELS, row) for row in scores], atol=1e-12)


def test_delong_and_bootstrap_agree():
    scores = draw_scores(1)
    _, covariance = compare.delong(scores, LABELS)
    drawn = np.stack([bootstrap_metrics(row, LABELS, 400, 0)[0] for row in scores])
    spread = np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    assert (drawn[1] - drawn[0]).std() == pytest.approx(spread, rel=0.15)
    assert np.cov(drawn)[0, 1] > 0  # the same images for both runs


def test_p_values_are_even_where_nothing_differs():
    """Of runs that are equally good, 5 % differ at p < 0.05."""
    p_values = []
    for seed in range(400):
        auroc, covariance = compare.delong(draw_scores(seed), LABELS)
        p_values.append(compare._delong_test(auroc, covariance, 1)[1])
    assert 0.02 < np.mean(np.array(p_values) < 0.05) < 0.09
    assert 0.4 < np.mean(p_values) < 0.6


def test_holm():
    assert compare.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert compare.holm([0.6, 0.5]) == [1.0, 1.0]
    assert compare.holm([]) == []


@pytest.mark.parametrize("metric", ["image_auroc", "image_ap", "image_f1_max"])
def test_what_a_comparison_says(runs, metric):
    found = compare.compare(runs, metric, resamples=300)
    scores = draw_scores(0, runs=3)
    for own, row in zip(found, scores, strict=True):
        assert own.value == pytest.approx(image_metrics(row, LABELS)[metric])
        assert 0 <= own.interval[0] < own.value < own.interval[1] <= 1
    assert (found[0].difference, found[0].difference_interval, found[0].p, found[0].p_holm) == (None,) * 4
    for own in found[1:]:
        assert own.difference == pytest.approx(own.value - found[0].value)
        assert own.difference_interval[0] < own.difference < own.difference_interval[1]
        assert (own.p < 0.05) == (not own.difference_interval[0] < 0 < own.difference_interval[1])
        assert own.p_holm >= own.p
    there, back = found[1], compare.compare([runs[1], runs[0]], metric, resamples=300)[1]
    assert back.difference == pytest.approx(-there.difference)
    np.testing.assert_allclose(back.difference_interval, -np.array(there.difference_interval)[::-1], atol=1e-12)
    assert compare.compare(runs, metric, resamples=300) == found
    assert (compare.compare(runs, metric, resamples=300, seed=1) == found) == (metric == "image_auroc")


@pytest.mark.parametrize("metric", ["image_auroc", "image_ap"])
def test_a_clear_difference_is_found_and_none_where_there_is_none(tmp_path, metric):
    scores = draw_scores(2)[0]
    good = write_run(tmp_path / "good", scores + 1.5 * LABELS)
    same = write_run(tmp_path / "same", scores, order=np.random.default_rng(0).permutation(len(scores)))
    first = write_run(tmp_path / "first", scores)
    better, equal = compare.compare([first, good, same], metric, resamples=300)[1:]
    assert better.difference > 0.05
    assert better.p < 0.01
    assert better.difference_interval[0] > 0
    assert (equal.difference, equal.difference_interval, equal.p) == (0.0, (0.0, 0.0), 1.0)


def test_runs_that_part_all_images_give_no_p(tmp_path):
    perfect = write_run(tmp_path / "perfect", LABELS * 1.0)
    empty = write_run(tmp_path / "empty", LABELS * 0.0)
    other = write_run(tmp_path / "other", draw_scores(0)[0])
    found = compare.compare([perfect, empty, other])
    assert (found[1].difference, found[1].p, found[1].p_holm) == (-0.5, None, None)
    assert found[2].p == found[2].p_holm


def test_a_run_chosen_on_test_data_is_never_shown_without_its_mark(tmp_path, capsys):
    scores = draw_scores(0, runs=3)
    rules = ("last", "paper", "valid")
    made = [write_run(tmp_path / rule, row, rule=rule, data=PHANTOMS) for rule, row in zip(rules, scores, strict=True)]
    out = tmp_path / "new" / "comparison.json"
    compare.main([*map(str, made), "--out", str(out)])
    shown = capsys.readouterr().out
    rows = re.findall(r"│ (\d) (.*?)[├└]", shown, re.S)
    assert [("chosen on" in row and "TEST SET" in row) for _, row in rows] == [False, True, False]
    assert "run 2: " in shown and "chosen on the TEST SET" in shown.partition("run 3: ")[0]
    assert "make a run look better" in shown
    assert PHANTOMS in " ".join(shown.split())
    written = json.loads(out.read_text())
    assert written["metric"] == "image_auroc"
    assert written["method"] == "delong"
    assert [run["chosen_on_test_data"] for run in written["runs"]] == [False, True, False]
    assert all(run["phantoms"] for run in written["runs"])
    assert written["runs"][1]["difference_interval"][0] < written["runs"][1]["difference"]


def test_two_runs_need_no_holm(runs, capsys):
    compare.main([str(runs[0]), str(runs[1])])
    assert "Holm" not in capsys.readouterr().out
    compare.main([*map(str, runs), "--metric", "image_ap", "--resamples", "100"])
    assert "Holm" in capsys.readouterr().out


def refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        compare.main([str(argument) for argument in arguments])
    capsys.readouterr()
    return str(stop.value)


def test_runs_on_other_images_are_refused(tmp_path, runs, capsys):
    names = [f"{'ungood' if label else 'good'}/{i:03d}.png" for i, label in enumerate(LABELS)]
    scores = draw_scores(0)[0]
    fewer = write_run(tmp_path / "fewer", scores[:-2], LABELS[:-2])
    said = refused([runs[0], fewer], capsys)
    assert "fewer and " in said
    assert "2 images that only the first has: ungood/068.png, ungood/069.png" in said
    renamed = write_run(tmp_path / "renamed", scores, names=[f"x{name}" for name in names])
    said = refused([runs[0], renamed], capsys)
    assert "70 images that only the first has: good/000.png" in said and "and 65 more" in said
    assert "70 images that the first has not: xgood/000.png" in said
    turned = np.where(np.arange(70) == 3, 1, LABELS)
    relabelled = write_run(tmp_path / "relabelled", scores, turned, names=names)
    assert "1 images of another label: good/003.png" in refused([runs[0], relabelled], capsys)


def test_runs_on_other_sets_are_refused_even_where_files_are_called_the_same(tmp_path, runs, capsys):
    chest = write_run(tmp_path / "chest", draw_scores(0)[0], dataset="chest")
    assert "chest was scored on chest and " in refused([runs[0], chest], capsys)


def test_other_bad_input_is_refused(tmp_path, runs, capsys):
    assert "give two runs or more" in refused([runs[0]], capsys)
    assert "give two runs or more" in refused([], capsys)
    assert "nowhere/scores.csv: evaluate.py writes it" in refused([runs[0], tmp_path / "nowhere"], capsys)
    assert "fewer than 100" in refused([*runs, "--resamples", "5"], capsys)
    single = [write_run(tmp_path / f"one{i}", np.ones(5), np.ones(5, int)) for i in range(2)]
    assert "of one class; Image AUROC is undefined" in refused(single, capsys)
    (runs[1] / "metrics.json").write_text("{}")
    assert "metrics.json is not what evaluate.py writes" in refused(runs[:2], capsys)
    (runs[1] / "metrics.json").unlink()
    assert "how the weights of that run were chosen" in refused(runs[:2], capsys)


def test_a_bootstrap_never_says_that_chance_is_impossible():
    assert compare._bootstrap_p(np.full(99, 0.1)) == compare._bootstrap_p(np.full(99, -0.1)) == 2 / 100
    assert compare._bootstrap_p(np.zeros(99)) == 1

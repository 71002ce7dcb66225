"""What scores mean: thresholds that do what was asked, probabilities that hold, refusals where too little is known."""

import json

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from iqe_jax import calibration


def pool(normal, anomalous, seed=0, apart=1.5):
    """Scores of two overlapping kinds, scaled and shifted so that nothing rests on their unit."""
    draw = np.random.default_rng(seed)
    scores = np.r_[draw.normal(0, 1, normal), draw.normal(apart, 1, anomalous)] * 0.01 + 3
    return scores, np.r_[np.zeros(normal), np.ones(anomalous)]


@pytest.mark.parametrize("target", [0.5, 0.8, 0.9, 0.95, 0.951, 1.0])
@pytest.mark.parametrize("name", ["sensitivity", "specificity"])
def test_the_threshold_just_meets_its_target(name, target):
    scores, labels = pool(37, 23)
    fitted = calibration.fit(scores, labels, **{name: target})
    called = fitted.decision(scores)
    shares = {"sensitivity": called[labels == 1].mean(), "specificity": 1 - called[labels == 0].mean()}
    of = {"sensitivity": 23, "specificity": 37}
    assert target <= shares[name] < target + 1 / of[name]
    for kind, share in shares.items():
        assert fitted.achieved[kind]["value"] == pytest.approx(share)
        assert fitted.achieved[kind]["low"] < share <= fitted.achieved[kind]["high"]
    # One score further the other way would miss the target, so the other share is as high as can be.
    if name == "specificity":
        further = scores >= scores[scores < fitted.threshold].max()
        assert 1 - further[labels == 0].mean() < target
    else:
        further = scores > scores[scores >= fitted.threshold].min()
        assert further[labels == 1].mean() < target


def test_the_default_target_is_a_specificity():
    assert calibration.fit(*pool(30, 30)).target == {"specificity": 0.95}


def test_intervals_are_clopper_and_pearsons():
    scores, labels = np.r_[np.arange(20.0), np.arange(15, 35.0)], np.r_[np.zeros(20), np.ones(20)]
    found = calibration.fit(scores, labels, specificity=0.95).achieved["specificity"]
    assert found["of"] == 20
    assert (found["low"], found["high"]) == pytest.approx((0.7513, 0.9987), abs=1e-4)  # of 19 in 20, from tables


def test_ties_do_not_break_the_target():
    scores, labels = np.r_[np.zeros(18), np.ones(2), np.ones(20)], np.r_[np.zeros(20), np.ones(20)]
    assert calibration.fit(scores, labels, specificity=0.9).achieved["specificity"]["value"] == 0.9
    assert calibration.fit(scores, labels, specificity=0.95).achieved["specificity"]["value"] == 1


def test_small_pools_get_platts_curve():
    scores, labels = pool(40, 20)
    fitted = calibration.fit(scores, labels)
    assert fitted.curve["method"] == "Platt"
    unit = (scores - scores.mean()) / scores.std()
    expected = LogisticRegression().fit(unit[:, None], labels).predict_proba(unit[:, None])[:, 1]
    np.testing.assert_allclose(fitted.probability(scores), expected, atol=1e-8)


def test_large_pools_get_an_isotonic_curve_that_holds():
    scores, labels = pool(1500, 1500)
    fitted = calibration.fit(scores, labels)
    assert fitted.curve["method"] == "isotonic"
    fresh, truth = pool(20000, 20000, seed=1)
    predicted = fitted.probability(fresh)
    assert (np.diff(fitted.probability(np.sort(fresh))) >= 0).all()
    for low in np.arange(0, 1, 0.2):
        inside = (predicted >= low) & (predicted < low + 0.2)
        assert truth[inside].mean() == pytest.approx(predicted[inside].mean(), abs=0.06)
    assert fitted.reliability["ece"] < 0.06


def test_reliability_is_of_images_that_were_not_fitted():
    """On scores that tell nothing, an honest Brier score is no better than the prevalence alone."""
    scores, labels = pool(700, 700, apart=0.02, seed=4)
    assert roc_auc_score(labels, scores) > 0.5
    reliability = calibration.fit(scores, labels).reliability
    assert reliability["brier"] > reliability["brier_of_prevalence"] == pytest.approx(0.25)
    assert sum(b["images"] for b in reliability["bins"]) == 1400


def test_another_prevalence_follows_bayes():
    scores, labels = pool(60, 20)
    fitted = calibration.fit(scores, labels)
    assert fitted.prevalence == 0.25
    plain, rare = fitted.probability(scores), fitted.probability(scores, prevalence=0.02)
    np.testing.assert_allclose(rare / (1 - rare), plain / (1 - plain) * (0.02 / 0.98) / (0.25 / 0.75))
    np.testing.assert_allclose(fitted.probability(scores, prevalence=0.25), plain)
    with pytest.raises(ValueError, match="prevalence is 1"):
        fitted.probability(scores, prevalence=1)


@pytest.mark.parametrize(
    ("normal", "anomalous", "target", "decides", "says"),
    [
        (9, 30, "specificity", False, "it takes 10 normal images to choose a threshold, there are 9"),
        (9, 30, "sensitivity", True, "there are 9 and 30"),
        (30, 9, "sensitivity", False, "it takes 10 anomalous images to choose a threshold, there are 9"),
        (30, 0, "specificity", True, "no probability: it takes 10 normal and 10 anomalous images, there are 30 and 0"),
        (0, 0, "specificity", False, "there are 0 and 0"),
    ],
)
def test_too_few_images_withhold_what_rests_on_them(tmp_path, normal, anomalous, target, decides, says):
    fitted = calibration.fit(*pool(normal, anomalous), **{target: 0.9})
    fitted.save(tmp_path)
    fitted = calibration.load(tmp_path)
    scores = np.array([2.9, 3.1])
    assert fitted.probability(scores) is None
    assert (fitted.decision(scores) is not None) == decides
    assert says in fitted.summary()


def test_scores_that_do_not_rise_with_anomaly_give_no_probability():
    scores, labels = pool(30, 30)
    fitted = calibration.fit(-scores, labels)
    assert fitted.probability(scores) is None
    assert "scores do not rise with anomaly" in fitted.summary()


def test_unusable_pools_are_refused():
    for scores, labels, how, message in (
        ([1.0], [0, 1], {}, "one of each per image"),
        ([np.nan], [0], {}, "not finite"),
        ([1.0], [2], {}, "neither 0 nor 1"),
        ([1.0], [0], {"sensitivity": 0.9, "specificity": 0.9}, "give one of them"),
        ([1.0], [0], {"sensitivity": 1.5}, "sensitivity is 1.5"),
        ([1.0], [0], {"specificity": 0}, "specificity is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            calibration.fit(scores, labels, **how)


def test_it_is_kept_with_the_run_as_plain_json(tmp_path, capsys):
    assert calibration.load(tmp_path) is None
    (tmp_path / "adapter.safetensors").write_bytes(b"weights")
    scores, labels = pool(60, 40)
    fitted = calibration.fit(scores, labels)
    fitted.save(tmp_path)
    kept = calibration.load(tmp_path)
    np.testing.assert_array_equal(kept.probability(scores), fitted.probability(scores))
    assert kept.threshold == fitted.threshold
    text = json.loads((tmp_path / "calibration.json").read_text())
    assert text["prevalence"] == 0.4
    assert not list(tmp_path.glob("*.tmp"))

    # Fitted again for another target, without the model.
    calibration.main(["--run", str(tmp_path), "--sensitivity", "0.9"])
    assert "sensitivity 0.9, there sensitivity 0.9" in capsys.readouterr().out
    again = calibration.load(tmp_path)
    assert again.target == {"sensitivity": 0.9}
    assert again.threshold < kept.threshold
    assert again.curve == kept.curve
    calibration.main(["--run", str(tmp_path), "--specificity", "0.8"])
    assert calibration.load(tmp_path).target == {"specificity": 0.8}


def test_other_weights_and_damage_are_said(tmp_path):
    (tmp_path / "adapter.safetensors").write_bytes(b"weights")
    calibration.fit(*pool(30, 30)).save(tmp_path)
    (tmp_path / "adapter.safetensors").write_bytes(b"other weights")
    with pytest.raises(ValueError, match=r"calibration\.json was made with other weights"):
        calibration.load(tmp_path)
    (tmp_path / "calibration.json").write_text('{"threshold": 1')
    with pytest.raises(ValueError, match=r"calibration\.json is damaged"):
        calibration.load(tmp_path)
    (tmp_path / "calibration.json").write_text('{"prevalence": 1}')
    with pytest.raises(ValueError, match=r"calibration\.json is damaged"):
        calibration.load(tmp_path)


def test_the_command_line_says_what_is_missing(tmp_path):
    with pytest.raises(SystemExit, match=r"has no calibration\.json: run evaluate\.py"):
        calibration.main(["--run", str(tmp_path)])


def test_what_a_threshold_does_on_other_images():
    fitted = calibration.fit(*pool(60, 60))
    scores = np.array([fitted.threshold, fitted.threshold + 1, fitted.threshold - 1, fitted.threshold + 1])
    found = fitted.on(scores, np.array([1, 1, 1, 0]))
    assert found is not None
    counts = {name: n for name, n in found.items() if name.endswith("tives")}
    assert counts == {"true_positives": 2, "false_positives": 1, "true_negatives": 0, "false_negatives": 1}
    assert [found[name]["of"] for name in ("sensitivity", "specificity", "precision")] == [3, 1, 3]
    assert found["sensitivity"]["value"] == pytest.approx(2 / 3) and found["precision"]["value"] == pytest.approx(2 / 3)
    assert found["specificity"]["value"] == 0
    none = fitted.on(np.array([fitted.threshold - 1]), np.array([0]))
    assert none is not None and none["sensitivity"] is none["precision"] is None and none["specificity"]["value"] == 1
    assert calibration.fit(*pool(3, 3)).on(scores, np.array([1, 1, 1, 0])) is None


def test_what_was_asked_of_a_threshold_is_remembered(tmp_path):
    assert calibration.target_of(tmp_path) == {}
    calibration.fit(*pool(60, 60), sensitivity=0.9).save(tmp_path)
    assert calibration.target_of(tmp_path) == {"sensitivity": 0.9}
    (tmp_path / calibration.FILE).write_text("{")
    assert calibration.target_of(tmp_path) == {}


def test_the_calibration_error_is_by_how_far_each_bin_is_off():
    """Bins that are off in both directions do not make up for one another."""
    draw = np.random.default_rng(0)
    scores, labels = np.repeat([0.0, 1.0, 2.0, 3.0], 50), np.repeat([0.0, 1.0, 0.0, 1.0], 50)
    reliability = calibration.fit(scores + 1e-3 * draw.random(200), labels).reliability
    off = [b["images"] * abs(b["probability"] - b["anomalous"]) for b in reliability["bins"]]
    assert reliability["ece"] == pytest.approx(sum(off) / 200)
    assert reliability["ece"] > 0.25

"""Image-level metrics against scikit-learn and by hand, bootstrap intervals, and the cases where there is none."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from iqe_jax.metrics import IMAGE_METRICS, _resampled, bootstrap, image_metrics, over_seeds, resampled_metrics


def drawn(seed, images=40, digits=1):
    draw = np.random.default_rng(seed)
    labels = np.arange(images) % 2
    return np.round(draw.random(images) + 0.3 * labels, digits), labels


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_has_no_curve_and_no_interval(label):
    scores, labels = np.arange(8.0), np.full(8, label)
    assert np.isnan(list(image_metrics(scores, labels).values())).all()
    assert set(bootstrap(scores, labels).values()) == {None}


@pytest.mark.parametrize("digits", [1, 9])
def test_figures_are_scikit_learns_and_those_of_every_threshold_tried(digits):
    scores, labels = drawn(2, digits=digits)
    found = image_metrics(scores, labels)
    assert tuple(found) == IMAGE_METRICS
    assert found["image_auroc"] == roc_auc_score(labels, scores)
    assert found["image_ap"] == average_precision_score(labels, scores)
    called = [scores >= threshold for threshold in (*np.unique(scores), np.inf)]
    assert found["image_f1_max"] == pytest.approx(max(f1_score(labels, c, zero_division=0) for c in called))
    allowed = [c[labels == 1].mean() for c in called if 1 - c[labels == 0].mean() >= 0.95]
    assert found["image_sensitivity_at_95_specificity"] == pytest.approx(max(allowed))


def test_one_false_alarm_in_twenty_is_allowed_at_95_percent_specificity():
    labels = np.repeat([0, 1], 20)
    scores = np.concatenate([np.linspace(0, 0.5, 20), np.linspace(0.49, 1, 20)])
    scores[0] = 0.8  # the one false alarm; a threshold below it is allowed, one below 0.5 is not
    found = image_metrics(scores, labels)["image_sensitivity_at_95_specificity"]
    assert found == (scores[20:] > 0.5).mean()


def test_equal_scores_say_nothing():
    labels = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1])
    found, intervals = image_metrics(np.full(14, 0.3), labels), bootstrap(np.full(14, 0.3), labels)
    share = 8 / 14
    expected = [0.5, share, 2 * share / (1 + share), 0.0]
    np.testing.assert_allclose(list(found.values()), expected)
    np.testing.assert_allclose(list(intervals.values()), [[value, value] for value in expected])


def test_a_resample_is_scored_as_scikit_learn_scores_it():
    scores, labels = drawn(3)
    distinct = -np.unique(-scores)
    (counts,) = _resampled(scores, labels, 7, seed=0)
    found = resampled_metrics(*counts)
    for i, (normal, anomalous) in enumerate(zip(*counts, strict=True)):
        assert normal.sum() == anomalous.sum() == 20  # stratified
        again = np.concatenate([np.repeat(distinct, normal), np.repeat(distinct, anomalous)])
        expected = image_metrics(again, np.repeat([0, 1], 20))
        np.testing.assert_allclose(found[:, i], list(expected.values()), atol=1e-12)


def test_intervals_are_repeatable_hold_the_figure_and_shrink_with_images():
    scores, labels = drawn(4, 200, 6)
    found, figures = bootstrap(scores, labels), image_metrics(scores, labels)
    assert found == bootstrap(scores, labels) != bootstrap(scores, labels, seed=1)
    assert all(low < figures[name] < high for name, (low, high) in found.items())
    many = bootstrap(*drawn(4, 5000, 6))
    assert all(many[n][1] - many[n][0] < 0.5 * (found[n][1] - found[n][0]) for n in found)
    # Hanley and McNeil's normal approximation of the same interval
    low, high = found["image_auroc"]
    a = figures["image_auroc"]
    q1, q2 = a / (2 - a), 2 * a**2 / (1 + a)
    error = np.sqrt((a * (1 - a) + 99 * (q1 - a**2) + 99 * (q2 - a**2)) / 100**2)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_too_few_images_get_figures_but_no_interval():
    scores, labels = np.arange(10.0), np.array([0] * 6 + [1] * 4)
    assert image_metrics(scores, labels)["image_auroc"] == 1
    assert set(bootstrap(scores, labels).values()) == {None}
    assert None not in bootstrap(scores, np.array([0, 1] * 5)).values()


def test_classes_that_scores_part_wholly_get_no_interval():
    labels = np.array([0] * 9 + [1] * 9)
    assert set(bootstrap(np.arange(18.0), labels).values()) == {None}
    assert None not in bootstrap(np.append(np.arange(17.0), 8.0), labels).values()  # a tie across the classes


def test_seeds_make_a_mean_with_students_interval():
    mean, (low, high) = over_seeds([0.7, 0.8, 0.9])
    assert mean == pytest.approx(0.8)
    half = 4.302653 * 0.1 / np.sqrt(3)
    assert (low, high) == (pytest.approx(0.8 - half), 1.0)  # cut where figures end
    assert over_seeds([0.1, 0.2, 0.3])[1] == (0.0, pytest.approx(0.2 + half))
    assert over_seeds([0.7]) == (0.7, None)
    mean, interval = over_seeds([0.7, float("nan")])
    assert np.isnan(mean)
    assert interval is None

"""Losses against PyTorch's own terms, and padding that weighs nothing."""

import numpy as np
import pytest
import torch

from iqe_jax import losses

DRAW = np.random.default_rng(0)
SCORES = DRAW.random((3, 4), np.float32)
LABELS = np.array([0, 1, 1, 0], np.float32)
MAPS = DRAW.random((3, 4, 8, 8), np.float32)
MASKS = DRAW.random((4, 8, 8), np.float32)
ALL = np.ones(4, np.float32)


def test_detection_takes_the_score_as_a_logit():
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    expected = sum(bce(torch.from_numpy(scores), torch.from_numpy(LABELS)) for scores in SCORES)
    assert float(losses.detection(SCORES, LABELS, ALL)) == pytest.approx(float(expected), abs=1e-6)


def test_focal_is_the_mean_over_pixels_for_each_level():
    p = np.where(MASKS > 0.5, MAPS, 1 - MAPS).astype(np.float64)
    expected = (-((1 - p) ** 2) * np.log(p)).mean((1, 2, 3)).sum()  # without the 1e-5 smoothing
    assert float(losses.focal(MAPS, MASKS, ALL)) == pytest.approx(expected, rel=1e-3)


def test_focal_smooths_the_masks_too():
    """SPEC section 5: the one-hot is clamped to [1e-5, 1 − 1e-5] before 1e-5 is added, which shows in a wrong map."""
    p = (1 - 1e-5) * 0 + 1e-5 * 1 + 1e-5
    wrong, mask = np.zeros((1, 1, 2, 2), np.float32), np.ones((1, 2, 2), np.float32)
    assert float(losses.focal(wrong, mask, np.ones(1))) == pytest.approx(-((1 - p) ** 2) * np.log(p), rel=1e-3)


def test_focal_is_finite_at_the_ends():
    assert np.isfinite(losses.focal(np.stack([MASKS > 0.5, MASKS < 0.5]).astype(np.float32), MASKS, ALL))


def test_dice_of_a_perfect_and_of_a_wrong_map():
    mask = np.zeros((1, 8, 8), np.float32)
    mask[0, :4] = 1
    assert float(losses.dice(mask[None], mask, np.ones(1))) == pytest.approx(0, abs=1e-6)
    assert float(losses.dice(1 - mask[None], mask, np.ones(1))) == pytest.approx(1 - 1 / 65, abs=1e-6)


def test_masks_are_binarised_above_one_half():
    for loss in (losses.focal, losses.dice):
        assert loss(MAPS, MASKS, ALL) == loss(MAPS, (MASKS > 0.5).astype(np.float32), ALL)
        assert loss(MAPS, np.full_like(MASKS, 0.5), ALL) == loss(MAPS, np.zeros_like(MASKS), ALL)


@pytest.mark.parametrize(
    ("loss", "values", "targets"),
    [(losses.detection, SCORES, LABELS), (losses.focal, MAPS, MASKS), (losses.dice, MAPS, MASKS)],
)
def test_padding_weighs_nothing(loss, values, targets):
    some = loss(values[:, :3], targets[:3], ALL[:3])
    padded = loss(values, targets, np.array([1, 1, 1, 0], np.float32))
    np.testing.assert_allclose(padded, some, rtol=1e-6)

"""Pixel metrics from counts against exact ones, their bounds, and the cases where there is no figure."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from iqe_jax import pixel_metrics
from iqe_jax.data.transforms import region_shares


def counted(values, masks, weight=None, batch=2):
    """The histogram of all images, in batches."""
    weight = np.ones(len(values), np.float32) if weight is None else weight
    regions = np.stack([region_shares(mask) for mask in masks])
    counts = pixel_metrics.start(values[:batch], weight[:batch], regions=True)
    for i in range(0, len(values), batch):
        part = slice(i, i + batch)
        counts = pixel_metrics.count(counts, values[part], masks[part], weight[part], regions[part])
    return pixel_metrics.histogram(counts)


def blobs(images=6, side=40, seed=0):
    """Masks of several round regions, one image in three without any, and noise that is higher inside them."""
    draw = np.random.default_rng(seed)
    masks = np.zeros((images, side, side), np.float32)
    y, x = np.mgrid[:side, :side]
    for i in range(images):
        for _ in range(0 if i % 3 == 0 else 3):
            cy, cx, radius = draw.integers(side), draw.integers(side), draw.integers(2, side // 4)
            masks[i][(y - cy) ** 2 + (x - cx) ** 2 <= radius**2] = 1
    noise = ndimage.gaussian_filter(draw.normal(size=masks.shape), (0, 1, 1))
    return masks, noise / noise.std() + 1.5 * masks


def exact_aupro(values, masks, limit=0.3):
    """AUPRO as its definition reads: every threshold, every region."""
    regions = []
    for value, mask in zip(values, masks, strict=True):
        labelled, number = ndimage.label(mask > 0.5, np.ones((3, 3)))
        regions += [np.sort(value[labelled == i]) for i in range(1, number + 1)]
    normal = np.sort(values[masks < 0.5])
    thresholds = np.unique(values)[::-1]
    rate = 1 - np.searchsorted(normal, thresholds) / len(normal)
    overlap = np.mean([1 - np.searchsorted(region, thresholds) / len(region) for region in regions], 0)
    rate, overlap = np.append(0, rate), np.append(0, overlap)
    grid = np.append(rate[rate <= limit], limit)
    shown = np.append(overlap[rate <= limit], np.interp(limit, rate, overlap))
    return np.trapezoid(shown, grid) / limit


def exact(values, masks):
    """Figures over all pixels by scikit-learn, and AUPRO."""
    labels, flat = masks.ravel() > 0.5, values.ravel()
    precision, recall, _ = precision_recall_curve(labels, flat)
    return {
        "pixel_auroc": roc_auc_score(labels, flat),
        "pixel_ap": average_precision_score(labels, flat),
        "pixel_f1_max": (2 * precision * recall / np.maximum(precision + recall, 1e-300)).max(),
        "pixel_aupro": exact_aupro(values, masks),
    }


def check(found, values, masks, tolerance):
    figures = pixel_metrics.pixel_metrics(found)
    for name, value in exact(values, masks).items():
        error = figures[f"{name}_error"]
        assert abs(figures[name] - value) <= error + 2e-7, name  # float32's 1/area is 6e-8 off
        assert error <= tolerance, name
        assert abs(figures[name] - value) <= 5e-6, name


CASES = {
    "wide": lambda noise: 0.5 + 0.1 * noise,
    "narrow": lambda noise: 0.5 + 1e-4 * noise,
    "near nothing": lambda noise: 1 / (1 + np.exp(12 - 2 * noise)),
    "near one": lambda noise: 1 - np.exp(-8 - 0.5 * np.abs(noise)),
    "few values": lambda noise: np.round(0.5 + 0.1 * noise, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_figures_are_exact_within_their_bounds(case):
    masks, noise = blobs()
    values = np.clip(CASES[case](noise), 0, 1).astype(np.float32)
    check(counted(values, masks), values, masks, tolerance=5e-4)


def test_bounds_hold_where_the_first_batch_misleads():
    masks, noise = blobs(12, 60)
    values = np.clip(0.7 + 2e-5 * noise, 0, 1).astype(np.float32)
    values[:2] = 0.1  # all bins that could be fitted are elsewhere, and a few hundred are left for this
    found = counted(values, masks)
    figures = pixel_metrics.pixel_metrics(found)
    assert 1e-4 < figures["pixel_auroc_error"] < 0.1
    for name, value in exact(values, masks).items():
        assert abs(figures[name] - value) <= figures[f"{name}_error"]


def test_equal_values_are_ties_and_exact():
    masks, _ = blobs()
    figures = pixel_metrics.pixel_metrics(counted(np.full_like(masks, 0.3), masks))
    share = float(masks.mean())
    assert figures["pixel_auroc"] == 0.5
    assert figures["pixel_ap"] == pytest.approx(share)
    assert figures["pixel_f1_max"] == pytest.approx(2 * share / (1 + share))
    assert figures["pixel_aupro"] == pytest.approx(0.15)  # a straight line to (1, 1)
    assert all(value == 0 for name, value in figures.items() if name.endswith("_error"))


def test_values_past_both_ends_count_as_the_ends():
    values = np.array([[[-0.0, 1.0], [-0.1, 1.1]], [[0.0, 1e-42], [0.5, 1.0]]], np.float32)
    found = counted(values, (values > 0.6).astype(np.float32))
    np.testing.assert_array_equal(found.normal, [4, 1, 0])
    np.testing.assert_array_equal(found.anomalous, [0, 0, 3])
    assert found.exact[[0, 2]].all()


def test_padding_is_not_counted():
    masks, noise = blobs(3)
    values = np.clip(0.5 + 0.1 * noise, 0, 1).astype(np.float32)
    found = counted(values, masks, weight=np.array([1, 0, 1], np.float32))
    assert found.normal.sum() + found.anomalous.sum() == 2 * 40 * 40
    check(found, values[[0, 2]], masks[[0, 2]], tolerance=1e-3)


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_has_no_figures(label):
    masks = np.full((2, 2, 2), label, np.float32)
    figures = pixel_metrics.pixel_metrics(counted(np.full((2, 2, 2), 0.5, np.float32), masks))
    assert len(figures) == 8
    assert np.isnan(list(figures.values())).all()


def test_without_regions_there_is_no_aupro():
    values = np.array([[[0.1, 0.9]]], np.float32)
    counts = pixel_metrics.start(values, np.ones(1, np.float32), regions=False)
    counts = pixel_metrics.count(counts, values, (values > 0.5).astype(np.float32), np.ones(1, np.float32))
    figures = pixel_metrics.pixel_metrics(pixel_metrics.histogram(counts))
    assert figures["pixel_auroc"] == figures["pixel_ap"] == 1
    assert "pixel_aupro" not in figures


def test_regions_touch_by_corners_and_share_one():
    mask = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1]], np.float32)
    shares = region_shares(mask)
    np.testing.assert_array_equal(shares, mask / 2)
    assert region_shares(np.zeros((3, 3), np.float32)).sum() == 0


def test_bins_never_outgrow_their_number_and_order_is_kept():
    draw = np.random.default_rng(0)
    for values in (
        draw.random((1, 64, 64)),
        draw.beta(1e-3, 1e-3, (1, 64, 64)),
        2.0 ** -draw.integers(0, 99, (1, 9, 9)),
    ):
        values = values.astype(np.float32)
        scale = np.asarray(pixel_metrics.start(values, np.ones(1, np.float32), regions=False).scale)
        first, hidden = scale >> 4, scale & 15
        assert first[-1] + 2 ** (16 - hidden[-1]) <= pixel_metrics.BINS
        np.testing.assert_array_equal(np.diff(first), 2 ** (16 - hidden[:-1]))
        ordered = np.sort(np.concatenate([values.ravel(), draw.random(5000, np.float32)]))
        assert (np.diff(jax.jit(pixel_metrics._place)(ordered, scale)) >= 0).all()


def test_a_great_many_pixels_are_counted_and_too_many_refused():
    values = np.array([[[0.1, 0.9]]], np.float32)
    batch = (values, (values > 0.5).astype(np.float32), np.ones(1, np.float32))
    for before, fits in ((2**32 - 3, True), (2**32 - 2, False)):
        counts = pixel_metrics.start(values, np.ones(1, np.float32), regions=False)
        place = int(pixel_metrics._place(jnp.float32(0.1), counts.scale))
        with jax.enable_x64(True):
            pixels = counts.pixels.at[0, 0, place].add(jnp.uint32(before))
            counts = pixel_metrics.PixelCounts(counts.scale, counts.seen + before, pixels, None)
        counts = pixel_metrics.count(counts, *batch)
        if fits:
            assert pixel_metrics.histogram(counts).normal.sum() == before + 1
        else:
            with pytest.raises(ValueError, match=f"counters of 32 bits surely hold {2**32 - 1}"):
                pixel_metrics.histogram(counts)


def test_widened_counts_hold_more_than_32_bits():
    values = np.array([[[0.1, 0.9]]], np.float32)
    weight = np.ones(1, np.float32)
    counts = pixel_metrics.start(values, weight, regions=False)
    place = int(pixel_metrics._place(jnp.float32(0.1), counts.scale))
    with jax.enable_x64(True):
        counts = counts.replace(seen=counts.seen + 2**33, pixels=counts.pixels.at[0, 0, place].add(2**32 - 1))
    counts = pixel_metrics.widened(counts)
    for _ in range(3):
        counts = pixel_metrics.count(counts, values, (values > 0.5).astype(np.float32), weight)
    found = pixel_metrics.histogram(counts)
    assert (found.normal.sum(), found.anomalous.sum()) == (2**32 + 2, 3)


def test_grey_masks_are_anomalous_above_one_half():
    masks = np.array([[[0.0, 0.2], [0.5, 0.6]]], np.float32)
    values, ones = np.array([[[0.1, 0.2], [0.3, 0.4]]], np.float32), np.ones(1, np.float32)
    regions = region_shares(masks[0])[None]
    np.testing.assert_array_equal(regions, masks > 0.5)
    counts = pixel_metrics.start(values, ones, regions=True)
    found = pixel_metrics.histogram(pixel_metrics.count(counts, values, masks, ones, regions))
    np.testing.assert_array_equal(found.normal, [1, 1, 1, 0])
    np.testing.assert_array_equal(found.anomalous, [0, 0, 0, 1])


def test_bounds_hold_whatever_the_order_inside_a_bin():
    """One bin of 13 normal and 185 anomalous pixels: the anomalous ones may all come first, or all come last."""
    found = pixel_metrics.Histogram(np.array([13.0]), np.array([185.0]), np.array([1.0]), np.array([False]))
    above, below = np.arange(1, 186) / np.arange(1, 186), np.arange(1, 186) / np.arange(14, 199)
    possible = {"auroc": (1, 0), "ap": (above.mean(), below.mean()), "aupro": (1, 0)}
    for name, value in pixel_metrics.pixel_metrics(found, possible).items():
        if not name.endswith("_error"):
            error = pixel_metrics.pixel_metrics(found)[f"{name}_error"]
            assert all(abs(value - true) <= error + 1e-12 for true in possible[name.removeprefix("pixel_")]), name


def test_parts_of_several_devices_add_up_past_what_one_may_count():
    values = np.array([[[0.1, 0.9]]], np.float32)
    scale = pixel_metrics.start(values, np.ones(1, np.float32), regions=False).scale
    pixels = np.zeros((2, 2, pixel_metrics.BINS), np.uint32)
    pixels[:, 0, int(pixel_metrics._place(jnp.float32(0.1), scale))] = 3 * 2**30
    lies = NamedSharding(jax.make_mesh((1,), ("data",)), PartitionSpec())
    with jax.enable_x64(True):
        seen, placed = jax.device_put((np.full(2, 3 * 2**30), pixels), lies)
    counts = pixel_metrics.PixelCounts(scale, seen, placed, None)
    assert pixel_metrics.histogram(counts).normal.tolist() == [6 * 2**30]

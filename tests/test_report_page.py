"""The page of an evaluation: what is on it, that it needs nothing else, its pictures, its curves; and maps as files."""

import base64
import dataclasses
import hashlib
import html
import io
import json
import os
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score, f1_score, precision_recall_curve, roc_auc_score

import evaluate as evaluate_script
from iqe_jax import calibration, config, evaluation, report, report_figures, report_page, saved_maps
from iqe_jax.data.bmad import load_split
from iqe_jax.pixel_metrics import Histogram
from iqe_jax.weights import digest
from tests.pages import HOSTILE, make_run

PAPER = "chosen on test data"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("page") / "last")


@pytest.fixture(scope="module")
def page(run):
    return run.write()


def counted(normal, anomalous):
    normal, anomalous = np.array(normal, float), np.array(anomalous, float)
    filled = normal + anomalous > 0
    return Histogram(normal[filled], anomalous[filled], None, np.ones(filled.sum(), bool))


def text_of(page):
    """What a reader of the page sees, more or less."""
    return " ".join(
        html.unescape(re.sub(r"<[^>]*>", " ", re.sub(r"<(style|script).*?</\1>", " ", page, flags=re.S))).split()
    )


def cards(page):
    """Attributes and pictures of the gallery, in its order."""
    for part in page.split("<li data-index=")[1:]:
        part = part.partition("</li>")[0]
        pictures = re.findall(r'<img class="(\w+)" src="data:image/\w+;base64,([^"]+)"', part)
        number, label, score = re.match(r'"(\d+)" data-label="(\d)" data-score="([^"]+)"', part).groups()
        yield (
            int(number),
            int(label),
            float(score),
            {k: Image.open(io.BytesIO(base64.b64decode(v))) for k, v in pictures},
        )


def test_a_page_needs_nothing_but_itself(page):
    attributes = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, pairs: attributes.extend(pairs)
    parser.feed(page)
    assert not {name for name, _ in attributes if name.startswith("on") or name == "style"}
    linked = [value for name, value in attributes if name in ("src", "href", "action", "data", "poster", "srcset")]
    assert len(linked) > 24
    assert {link.partition(":")[0] for link in linked if not link.startswith("#")} == {"data"}
    assert "@import" not in page
    assert set(re.findall(r"url\(([^)]*)\)", page)) <= {"#edge"}
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert html.unescape(policy).startswith("default-src 'none'; img-src data:; ")
    for tag in ("style", "script"):
        (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.S)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in html.unescape(policy)


def test_names_from_disk_are_text(page):
    text = text_of(page)
    for name in HOSTILE[:3]:
        assert name not in page
        assert html.unescape(str(name)) in html.unescape(text) or name in text
    assert r"good/not utf-8 \xff.png" in text
    assert r"good/turned \u202e round.png" in text
    assert r"good/two\nlines.png" in text


def test_what_is_said_of_a_run(page):
    text = text_of(page)
    assert "Brain MRI few-shot, k = 4" in text
    assert "Weights of the last step (step 3)" in text
    assert "python evaluate.py --report" in text
    assert "Digest of CLIP 0123abcd" in text
    assert "flax" in text and "Python 3" in text
    assert "model.image_size 24" in text
    assert "0.875" in text
    assert "counted in bins" not in text  # the error is far below the digits shown
    assert "Raw scores are not probabilities" in text
    assert PAPER not in text
    assert "rendered phantoms" not in text


@pytest.mark.parametrize(
    ("rule", "phantoms", "marks"),
    [("paper", False, [PAPER]), ("paper", True, [PAPER, "phantoms"]), ("valid", True, ["phantoms"])],
)
def test_marks_stand_in_the_head_and_beside_every_figure(tmp_path, rule, phantoms, marks):
    page = make_run(tmp_path / "run", count=3, rule=rule, phantoms=phantoms, names=False).write(
        pixels=counted([5, 3], [1, 4])
    )
    figures = re.findall(r"<figcaption>.*?</figcaption>", page, re.S)
    assert len(figures) == 6
    title = re.findall(r"<title>.*?</title>", page, re.S)[0]  # figures have titles too
    (head,) = re.findall(r"<h1>.*?</h1>", page, re.S)
    captions = re.findall(r"<caption>.*?</caption>", page, re.S)
    for mark in marks:
        assert all(mark in part for part in (title, head, *figures, *captions))
        assert f"<strong>{mark}</strong>" in page
    numbers = re.findall(r'<div class="metric">.*?</div>', page, re.S)
    assert len(numbers) == 2
    assert all((PAPER in number) == (rule == "paper") for number in numbers)
    dialog = page[page.index("<dialog") :]
    assert all(mark in dialog for mark in marks)


def test_further_figures_are_shown_where_they_are_there(tmp_path):
    run = make_run(tmp_path / "run", count=3, names=False)
    path = run.directory / "metrics.json"
    summary = json.loads(path.read_text())
    summary["metrics"] |= {"image_ap": None, "pixel_aupro": 0.61234, "pixel_aupro_error": 0.002, "new_one": 0.25}
    summary["intervals"] = {"image_auroc": [0.7654, 0.9123], "image_ap": None}
    summary["reductions"] = {"official": {"image_auroc": 0.7012}, "max": {"image_auroc": 0.8034, "other": 0.5}}
    summary["rules"] = {
        "last": {"image_auroc": 0.7, "chosen_on_test_data": False, "intervals": {"image_auroc": [0.6, 0.8]}},
        "paper": {"image_auroc": 0.9, "chosen_on_test_data": True},
    }
    path.write_text(json.dumps(summary))
    page = run.write()
    text = text_of(page)
    assert "95 % interval 0.765 to 0.912" in text
    assert "Image AP undefined" in text
    assert "Pixel AUPRO 0.612" in text
    assert "counted in bins, at most 0.002 off" in text
    assert "new one 0.250" in text
    assert re.search(r"metric official max Image AUROC 0\.701 0\.803", text)
    assert f"metric last paper {PAPER} Image AUROC 0.700 0.600 to 0.800 0.900" in text


def test_the_most_wrong_come_first(run, page):
    scores, labels = run.evaluation.scores, run.evaluation.labels
    thresholds = np.unique(scores)
    best = thresholds[np.argmax([f1_score(labels, scores >= t) for t in thresholds])]
    wrong = [best - s if label else s - best for s, label in zip(scores, labels, strict=True)]
    found = list(cards(page))
    assert [number for number, *_ in found] == np.argsort(-np.array(wrong), kind="stable").tolist()
    for number, label, score, _ in found:
        assert label == labels[number]
        assert score == pytest.approx(scores[number], abs=1e-6)


def test_pictures_show_image_mask_and_map(run, page):
    for number, label, _, pictures in cards(page):
        sample, segmentation = run.samples[number], run.evaluation.maps[number]
        assert set(pictures) == ({"image", "mask", "heat"} if label else {"image", "heat"})
        heat = np.asarray(pictures["heat"].convert("RGB"), float) / 255
        np.testing.assert_allclose(heat, report.colours(segmentation), atol=0.02)
        with Image.open(sample.image) as original:  # JPEG keeps less of colour, which noise has most of
            off = np.asarray(pictures["image"].convert("L"), float) - np.asarray(original.convert("L"), float)
        assert np.abs(off).mean() < 12
        if label:
            with Image.open(sample.mask) as original:
                np.testing.assert_array_equal(np.asarray(pictures["mask"]), np.asarray(original) > 0)
    # Half of the layer over the image is what the other pictures of a run show.
    image = np.asarray(pictures["image"].convert("RGB"), float)
    half = np.round((image + 255 * heat) / 2)
    np.testing.assert_allclose(half, report.overlay(image / 255, segmentation), atol=3)


def test_large_pictures_are_reduced_and_200_of_them_stay_small(tmp_path):
    run = make_run(tmp_path / "run", count=3, size=300, names=False)
    page = run.write()
    assert "reduced from 300 to 240 pixels" in text_of(page)
    for *_, pictures in cards(page):
        assert {picture.size for picture in pictures.values()} == {(240, 240)}
    assert len(page.encode()) * 200 / 6 < 20e6


def test_a_gallery_of_some_says_so(run):
    some = {i: run.evaluation.maps[i] for i in (3, 20)}
    page = report_page.write(run.config, run.directory, run.samples, some, []).read_text()
    assert "The 2 most wrong of 24 images" in text_of(page)
    assert 'href="scores.csv"' in page
    assert len(json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])["scores"]) == 24


@pytest.mark.parametrize("kind", ["one class", "equal scores"])
def test_degenerate_sets_have_a_page(tmp_path, kind):
    run = make_run(tmp_path / "run", count=3, names=False)
    path = run.directory / "scores.csv"
    lines = path.read_text().splitlines()
    if kind == "equal scores":
        lines = [lines[0], *(line.rpartition(",")[0] + ",0.5" for line in lines[1:])]
    else:
        lines = [lines[0], *(re.sub(r",1,", ",0,", line) for line in lines[1:])]
    path.write_text("\n".join(lines) + "\n")
    page = run.write()
    assert ("undefined: one class only" in page) == (kind == "one class")
    assert len(list(cards(page))) == 6


def test_a_set_without_masks_has_a_page(tmp_path):
    run = make_run(tmp_path / "run", count=3, names=False)
    bare = [dataclasses.replace(sample, mask=None) for sample in run.samples]
    page = dataclasses.replace(run, samples=bare).write()
    assert [set(pictures) for *_, pictures in cards(page)] == [{"image", "heat"}] * 6
    assert text_of(page).count("no mask") == 3
    assert "ROC of pixels" not in page


def test_a_fitted_calibration_is_used_if_it_is_of_these_weights(tmp_path):
    run = make_run(tmp_path / "run", count=12, names=False)
    scores, labels = run.evaluation.scores, run.evaluation.labels
    fitted = calibration.fit(np.append(scores, np.full(6, 0.4)), np.append(labels, np.zeros(6)))
    fitted.save(run.directory)
    page = run.write()
    text = text_of(page)
    assert "fitted on 30 images of the valid pool" in text
    assert "the pool's share of anomalous images, 40%; in this test set it is 50%" in text
    found = fitted.probability(scores)
    place = np.minimum((found * 10).astype(int), 9)
    off = [(place == i).sum() * abs((found - labels)[place == i].mean()) for i in np.unique(place)]
    said = "Brier score is {:.3f} (0 is best; always saying the share of anomalous ones has 0.250)"
    assert said.format(np.mean((found - labels) ** 2)) in text
    assert f"expected calibration error {sum(off) / 24:.3f}." in text
    assert "fitted probability of an anomaly" in text
    assert "Raw scores are not" not in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    np.testing.assert_allclose(data["probabilities"], fitted.probability(run.evaluation.scores), atol=1e-4)
    assert data["calibrated"] == fitted.threshold
    (run.directory / "adapter.safetensors").write_bytes(b"others")
    text = text_of(run.write())
    assert "made with other weights" in text
    assert "Raw scores are not probabilities" in text


def test_scores_of_other_images_are_refused(run):
    with pytest.raises(ValueError, match="is not of the images that are here now"):
        report_page.write(run.config, run.directory, run.samples[1:], {}, [])


# ---------------------------------------------------------------------------- curves


def test_curves_enclose_the_areas_that_scikit_learn_says():
    draw = np.random.default_rng(1)
    labels = draw.integers(0, 2, 3000)
    scores = np.round(draw.normal(labels, 1.0), 2)
    false, true = np.array(report_figures.roc(scores, labels)).T
    assert len(false) <= report_figures.POINTS
    assert np.trapezoid(true, false) == pytest.approx(roc_auc_score(labels, scores), abs=1e-3)
    recall, precision = np.array(report_figures.precision_recall(scores, labels)).T
    assert (np.diff(recall) * precision[1:]).sum() == pytest.approx(average_precision_score(labels, scores), abs=2e-3)
    assert report_figures.roc(scores, np.ones(3000)) == report_figures.precision_recall(scores, np.ones(3000)) == []


def test_pixel_curves_are_those_of_the_pixels():
    draw = np.random.default_rng(2)
    labels = draw.integers(0, 2, 5000)
    values = np.clip(draw.normal(0.4 + 0.2 * labels, 0.2), 0, 0.999)
    place = (values * 100).astype(int)
    counts = counted(*(np.bincount(place[labels == label], minlength=100) for label in (0, 1)))
    curve, pr = (np.array(points).T for points in report_figures.pixel_curves(counts))
    assert np.trapezoid(curve[1], curve[0]) == pytest.approx(roc_auc_score(labels, place), abs=1e-4)
    precision, recall, _ = precision_recall_curve(labels, place)
    np.testing.assert_allclose(pr[:, 1:], [recall[::-1][1:], precision[::-1][1:]], atol=1e-5)
    assert report_figures.pixel_curves(counted([1, 2], [0, 0])) == ([], [])


@pytest.mark.parametrize(("successes", "trials"), [(0, 5), (3, 5), (5, 5), (70, 200)])
def test_intervals_are_wilsons(successes, trials):
    expected = binomtest(successes, trials).proportion_ci(method="wilson")
    assert report_figures.wilson(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_reliability_counts_every_image_once():
    draw = np.random.default_rng(3)
    p = draw.random(500)
    labels = (draw.random(500) < p).astype(float)
    for probabilities in (True, False):
        bins = report_figures.reliability(p, labels, probabilities=probabilities)
        assert sum(b.images for b in bins) == 500
        assert sum(b.images * b.observed for b in bins) == pytest.approx(labels.sum())
        assert all(b.low <= b.observed <= b.high for b in bins)
    first = report_figures.reliability(p, labels, probabilities=True)[0]
    assert first.images == (p < 0.1).sum()


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.21, 0.34), (-3.0, 8.0), (0.5, 0.500004)])
def test_ticks_are_few_and_round(low, high):
    found = report_figures.ticks(low, high)
    assert 3 <= len(found) <= 7
    assert low - 1e-9 <= found[0] and found[-1] <= high + 1e-9


def test_a_histogram_has_the_normal_images_first():
    scores = np.array([0.0, 0.0, 0.1, 1.0])
    edges, shares = report_figures.histogram(scores, np.array([0, 0, 1, 1]))
    assert (edges[0], edges[-1]) == (0, 1)
    assert shares[0, 0] == 1 and shares[1, -1] == 0.5 and shares.sum(1).tolist() == [1, 1]
    assert report_figures.span(np.full(3, 0.5)) == (0.0, 1.0)


# ---------------------------------------------------------------------------- scores.csv


def test_scores_are_read_back_with_any_name(run):
    read = report.read_scores(run.directory / "scores.csv")
    assert read.names == [sample.name for sample in run.samples]
    np.testing.assert_allclose(read.score, run.evaluation.scores, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,label\na,0\n", "no column 'score'"),
        ("image,label,score\na,0,x\n", "line 2: could not convert"),
        ("image,label,score\na,0,nan\n", "line 2: label must be 0 or 1 and score a finite number"),
        ("image,label,score\na,2,0.5\n", "line 2: label must be"),
        ("image,label,score\na,1\n", "line 2: label must be"),
        ("image,label,score\n", "lists no images"),
        ("image,label,score\na,0,0.1\na,0,0.2\n", "lists a twice"),
    ],
)
def test_scores_that_are_none_are_refused(tmp_path, text, message):
    path = tmp_path / "scores.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        report.read_scores(path)


# ---------------------------------------------------------------------------- maps as files


@pytest.mark.parametrize("form", ["png16", "npz"])
def test_maps_are_read_back(tmp_path, form):
    run = make_run(tmp_path / "run", count=7)
    files = saved_maps.MapFiles(run.directory, run.samples, 24, form)
    maps = np.stack([run.evaluation.maps[i] for i in range(14)])
    files(0, maps[:9])
    files(9, maps[9:])
    names = saved_maps.file_names([sample.name for sample in run.samples], form)
    found = sorted(os.path.relpath(path, run.directory / "maps") for path in (run.directory / "maps").glob("*/*"))
    assert found == sorted(names)
    for name, segmentation in zip(names, maps, strict=True):
        path = run.directory / "maps" / name
        if form == "png16":
            with Image.open(path) as picture:
                assert picture.mode == "I;16"
                values = np.asarray(picture) / 65535
            np.testing.assert_allclose(values, segmentation, atol=0.5001 / 65535)
        else:
            np.testing.assert_array_equal(np.load(path)["segmentation"], segmentation)
    about = json.loads((run.directory / "maps" / "about.json").read_text())
    assert about["side"] == 24
    assert ("65535" in about["format"]) == (form == "png16")


def test_files_of_maps_never_share_a_name():
    assert saved_maps.file_names(["good/a.jpeg", "ungood/a.jpeg"], "png16") == ["good/a.png", "ungood/a.png"]
    assert saved_maps.file_names(["good/a.jpeg", "good/a.png"], "npz") == ["good/a.jpeg.npz", "good/a.png.npz"]
    long = [f"good/{'ä' * 120}{i}.png" for i in range(2)]
    names = saved_maps.file_names(long, "png16")
    assert len(set(names)) == 2
    assert all(len(name.encode()) < 255 for name in names)


def test_a_disk_without_room_is_found_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    run = make_run(tmp_path / "run", count=3)
    with pytest.raises(OSError, match="GB for 6 maps and has"):
        saved_maps.MapFiles(run.directory, run.samples, 24, "npz")


# ---------------------------------------------------------------------------- from evaluate.py


@pytest.mark.parametrize(
    ("flags", "report_is", "maps_are"),
    [
        ([], None, "none"),
        (["--report", "--save-maps", "npz"], True, "npz"),
        (["--no-report", "--save-maps=png16"], False, "png16"),
        (["--eval.report", "True"], True, "none"),
    ],
)
def test_flags(monkeypatch, flags, report_is, maps_are):
    asked = []
    monkeypatch.setattr(evaluation, "run_evaluation", asked.append)
    evaluate_script.main(["--config", "brain_fewshot", *flags])
    assert (asked[0].eval.report, asked[0].eval.save_maps) == (report_is, maps_are)


def test_an_evaluation_leaves_page_and_maps(
    tiny_root, golden_settings, golden_files, golden_model, tmp_path, monkeypatch
):
    """With a gallery smaller than the test set, so that its maps come from a second pass."""
    monkeypatch.setattr(report_page, "GALLERY", 6)
    model = config.ModelConfig(**golden_settings, adapter=str(golden_files[1]), sigma=2.0)
    recipe = config.Config(
        "tiny",
        tmp_path,
        model,
        config.DataConfig(root=tiny_root),
        eval=config.EvalConfig(batch_size=8, heatmaps=8, report=True, save_maps="png16"),
    )
    evaluation.run_evaluation(recipe)
    samples = load_split(tiny_root, "brain", "test")
    names = saved_maps.file_names([sample.name for sample in samples], "png16")
    maps = []
    for name in names:
        with Image.open(tmp_path / "maps" / name) as picture:
            maps.append(np.asarray(picture) / 65535)
    page = (tmp_path / "report.html").read_text()
    found = list(cards(page))
    assert len(found) == 6
    assert "The 6 most wrong of 20 images" in text_of(page)
    scores = report.read_scores(tmp_path / "scores.csv").score
    maxima = report.read_scores(tmp_path / "scores.csv").others["max"]
    held = re.findall(r'<li data-index="(\d+)".*?data-others="(.*?)"', page)
    assert len(held) == 6
    assert all(json.loads(html.unescape(others))["max"] == maxima[int(number)] for number, others in held)
    for number, _, score, pictures in found:
        assert score == scores[number]
        heat = np.asarray(pictures["heat"].convert("RGB"), float) / 255
        np.testing.assert_allclose(heat, report.colours(maps[number]), atol=0.02)
    assert f"Digest of the adapter {digest(golden_model[2])}" in text_of(page)
    assert "the given adapter: how they were chosen is not known here" in text_of(page)
    assert len(list((tmp_path / "heatmaps").iterdir())) == 9  # eight and the overview, not the gallery's

    config_without = config.Config(
        "tiny",
        tmp_path / "no",
        model,
        config.DataConfig(root=tiny_root),
        eval=config.EvalConfig(batch_size=8, heatmaps=0),
    )
    evaluation.run_evaluation(config_without)
    left = {path.name for path in (tmp_path / "no").iterdir()}
    assert left == {"calibration.json", "config.json", "metrics.json", "scores.csv"}

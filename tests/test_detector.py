"""The Python face: every kind of image, single and several, and one clear error for each that cannot be used."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import iqe_jax
from iqe_jax import config

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), np.uint8)


@pytest.fixture(scope="module")
def detector(golden_files):
    return iqe_jax.load(clip=golden_files[0], adapter=golden_files[1], image_size=40, levels=[1, 2, 3, 4], iqm_heads=4)


@pytest.fixture(scope="module")
def expected(detector):
    return detector(IMAGES)


def test_shapes_and_ranges(expected):
    assert expected.score.shape == (3,)
    assert expected.anomaly_map.shape == (3, 40, 40)
    assert ((expected.anomaly_map >= 0) & (expected.anomaly_map <= 1)).all()


def test_all_kinds_of_images_give_the_same(detector, expected, tmp_path):
    paths = []
    for i, image in enumerate(IMAGES):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(image).save(paths[-1])
    kinds = {
        "floats": IMAGES.astype(np.float32) / 255,
        "list of arrays": list(IMAGES),
        "PIL": [Image.fromarray(image) for image in IMAGES],
        "paths": paths,
        "strings": [str(path) for path in paths],
        "mixed": [IMAGES[0], Image.fromarray(IMAGES[1]), paths[2]],
    }
    for kind, images in kinds.items():
        found = detector(images)
        np.testing.assert_allclose(found.score, expected.score, atol=1e-6, err_msg=kind)
        np.testing.assert_allclose(found.anomaly_map, expected.anomaly_map, atol=1e-6, err_msg=kind)


def test_a_single_image_gives_a_single_prediction(detector, expected, tmp_path):
    Image.fromarray(IMAGES[1]).save(tmp_path / "one.png")
    for image in (IMAGES[1], Image.fromarray(IMAGES[1]), tmp_path / "one.png", str(tmp_path / "one.png")):
        found = detector(image)
        assert found.score.shape == ()
        assert found.anomaly_map.shape == (40, 40)
        assert found.score == pytest.approx(expected.score[1], abs=1e-6)


def test_more_images_than_a_batch(golden_files, expected):
    detector = iqe_jax.load(
        clip=golden_files[0], adapter=golden_files[1], image_size=40, levels=(1, 2, 3, 4), iqm_heads=4
    )
    detector.batch_size = 2
    np.testing.assert_allclose(detector(IMAGES).score, expected.score, atol=1e-6)


def test_other_sizes_are_resized_as_files_are(detector, tmp_path):
    large = np.random.default_rng(1).integers(0, 256, (60, 50, 3), np.uint8)
    Image.fromarray(large).save(tmp_path / "large.png")
    from_file = detector(tmp_path / "large.png")
    for image in (large, large.astype(np.float64) / 255, Image.fromarray(large)):
        assert detector(image).score == pytest.approx(from_file.score, abs=1e-6)


def test_zero_shot_scores(golden_files, detector):
    kwargs = {"image_size": 40, "levels": (1, 2, 3, 4), "iqm_heads": 4}
    zero = iqe_jax.load(clip=golden_files[0], adapter=golden_files[1], zero_shot=True, **kwargs)
    outputs = detector.outputs(IMAGES)
    np.testing.assert_allclose(zero(IMAGES).score, outputs["score_zero"], atol=1e-5)
    np.testing.assert_allclose(detector(IMAGES).score, outputs["score_few"], atol=1e-5)


def test_sizes_are_read_from_our_own_files_too(golden_files, expected, tmp_path):
    from convert.adapter import load_adapter, save_adapter

    save_adapter(load_adapter(golden_files[1], 4), tmp_path / "adapter.safetensors")
    levels = (1, 2, 3, 4)
    ours = iqe_jax.load(clip=golden_files[0], adapter=tmp_path / "adapter.safetensors", image_size=40, levels=levels)
    np.testing.assert_array_equal(ours(IMAGES).score, expected.score)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "no images were given"),
        (np.zeros((0, 40, 40, 3), np.uint8), "no images were given"),
        (np.zeros((40, 40), np.uint8), r"image 0 has shape \(40, 40\); expected \(height, width, 3\)"),
        (np.zeros((2, 40, 40, 1), np.uint8), r"image 0 has shape \(40, 40, 1\); expected \(height, width, 3\)"),
        (np.zeros((0, 40, 3), np.uint8), r"image 0 has shape \(0, 40, 3\)"),
        (np.zeros((40, 40, 3), np.int32), "image 0 has type int32"),
        (np.full((40, 40, 3), np.nan), "values from nan to nan; expected finite"),
        (np.full((40, 40, 3), 255.0), r"values from 255.0 to 255.0; expected finite ones in \[0, 1\]"),
        (np.zeros(()), r"image 0 has shape \(\)"),
        ([IMAGES[0], 7], "image 1 is a int; expected an array, a PIL image or a path"),
    ],
)
def test_unusable_images_are_named(detector, images, message):
    with pytest.raises(ValueError, match=message):
        detector(images)


def test_missing_and_broken_files_are_named(detector, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        detector(tmp_path / "none.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"broken\.png"):
        detector([IMAGES[0], tmp_path / "broken.png"])
    Image.fromarray(IMAGES[0]).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:-900])
    with Image.open(tmp_path / "cut.png") as cut, pytest.raises(ValueError, match="image number 1 cannot be read"):
        detector([IMAGES[0], cut])


def test_a_tiff_whose_zero_is_white_is_the_same_open_and_by_its_path(detector, tmp_path):
    pixels = Image.fromarray(IMAGES[0, ..., 0].astype(np.uint16) * 257)
    pixels.save(tmp_path / "white.tif", tiffinfo={262: 0})
    pixels.save(tmp_path / "black.tif")
    with Image.open(tmp_path / "white.tif") as opened:
        assert detector(opened).score == detector(tmp_path / "white.tif").score
    assert detector(tmp_path / "black.tif").score != detector(tmp_path / "white.tif").score


def test_what_load_needs(golden_files, tmp_path):
    with pytest.raises(TypeError, match="both clip= and adapter="):
        iqe_jax.load(clip=golden_files[0])
    with pytest.raises(TypeError, match="not both"):
        iqe_jax.load(tmp_path, clip=golden_files[0])
    with pytest.raises(TypeError, match="not both"):
        iqe_jax.load(tmp_path, zero_shot=False)
    with pytest.raises(TypeError, match="unexpected keyword argument 'levelz'"):
        iqe_jax.load(clip=golden_files[0], adapter=golden_files[1], iqm_heads=4, levelz=(1,))
    with pytest.raises(FileNotFoundError, match="is no run directory"):
        iqe_jax.load(tmp_path)
    (tmp_path / "config.json").write_text(config.to_json(config.Config()))
    with pytest.raises(FileNotFoundError, match=r"has no trained adapter yet: run train\.py"):
        iqe_jax.load(tmp_path)
    with pytest.raises(
        ValueError, match=r"wrong shape: dense/kernel is \(4, 128, 64\), the config makes it \(2, 128, 64\)"
    ):
        iqe_jax.load(clip=golden_files[0], adapter=golden_files[1], image_size=40, levels=(1, 2), iqm_heads=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"normalisation": "CLIP"}, "model.normalisation is 'CLIP'; it must be one of none, clip"),
        ({"score": "bogus"}, "model.score is 'bogus'; it must be one of official, mean, max, top"),
        ({"use_global": "no"}, "model.use_global is 'no'; it must be one of True, False"),
        ({"sigma": -1.0}, "model.sigma is -1.0"),
        ({"fusion_weight": 5.0}, "model.fusion_weight is 5.0"),
        ({"levels": (1, 1, 2, 3)}, "model.levels is"),
    ],
)
def test_settings_that_cannot_work_are_named(golden_files, settings, message):
    settings = {"image_size": 40, "levels": (1, 2, 3, 4), "iqm_heads": 4, **settings}
    with pytest.raises(ValueError, match=message):
        iqe_jax.load(clip=golden_files[0], adapter=golden_files[1], **settings)


def test_importing_the_package_is_light():
    """Only what running a model needs is imported, and that only once it is asked for."""
    code = (
        "import iqe_jax, sys; print(sorted({'jax', 'torch', 'transformers', 'tensorflow_datasets'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    code = (
        "from iqe_jax import load; import sys; "
        "print(sorted({'torch', 'transformers', 'tensorflow_datasets', 'sklearn', 'grain'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    code = (  # the phantoms' renderers and transformers' tokenizers take a second
        "from iqe_jax import config, weights; import sys; weights.load_model(config.load('phantom_fewshot').model); "
        "print(sorted({'torch', 'transformers', 'scipy.ndimage', 'sklearn', 'grain'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    code = (  # nor are Grain and Orbax, before images are decoded and a checkpoint is opened
        "from iqe_jax import evaluation; import sys; "
        "print(sorted({'torch', 'sklearn', 'grain', 'orbax.checkpoint', 'jinja2', 'tensorboardX'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

"""Opening and resizing images and masks, and the eleven-fold augmentation against the official one."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from iqe_jax.data import transforms
from iqe_jax.data.transforms import augment, check_header, load_image, load_mask, load_pair
from tests.parity import golden

GOLDEN = Path(__file__).parent / "parity" / "tiny.npz"


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(path: Path, pixels: np.ndarray | Image.Image, **options) -> Path:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


@pytest.mark.parametrize(("height", "width"), [(50, 70), (20, 31), (40, 64), (512, 300)])
def test_image_is_resized_in_eight_bits(tmp_path, height, width):
    pixels = noise(height, width) // 3 + 80  # nothing to clip, which Pillow does between its two passes
    out = load_image(save(tmp_path / "a.png", pixels), 40)
    by_hand = np.asarray(Image.fromarray(pixels).resize((40, 40), Image.Resampling.BICUBIC))
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, by_hand.astype(np.float32) / 255)
    # An implementation that is not Pillow's: PyTorch's antialiased bicubic, which torchvision uses on 8-bit tensors.
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    other = torch.nn.functional.interpolate(tensor.float(), size=(40, 40), mode="bicubic", antialias=True)
    other = other.clamp(0, 255).round()[0].permute(1, 2, 0).numpy()
    assert np.abs(other - out * 255).max() <= 1.5  # Pillow also rounds between them


def test_image_of_the_right_size_is_taken_as_it_is(tmp_path):
    pixels = noise(40, 40)
    np.testing.assert_array_equal(load_image(save(tmp_path / "a.bmp", pixels), 40), pixels.astype(np.float32) / 255)


def test_bicubic_by_hand(tmp_path):
    # 4 → 2 of a step 0 0 255 255: Pillow's kernel, a = −½, stretched by two, about the first output pixel's centre
    # at 1; the four pixels inside are its taps, normalised.
    def kernel(x):
        x = abs(x)
        return 1.5 * x**3 - 2.5 * x**2 + 1 if x < 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    taps = np.array([kernel((i + 0.5 - 1) / 2) for i in range(4)])
    first = np.clip(np.round(255 * taps[2:].sum() / taps.sum()), 0, 255)
    step = np.tile(np.array([0, 0, 255, 255], np.uint8), (2, 1))
    out = load_image(save(tmp_path / "a.png", step), 2)
    np.testing.assert_allclose(out[0, :, 0] * 255, [first, 255 - first], atol=1e-4)


def test_modes_become_rgb(tmp_path):
    rgb = noise(9, 9)
    grey = noise(9, 9, 1)
    as_float = rgb.astype(np.float32) / 255
    grey_float = np.repeat(grey[..., None], 3, 2).astype(np.float32) / 255
    np.testing.assert_array_equal(load_image(save(tmp_path / "grey.png", grey), 9), grey_float)
    alpha = np.concatenate([rgb, noise(9, 9, 1, 5)[..., None]], 2)
    np.testing.assert_array_equal(load_image(save(tmp_path / "rgba.png", alpha), 9), as_float)
    grey_alpha = Image.fromarray(grey).convert("LA")
    np.testing.assert_array_equal(load_image(save(tmp_path / "la.tiff", grey_alpha), 9), grey_float)
    palette = Image.fromarray(rgb // 64 * 64).quantize(64)
    expected = np.asarray(palette.convert("RGB")).astype(np.float32) / 255
    np.testing.assert_array_equal(load_image(save(tmp_path / "p.png", palette), 9), expected)
    clear = save(tmp_path / "pt.png", palette, transparency=bytes(range(64)))
    np.testing.assert_array_equal(load_image(clear, 9), expected)
    one_bit = Image.fromarray(grey > 100)
    np.testing.assert_array_equal(load_image(save(tmp_path / "1.png", one_bit), 9)[..., 0], grey > 100)
    cmyk = load_image(save(tmp_path / "cmyk.jpg", Image.fromarray(rgb).convert("CMYK")), 9)
    assert cmyk.shape == (9, 9, 3)


def test_sixteen_bits(tmp_path):
    values = np.array([[0, 128, 129, 257], [32768, 65535, 65278, 385], [1, 2, 3, 4], [5, 6, 7, 8]], np.uint16)
    expected = np.round(values / 257).astype(np.float32) / 255
    for name in ("a.png", "a.tif"):
        out = load_image(save(tmp_path / name, Image.fromarray(values)), 4)
        np.testing.assert_array_equal(out, np.repeat(expected[..., None], 3, 2))
    wide = save(tmp_path / "i.tif", Image.fromarray(values.astype(np.int32)))
    np.testing.assert_array_equal(load_image(wide, 4)[..., 0], expected)
    with pytest.raises(ValueError, match=r"over\.tif holds values from -1 to 70000"):
        load_image(save(tmp_path / "over.tif", Image.fromarray(np.array([[-1, 70000]], np.int32))), 4)
    with pytest.raises(ValueError, match=r"f\.tif holds floating-point values"):
        load_image(save(tmp_path / "f.tif", Image.fromarray(np.ones((2, 2), np.float32))), 4)
    with pytest.raises(ValueError, match=r"f\.tif holds floating-point values"):
        load_mask(tmp_path / "f.tif", 4)
    with pytest.raises(ValueError, match=r"^image .*f\.tif holds floating-point values"):
        check_header(tmp_path / "f.tif", None)


def test_mask_is_resized_by_nearest_neighbour(tmp_path):
    pixels = noise(30, 50, 1)
    out = load_mask(save(tmp_path / "m.png", pixels), 20)
    rows, columns = ((np.arange(20) + 0.5) * 1.5).astype(int), ((np.arange(20) + 0.5) * 2.5).astype(int)
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, pixels[np.ix_(rows, columns)].astype(np.float32) / 255)


@pytest.mark.parametrize(
    "kind",
    [
        "0/255",
        "0/1",
        "0/2",
        "0/127",
        "bool",
        "rgb",
        "red",
        "blue",
        "palette",
        "16 bit",
        "0/1 in 16 bit",
        "0/255 in 16 bit",
    ],
)
def test_masks_of_every_kind(tmp_path, kind):
    on = noise(6, 6, 1) > 128
    pixels = {
        "0/255": on.astype(np.uint8) * 255,
        "0/1": on.astype(np.uint8),
        "0/2": on.astype(np.uint8) * 2,
        "0/127": on.astype(np.uint8) * 127,
        "bool": on,
        "rgb": np.repeat(on[..., None], 3, 2).astype(np.uint8) * 255,
        "red": on[..., None] * np.array([255, 0, 0], np.uint8),
        "blue": on[..., None] * np.array([0, 0, 255], np.uint8),
        "palette": red_of_two_colours(on),
        "16 bit": on.astype(np.uint16) * 65535,
        "0/1 in 16 bit": on.astype(np.uint16),
        "0/255 in 16 bit": on.astype(np.uint16) * 255,
    }[kind]
    np.testing.assert_array_equal(load_mask(save(tmp_path / "m.png", pixels), 6), on.astype(np.float32))


def red_of_two_colours(on: np.ndarray) -> Image.Image:
    image = Image.new("P", on.shape[::-1])
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.putdata(on.astype(np.uint8).ravel().tolist())
    return image


def test_label_maps_are_no_masks(tmp_path):
    path = save(tmp_path / "m.png", np.resize(np.array([0, 1, 2, 4], np.uint8), (6, 6)))
    with pytest.raises(ValueError, match=r"m.png holds the values 1, 2, 4 of 255, .* save it as 0"):
        load_mask(path, 6)


def test_soft_masks_are_left_as_the_official_code_reads_them(tmp_path):
    """Such as lesions of a few pixels that were made smaller: above one half counts, which here is nothing."""
    pixels = np.resize(np.array([0, 16, 90, 127], np.uint8), (6, 6))
    np.testing.assert_array_equal(load_mask(save(tmp_path / "m.png", pixels), 6), pixels.astype(np.float32) / 255)
    pixels = np.resize(np.array([0, 200], np.uint8), (6, 6))
    np.testing.assert_array_equal(load_mask(save(tmp_path / "m.png", pixels), 6), pixels.astype(np.float32) / 255)


def test_an_empty_mask_stays_empty(tmp_path):
    assert load_mask(save(tmp_path / "m.png", np.zeros((5, 5), np.uint8)), 4).sum() == 0


def test_pair_and_its_sizes(tmp_path):
    image, mask = save(tmp_path / "i.png", noise(30, 20)), save(tmp_path / "m.png", noise(30, 20, 1))
    pixels, marks = load_pair(image, mask, 16)
    np.testing.assert_array_equal(pixels, load_image(image, 16))
    np.testing.assert_array_equal(marks, load_mask(mask, 16))
    pixels, marks = load_pair(image, None, 16)
    np.testing.assert_array_equal(pixels, load_image(image, 16))
    assert marks.shape == (16, 16)
    assert not marks.any()
    other = save(tmp_path / "o.png", noise(20, 30, 1))
    with pytest.raises(ValueError, match=r"image .*i\.png is 30×20 .* its mask .*o\.png is 20×30"):
        load_pair(image, other, 16)
    with pytest.raises(ValueError, match=r"image .*i\.png is 30×20 .* its mask .*o\.png is 20×30"):
        check_header(image, other)
    check_header(image, mask)
    check_header(image, None)


def test_unreadable_files_are_named(tmp_path, monkeypatch):
    good_png, good_jpg = save(tmp_path / "a.png", noise(64, 64)), save(tmp_path / "a.jpg", noise(64, 64))
    for source in (good_png, good_jpg):
        for part in (20, 200, len(source.read_bytes()) // 2, len(source.read_bytes()) - 40):
            cut = tmp_path / f"cut{part}{source.suffix}"
            cut.write_bytes(source.read_bytes()[:part])
            with pytest.raises(ValueError, match=rf"{cut.name} cannot be read \(.*\): it is damaged"):
                load_image(cut, 16)
    broken = bytearray(good_png.read_bytes())
    broken[60:90] = bytes(30)
    (tmp_path / "broken.png").write_bytes(broken)
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    for name, message in (("broken", "cannot be read"), ("text", "cannot be read"), ("empty", r"is empty \(0 bytes\)")):
        for load in (load_image, load_mask):
            with pytest.raises(ValueError, match=rf"{name}\.png {message}"):
                load(tmp_path / f"{name}.png", 16)
        if name != "broken":  # further on than its header
            for pair in ((tmp_path / f"{name}.png", None), (good_png, tmp_path / f"{name}.png")):
                with pytest.raises(ValueError, match=rf"{name}\.png {message}"):
                    check_header(*pair)
    with pytest.raises(FileNotFoundError, match=r"no image file at .*gone\.png"):
        load_image(tmp_path / "gone.png", 16)
    for name in ("a.nii", "A.NII.GZ"):
        (tmp_path / name).write_bytes(b"a volume")
        with pytest.raises(ValueError, match=rf"{name} is a volume: give its slices one by one"):
            load_image(tmp_path / name, 16)
    with pytest.raises(FileNotFoundError, match=r"no image file at .*gone\.png"):
        check_header(good_png, tmp_path / "gone.png")
    for limit in (3000, 1000):  # Pillow warns at the first and refuses at the second; 4096 pixels
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match=r"a\.png cannot be read .*4096 pixels"):
            load_image(good_png, 16)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_many_pixels_where_warnings_are_not_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    with pytest.raises(ValueError, match=r"64×64 pixels, more than 3000"):
        load_image(save(tmp_path / "a.png", noise(64, 64)), 16)


def test_augmentation_is_the_official_one():
    images, masks, _ = golden.samples(golden.TINY)
    with np.load(GOLDEN) as expected:
        want_images, want_masks = expected["aug/images"], expected["aug/masks"]
    got_images, got_masks = augment(images[:2].transpose(0, 2, 3, 1), masks[:2, 0])
    assert got_images.dtype == got_masks.dtype == np.float32
    np.testing.assert_allclose(got_images.transpose(0, 3, 1, 2), want_images, rtol=0, atol=2e-5)
    np.testing.assert_allclose(got_masks, want_masks.reshape(got_masks.shape), rtol=0, atol=2e-5)


@pytest.mark.parametrize("size", [7, 24, 33])
def test_augmentation_against_torch_at_other_sizes(size):
    draw = np.random.default_rng(size)
    images, masks = draw.random((3, size, size, 3), np.float32), draw.random((3, size, size), np.float32)
    stacked = torch.from_numpy(np.concatenate([images, masks[..., None]], -1)).permute(0, 3, 1, 2)
    expected = [stacked]
    warps = [(a, 0.0, 0.0) for a in (-np.pi / 8, -np.pi / 16, np.pi / 16, np.pi / 8)]
    warps += [(0.0, x, y) for x, y in ((0.1, 0.1), (-0.1, 0.1), (-0.1, -0.1), (0.1, -0.1))]
    for angle, tx, ty in warps:
        matrix = torch.tensor(
            [[np.cos(angle), -np.sin(angle), tx], [np.sin(angle), np.cos(angle), ty]], dtype=torch.float32
        )
        grid = torch.nn.functional.affine_grid(matrix.expand(3, 2, 3), list(stacked.shape), align_corners=False)
        expected.append(
            torch.nn.functional.grid_sample(
                stacked, grid, mode="bilinear", padding_mode="reflection", align_corners=False
            )
        )
    expected += [stacked.flip(3), stacked.flip(2)]
    want = torch.cat(expected).permute(0, 2, 3, 1).numpy()
    got_images, got_masks = augment(images, masks)
    np.testing.assert_allclose(got_images, want[..., :3], rtol=0, atol=2e-5)
    np.testing.assert_allclose(got_masks, want[..., 3], rtol=0, atol=2e-5)


def test_augmentation_order_and_directions():
    images = np.zeros((2, 20, 20, 3), np.float32)
    images[1, 4, 6] = 1
    masks = images[..., 0].copy()
    out, out_masks = augment(images, masks)
    assert out.shape == (transforms.AUGMENTATIONS * 2, 20, 20, 3)
    assert not out[::2].any()  # image 0 in all augmentations
    np.testing.assert_allclose(out[..., 0], out_masks)
    places = [tuple(np.argwhere(x > 0.99)[0]) for x in (out[1, ..., 0], *out[11::2, ..., 0])]
    # Identity; a tenth of half of 20 is one pixel, and +tx moves the content left; left-right flip; up-down flip.
    assert places == [(4, 6), (3, 5), (3, 7), (5, 7), (5, 5), (4, 13), (15, 6)]


def test_augmentation_keeps_its_input_and_needs_little_memory():
    images, masks = np.full((4, 64, 64, 3), 0.5, np.float32), np.ones((4, 64, 64), np.float32)
    tracemalloc.start()
    try:
        out, out_masks = augment(images, masks)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    np.testing.assert_allclose(out, 0.5, atol=1e-6)
    np.testing.assert_allclose(out_masks, 1, atol=1e-6)
    assert (images == 0.5).all()
    assert (masks == 1).all()
    assert peak < out.nbytes + out_masks.nbytes + 12 * images.nbytes


@pytest.mark.parametrize(
    "shapes", [((2, 8, 9, 3), (2, 8, 9)), ((2, 8, 8, 3), (1, 8, 8)), ((8, 8, 3), (8, 8)), ((2, 3, 8, 8), (2, 8, 8))]
)
def test_augmentation_refuses_other_shapes(shapes):
    with pytest.raises(ValueError, match=r"expected images \[n, size, size, 3\]"):
        augment(np.zeros(shapes[0], np.float32), np.zeros(shapes[1], np.float32))

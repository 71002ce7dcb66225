"""Opens images and masks as float arrays at the model's side, and augments few-shot images eleven-fold.

Pillow, NumPy and SciPy only, so that reader threads and processes need nothing else, but for DICOM files, which
scans.py opens. Which files to open is for bmad.py to say, batches are made in pipeline.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path

import numpy as np
from jaxtyping import Float32
from PIL import Image, ImageChops

# Rotations in radians, shifts in units of half the image side, flips; in the official order.
_ROTATIONS = (-np.pi / 8, -np.pi / 16, np.pi / 16, np.pi / 8)
_SHIFTS = ((0.1, 0.1), (-0.1, 0.1), (-0.1, -0.1), (0.1, -0.1))
AUGMENTATIONS = 1 + len(_ROTATIONS) + len(_SHIFTS) + 2
CLASSES = 15  # highest number of a class that a label map is known by; soft edges of a true mask go beyond it


def load_image(path: Path, size: int) -> Float32[np.ndarray, "size size 3"]:
    """An image as RGB in [0, 1], resized to size×size with Pillow's bicubic filter, as torchvision's Resize does.

    Resizing is done in 8 bits, as there. An image that has the size already is not resampled. Transparency is dropped,
    EXIF rotation not applied, of several frames the first taken. 16-bit grey images are brought to 8 bits as
    value / 257, rounded (of 16-bit colour Pillow keeps the upper 8). DICOM files (.dcm, .dicom) go through their own
    window to 8 bits, as `scans.open_scan` says.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is empty, truncated, no image, of a kind with no fixed range (float), or has too many pixels.
    """
    return image_array(_open(path), path, size)


def load_mask(path: Path, size: int) -> Float32[np.ndarray, "size size"]:
    """A mask in [0, 1], resized to size×size by nearest neighbour; binarising it is the loss's work.

    Masks whose only values are 0 and one other up to 127 are taken as 0 and 255, and 16-bit ones of no more than 255 as
    8-bit ones, since nothing else can be meant. Of a coloured mask the strongest channel counts.

    Raises:
      FileNotFoundError: no such file.
      ValueError: as `load_image`; or the mask holds numbers of several classes.
    """
    return _mask_array(_open(path), path, size)


def load_pair(
    image: Path, mask: Path | None, size: int
) -> tuple[Float32[np.ndarray, "size size 3"], Float32[np.ndarray, "size size"]]:
    """An image and its mask, as `load_image` and `load_mask` give them; a mask of zeros where there is none.

    Raises:
      FileNotFoundError: one of the files is not there.
      ValueError: as `load_image`; or the two differ in size on disk (both files and both sizes are named).
    """
    opened = _open(image)
    pixels = image_array(opened, image, size)
    if mask is None:
        return pixels, np.zeros((size, size), np.float32)
    opened_mask = _open(mask)
    _check_same_size(image, opened.size, mask, opened_mask.size)
    return pixels, _mask_array(opened_mask, mask, size)


def region_shares(mask: Float32[np.ndarray, "size size"]) -> Float32[np.ndarray, "size size"]:
    """1/area of the connected region that each anomalous pixel (above 0.5) belongs to, 0 on normal ones.

    Pixels that touch, by a corner too, are connected, as in the evaluation code of MVTec AD. The mean over regions of
    the share that is found is then one weighted count over pixels (docs/metrics.md).
    """
    from scipy.ndimage import label

    regions = np.zeros(mask.shape, np.int32)
    number = int(label(mask > 0.5, np.ones((3, 3)), regions))  # pyright: ignore[reportArgumentType]
    area = np.bincount(regions.ravel(), minlength=number + 1)
    share = 1 / np.maximum(area, 1)
    share[0] = 0
    return share.astype(np.float32)[regions]


def augment(
    images: Float32[np.ndarray, "n size size 3"], masks: Float32[np.ndarray, "n size size"]
) -> tuple[Float32[np.ndarray, "11n size size 3"], Float32[np.ndarray, "11n size size"]]:
    """The official eleven-fold augmentation: entry a·n + i is augmentation a of image i.

    Identity; rotations by −π/8, −π/16, π/16, π/8; shifts by a tenth of half the side along both diagonals, both ways;
    left-right flip; up-down flip. Rotated and shifted masks are left fractional.

    Raises:
      ValueError: the arrays are not square, or do not belong together.
    """
    if (
        images.ndim != 4
        or masks.shape != images.shape[:3]
        or images.shape[1] != images.shape[2]
        or images.shape[3] != 3
    ):
        raise ValueError(
            f"expected images [n, size, size, 3] and masks [n, size, size], got {images.shape} and {masks.shape}"
        )
    n, size = images.shape[:2]
    all_images = np.empty((AUGMENTATIONS * n, size, size, 3), np.float32)
    all_masks = np.empty((AUGMENTATIONS * n, size, size), np.float32)
    # One augmentation at a time: apart from the result, only four taps of n images are ever held.
    for a, (out_images, out_masks) in enumerate(zip(_variants(images), _variants(masks[..., None]), strict=True)):
        all_images[a * n : (a + 1) * n] = out_images
        all_masks[a * n : (a + 1) * n] = out_masks[..., 0]
    return all_images, all_masks


def _variants(x: Float32[np.ndarray, "n size size c"]) -> Iterator[Float32[np.ndarray, "n size size c"]]:
    yield x
    for angle in _ROTATIONS:
        yield _warp(x, angle, 0.0, 0.0)
    for tx, ty in _SHIFTS:
        yield _warp(x, 0.0, tx, ty)
    yield x[:, :, ::-1]
    yield x[:, ::-1]


def _warp(
    x: Float32[np.ndarray, "n size size c"], angle: float, tx: float, ty: float
) -> Float32[np.ndarray, "n size size c"]:
    """Bilinear sampling at [[cos, −sin, tx], [sin, cos, ty]] · (x, y, 1), coordinates −1 … 1 from edge to edge."""
    size = x.shape[1]
    axis = (2 * np.arange(size) + 1) / size - 1  # pixel centres
    u, v = axis[None, :], axis[:, None]
    across = _reflect(np.cos(angle) * u - np.sin(angle) * v + tx, size)  # [size, size], in pixels
    down = _reflect(np.sin(angle) * u + np.cos(angle) * v + ty, size)
    left, top = np.floor(across).astype(np.intp), np.floor(down).astype(np.intp)
    right, bottom = np.minimum(left + 1, size - 1), np.minimum(top + 1, size - 1)
    wx, wy = (across - left).astype(np.float32)[..., None], (down - top).astype(np.float32)[..., None]
    upper = x[:, top, left] * (1 - wx) + x[:, top, right] * wx
    lower = x[:, bottom, left] * (1 - wx) + x[:, bottom, right] * wx
    return upper * (1 - wy) + lower * wy


def _reflect(coordinate: Float32[np.ndarray, "..."], size: int) -> Float32[np.ndarray, "..."]:
    """−1 … 1 → pixel index, folded back about the pixel edges −½ and size − ½, then kept among the pixel centres."""
    from_edge = np.abs((coordinate + 1) * size / 2) % (2 * size)
    folded = np.where(from_edge > size, 2 * size - from_edge, from_edge)
    return np.clip(folded - 0.5, 0, size - 1)


def check_header(image: Path, mask: Path | None) -> None:
    """Raise as `load_pair` for what the headers of an image and its mask tell; pixels are not decoded."""
    size = _size(image)
    if mask is not None:
        _check_same_size(image, size, mask, _size(mask))


def _size(path: Path) -> tuple[int, int]:
    """Width and height of an image, by its header."""
    _check_there(path)
    if _is_dicom(path):
        from iqe_jax.data.scans import open_scan

        height, width = open_scan(path).size
        return width, height
    with _opened(path) as image:
        mode, size = image.mode, image.size
    _check_fixed_range(mode, path)
    return size


def _check_same_size(image: Path, size: tuple[int, int], mask: Path, mask_size: tuple[int, int]) -> None:
    if size != mask_size:
        raise ValueError(
            f"image {image} is {size[1]}×{size[0]} (height × width), its mask {mask} is "
            f"{mask_size[1]}×{mask_size[0]}: they must be equal"
        )


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"no image file at {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"image {path} is empty (0 bytes): get it again")
    if path.name.lower().endswith((".nii", ".nii.gz")):
        raise ValueError(
            f"image {path} is a volume: give its slices one by one, as iqe_jax.data.scans.open_scan(path).frame(i) "
            "reads them, or use predict.py"
        )


def _is_dicom(path: Path) -> bool:
    return path.suffix.lower() in (".dcm", ".dicom")


def _open(path: Path) -> Image.Image:
    """The decoded first frame. All decoding faults become one ValueError that names the file."""
    _check_there(path)
    if _is_dicom(path):
        from iqe_jax.data.scans import open_scan

        return Image.fromarray(np.round(open_scan(path).frame(0) * 255).astype(np.uint8))
    with _opened(path) as image:
        return decoded(image)


def decoded(image: Image.Image) -> Image.Image:
    """The first frame of an image that Pillow has opened, of a 16-bit TIFF whose 0 is white turned over.

    Raises whatever Pillow does where it is damaged: see `reading`.
    """
    image.load()
    return Image.fromarray(65535 - np.asarray(image)) if white_is_zero(image) else image.copy()


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image file whose header has been read."""
    with reading(path), Image.open(path) as image:
        # Pillow only warns between one and two times its limit; a warning is lost in a reader process.
        if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(
                f"{image.width}×{image.height} pixels, more than {Image.MAX_IMAGE_PIXELS}"
            )
        yield image


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Turn whatever goes wrong in here into one ValueError that names the image."""
    try:
        yield
    except (
        Exception
    ) as fault:  # Pillow's decoders raise OSError, SyntaxError, struct.error and more, and a warning may be an error
        raise ValueError(
            f"image {path} cannot be read ({fault}): it is damaged, cut short, or no image; get it again"
        ) from fault


def white_is_zero(image: Image.Image) -> bool:
    """Whether an open image is a 16-bit TIFF whose 0 is white, which Pillow turns over at 8 bits alone."""
    return image.mode.startswith("I;16") and getattr(image, "tag_v2", {}).get(262) == 0  # PhotometricInterpretation


def _check_fixed_range(mode: str, path: Path | str) -> None:
    if mode == "F":
        raise ValueError(f"image {path} holds floating-point values, whose range is unknown: save it with 8 or 16 bits")


def _eight_bit(image: Image.Image, path: Path | str) -> Image.Image:
    """16-bit grey values, which Pillow holds in modes I;16 and I, at 8 bits; other modes as they are."""
    _check_fixed_range(image.mode, path)
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"image {path} holds values from {values.min()} to {values.max()}: save it with 8 or 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def image_array(image: Image.Image, path: Path | str, size: int) -> Float32[np.ndarray, "size size 3"]:
    """An image that is open already, as `load_image` would give it; `path` is what errors call it."""
    image = _eight_bit(image, path)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB gives the same colours, and a warning
    return _scaled(image.convert("RGB"), size, Image.Resampling.BICUBIC)


def _mask_array(mask: Image.Image, path: Path, size: int) -> Float32[np.ndarray, "size size"]:
    if mask.mode.startswith("I") and (numbers := np.asarray(mask)).min() >= 0 and numbers.max() <= 255:
        mask = Image.fromarray(numbers.astype(np.uint8))
    mask = _eight_bit(mask, path)
    # By Pillow, as this is on the way of every mask that is decoded: of colours the strongest channel.
    grey = reduce(ImageChops.lighter, mask.convert("L" if mask.mode in ("1", "L") else "RGB").split())
    found = [value for value, pixels in enumerate(grey.histogram()) if value and pixels]
    if len(found) == 1 and found[0] <= 127:
        grey = grey.point([0] + 255 * [255])
    if len(found) > 1 and found[-1] <= CLASSES:
        raise ValueError(
            f"mask {path} holds the values {', '.join(map(str, found))} of 255, as label maps do: save it as 0 where "
            "the image is normal and 255 where it is not"
        )
    return _scaled(grey, size, Image.Resampling.NEAREST)


def _scaled(image: Image.Image, size: int, resample: Image.Resampling) -> Float32[np.ndarray, "size size ..."]:
    if image.size != (size, size):
        image = image.resize((size, size), resample)
    return np.asarray(image, np.float32) / np.float32(255)

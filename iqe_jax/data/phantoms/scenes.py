"""What the tiny CLIP is trained on: generic scenes with captions, and normal anatomy of the modalities with captions.

A scene is a textured background with a few shapes that differ in size, tone, edge, filling and place. Anatomy is one
such background: shapes drawn on it are what the word `abnormal` is learned from. None of the phantoms' own anomalies is
ever drawn or named here, and nothing reads the sets: seeds come from another sequence.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from PIL import Image
from scipy.ndimage import gaussian_filter

from . import head_body, retina, tissue
from .canvas import noise

SIDE = 96
"""Pictures are this many pixels wide and high."""
SHAPES_ON_ANATOMY = 0.7
"""Share of the pictures of anatomy that carry generic shapes."""
REGIONS = 8
"""At most this many captioned regions per picture."""

MODALITIES = {
    "brain mr": head_body.brain,
    "abdominal ct": head_body.liver,
    "retinal oct": retina.resc,
    "retina oct scan": retina.oct17,
    "chest x-ray": tissue.chest,
    "histology slide": tissue.his,
}
SHAPES = ("disc", "oval", "ring", "blob", "square", "bar", "crescent", "cluster", "curve", "star")
BACKGROUNDS = ("plain", "shaded", "noisy", "cloudy", "striped", "checkered", "dotted", "layered", "cellular")
TONES = {-2: "dark", -1: "faint dark", 1: "faint bright", 2: "bright"}
COLOURS = {
    "red": (0.85, 0.3, 0.3),
    "blue": (0.3, 0.4, 0.9),
    "green": (0.3, 0.75, 0.35),
    "purple": (0.55, 0.3, 0.7),
    "pink": (0.95, 0.6, 0.75),
}

Plane = Float[np.ndarray, "side side"]
_AXIS = ((np.arange(SIDE, dtype=np.float32) + 0.5) * (2.0 / SIDE) - 1.0).astype(np.float32)


@dataclass
class Scene:
    """A picture in [0, 1], its caption, and phrases that describe parts of it with the coverage of each part."""

    image: Float[np.ndarray, "side side 3"]
    caption: str
    regions: list[tuple[str, Plane]]


def draw(rng: np.random.Generator, anatomy_share: float = 0.7) -> Scene:
    """One training picture: normal anatomy with probability `anatomy_share`, else a generic scene."""
    return anatomy(rng) if rng.random() < anatomy_share else generic(rng)


def anatomy(rng: np.random.Generator) -> Scene:
    """Normal anatomy of a random modality, captioned with modality, normal attributes and normal parts.

    Some carry the generic scenes' shapes: anatomy is one more background, and what is not part of it has other words.
    """
    modality = list(MODALITIES)[int(rng.integers(len(MODALITIES)))]
    drawing = MODALITIES[modality](rng, False)
    words = list(drawing.words)
    rng.shuffle(words)
    article = "an" if modality[0] == "a" else "a"
    starts = (f"a photo of {article} {modality}", f"{article} {modality}", f"a photo of a normal {modality}")
    with_shapes = rng.random() < SHAPES_ON_ANATOMY
    caption = starts[int(rng.integers(2 if with_shapes else 3))]
    image = np.clip(np.stack([_resize(drawing.image[..., c]) for c in range(3)], -1), 0.0, 1.0)
    parts = [(name, _resize(cover)) for name, cover in drawing.parts.items()]
    # Tone in the words of the generic scenes, so that the two kinds of picture share a language.
    where = f" in {article} {modality}" if rng.random() < 0.5 else ""
    regions = [(f"{_tone(image.mean(2), cover)} {name}{where}", cover) for name, cover in parts if cover.max() > 0.4]
    rng.shuffle(regions)
    covered = np.zeros((SIDE, SIDE), np.float32)
    body = (gaussian_filter(image.mean(2), 4.0) > 0.08).astype(np.float32)
    if with_shapes:
        caption, image, regions, covered = _with_shapes(rng, caption, image, body, regions)
    else:
        caption += "".join(f", {word}" for word in words[:3])
    # What a real CLIP has from its reading, this one has to learn somewhere: that `abnormal` is said of what does not
    # belong. The name is left open half of the time, as in the method's templates.
    name = modality if rng.random() < 0.5 else "<|class|>"
    regions.insert(0, (f"a photo of a normal {name}.", body * (1.0 - covered)))
    if with_shapes:
        regions.insert(0, (f"a photo of a abnormal {name}.", covered))
    return Scene(image, caption, regions[:REGIONS])


def _with_shapes(
    rng: np.random.Generator, caption: str, image: np.ndarray, body: Plane, regions: list[tuple[str, Plane]]
) -> tuple[str, np.ndarray, list[tuple[str, Plane]], Plane]:
    """Draw one to three generic shapes on a picture of anatomy; also returns what they cover."""
    grey = image.mean(2)
    changed, phrases, free = grey.copy(), [], body.copy()
    for _ in range(int(rng.integers(1, 4))):
        _add_object(rng, changed, free, phrases)
    image = np.clip(image + (changed - grey)[..., None], 0.0, 1.0)
    covered = np.clip(sum((cover for _, _, cover in phrases), np.zeros_like(grey)), 0.0, 1.0)
    caption += "".join(f"{' and' if i else ' with'} {text} {place}" for i, (text, place, _) in enumerate(phrases[:2]))
    regions = [(text, cover) for text, _, cover in phrases] + [
        (text, cover * (1.0 - covered)) for text, cover in regions
    ]
    return caption, image, regions, covered


def _tone(image: Plane, cover: Plane) -> str:
    """The tone of the covered part against its surroundings, in words."""
    weight = np.maximum(cover, 0.0)
    near = np.clip(gaussian_filter(weight, 5.0) * 4.0, 0.0, 1.0) * (1.0 - np.clip(weight * 2.0, 0.0, 1.0))
    step = float((image * weight).sum() / weight.sum() - (image * near).sum() / max(float(near.sum()), 1e-6))
    return TONES[(1 if step > 0 else -1) * (1 if abs(step) < 0.15 else 2)] if abs(step) > 0.04 else "gray"


def generic(rng: np.random.Generator) -> Scene:
    """Shapes on a textured background, captioned with their attributes and places."""
    kind = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
    image, base = _background(rng, kind)
    free = np.ones((SIDE, SIDE), np.float32)
    phrases: list[tuple[str, str, Plane]] = []
    frame = rng.random() < 0.35
    if frame:
        # The scene inside a large outline, like a body in its field of view, sometimes with a rim.
        outline = _shape(rng, "blob" if rng.random() < 0.4 else "disc", 0.0, 0.0, rng.uniform(0.7, 0.95))
        rim = np.clip(1.0 - np.abs(gaussian_filter(outline, rng.uniform(0.5, 2.0)) - 0.5) * 3.0, 0.0, 1.0)
        image = image * outline + float(rng.choice([0.0, 0.05, 0.9])) * (1 - outline)
        if rng.random() < 0.5:
            image += rim * (rng.uniform(0.0, 1.0) - image)
        free = outline * (1.0 - rim)
    for _ in range(int(rng.integers(1, 5))):
        _add_object(rng, image, free, phrases)
    colour = ""
    picture = np.repeat(image[..., None], 3, 2)
    if rng.random() < 0.3:
        colour = list(COLOURS)[int(rng.integers(len(COLOURS)))]
        picture = 1 - (1 - picture) * (1 - np.array(COLOURS[colour], np.float32) * rng.uniform(0.5, 1.0))
    picture = picture * rng.uniform(0.75, 1.1) + rng.uniform(-0.08, 0.08)
    picture += rng.uniform(0.0, 0.08) * rng.standard_normal(picture[..., :1].shape, dtype=np.float32)
    picture = np.clip(picture, 0.0, 1.0) ** np.float32(rng.uniform(0.75, 1.35))
    ground = f"{base} {kind} {colour + ' ' if colour else ''}background"
    named = [f"{text} {place}" for text, place, _ in phrases[:3]]
    caption = " and ".join(named) + f", on a {ground}" + (", in a frame" if frame else "")
    regions = [(text, cover) for text, _, cover in phrases] + [(ground, free)]
    return Scene(picture.astype(np.float32), caption, regions[-REGIONS:])


def _add_object(rng: np.random.Generator, image: Plane, free: Plane, phrases: list[tuple[str, str, Plane]]) -> None:
    """Draw one shape where there is room, in place, and append its phrase, place and coverage."""
    shape = SHAPES[int(rng.integers(len(SHAPES)))]
    size = float(np.exp(rng.uniform(np.log(0.07), np.log(0.42))))
    for _ in range(6):
        cx, cy = rng.uniform(-0.85, 0.85, 2)
        cover = _shape(rng, shape, cx, cy, size)
        if (cover * free).sum() > 0.85 * cover.sum():
            break
    else:
        return
    cover = cover * free
    size_word = "tiny" if size < 0.11 else "small" if size < 0.18 else "medium" if size < 0.28 else "large"
    around = float((image * cover).sum() / max(cover.sum(), 1e-6))
    strength = rng.uniform(0.12, 0.5)
    sign = 1 if (rng.random() < 0.5 and around + strength < 1.0) or around - strength < 0.0 else -1
    tone = TONES[sign * (1 if strength < 0.2 else 2)]
    mottled = rng.random() < 0.25
    fill = around + sign * strength + (0.12 * noise(rng, 22, size=SIDE) if mottled else 0.0)
    if rng.random() < 0.3:
        fill = fill + 0.7 * (image - around)  # the background's texture shows through
    image += cover * (fill - image)
    text = f"a {size_word} {tone} {'mottled ' if mottled else ''}{shape}"
    phrases.append((text, _place(cx, cy), cover))
    free *= 1.0 - np.clip(cover * 2.0, 0.0, 1.0)


def _place(cx: float, cy: float) -> str:
    """A place in words, on a 3 × 3 grid."""
    row = "upper" if cy < -0.3 else "lower" if cy > 0.3 else ""
    column = "left" if cx < -0.3 else "right" if cx > 0.3 else ""
    if row and column:
        return f"in the {row} {column}"
    if row:
        return "at the top" if row == "upper" else "at the bottom"
    return f"on the {column}" if column else "in the center"


def _background(rng: np.random.Generator, kind: str) -> tuple[Plane, str]:
    """A background of the given kind, and the word for its brightness."""
    level = rng.uniform(0.12, 0.85)
    word = "black" if level < 0.25 else "gray" if level < 0.6 else "white"
    contrast = rng.uniform(0.05, 0.2)
    angle, pitch = rng.uniform(0, 3.14), rng.uniform(0.1, 0.4)
    x, y = _AXIS[None, :] + 0.04 * noise(rng, 4, size=SIDE), _AXIS[:, None] + 0.04 * noise(rng, 4, size=SIDE)
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    wave_u, wave_v = np.sin(u * (6.283 / pitch)), np.sin(v * (6.283 / pitch))
    if kind == "plain":
        pattern = np.zeros((SIDE, SIDE), np.float32)
    elif kind == "shaded":
        pattern = 1.4 * u + 0.4 * noise(rng, 3, size=SIDE)
    elif kind == "noisy":
        pattern = noise(rng, int(rng.integers(30, 96)), size=SIDE)
    elif kind == "cloudy":
        pattern = noise(rng, int(rng.integers(5, 14)), size=SIDE)
    elif kind == "striped":
        pattern = np.clip(wave_u * rng.uniform(1, 4), -1, 1)
    elif kind == "checkered":
        pattern = np.sign(wave_u * wave_v)
    elif kind == "dotted":
        pattern = 2.0 * np.clip(wave_u * wave_v * 3 - rng.uniform(0.5, 1.5), 0, 1) * rng.choice([-1, 1])
    elif kind == "layered":
        depth = (
            y + rng.uniform(-0.3, 0.3) * x + rng.uniform(-0.3, 0.3) * x * x + 0.06 * noise(rng, 5, rows=2, size=SIDE)
        )
        steps = rng.standard_normal(int(rng.integers(4, 12)), dtype=np.float32)
        pattern = np.interp(depth, np.linspace(-1.4, 1.4, len(steps)), steps).astype(np.float32)
        if rng.random() < 0.5:
            pattern = steps[np.clip(((depth + 1.4) / 2.8 * len(steps)).astype(int), 0, len(steps) - 1)]
    else:  # cellular: many round cells of one size
        pattern = np.zeros((SIDE, SIDE), np.float32)
        radius = rng.uniform(0.04, 0.09)
        step = 2.4 * radius
        cells_x = x / step - np.round(x / step) + 0.25 * noise(rng, 12, size=SIDE)
        cells_y = y / step - np.round(y / step) + 0.25 * noise(rng, 12, size=SIDE)
        pattern = 3.0 * np.clip((0.42 - np.hypot(cells_x, cells_y)) * 6.0, 0, 1) * rng.choice([-1, 1])
    image = level + contrast * pattern + 0.02 * noise(rng, 40, size=SIDE)
    return np.clip(image, 0.0, 1.0).astype(np.float32), word


def _shape(rng: np.random.Generator, kind: str, cx: float, cy: float, size: float) -> Plane:
    """Coverage of one shape of about the radius `size`, with a sharp or a soft edge."""
    angle = rng.uniform(0, 6.28)
    x, y = _AXIS[None, :] - np.float32(cx), _AXIS[:, None] - np.float32(cy)
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    radius = np.hypot(u, v)
    soft = 0.03 if rng.random() < 0.6 else rng.uniform(0.2, 0.6) * size + 0.03
    if kind == "disc":
        distance = radius - size
    elif kind == "oval":
        distance = (np.hypot(u, v * rng.uniform(1.5, 2.4)) - size) * 0.7
    elif kind == "ring":
        distance = np.abs(radius - size * 0.8) - max(0.22 * size, 0.025)
        soft = min(soft, 0.3 * size)
    elif kind == "blob":
        distance = radius - size * (1.0 + rng.uniform(0.08, 0.2) * noise(rng, 5, size=SIDE))
    elif kind == "square":
        distance = np.maximum(np.abs(u), np.abs(v)) - size * 0.85
    elif kind == "bar":
        distance = np.maximum(np.abs(u) - size * 1.3, np.abs(v) - max(size * 0.28, 0.03))
    elif kind == "crescent":
        distance = np.maximum(radius - size, size * 0.8 - np.hypot(u - 0.5 * size, v))
    elif kind == "cluster":
        dots = [rng.normal(0.0, 0.55 * size, 2) for _ in range(int(rng.integers(4, 9)))]
        distance = np.min([np.hypot(u - a, v - b) for a, b in dots], axis=0) - max(0.22 * size, 0.03)
        soft = 0.03
    elif kind == "curve":
        bend = v - rng.uniform(-0.9, 0.9) * u * u / size - 0.15 * size * np.sin(u * 4 / size)
        distance = np.maximum(np.abs(bend) - max(0.09 * size, 0.022), np.abs(u) - 1.4 * size)
        soft = 0.03
    else:  # star
        distance = radius - size * (0.75 + 0.3 * np.cos(np.arctan2(v, u) * int(rng.integers(4, 7))))
    return np.clip(0.5 - distance / soft, 0.0, 1.0).astype(np.float32)


def _resize(plane: Plane) -> Plane:
    """A plane of any size to SIDE × SIDE, as the project's images are resized."""
    return np.asarray(
        Image.fromarray(np.ascontiguousarray(plane, np.float32)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    )

"""The drawing board of the phantom renderers: coordinates, soft shapes, noise, and the last steps of an imaging chain.

It knows no anatomy: `head_body.py`, `retina.py` and `tissue.py` draw with it, and `scenes.py` borrows its noise.
"""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from scipy.ndimage import gaussian_filter

SIZE = 128
PIXEL = 2.0 / SIZE
"""Width of one pixel in canvas units, which run from -1 to 1 across the picture."""

Plane = Float[np.ndarray, "height width"]

_AXIS = ((np.arange(SIZE, dtype=np.float32) + 0.5) * PIXEL - 1.0).astype(np.float32)


def noise(rng: np.random.Generator, cells: int, rows: int | None = None, size: int = SIZE) -> Plane:
    """Smooth Gaussian noise of about unit spread with `cells` features across (and `rows` down) a size × size plane."""
    coarse = rng.standard_normal((rows or cells, cells), dtype=np.float32)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)) * 1.25


def cover(distance: Plane, soft: float = 1.5 * PIXEL) -> Plane:
    """Signed distance (negative inside) to coverage in [0, 1], with an edge `soft` canvas units wide."""
    return np.clip(0.5 - distance / soft, 0.0, 1.0)


@dataclass
class Drawing:
    """What a renderer returns before encoding: a float picture, the support of its anomalies, its normal contents.

    `parts` maps the name of a normal structure to its coverage, `words` lists normal attributes; both serve captions.
    """

    image: Float[np.ndarray, "height width channel"]
    mask: Bool[np.ndarray, "height width"]
    parts: dict[str, Plane] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)

    def encode(self) -> tuple[UInt8[np.ndarray, "height width 3"], UInt8[np.ndarray, "height width"]]:
        """The picture as 8-bit RGB and the mask as {0, 255}."""
        return (self.image * 255.0 + 0.5).astype(np.uint8), self.mask.astype(np.uint8) * 255


class Canvas:
    """A grey float picture over gently warped, tilted and shifted coordinates, so that nothing is quite regular."""

    def __init__(self, rng: np.random.Generator, tilt: float = 0.1, shift: float = 0.04, warp: float = 0.03):
        self.rng = rng
        angle = rng.normal(0.0, tilt)
        x = _AXIS[None, :] + rng.normal(0.0, shift) + warp * noise(rng, 5)
        y = _AXIS[:, None] + rng.normal(0.0, shift) + warp * noise(rng, 5)
        c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        self.x, self.y = c * x - s * y, s * x + c * y
        self.image = np.zeros((SIZE, SIZE), np.float32)
        self.mask = np.zeros((SIZE, SIZE), bool)
        self.parts: dict[str, Plane] = {}
        self.words: list[str] = []

    def uniform(self, low: float, high: float) -> float:
        """One uniform draw."""
        return float(self.rng.uniform(low, high))

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return bool(self.rng.random() < probability)

    def ellipse(
        self, cx: float, cy: float, rx: float, ry: float, angle: float = 0.0, wobble: float = 0.0, cells: int = 6
    ) -> Plane:
        """Signed distance to an ellipse whose edge wanders by the fraction `wobble` of its radius."""
        c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        dx, dy = self.x - np.float32(cx), self.y - np.float32(cy)
        u, v = (c * dx + s * dy) / np.float32(rx), (c * dy - s * dx) / np.float32(ry)
        rho = np.sqrt(u * u + v * v) - 1.0
        if wobble:
            rho = rho + wobble * noise(self.rng, cells)
        return rho * np.float32(min(rx, ry))

    def paint(self, coverage: Plane, value: float | Plane, name: str | None = None) -> None:
        """Blend `value` in where `coverage` says; `name` records the structure as a part, hiding those beneath it."""
        self.image += coverage * (value - self.image)
        if name:
            self.parts = {other: before * (1.0 - coverage) for other, before in self.parts.items()}
            self.parts[name] = np.maximum(self.parts[name], coverage) if name in self.parts else coverage

    def spot(self, allowed: Bool[np.ndarray, "height width"]) -> tuple[float, float]:
        """Canvas coordinates of a random allowed pixel; the middle of the picture where none is."""
        at = np.flatnonzero(allowed)
        if not len(at):
            return 0.0, 0.0
        index = at[int(self.rng.integers(len(at)))]
        return float(self.x.flat[index]), float(self.y.flat[index])

    def mark(self, coverage: Plane, threshold: float = 0.5) -> None:
        """Add what is covered to the mask of the anomaly."""
        self.mask |= coverage > threshold

    def finish(
        self,
        blur: tuple[float, float],
        grain: tuple[float, float],
        bias: float,
        peak: tuple[float, float],
        floor: tuple[float, float] = (0.0, 0.03),
        gamma: tuple[float, float] = (0.8, 1.25),
    ) -> Drawing:
        """Point spread, field bias, noise, then a display window as a reader of the modality might choose it."""
        image = gaussian_filter(self.image, self.uniform(*blur))
        image *= 1.0 + self.uniform(0.0, bias) * (noise(self.rng, 3) * 0.5 + self.uniform(-1, 1) * self.x)
        strength = self.uniform(*grain)
        image += strength * (
            self.rng.standard_normal(image.shape, dtype=np.float32) * 0.8 + noise(self.rng, SIZE // 2) * 0.6
        )
        low, high = np.percentile(image, [0.5, 99.0])
        base = self.uniform(*floor)
        image = base + (np.maximum(image - low, 0.0) / (high - low)) * (self.uniform(*peak) - base)
        image = np.clip(image, 0.0, 1.0) ** np.float32(self.uniform(*gamma))
        return Drawing(np.repeat(image[..., None], 3, axis=2), self.mask, self.parts, self.words)

"""Two retinal OCT sets: RESC-like scans with pixel masks, and OCT2017-like scans (tilted frames, no masks).

A scan is a stack of layer boundaries, each a curve over the columns; disease bends curves or opens gaps between them.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from .canvas import PIXEL, SIZE, Canvas, Drawing, Plane, cover, noise

Curve = Float[np.ndarray, " width"]

_COLUMNS = ((np.arange(SIZE, dtype=np.float32) + 0.5) * PIXEL - 1.0).astype(np.float32)
_ROWS = _COLUMNS[:, None]
_SHARES = {"ganglion cells": 0.3, "inner nuclear": 0.14, "outer plexiform": 0.08, "outer nuclear": 0.28}


@dataclass
class _Scan:
    """The curves of one scan, in canvas units from the top: the retina's surface and outer end, pigment epithelium."""

    surface: Curve
    outer: Curve
    pigment: Curve
    base: Curve


def _curve(rng: np.random.Generator, cells: int) -> Curve:
    """A smooth random curve of about unit spread."""
    return noise(rng, cells, rows=1)[0]


def _bump(center: float, width: float, height: float, power: float = 2.0) -> Curve:
    """A dome over the columns."""
    return height * np.exp(-(np.abs((_COLUMNS - center) / width) ** power)).astype(np.float32)


def _between(top: Curve | float, bottom: Curve | float, soft: float = 1.2 * PIXEL) -> Plane:
    """Coverage of the rows between two curves."""
    return np.clip(0.5 + (_ROWS - top) / soft, 0, 1) * np.clip(0.5 + (bottom - _ROWS) / soft, 0, 1)


def resc(rng: np.random.Generator, anomalous: bool) -> Drawing:
    """A RESC-like scan: strong speckle, dark vitreous, gentle curvature."""
    canvas = Canvas(rng, tilt=0.0, shift=0.0, warp=0.0)
    kinds = ("subretinal", "detachment", "both", "oedema") if anomalous else ()
    _retina(canvas, kinds, tilt=0.12, thick=(0.34, 0.46))
    return canvas.finish((0.45, 0.8), (0.05, 0.11), 0.3, (0.65, 1.05), gamma=(0.7, 1.2))


def oct17(rng: np.random.Generator, anomalous: bool) -> Drawing:
    """An OCT2017-like scan: finer grain, stronger tilt, often with the white corners of a rotated frame."""
    canvas = Canvas(rng, tilt=0.0, shift=0.0, warp=0.0)
    kinds = ("drusen", "membrane", "oedema", "subretinal") if anomalous else ()
    tilt = _retina(canvas, kinds, tilt=0.3, thick=(0.28, 0.4))
    drawing = canvas.finish((0.35, 0.65), (0.03, 0.08), 0.35, (0.6, 1.0), gamma=(0.6, 1.1))
    if canvas.chance(0.4):
        side = _COLUMNS[None, :] * np.float32(tilt) * 1.3
        cut = canvas.uniform(0.72, 0.98)
        corner = (_ROWS - side < -cut) | (_ROWS - side > cut)
        drawing.image[corner & ~drawing.mask] = 1.0
    return drawing


def _retina(canvas: Canvas, kinds: tuple[str, ...], tilt: float, thick: tuple[float, float]) -> float:
    """Draw one scan, with one of the given kinds of disease if there are any; return its tilt."""
    rng, uniform, chance = canvas.rng, canvas.uniform, canvas.chance
    slope = float(np.clip(rng.normal(0.0, tilt), -0.45, 0.45))
    base = uniform(0.1, 0.4) + slope * _COLUMNS + uniform(-0.1, 0.16) * (_COLUMNS**2 - 0.4) + 0.012 * _curve(rng, 6)
    fovea = uniform(-0.45, 0.45)
    pit = _bump(fovea, uniform(0.14, 0.3), uniform(0.03, 0.22)) if chance(0.75) else np.zeros(SIZE, np.float32)
    canvas.words.append(
        "no foveal pit" if not pit.any() else "deep foveal pit" if pit.max() > 0.12 else "shallow foveal pit"
    )
    canvas.words.append("tilted right" if slope > 0.08 else "tilted left" if slope < -0.08 else "level")
    thickness = uniform(*thick) + 0.05 * _bump(fovea - 0.45, 0.3, 1.0) + 0.05 * _bump(fovea + 0.45, 0.3, 1.0) - pit
    scan = _Scan(base - thickness, base - 0.045, base.copy(), base)

    kind = kinds[int(rng.integers(len(kinds)))] if kinds else ""
    fluid = _deform(canvas, scan, kind)
    ganglion = uniform(0.42, 0.58)
    vitreous = uniform(0.02, 0.1)
    canvas.image[:] = vitreous
    canvas.paint(_between(-2.0, scan.surface), vitreous, "vitreous")
    if chance(0.35):
        # The posterior hyaloid: a thin bright strand above the retina.
        strand = scan.surface - uniform(0.05, 0.3) - 0.04 * np.abs(_curve(rng, 4))
        canvas.paint(_between(strand, strand + 0.02) * uniform(0.3, 0.8), 0.5, "hyaloid strand")

    choroid = uniform(0.3, 0.55)
    fall = np.exp(-np.maximum(_ROWS - base, 0.0) / uniform(0.18, 0.5))
    pores = np.clip(noise(rng, 22, rows=14) * 0.5 - 0.3, 0.0, 0.6)
    canvas.paint(_between(base, 3.0), choroid * fall * (1.0 - pores) + 0.03, "choroid")
    for _ in range(int(rng.integers(2, 8))):
        # Large choroidal vessels: dark ovals like cysts, but below the pigment epithelium.
        vx = uniform(-0.95, 0.95)
        vy = float(np.interp(vx, _COLUMNS, base)) + uniform(0.09, 0.22)
        shape = canvas.ellipse(vx, vy, uniform(0.04, 0.11), uniform(0.02, 0.05), wobble=0.15)
        canvas.paint(
            cover(shape, 0.04) * uniform(0.5, 0.9) * _between(base + 0.04, 3.0), choroid * 0.25, "choroidal vessel"
        )

    _layers(canvas, scan, ganglion)
    canvas.paint(_between(scan.outer, scan.outer + 0.022) * 0.95, uniform(0.7, 0.9), "photoreceptor line")
    canvas.paint(_between(scan.outer + 0.02, scan.pigment), uniform(0.45, 0.6))
    if kind:
        _disease(canvas, scan, kind, fluid, vitreous)
    canvas.paint(_between(scan.pigment - 0.01, scan.pigment + 0.045), uniform(0.8, 1.0), "pigment epithelium")
    for _ in range(int(rng.integers(0, 5))):
        # A vessel in the surface layer shades everything beneath it.
        vx, width = uniform(-0.95, 0.95), uniform(0.01, 0.035)
        shade = np.clip(1.0 - np.abs(_COLUMNS - vx) / width, 0, 1)[None, :] * uniform(0.3, 0.75)
        canvas.image *= 1.0 - shade * _between(scan.surface + 0.05, 3.0)
        top = float(np.interp(vx, _COLUMNS, scan.surface)) + 0.03
        canvas.paint(cover(canvas.ellipse(vx, top, width, 0.03)), uniform(0.75, 1.0), "vessel")
    return slope


def _layers(canvas: Canvas, scan: _Scan, ganglion: float) -> None:
    """Paint the inner layers between the surface and the photoreceptor line, each a fixed share of the thickness."""
    uniform = canvas.uniform
    total = np.maximum(scan.outer - scan.surface, 0.02)
    levels = {
        "ganglion cells": ganglion,
        "inner nuclear": ganglion - uniform(0.14, 0.22),
        "outer plexiform": ganglion + uniform(0.0, 0.1),
        "outer nuclear": ganglion - uniform(0.18, 0.28),
    }
    fibres = np.clip(uniform(0.12, 0.22) + uniform(-0.1, 0.1) * _COLUMNS, 0.06, 0.3).astype(np.float32)
    top = scan.surface
    bottom = top + fibres * total
    canvas.paint(_between(top, bottom), ganglion + uniform(0.2, 0.38), "nerve fibres")
    scale = (1.0 - fibres) / sum(_SHARES.values())
    for name, share in _SHARES.items():
        top, bottom = bottom, bottom + share * scale * total
        canvas.paint(_between(top, bottom), levels[name], name)


def _deform(canvas: Canvas, scan: _Scan, kind: str) -> tuple[float, float]:
    """Bend the curves for the given disease, in place; return the place and width of its main part."""
    rng, uniform = canvas.rng, canvas.uniform
    center, width = uniform(-0.5, 0.5), uniform(0.14, 0.34)
    lift = np.zeros(SIZE, np.float32)
    if kind in ("detachment", "both"):
        rise = _bump(
            center - (0.35 if kind == "both" else 0.0), uniform(0.1, 0.26), uniform(0.09, 0.22), uniform(2, 3.5)
        )
        scan.pigment -= rise
        lift += rise
    if kind in ("subretinal", "both"):
        rise = _bump(center + (0.2 if kind == "both" else 0.0), width, uniform(0.09, 0.24), uniform(2, 3))
        lift += rise
    if kind == "drusen":
        rise = np.zeros(SIZE, np.float32)
        for _ in range(int(rng.integers(3, 9))):
            rise = np.maximum(rise, _bump(uniform(-0.8, 0.8), uniform(0.03, 0.1), uniform(0.05, 0.13)))
        scan.pigment -= rise
        lift += rise
    if kind == "membrane":
        scan.pigment -= _bump(center, width * 0.7, uniform(0.03, 0.1))
        lift += _bump(center, width, uniform(0.12, 0.26))
    scan.outer -= lift
    # The surface follows only in part: the tissue above is pressed as well as lifted.
    scan.surface -= lift * uniform(0.35, 0.9)
    if kind == "oedema":
        scan.surface -= _bump(center, width * 1.4, uniform(0.03, 0.16))
    scan.surface[:] = np.minimum(scan.surface, scan.outer - 0.1)
    return center, width


def _disease(canvas: Canvas, scan: _Scan, kind: str, main: tuple[float, float], vitreous: float) -> None:
    """Fill the gaps that the bent curves opened, add cysts, and mark all of it."""
    rng, uniform = canvas.rng, canvas.uniform
    center, width = main
    below, above = _between(scan.pigment + 0.03, scan.base + 0.01), _between(scan.outer + 0.03, scan.pigment - 0.005)
    if kind in ("detachment", "both", "drusen", "membrane"):
        raised = below * ((scan.base - scan.pigment) > 0.035)
        filling = uniform(0.4, 0.65) if kind == "drusen" else uniform(0.12, 0.4)
        canvas.paint(raised, filling + 0.04 * noise(rng, 30))
        canvas.mark(raised)
    if kind in ("subretinal", "both"):
        gap = above * ((scan.pigment - scan.outer) > 0.07)
        canvas.paint(gap, vitreous + uniform(0.0, 0.08))
        canvas.mark(gap)
    if kind == "membrane":
        gap = above * ((scan.pigment - scan.outer) > 0.07)
        canvas.paint(gap, uniform(0.62, 0.85) + 0.1 * noise(rng, 24))
        canvas.mark(gap)
    if kind == "oedema":
        for _ in range(int(rng.integers(3, 9))):
            cx = center + uniform(-1.0, 1.0) * width * 1.2
            top = float(np.interp(cx, _COLUMNS, scan.surface))
            tall = float(np.interp(cx, _COLUMNS, scan.outer)) - top
            shape = canvas.ellipse(
                cx,
                top + tall * uniform(0.42, 0.75),
                uniform(0.04, 0.12),
                min(uniform(0.04, 0.11), 0.28 * tall),
                wobble=0.08,
            )
            hole = cover(shape)
            canvas.paint(hole, vitreous + uniform(0.0, 0.06))
            canvas.mark(hole)

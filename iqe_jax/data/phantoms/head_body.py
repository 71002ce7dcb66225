"""Two cross-sections with pixel masks: axial brain MR and axial liver CT.

Each renderer first draws an anatomy that varies by itself, look-alikes of lesions included, then lesions if asked.
"""

import numpy as np
from scipy.ndimage import gaussian_filter

from .canvas import PIXEL, Canvas, Drawing, Plane, cover, noise


def brain(rng: np.random.Generator, anomalous: bool) -> Drawing:
    """An axial brain slice: cortex, white matter, sulci, ventricles, vessels, sometimes skull and scalp."""
    canvas = Canvas(rng, tilt=0.12, shift=0.03, warp=0.02)
    uniform, chance = canvas.uniform, canvas.chance
    rx, ry = uniform(0.60, 0.72), uniform(0.76, 0.87)
    head = canvas.ellipse(0.0, 0.0, rx, ry, wobble=0.02)
    inside, depth = cover(head), -head
    white = uniform(0.42, 0.58)
    # Grey matter is the brighter tissue in FLAIR and T2, the darker one in T1.
    grey = white + (uniform(0.06, 0.18) if chance(0.65) else -uniform(0.05, 0.14))
    fluid = uniform(0.05, 0.18)

    if chance(0.4):
        gap, thick = uniform(0.035, 0.06), uniform(0.02, 0.05)
        scalp = cover(np.abs(head - gap - thick) - thick / 2) * uniform(0.35, 0.95)
        canvas.paint(scalp, 1.0, "scalp and skull")
        canvas.words.append("with skull")
    folds = noise(rng, 17)
    canvas.paint(inside, white + 0.02 * noise(rng, 12), "white matter")
    cortex = inside * np.clip((uniform(0.10, 0.16) + 0.055 * folds - depth) / 0.03, 0.0, 1.0)
    canvas.paint(cortex, grey + 0.02 * noise(rng, 20), "cortex")
    atrophy = uniform(0.0, 1.0)
    ridge = np.abs(noise(rng, 13)) + np.clip(depth - 0.06, 0.0, 1.0) * (5.0 - 2.5 * atrophy)
    sulci = inside * np.clip((0.16 + 0.16 * atrophy - ridge) / 0.1, 0.0, 1.0)
    canvas.paint(sulci, fluid, "sulci")
    canvas.paint(
        cover(np.abs(canvas.x + 0.012 * noise(rng, 6)) - 0.008) * inside * 0.8, fluid + 0.05, "midline fissure"
    )

    ventricles = _ventricles(canvas, inside, fluid, grey)
    for _ in range(int(rng.integers(0, 5))):
        # Vessels in cross-section: as bright as a lesion, but pinpoint and at the brain's rim or midline.
        on_midline = chance(0.4)
        vx, vy = (
            (uniform(-0.02, 0.02), uniform(-0.8, 0.8) * ry)
            if on_midline
            else canvas.spot((depth > 0.0) & (depth < 0.07))
        )
        canvas.paint(
            cover(canvas.ellipse(vx, vy, uniform(0.012, 0.028), uniform(0.012, 0.03))), uniform(0.7, 1.0), "vessel"
        )
    if chance(0.3):
        # Partial volume of the eyes' sockets or the skull base: large, symmetric, normal.
        side = -0.5 * ry
        for sign in (-1, 1):
            patch = canvas.ellipse(
                sign * uniform(0.2, 0.3), side, uniform(0.08, 0.16), uniform(0.06, 0.12), wobble=0.15
            )
            canvas.paint(gaussian_filter(cover(patch, 0.08), 2) * inside * 0.5, grey + 0.12)
    if anomalous:
        _brain_lesions(canvas, depth, ventricles, white, fluid)
    return canvas.finish((0.4, 0.9), (0.01, 0.045), 0.35, (0.62, 1.08))


def _ventricles(canvas: Canvas, inside: Plane, fluid: float, grey: float) -> Plane:
    """Draw lateral and third ventricles with choroid plexus and caps, the deep grey nuclei; return their coverage."""
    uniform, chance = canvas.uniform, canvas.chance
    size = uniform(0.0, 1.0)
    if size < 0.15:
        return np.zeros_like(inside)
    canvas.words.append(
        "large ventricles" if size > 0.65 else "small ventricles" if size < 0.4 else "medium ventricles"
    )
    total = np.zeros_like(inside)
    front, back, spread = uniform(-0.34, -0.2), uniform(0.2, 0.36), uniform(0.07, 0.13)
    for sign in (-1, 1):
        scale = (0.45 + 0.75 * size) * uniform(0.85, 1.15)
        nucleus = canvas.ellipse(sign * (spread + 0.17), 0.02, 0.09, 0.2, sign * 0.35, wobble=0.1)
        canvas.paint(cover(nucleus, 0.04) * inside * 0.8, grey, "deep nuclei")
        horn = canvas.ellipse(sign * spread, front * 0.6, 0.06 * scale, 0.22 * scale, sign * -0.28, wobble=0.08)
        tail = canvas.ellipse(
            sign * (spread + 0.07), back, 0.07 * scale, uniform(0.12, 0.26) * scale, sign * 0.35, wobble=0.08
        )
        shape = np.minimum(horn, tail)
        canvas.paint(cover(np.abs(shape) - 0.02, 0.04) * inside * uniform(0.0, 0.6), grey + 0.2)
        canvas.paint(cover(shape) * inside, fluid, "ventricles")
        total = np.maximum(total, cover(shape))
        if chance(0.5):
            plexus = canvas.ellipse(sign * (spread + 0.07), back, 0.03, 0.06, sign * 0.35, wobble=0.3, cells=24)
            canvas.paint(cover(plexus) * cover(shape) * 0.9, uniform(0.55, 0.95), "choroid plexus")
    canvas.paint(cover(canvas.ellipse(0.0, 0.02, 0.012 + 0.02 * size, 0.1)) * inside, fluid, "ventricles")
    return total


def _brain_lesions(canvas: Canvas, depth: Plane, ventricles: Plane, white: float, fluid: float) -> None:
    """Add one of: solid tumour with oedema, ring-enhancing lesion, diffuse oedema, cyst, several small metastases."""
    rng, uniform = canvas.rng, canvas.uniform
    kind = ("solid", "ring", "oedema", "cyst", "metastases")[int(rng.choice(5, p=[0.28, 0.24, 0.18, 0.14, 0.16]))]
    for _ in range(int(rng.integers(2, 5)) if kind == "metastases" else 1):
        radius = uniform(0.06, 0.11) if kind == "metastases" else uniform(0.11, 0.3)
        cx, cy = canvas.spot((depth > 0.6 * radius + 0.04) & (np.abs(canvas.x) > 0.6 * radius) & (ventricles < 0.5))
        shape = canvas.ellipse(
            cx, cy, radius, radius * uniform(0.65, 1.0), uniform(0, 3.1), wobble=uniform(0.08, 0.2), cells=9
        )
        brain_only = np.clip(depth / 0.03, 0.0, 1.0)
        area = cover(shape, uniform(0.02, 0.05)) * brain_only
        bright = white + uniform(0.2, 0.42)
        if kind in ("solid", "ring") and canvas.chance(0.6):
            halo = cover(shape - radius * uniform(0.25, 0.6) - 0.05 * noise(rng, 10), 0.1) * brain_only
            halo = halo * (1.0 - 0.9 * ventricles)
            canvas.paint(halo * 0.8, white + uniform(0.12, 0.2))
            canvas.mark(halo)
        if kind in ("solid", "metastases"):
            canvas.paint(area, bright + 0.07 * noise(rng, 24))
        elif kind == "ring":
            wall = uniform(0.25, 0.4) * radius + 1.0 * PIXEL
            canvas.paint(area, bright + 0.05 * noise(rng, 20))
            canvas.paint(cover(shape + wall, 0.03) * brain_only, fluid + uniform(0.05, 0.2))
        elif kind == "oedema":
            area = cover(shape - 0.06 * noise(rng, 12), 0.1) * brain_only * (1.0 - 0.9 * ventricles)
            canvas.paint(area * 0.85, white + uniform(0.17, 0.3) + 0.03 * noise(rng, 16))
        else:
            canvas.paint(cover(np.abs(shape) - 0.012, 0.03) * brain_only * 0.5, bright)
            canvas.paint(area, fluid + uniform(0.0, 0.06))
        canvas.mark(area)


def liver(rng: np.random.Generator, anomalous: bool) -> Drawing:
    """An axial abdominal CT slice: liver with vessels and gallbladder, spleen, stomach, spine, ribs, aorta, fat."""
    canvas = Canvas(rng, tilt=0.06, shift=0.03, warp=0.025)
    uniform, chance = canvas.uniform, canvas.chance
    rx, ry = uniform(0.84, 0.95), uniform(0.66, 0.8)
    body = canvas.ellipse(0.0, 0.0, rx, ry, wobble=0.015)
    fat, muscle = uniform(0.16, 0.26), uniform(0.42, 0.5)
    canvas.paint(cover(body), fat + 0.015 * noise(rng, 30), "fat")
    rim = uniform(0.03, 0.10)
    canvas.paint(cover(body + rim), muscle + 0.03 * noise(rng, 30), "muscle")
    canvas.paint(cover(body + rim + 0.07, 0.03), fat + 0.02 * noise(rng, 24))
    _bowel_and_spine(canvas, body, rim, muscle, fat)

    tissue = uniform(0.5, 0.64)
    lx, ly = uniform(-0.42, -0.34), uniform(-0.14, -0.02)
    right = canvas.ellipse(lx, ly, uniform(0.38, 0.46), uniform(0.42, 0.52), uniform(-0.25, 0.15), wobble=0.05)
    left = canvas.ellipse(
        lx + uniform(0.34, 0.5), ly - 0.2, uniform(0.24, 0.4), uniform(0.12, 0.22), uniform(-0.3, 0.1), wobble=0.06
    )
    shape = np.maximum(np.minimum(right, left), body + rim + 0.08)
    inside, depth = cover(shape), -shape
    canvas.paint(inside, tissue + 0.012 * noise(rng, 40) + 0.012 * noise(rng, 6), "liver")
    canvas.words.append("wide liver" if lx < -0.38 else "narrow liver")
    enhanced = chance(0.6)
    canvas.words.append("with contrast" if enhanced else "without contrast")
    step = uniform(0.08, 0.2) if enhanced else -uniform(0.05, 0.13)
    for _ in range(int(rng.integers(3, 7))):
        _vessel(canvas, inside, depth, tissue + step)
    if chance(0.45):
        # The gallbladder: round, dark and sharp like a cyst, but at the liver's lower edge.
        gall = canvas.ellipse(
            lx + uniform(0.22, 0.36),
            ly + uniform(0.2, 0.32),
            uniform(0.07, 0.11),
            uniform(0.09, 0.16),
            uniform(-0.6, 0.3),
        )
        canvas.paint(cover(gall), uniform(0.3, 0.36), "gallbladder")
        canvas.words.append("gallbladder")
    if chance(0.5):
        fissure = np.abs(canvas.ellipse(lx + 0.34, ly - 0.25, 0.05, 0.26, uniform(-0.5, 0.2), wobble=0.2)) - 0.008
        canvas.paint(cover(np.maximum(fissure, canvas.x - lx - 0.34)) * inside * 0.7, fat + 0.1)
    if anomalous:
        _liver_lesions(canvas, inside, depth, tissue)
    return canvas.finish((0.5, 0.95), (0.012, 0.05), 0.06, (0.72, 1.1), gamma=(0.8, 1.3))


def _bowel_and_spine(canvas: Canvas, body: Plane, rim: float, muscle: float, fat: float) -> None:
    """Draw what surrounds the liver: spleen, stomach with air, kidneys, spine, aorta and ribs."""
    rng, uniform, chance = canvas.rng, canvas.uniform, canvas.chance
    room = cover(body + rim + 0.08)
    stomach = canvas.ellipse(
        uniform(0.3, 0.42), uniform(-0.35, -0.2), uniform(0.2, 0.3), uniform(0.14, 0.24), 0.4, wobble=0.08
    )
    canvas.paint(cover(stomach) * room, muscle, "stomach")
    canvas.paint(cover(stomach + 0.03) * room, uniform(0.3, 0.5) + 0.05 * noise(rng, 20))
    if chance(0.6):
        air = np.maximum(stomach + 0.03, canvas.y - uniform(-0.36, -0.24))
        canvas.paint(cover(air) * room, 0.0, "air")
    spleen = canvas.ellipse(
        uniform(0.55, 0.62), uniform(0.05, 0.2), uniform(0.12, 0.18), uniform(0.22, 0.3), uniform(0.1, 0.5), wobble=0.06
    )
    canvas.paint(cover(spleen) * room, uniform(0.5, 0.66), "spleen")
    for sign in (-1, 1):
        if chance(0.45):
            kidney = canvas.ellipse(sign * uniform(0.32, 0.38), uniform(0.3, 0.36), 0.1, 0.13, sign * 0.4, wobble=0.06)
            canvas.paint(cover(kidney) * room, uniform(0.55, 0.85), "kidney")
            canvas.paint(cover(kidney + 0.07) * room * 0.7, fat + 0.15)
    spine = canvas.ellipse(0.0, uniform(0.32, 0.4), uniform(0.12, 0.16), uniform(0.1, 0.13), wobble=0.05)
    bone = uniform(0.8, 1.0)
    canvas.paint(cover(spine), bone - 0.12 + 0.06 * noise(rng, 30), "spine")
    canvas.paint(cover(np.abs(spine) - 0.012), bone)
    canvas.paint(cover(canvas.ellipse(0.0, 0.53, 0.045, 0.045)), 0.35)
    canvas.paint(cover(np.abs(canvas.ellipse(0.0, 0.53, 0.06, 0.06)) - 0.02), bone)
    vessel = uniform(0.5, 0.95)
    canvas.paint(cover(canvas.ellipse(uniform(0.05, 0.1), uniform(0.16, 0.22), 0.06, 0.06)), vessel, "aorta")
    canvas.paint(
        cover(canvas.ellipse(uniform(-0.14, -0.08), uniform(0.14, 0.2), 0.07, 0.05)), vessel - 0.06, "vena cava"
    )
    turn = np.arctan2(canvas.y, canvas.x)
    ribs = np.abs(body + rim + 0.045) - uniform(0.014, 0.022)
    gaps = np.sin(turn * int(rng.integers(7, 11)) + uniform(0, 6.3)) - uniform(0.45, 0.75)
    canvas.paint(cover(ribs) * np.clip(gaps * 6.0, 0.0, 1.0), bone, "ribs")


def _vessel(canvas: Canvas, inside: Plane, depth: Plane, value: float) -> None:
    """Draw one tapering vessel through the liver, or its round cross-section."""
    uniform = canvas.uniform
    if canvas.chance(0.35):
        vx, vy = canvas.spot(depth > 0.08)
        radius = uniform(0.02, 0.045)
        canvas.paint(cover(canvas.ellipse(vx, vy, radius, radius * uniform(0.7, 1.0)), 0.03) * inside, value, "vessel")
        return
    vx, vy = canvas.spot(depth > 0.1)
    angle, length = uniform(0, 3.14), uniform(0.15, 0.32)
    along = np.cos(angle) * (canvas.x - vx) + np.sin(angle) * (canvas.y - vy)
    across = np.cos(angle) * (canvas.y - vy) - np.sin(angle) * (canvas.x - vx) + uniform(-1.2, 1.2) * along**2
    width = uniform(0.014, 0.032) * np.clip(1.0 - along / length, 0.0, 1.3)
    line = np.maximum(np.abs(across) - width, np.abs(along) - length)
    canvas.paint(cover(line, 0.025) * inside, value, "vessel")


def _liver_lesions(canvas: Canvas, inside: Plane, depth: Plane, tissue: float) -> None:
    """Add one of: hypodense mass, hyperdense mass, several metastases, cyst, heterogeneous mass with a capsule."""
    rng, uniform = canvas.rng, canvas.uniform
    kind = ("dark", "bright", "many", "cyst", "mixed")[int(rng.choice(5, p=[0.28, 0.18, 0.24, 0.12, 0.18]))]
    dark = uniform(0.12, 0.22)
    for _ in range(int(rng.integers(2, 6)) if kind == "many" else 1):
        radius = uniform(0.05, 0.10) if kind == "many" else uniform(0.09, 0.24)
        cx, cy = canvas.spot(depth > 0.55 * radius + 0.03)
        shape = canvas.ellipse(
            cx, cy, radius, radius * uniform(0.7, 1.0), uniform(0, 3.1), wobble=uniform(0.05, 0.18), cells=9
        )
        area = cover(shape, uniform(0.02, 0.06)) * inside
        if kind in ("dark", "many"):
            canvas.paint(area, tissue - dark + 0.025 * noise(rng, 24))
        elif kind == "bright":
            canvas.paint(area, tissue + uniform(0.13, 0.25) + 0.03 * noise(rng, 24))
        elif kind == "cyst":
            canvas.paint(area, uniform(0.28, 0.34))
        else:
            canvas.paint(area, tissue + uniform(0.08, 0.2))
            canvas.paint(cover(shape + 0.03, 0.03) * inside, tissue - dark * 0.7 + 0.09 * noise(rng, 18))
        canvas.mark(area)

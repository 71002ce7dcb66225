"""Two sets without pixel masks: frontal chest X-ray, and histology of lymph nodes, stained with H&E."""

import numpy as np
from scipy.ndimage import gaussian_filter

from .canvas import PIXEL, SIZE, Canvas, Drawing, Plane, cover, noise


def chest(rng: np.random.Generator, anomalous: bool) -> Drawing:
    """A frontal chest X-ray: lungs, ribs, clavicles, spine, heart, diaphragm, vessels, sometimes breasts and leads."""
    canvas = Canvas(rng, tilt=0.05, shift=0.04, warp=0.025)
    uniform, chance, x, y = canvas.uniform, canvas.chance, canvas.x, canvas.y
    body = canvas.ellipse(0.0, 0.4, uniform(0.9, 1.3), uniform(1.15, 1.4), wobble=0.02)
    soft = uniform(0.52, 0.66)
    canvas.paint(cover(body, 0.06), soft + 0.08 * y + 0.02 * noise(rng, 10), "soft tissue")
    canvas.paint(cover(np.abs(x) - uniform(0.14, 0.2), 0.08), soft + uniform(0.1, 0.2), "mediastinum")
    neck = cover(np.abs(x) - 0.06, 0.03) * np.clip((-0.45 - y) * 5, 0, 1)
    canvas.paint(neck * 0.4, soft - 0.1, "trachea")

    lungs = np.zeros((SIZE, SIZE), np.float32)
    air = uniform(0.14, 0.3)
    top, base = uniform(-0.8, -0.7), uniform(0.42, 0.7)
    dome = []
    for sign in (-1, 1):
        lung = canvas.ellipse(
            sign * uniform(0.4, 0.46),
            (top + base) / 2 + 0.1,
            uniform(0.27, 0.33),
            (base - top) / 2 + 0.12,
            sign * -0.12,
            wobble=0.03,
        )
        floor = base + uniform(-0.06, 0.06) + 0.9 * (x - sign * 0.38) ** 2
        dome.append(floor)
        lung = np.maximum(lung, y - floor)
        canvas.paint(
            cover(lung, 0.04), air + 0.08 * np.abs(y) + 0.01 * noise(rng, 14), f"{'left' if sign < 0 else 'right'} lung"
        )
        lungs = np.maximum(lungs, cover(lung, 0.04))
    for _ in range(int(rng.integers(14, 26))):
        _lung_vessel(canvas, lungs)
    for sign in (-1, 1):
        hilum = canvas.ellipse(
            sign * uniform(0.17, 0.23),
            uniform(-0.15, 0.0),
            uniform(0.06, 0.1),
            uniform(0.09, 0.16),
            sign * 0.3,
            wobble=0.2,
        )
        canvas.paint(cover(hilum, 0.08) * 0.6, soft, "hilum")
    if anomalous:
        _opacities(canvas, lungs * cover(body + 0.08, 0.04), dome, soft, air)
    size = uniform(0.24, 0.4)
    heart = canvas.ellipse(
        uniform(0.08, 0.16), base - size * 0.9 + 0.05, size, size * uniform(0.85, 1.1), 0.5, wobble=0.04
    )
    canvas.paint(cover(heart, 0.05), soft + uniform(0.1, 0.2), "heart")
    canvas.mask &= heart > 0.0  # what the heart hides is no visible anomaly
    canvas.words.append("large heart" if size > 0.34 else "small heart" if size < 0.29 else "medium heart")
    _bones(canvas, soft)
    if chance(0.35):
        for sign in (-1, 1):
            breast = canvas.ellipse(
                sign * uniform(0.45, 0.55), uniform(0.3, 0.5), uniform(0.25, 0.34), uniform(0.22, 0.3), wobble=0.04
            )
            canvas.image += cover(breast, 0.08) * uniform(0.05, 0.12)
        canvas.words.append("breast shadows")
    if chance(0.25):
        lead = np.abs(y - uniform(-0.5, 0.6) - uniform(-0.8, 0.8) * x - 0.1 * noise(rng, 3)) - 0.008
        canvas.paint(cover(lead) * 0.8, uniform(0.8, 1.0), "lead")
        canvas.words.append("with a lead")
    if chance(0.4):
        mark = np.maximum(np.abs(x - uniform(-0.9, -0.75)) - 0.035, np.abs(y + uniform(0.75, 0.88)) - 0.05)
        canvas.paint(cover(np.abs(mark) - 0.01), 1.0, "side marker")
    return canvas.finish((0.5, 1.1), (0.008, 0.035), 0.15, (0.8, 1.08), floor=(0.0, 0.1), gamma=(0.7, 1.4))


def _lung_vessel(canvas: Canvas, lungs: Plane) -> None:
    """Draw one branch that leaves a hilum and thins towards the wall."""
    uniform, x, y = canvas.uniform, canvas.x, canvas.y
    sign = 1.0 if canvas.chance(0.5) else -1.0
    angle, length = uniform(-1.25, 1.25), uniform(0.2, 0.5)
    ax, ay = sign * 0.2, uniform(-0.15, 0.0)
    ux, uy = sign * float(np.cos(angle)), float(np.sin(angle))
    along = ux * (x - ax) + uy * (y - ay)
    across = ux * (y - ay) - uy * (x - ax) + uniform(-0.8, 0.8) * along**2
    width = 0.022 * np.clip(1.0 - along / length, 0.0, 1.0) + 0.002
    line = cover(np.abs(across) - width, 0.02) * ((along > 0) & (along < length))
    canvas.image += line * lungs * uniform(0.06, 0.16)


def _bones(canvas: Canvas, soft: float) -> None:
    """Draw spine, ribs and clavicles over what lies behind them."""
    uniform, x, y = canvas.uniform, canvas.x, canvas.y
    pitch, strength, phase = uniform(0.15, 0.2), uniform(0.05, 0.14), uniform(0.0, 0.2)
    spine = cover(np.abs(x) - 0.07, 0.04) * (0.5 + 0.5 * np.clip(np.sin(y / pitch * 6.28) * 3, -1, 1))
    canvas.image += spine * uniform(0.02, 0.07)
    chest_wall = np.clip((0.86 - np.abs(x)) / 0.08, 0, 1) * np.clip((0.75 - np.abs(y)) / 0.1, 0, 1)
    arc = y + phase - 0.5 * np.sqrt(np.clip(1.0 - (x / 0.95) ** 2, 0, 1)) * uniform(0.5, 0.9)
    back = np.clip(np.cos(arc / pitch * 6.28) * 2 - 1.1, 0, 1)
    canvas.image += back * chest_wall * strength
    canvas.parts["ribs"] = back * chest_wall
    front = y - 0.6 * np.abs(x) + phase * 0.5
    canvas.image += np.clip(np.cos(front / (pitch * 1.2) * 6.28) * 2 - 1.3, 0, 1) * chest_wall * strength * 0.5
    for sign in (-1, 1):
        clavicle = np.maximum(
            np.abs(y + 0.66 + uniform(-0.03, 0.03) + 0.22 * sign * x) - 0.026, np.abs(x - sign * 0.42) - 0.34
        )
        canvas.paint(cover(clavicle, 0.03) * 0.7, soft + uniform(0.12, 0.22), "clavicle")


def _opacities(canvas: Canvas, lungs: Plane, dome: list[Plane], soft: float, air: float) -> None:
    """Add one of: nodules, a patch of consolidation, a whole lobe, fluid above the diaphragm, diffuse streaks."""
    rng, uniform, x, y = canvas.rng, canvas.uniform, canvas.x, canvas.y
    kind = ("nodules", "patch", "lobe", "fluid", "diffuse")[int(rng.choice(5, p=[0.24, 0.28, 0.16, 0.16, 0.16]))]
    room = lungs > 0.95
    dense = air + (soft - air) * uniform(0.6, 1.0)
    sign = 1.0 if canvas.chance(0.5) else -1.0
    if kind in ("nodules", "patch"):
        for _ in range(int(rng.integers(1, 5)) if kind == "nodules" else int(rng.integers(1, 3))):
            cx, cy = canvas.spot(room & (np.abs(x) > 0.25))
            radius = uniform(0.055, 0.13) if kind == "nodules" else uniform(0.15, 0.32)
            wobble, edge = (0.1, 0.05) if kind == "nodules" else (0.3, uniform(0.12, 0.25))
            area = (
                cover(canvas.ellipse(cx, cy, radius, radius * uniform(0.7, 1.1), uniform(0, 3), wobble=wobble), edge)
                * lungs
            )
            texture = 0.0 if kind == "nodules" else 0.05 * noise(rng, 22)
            canvas.paint(area * 0.9, dense + texture)
            canvas.mark(area)
        return
    if kind == "lobe":
        split = uniform(-0.2, 0.15) + 0.3 * np.abs(x)
        area = (
            cover((y - split) * (1.0 if canvas.chance(0.6) else -1.0) + 0.03 * noise(rng, 8), 0.08)
            * lungs
            * (sign * x > 0)
        )
    elif kind == "fluid":
        level = dome[0 if sign < 0 else 1] - uniform(0.1, 0.32) - 0.5 * np.maximum(np.abs(x) - 0.35, 0.0)
        area = cover(level - y, 0.06) * lungs * (sign * x > 0)
    else:
        spread = np.clip(0.5 + 0.7 * noise(rng, 4) + uniform(-0.2, 0.3), 0, 1)
        area = spread * lungs
        fine = np.clip(np.abs(noise(rng, 26)) * 1.1, 0.0, 1.0)
        canvas.paint(area * (0.3 + 0.7 * fine), dense - 0.05)
        canvas.mark(area)
        return
    canvas.paint(area * 0.92, dense + 0.03 * noise(rng, 18))
    canvas.mark(area)


def his(rng: np.random.Generator, anomalous: bool) -> Drawing:
    """Lymph node stained with H&E: lymphocytes, stroma, sinuses, fat, vessels; metastases where asked."""
    canvas = Canvas(rng, tilt=0.5, shift=0.1, warp=0.1)
    uniform, chance = canvas.uniform, canvas.chance
    # The stains, as optical densities per channel; their mix varies from laboratory to laboratory.
    blue = np.array([0.62, 0.68, 0.28], np.float32) * uniform(0.85, 1.25) + rng.normal(0, 0.03, 3).astype(np.float32)
    pink = np.array([0.10, 0.42, 0.22], np.float32) * uniform(0.75, 1.3) + rng.normal(0, 0.02, 3).astype(np.float32)
    eosin = uniform(0.5, 0.8) + 0.14 * noise(rng, 9) + 0.06 * noise(rng, 40)
    haem = uniform(0.08, 0.2) + 0.05 * noise(rng, 20)
    fibres = np.abs(noise(rng, 5, rows=int(rng.integers(10, 27))))
    lymphoid = np.clip(0.5 + 1.2 * (noise(rng, 3) + uniform(-0.7, 1.6)), 0.0, 1.0)
    eosin += (1 - lymphoid) * np.clip(0.6 - fibres, 0, 1) * 0.9
    canvas.words.append(
        "many small cells" if lymphoid.mean() > 0.65 else "fibrous" if lymphoid.mean() < 0.35 else "mixed"
    )
    canvas.parts["small cells"] = lymphoid

    empty = np.zeros((SIZE, SIZE), np.float32)
    if chance(0.45):
        # Fat cells, sinuses or gland-like lumina: white holes of any size.
        for _ in range(int(rng.integers(1, 7))):
            radius = uniform(0.05, 0.26)
            hole = canvas.ellipse(
                uniform(-1, 1), uniform(-1, 1), radius, radius * uniform(0.4, 1), uniform(0, 3), wobble=0.1
            )
            empty = np.maximum(empty, cover(hole))
        canvas.parts["empty space"] = empty
        canvas.words.append("with empty spaces")
    tumour, dead = np.zeros_like(empty), np.zeros_like(empty)
    kind = ("nest", "sheet", "glands", "necrosis")[int(rng.integers(4))] if anomalous else ""
    if kind:
        radius = uniform(0.25, 0.6) if kind != "sheet" else uniform(0.7, 1.3)
        shape = canvas.ellipse(
            uniform(-0.5, 0.5), uniform(-0.5, 0.5), radius, radius * uniform(0.6, 1), uniform(0, 3), wobble=0.25
        )
        tumour = cover(shape, 0.06) * (1 - empty)
        if kind == "necrosis":
            dead = cover(shape + radius * uniform(0.3, 0.6), 0.15) * (1 - empty)
        canvas.mark(tumour)
        eosin = eosin * (1 - 0.35 * tumour) + 0.25 * dead + dead * 0.2 * noise(rng, 50)
        haem = haem + 0.1 * tumour
    _nuclei(canvas, haem, lymphoid * (1 - tumour), empty, uniform(0.045, 0.058), (0.85, 1.25), 0.9)
    if chance(0.3):
        # A germinal centre: larger, paler, but regular cells; a normal structure.
        center = cover(canvas.ellipse(uniform(-0.6, 0.6), uniform(-0.6, 0.6), 0.4, 0.32, wobble=0.1), 0.15) * (
            1 - tumour
        )
        haem *= 1 - 0.4 * center
        canvas.words.append("with a germinal centre")
        canvas.parts["germinal centre"] = center
    if kind:
        lumen = (np.abs(noise(rng, 9)) < 0.22) * tumour if kind == "glands" else np.zeros_like(empty)
        lumen = gaussian_filter(lumen.astype(np.float32), 1.0)
        _nuclei(canvas, haem, tumour * (1 - dead) * (lumen < 0.3), empty, uniform(0.075, 0.11), (0.45, 1.3), 0.75)
        _nuclei(canvas, haem, dead, empty, 0.035, (0.5, 1.4), 0.25)
        empty = np.maximum(empty, lumen)
    eosin, haem = gaussian_filter(eosin, 0.6) * (1 - empty), haem * (1 - empty)
    if chance(0.4):
        for _ in range(int(rng.integers(3, 15))):
            cell = cover(canvas.ellipse(uniform(-1, 1), uniform(-1, 1), 0.05, 0.045))
            eosin = np.maximum(eosin, 1.5 * cell * (1 - tumour))
    density = haem[..., None] * blue * 1.35 + np.maximum(eosin, 0)[..., None] * pink
    image = np.exp(-np.maximum(density, 0.0)) * uniform(0.88, 1.0)
    image = gaussian_filter(image, (*(uniform(0.3, 0.6),) * 2, 0))
    image += uniform(0.01, 0.03) * rng.standard_normal(image.shape, dtype=np.float32)
    return Drawing(np.clip(image, 0, 1).astype(np.float32), canvas.mask, canvas.parts, canvas.words)


def _nuclei(
    canvas: Canvas,
    haem: Plane,
    density: Plane,
    empty: Plane,
    radius: float,
    shades: tuple[float, float],
    packing: float,
) -> None:
    """Stamp nuclei of about the given radius on a jittered grid into `haem`, in place, where `density` lets them be."""
    rng = canvas.rng
    pitch = 2.3 * radius / PIXEL
    count = int(SIZE / pitch) + 2
    grid = (np.stack(np.meshgrid(np.arange(count), np.arange(count), indexing="ij"), -1).reshape(-1, 2) + 0.0) * pitch
    grid[:, 0] += (grid[:, 1] // pitch % 2) * pitch / 2
    places = grid + rng.normal(0.0, 0.2 * pitch, grid.shape) - pitch / 2
    at = np.clip(places.astype(int), 0, SIZE - 1)
    keep = rng.random(len(at)) < packing * (0.12 + 0.88 * density[at[:, 0], at[:, 1]]) * (
        density[at[:, 0], at[:, 1]] > 0.02
    )
    keep &= empty[at[:, 0], at[:, 1]] < 0.5
    atypical = shades[0] < 0.5
    for row, column in places[keep]:
        spread = rng.uniform(0.65, 1.35) if atypical else rng.uniform(0.85, 1.1)
        a = radius / PIXEL * spread
        b = a * (rng.uniform(0.6, 1.0) if atypical else rng.uniform(0.8, 1.0))
        reach = int(a) + 2
        r0, c0 = max(int(row) - reach, 0), max(int(column) - reach, 0)
        r1, c1 = min(int(row) + reach + 1, SIZE), min(int(column) + reach + 1, SIZE)
        if r0 >= r1 or c0 >= c1:
            continue
        angle = rng.uniform(0, 3.14)
        dy, dx = np.arange(r0, r1)[:, None] - row, np.arange(c0, c1)[None, :] - column
        u, v = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx
        inside = np.clip((1.0 - np.sqrt((u / a) ** 2 + (v / b) ** 2)) * b + 0.5, 0, 1)
        shade = rng.uniform(*shades)
        patch = haem[r0:r1, c0:c1]
        if atypical:
            # Large nuclei: paler inside, a dark rim and a nucleolus.
            dot = np.clip(1.4 - np.hypot(dy - 0.2 * a, dx), 0, 1)
            inside = inside * (0.65 + 0.5 * np.clip(np.hypot(u / a, v / b), 0, 1)) + 0.5 * dot * (inside > 0)
        patch[:] = np.maximum(patch, inside * shade)

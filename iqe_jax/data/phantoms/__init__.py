"""Six rendered stand-ins for the medical sets, laid out on disk as those are, and the tiny CLIP that goes with them.

`make_phantoms` writes the sets, `render` draws one picture, `CLIP_DIR` is the backbone. The drawings themselves are in
head_body.py, retina.py and tissue.py; how the backbone was trained is in train_clip.py. Reading the sets is
the business of the project's ordinary data code, which cannot tell them from the real ones.
"""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8
from PIL import Image

if TYPE_CHECKING:
    from .canvas import Drawing

CLIP_DIR = Path(__file__).parent / "clip"
"""The tiny CLIP, a Hugging Face folder."""

MARK = "PHANTOMS.txt"
"""A file of this name beside the sets says that they are phantoms, to people and to whatever reports on them."""

COUNTS = {"valid": 24, "test": 100}
"""Good pictures per split; as many anomalous ones."""


@dataclass(frozen=True)
class PhantomSet:
    """One set: its folder's name, whether masks are kept, and the files' ending."""

    folder: str
    has_masks: bool
    suffix: str = ".png"


SETS: dict[str, PhantomSet] = {
    "brain": PhantomSet("Brain_AD", True),
    "liver": PhantomSet("Liver_AD", True),
    "resc": PhantomSet("Retina_RESC_AD", True),
    "oct17": PhantomSet("Retina_OCT2017_AD", False, ".jpeg"),
    "chest": PhantomSet("Chest_AD", False),
    "his": PhantomSet("Histopathology_AD", False),
}


def render(
    set_name: str, rng: np.random.Generator, anomalous: bool
) -> tuple[UInt8[np.ndarray, "128 128 3"], UInt8[np.ndarray, "128 128"]]:
    """Draw one picture of a set and the mask of its anomalies, {0, 255}, which is empty for normal pictures only.

    All randomness comes from `rng`. Raises ValueError for an unknown set.
    """
    _known(set_name)
    drawing = _draw(set_name, rng, anomalous)
    while anomalous and not drawing.mask.any():  # its anomaly was hidden behind something: draw another
        drawing = _draw(set_name, rng, anomalous)
    return drawing.encode()


def _draw(set_name: str, rng: np.random.Generator, anomalous: bool) -> "Drawing":
    from . import head_body, retina, tissue  # here, as most starts find their pictures drawn

    draw = {
        "brain": head_body.brain,
        "liver": head_body.liver,
        "resc": retina.resc,
        "oct17": retina.oct17,
        "chest": tissue.chest,
        "his": tissue.his,
    }
    return draw[set_name](rng, anomalous)


def make_phantoms(root: Path, sets: Sequence[str] = tuple(SETS), seed: int = 0) -> None:
    """Render what `root` lacks of the named sets.

    Layout: `{root}/{Brain_AD,…}/{valid,test}/{good,Ungood}/img/*`, masks in `Ungood/anomaly_mask/` under the picture's
    name for brain, liver and resc. A new set appears whole or not at all, files missing from one that is there are
    drawn again, and what is there is left alone, so several processes may call this at once. Every picture depends
    only on (seed, set, split, label, number); `root` is for one seed. Raises ValueError for an unknown set and
    FileExistsError where a set's folder holds files that are not its own, such as the real set.
    """
    root = Path(root)
    for name in sets:
        _known(name)
    for name in sets:
        if missing := _missing(root / SETS[name].folder, SETS[name]):
            _make_set(root, name, seed, missing)
    root.mkdir(parents=True, exist_ok=True)
    (root / MARK).write_text("Rendered by iqe_jax.data.phantoms: nothing measured on these tells of real data.\n")


def _known(name: str) -> PhantomSet:
    if name not in SETS:
        raise ValueError(f"unknown phantom set {name!r}; expected one of {', '.join(SETS)}")
    return SETS[name]


def _files(kind: PhantomSet, split: str, anomalous: bool) -> list[str]:
    """The paths of one split's pictures inside the set's folder."""
    label = "Ungood" if anomalous else "good"
    return [f"{split}/{label}/img/{split}_{label.lower()}_{i:03d}{kind.suffix}" for i in range(COUNTS[split])]


def _mask_path(picture: str) -> str:
    return picture.replace("/img/", "/anomaly_mask/")


def _all_files(kind: PhantomSet) -> list[str]:
    """Every path of a whole set, masks included, in its folder."""
    pictures = [path for split in COUNTS for anomalous in (False, True) for path in _files(kind, split, anomalous)]
    return pictures + [_mask_path(path) for path in pictures if kind.has_masks and "/Ungood/" in path]


def _missing(folder: Path, kind: PhantomSet) -> set[str]:
    """The files a set's folder lacks; all of them where there is no folder."""
    expected = set(_all_files(kind))
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if foreign := sorted(present - expected):
        raise FileExistsError(
            f"{folder} holds files that no phantom set has, such as {foreign[0]}; phantoms are not mixed into other "
            "data: choose another root"
        )
    return expected - present


def _make_set(root: Path, name: str, seed: int, missing: set[str]) -> None:
    """Render the missing files beside their place, then move them there: a new set in one step, else file by file."""
    kind = SETS[name]
    root.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{kind.folder}.", dir=root))
    try:
        for split_index, split in enumerate(COUNTS):
            for anomalous in (False, True):
                for number, path in enumerate(_files(kind, split, anomalous)):
                    if not missing & {path, _mask_path(path)}:
                        continue
                    entropy = (seed, list(SETS).index(name), split_index, int(anomalous), number)
                    image, mask = render(name, np.random.default_rng(entropy), anomalous)
                    for array, wanted in ((image, path), (mask, _mask_path(path))):
                        if wanted in missing:
                            _save(array, building / wanted)
        building.chmod(0o755)
        try:
            building.rename(root / kind.folder)
        except OSError:  # the folder is there: part of the set, or all of it from another process meanwhile
            for path in missing:
                (root / kind.folder / path).parent.mkdir(parents=True, exist_ok=True)
                (building / path).replace(root / kind.folder / path)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _save(array: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jpeg":
        Image.fromarray(array).save(path, quality=95)
    else:
        Image.fromarray(array).save(path, compress_level=1)

"""Finds the images, masks and labels of a data set on disk: BMAD's six sets, or any folder of the same shape.

Both MVFA's packaging of the six sets and BMAD's own are understood. The listing is kept as a TFDS data set of paths
(bmad_builder.py), keyed by a digest of the folder and of every name, size and time in it, so a changed folder is
prepared anew. Opening the files is left to transforms.py and pipeline.py.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from iqe_jax.cache import cache_dir
from iqe_jax.data.scans import printable
from iqe_jax.progress import console

if TYPE_CHECKING:
    from iqe_jax.data.bmad_builder import Row

Split = Literal["valid", "test"]
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".dcm", ".dicom"})
_SPLIT_NAMES = {"valid": ("valid", "val"), "test": ("test",)}
_MASK_NAMES = ("anomaly_mask", "label")
NAMED_AT_MOST = 20  # file names in one error message
_ABANDONED_AFTER = 3600.0  # seconds; a preparation takes well under a minute


@dataclass(frozen=True)
class SetSpec:
    """What is known of a set: title, folder names (case, `-` and `_` aside), masks or not, images per split."""

    title: str
    folders: tuple[str, ...]
    has_masks: bool
    valid: int
    test: int


SETS = {
    "brain": SetSpec("Brain MRI", ("Brain_AD", "Brain", "BraTS2021_slice", "BraTS2021"), True, 83, 3715),
    "liver": SetSpec("Liver CT", ("Liver_AD", "Liver", "hist_DIY"), True, 166, 1493),
    "resc": SetSpec("Retinal OCT (RESC)", ("Retina_RESC_AD", "Retina_RESC", "RESC"), True, 115, 1805),
    "oct17": SetSpec(
        "Retinal OCT (OCT2017)", ("Retina_OCT2017_AD", "Retina_OCT2017", "OCT2017", "OCT17"), False, 32, 968
    ),
    "chest": SetSpec("Chest X-ray", ("Chest_AD", "Chest", "Chest_RSNA", "RSNA"), False, 1490, 17194),
    "his": SetSpec(
        "Histopathology",
        ("Histopathology_AD", "Histopathology", "camelyon16_256", "camelyon16", "HIS"),
        False,
        236,
        1997,
    ),
}


@dataclass(frozen=True)
class Sample:
    """One image on disk. `mask` is None for normal images and in sets without masks; `label` is 1 for an anomaly.

    `name` is "good/FILE" or "ungood/FILE" in every layout, and so unique within a split.
    """

    image: Path
    mask: Path | None
    label: int
    name: str


def load_split(root: Path, set_name: str, split: Split, *, folder: str | None = None) -> list[Sample]:
    """The samples of one split, good ones first, each part sorted by file name.

    Args:
      root: the folder that holds the sets, or a set's own folder.
      set_name: a key of `SETS`, or the name of any folder below `root` of the same shape. A set that is not in `SETS`
        has masks where the split's anomalous images have a mask folder, and may have normal images alone where `good`
        is the split's only folder.
      split: "valid" (also found as `val`) or "test".
      folder: the set's folder below `root`, where it goes by a name that is not in `SETS[set_name].folders`.

    Raises:
      FileNotFoundError: the root, the set, the split, `good`, `Ungood`, all images or some masks are missing.
      ValueError: `split` is something else, or `root` is the folder of another set.
    """
    if split not in _SPLIT_NAMES:
        raise ValueError(f"split is {split!r}, expected 'valid' or 'test'")
    spec = SETS.get(set_name)
    base = find_folder(Path(root), set_name, folder).resolve()
    rows, digest = _list_split(base, set_name, spec, split)
    samples = []
    for row in _through_tfds(rows, split, digest):
        image = base / os.fsdecode(row[0])
        mask = base / os.fsdecode(row[1]) if row[1] else None
        samples.append(Sample(image, mask, row[2], f"{'ungood' if row[2] else 'good'}/{image.name}"))
    return samples


def find_folder(root: Path, set_name: str, folder: str | None = None) -> Path:
    """The folder that holds the set's `valid` and `test`; at most two levels below the one that has the set's name.

    Raises:
      FileNotFoundError: `root` or the set is not there. The message says which names were tried and what is there.
      ValueError: `root` is itself the folder of a different set, or several sets are in the set's folder.
    """
    if not root.is_dir():
        if set_name not in SETS:
            raise FileNotFoundError(
                f"no data folder at {root}: --data.root has to be the folder of the set {set_name!r}, or the one "
                "above. See docs/data.md"
            )
        raise FileNotFoundError(
            f"no data folder at {root}: download the sets (BMAD as MVFA packs them, see docs/data.md) and unpack them "
            "there, or point the data root at the folder that holds Brain_AD, Liver_AD and so on"
        )
    names = (folder,) if folder else SETS[set_name].folders if set_name in SETS else (set_name,)
    for name in names:
        found = _child(root, (name,)) or (root / name if name and (root / name).is_dir() else None)
        if found is None:
            continue
        inner = _holding_splits(found)
        if not inner:
            raise FileNotFoundError(
                f"{found} has neither a 'valid' (or 'val') nor a 'test' folder; it holds {_held(found)}. "
                "See docs/data.md"
            )
        if len(inner) > 1:
            several = _some([str(f.relative_to(found)) for f in inner])
            raise ValueError(f"{found} holds several sets, {several}: name one of them, as its path below {root}")
        return inner[0]
    if folder is None and _has_split(root):
        others = [key for key, s in SETS.items() if key != set_name and _plain(root.name) in map(_plain, s.folders)]
        if others and set_name in SETS:  # a set of one's own may lie in a folder of any name
            raise ValueError(
                f"set {set_name!r} was asked for, but {root} is the folder of {others[0]!r}: "
                "ask for that set, or give the folder above as the root"
            )
        return root
    raise FileNotFoundError(
        f"set {set_name!r} is not in {root}: tried {', '.join(map(repr, names))}; it holds {_held(root)}. "
        f"Known sets are {', '.join(SETS)}; any folder with valid and test in it can be named as well. See docs/data.md"
    )


def _list_split(
    base: Path, set_name: str, spec: SetSpec | None, split: Split
) -> tuple[list[tuple[bytes, bytes, int, int]], str]:
    """The rows of one split, and the digest of all that they depend on."""
    home = _child(base, _SPLIT_NAMES[split])
    if home is None:
        wanted = " or ".join(map(repr, _SPLIT_NAMES[split]))
        raise FileNotFoundError(
            f"set {set_name!r} has no {wanted} folder in {base}; it holds {_held(base)}. See docs/data.md"
        )
    rows, listing = [], []
    for label, part in enumerate(("good", "ungood")):
        # BMAD's liver archive swaps the two levels: img/good, img/Ungood, label/Ungood.
        within = _child(home, (part,)) or ((swapped := _child(home, ("img",))) and _child(swapped, (part,)))
        if not within:
            if label and spec is None and [_plain(e) for e in _entries(home) if (home / e).is_dir()] == ["good"]:
                continue
            shown = ("good", "Ungood")[label]
            raise FileNotFoundError(
                f"set {set_name!r} has no {shown!r} folder in {home}; it holds {_held(home)}. See docs/data.md"
            )
        folder = _child(within, ("img",)) or within
        images = _images(folder)
        _tell_left_out(folder, images)
        if not images:
            raise FileNotFoundError(
                f"no images in {folder} (looked for {', '.join(sorted(IMAGE_SUFFIXES))}); it holds {_held(folder)}"
            )
        masks: dict[str, Path] = {}
        if label and (spec is None or spec.has_masks):
            masks = _masks(home, within, images, set_name, required=spec is not None)
        for image in images:
            mask = masks.get(image.name)
            rows.append((_relative(image, base), _relative(mask, base) if mask else b"", label, len(rows)))
            listing += [_stamp(p, base) for p in (image, mask) if p]
    # The digest covers the layout of the records too: raise the number when it changes.
    key = json.dumps([1, os.fsencode(base).hex(), split, [[r[0].hex(), r[1].hex(), r[2]] for r in rows], listing])
    return rows, hashlib.sha256(key.encode()).hexdigest()[:32]


def _tell_left_out(folder: Path, images: list[Path]) -> None:
    """Say which files of a folder of images are taken for none, once."""
    taken, known = {image.name for image in images}, {_plain(name) for name in ("img", *_MASK_NAMES)}
    rest = [entry for entry in _entries(folder) if entry not in taken and _plain(entry) not in known]
    inside = {entry: sum(1 for _ in (folder / entry).rglob("*.*")) for entry in rest if (folder / entry).is_dir()}
    said = [f"{n} in the folder {entry}" for entry, n in inside.items() if n]
    suffixes = Counter(Path(entry).suffix.lower() for entry in rest if entry not in inside)
    said += [f"{n} {suffix or 'without an ending'}" for suffix, n in suffixes.items()]
    if said:
        taken = f"images are {', '.join(sorted(IMAGE_SUFFIXES))} in it alone"
        _say_once(f"Files of {printable(str(folder))} that are left out: {_some(said)}; {taken}")


@cache
def _say_once(message: str) -> None:
    console.print(message, markup=False, highlight=False)


def _masks(home: Path, within: Path, images: list[Path], set_name: str, *, required: bool) -> dict[str, Path]:
    """Image file name → mask, by the same file name or else the same stem. Masks without an image are ignored."""
    folder = _child(within, _MASK_NAMES)
    if folder is None and (swapped := _child(home, _MASK_NAMES)):
        folder = _child(swapped, ("ungood",))
    if folder is None:
        if not required:
            return {}
        raise FileNotFoundError(
            f"set {set_name!r} has masks, but {within} holds none: expected a folder "
            f"{' or '.join(map(repr, _MASK_NAMES))} in it; it holds {_held(within)}. See docs/data.md"
        )
    files = _images(folder)
    by_name, by_stem = {p.name: p for p in files}, {p.stem: p for p in reversed(files)}
    found = {i.name: by_name.get(i.name) or by_stem.get(i.stem) for i in images}
    missing = sorted(name for name, mask in found.items() if mask is None)
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(images)} anomalous images of set {set_name!r} have no mask in {folder}: "
            f"{_some(missing)}"
        )
    return {name: mask for name, mask in found.items() if mask}


def _through_tfds(rows: list[tuple[bytes, bytes, int, int]], split: Split, digest: str) -> "list[Row]":
    """Prepares the rows unless they are prepared already, and reads them back."""
    from iqe_jax.data import bmad_builder

    final = cache_dir() / "tfds" / digest
    typed = [bmad_builder.Row(*row) for row in rows]
    if final.is_dir():
        try:
            if (kept := bmad_builder.read(final, split)) == typed:
                return kept
        except Exception:  # whatever TFDS raises where a part of the cache has been deleted: it is made again below
            pass
        shutil.rmtree(final, ignore_errors=True)
    final.parent.mkdir(parents=True, exist_ok=True)
    for left in final.parent.glob(".preparing-*"):  # by runs that were killed
        if time.time() - left.stat().st_mtime > _ABANDONED_AFTER:
            shutil.rmtree(left, ignore_errors=True)
    # Made aside and renamed, so that a folder with the final name is always whole.
    aside = Path(tempfile.mkdtemp(prefix=".preparing-", dir=final.parent))
    try:
        bmad_builder.prepare(aside, split, typed)
        try:
            aside.rename(final)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) and not final.is_dir():
                raise
            return typed  # another process was first, with the same rows, which NFS may show late
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return bmad_builder.read(final, split)


def _plain(name: str) -> str:
    return name.casefold().replace("-", "_")


def _entries(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


def _child(folder: Path, names: Iterable[str]) -> Path | None:
    """The first of the named folders that is there, an exact match before one that differs in case or hyphens."""
    there = _entries(folder)
    for name in names:
        for entry in [e for e in there if e == name] + [e for e in there if _plain(e) == _plain(name)]:
            if (folder / entry).is_dir():
                return folder / entry
    return None


def _has_split(folder: Path) -> bool:
    return _child(folder, [n for names in _SPLIT_NAMES.values() for n in names]) is not None


def _holding_splits(folder: Path) -> list[Path]:
    """`folder`, or those up to two levels below that have splits: archives often wrap a set once or twice."""
    level = [folder]
    for _ in range(3):
        if holding := [f for f in level if _has_split(f)]:
            return holding
        level = [f / e for f in level for e in _entries(f) if (f / e).is_dir()]
    return []


def _images(folder: Path) -> list[Path]:
    return [folder / e for e in _entries(folder) if Path(e).suffix.lower() in IMAGE_SUFFIXES and (folder / e).is_file()]


def _relative(path: Path, base: Path) -> bytes:
    return os.fsencode(path.relative_to(base))


def _stamp(path: Path, base: Path) -> list:
    stat = path.stat()
    return [_relative(path, base).hex(), stat.st_size, stat.st_mtime_ns]


def _some(names: list[str]) -> str:
    more = len(names) - NAMED_AT_MOST
    return ", ".join(names[:NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")


def _held(folder: Path) -> str:
    return _some(_entries(folder)) or "nothing"

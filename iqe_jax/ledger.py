"""Which scans are to be predicted, and what is on record of them: the files behind a run of predict.py that can resume.

settings.json    what results depend on; a run with other settings is refused
scores.jsonl     a line per frame, added file by file in whole lines
failures.jsonl   a line per file that could not be used in the latest run, which tried it again
scores.csv       the same as scores.jsonl, made from it at the end
"""

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iqe_jax.data.scans import SUFFIXES, printable

_RESULTS = ("scores.csv", "scores.jsonl", "failures.jsonl")
_COLUMNS = ("file", "frame", "score", "probability", "decision", "heatmap")


@dataclass(frozen=True)
class Item:
    """A file to predict: what it is called in messages and results, and by what its results are named and found.

    `place` stands for where the file lies, whatever is there, and `key` for this version of it.
    """

    path: Path
    label: str
    place: str
    key: str


def find(given: Sequence[str], out: Path, redact: bool = False) -> list[Path]:
    """The files that paths, folders and patterns stand for, each once, in their order; folders are walked sorted.

    In a folder those count that end as scans do, and those of any name that begin as DICOM files do; hidden ones, the
    results in `out`, DICOMDIR and the masks of a data set do not. Links to folders are not followed.

    Raises FileNotFoundError where one of `given` stands for no file, and OSError where a folder cannot be searched;
    under `redact` they name the number, not the name.
    """
    found: dict[Path, Path] = {}
    for number, name in enumerate(given, 1):
        called = f"PATH number {number}" if redact else None
        matches = [Path(name)] if Path(name).exists() else _matching(name)
        files = [file for match in matches for file in (_walk(match, out, called) if match.is_dir() else [match])]
        files = [file for file in files if out.resolve() not in file.resolve().parents]
        if not files:
            what = "holds no scans" if matches else "is not there, and no file matches it"
            endings = ", ".join(sorted(SUFFIXES))
            raise FileNotFoundError(
                f"{called or printable(name)} {what}: expected a scan, a pattern, or a folder with files in {endings}"
            )
        for file in files:
            found.setdefault(file.resolve(), file)
    if not found:
        raise FileNotFoundError("nothing to predict: give at least one PATH")
    return list(found.values())


def _matching(pattern: str) -> list[Path]:
    """What a pattern such as 'study/**/*.dcm' matches, sorted, hidden files and folders left out."""
    parts = Path(pattern).parts
    plain = next((i for i, part in enumerate(parts) if set(part) & set("*?[")), None)
    if plain is None:
        return []
    base = Path(*parts[:plain])  # as it is given: it may go up by '..', or into a hidden folder
    matches = base.glob(str(Path(*parts[plain:])))
    return sorted(path for path in matches if not any(part.startswith(".") for part in path.relative_to(base).parts))


def _walk(folder: Path, out: Path, called: str | None) -> Iterator[Path]:
    def fail(fault: OSError) -> None:
        place = fault.filename if called is None else f"a folder of {called}"
        raise OSError(
            f"{printable(str(place))} cannot be searched: {fault.strerror}; give files or folders that can be"
        )

    for place, folders, files in os.walk(folder, onerror=fail):
        left_out = {f for f in folders if f.startswith(".") or _holds_masks(f, folders)}
        folders[:] = sorted(f for f in {*folders} - left_out if (Path(place) / f).resolve() != out.resolve())
        for name in sorted(files):
            path = Path(place) / name
            if not name.startswith(".") and name != "DICOMDIR" and path.is_file() and _may_be_scan(path):
                yield path


def _holds_masks(folder: str, beside: Sequence[str]) -> bool:
    """Whether a folder is one of masks in the layouts of the data sets."""
    return folder == "anomaly_mask" or (folder == "label" and "img" in beside)


def _may_be_scan(path: Path) -> bool:
    name = path.name.lower()
    if path.suffix.lower() in SUFFIXES:
        return not name.endswith(".gz") or name.endswith(".nii.gz")
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def itemise(paths: Sequence[Path], redact: bool) -> list[Item]:
    """Names for results: under `redact` numbers, else the path, and a key that no other file or later version has."""
    if redact:
        return [Item(path, *[f"file-{i:05d}"] * 3) for i, path in enumerate(paths, 1)]
    items = []
    for path in paths:
        stem = re.sub(r"[^\w.-]", "_", re.sub(r"(\.nii)?\.[^.]*$", "", path.name), flags=re.ASCII)[:60].strip(".")
        place = hashlib.blake2b(os.fsencode(path.resolve()), digest_size=8).hexdigest()
        items.append(Item(path, printable(str(path)), place, f"{stem or 'scan'}-{_digest([path])[:10]}"))
    return items


def _digest(paths: Sequence[Path]) -> str:
    """A word for files by place, size and time."""
    hasher = hashlib.blake2b(digest_size=16)
    for path in paths:
        stat = path.stat()
        hasher.update(os.fsencode(path.resolve()) + f"\0{stat.st_size} {stat.st_mtime_ns}\0".encode())
    return hasher.hexdigest()


class Ledger:
    """The results folder. Entering it reads what is there, and drops what a killed run left half."""

    def __init__(self, out: Path, settings: dict[str, Any], items: Sequence[Item]):
        """The results of `items` under `settings` in the folder `out`, which need not be there."""
        self.out, self.items, self.failures = out, items, 0
        # Numbers stand for places in the list, so under --redact the list has to stay the same.
        files = _digest([item.path for item in items]) if settings["redact"] else None
        self.settings = {**settings, "files": files}
        self.done: set[str] = set()
        """Keys of the files on record."""

    def __enter__(self) -> "Ledger":
        """Open the folder.

        Raises ValueError where it has results of other settings, files of another command that results would
        overwrite, a damaged line, or another command at work in it, FileExistsError where a file is in its place.
        """
        from iqe_jax.checkpoint import alone_in

        self.out.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            stack.enter_context(alone_in(self.out, "give this one another --out"))
            self._read()
            self._scores = stack.enter_context((self.out / "scores.jsonl").open("ab", buffering=0))
            self._failures = stack.enter_context((self.out / "failures.jsonl").open("wb", buffering=0))
            self._entered = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        self._entered.close()

    def _read(self) -> None:
        """Take what is there, if it is of the same settings, and drop what is half or of files that have changed."""
        from iqe_jax.checkpoint import write_whole

        stored = self.out / "settings.json"
        if stored.exists():
            self._compare(stored)
        elif foreign := [name for name in _RESULTS if (self.out / name).exists()]:
            raise ValueError(
                f"{self.out} holds {', '.join(foreign)} and no settings.json, so it is no folder of predictions: give "
                "another --out"
            )
        else:
            write_whole(stored, json.dumps(self.settings, indent=2) + "\n")
        path = self.out / "scores.jsonl"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole, kept = text[: text.rfind("\n") + 1], ""
        current = {item.place: item.key for item in self.items}
        for key, lines in _by_file(path, whole).items():
            records = [record for _, record in lines]
            complete = len(records) == records[0]["frames"]
            if complete and current.get(records[0]["place"], key) == key:  # else it was cut short, or the file changed
                self.done.add(key)
                kept += "".join(line for line, _ in lines)
        if kept != text:
            write_whole(path, kept)

    def _compare(self, path: Path) -> None:
        try:
            stored = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as fault:
            raise ValueError(f"{path} is damaged ({fault}): give another --out, or remove that folder") from fault
        different = [name for name in self.settings if stored.get(name) != self.settings[name]]
        if different:
            short = ", ".join(
                f"{name} was {stored.get(name)}, now {self.settings[name]}"
                if name not in ("weights", "calibration", "files")
                else f"other {name}"
                for name in different
            )
            raise ValueError(
                f"{self.out} holds results of other settings ({short}); "
                "give this run another --out, or remove that folder"
            )

    def record(self, item: Item, frame: int, frames: int, score: float) -> dict[str, Any]:
        """A line of scores.jsonl, without what comes later."""
        record = {"file": item.label, "place": item.place, "key": item.key, "frame": frame, "frames": frames}
        return {**record, "score": round(score, 6), "probability": None, "decision": None, "heatmap": None}

    def add(self, item: Item, records: Sequence[dict[str, Any]]) -> None:
        """Put all frames of a file on record, in one write."""
        _append(self._scores, records)
        self.done.add(item.key)

    def fail(self, item: Item, message: str) -> None:
        """Put a file that could not be used on record."""
        self.failures += 1
        _append(self._failures, [{"file": item.label, "error": message}])

    def write_key(self, path: Path, files: Sequence[Path]) -> None:
        """The list of numbers and files of a redacted run. Raises ValueError rather than replace another list."""
        from iqe_jax.checkpoint import write_whole

        rows = [(item.label, printable(str(file))) for item, file in zip(self.items, files, strict=True)]
        table = _table([("number", "file"), *rows])
        if path.exists() and path.read_bytes() != table.encode():
            raise ValueError(f"--redact-key {path} is there already and lists other files: give another name")
        write_whole(path, table)

    def write_table(self) -> tuple[int, int]:
        """Write scores.csv, in the order of the files; returns how many frames it has and how many are anomalous."""
        from iqe_jax.checkpoint import write_whole

        path = self.out / "scores.jsonl"
        files = _by_file(path, path.read_text(encoding="utf-8"))
        order = [item.key for item in self.items if item.key in files]
        known = set(order)
        order += [key for key in files if key not in known]  # of earlier commands with other paths
        records = [record for key in order for _, record in files[key]]
        rows = [["" if record[name] is None else record[name] for name in _COLUMNS] for record in records]
        write_whole(self.out / "scores.csv", _table([_COLUMNS, *rows]))
        return len(records), sum(record["decision"] == "anomalous" for record in records)


def _by_file(path: Path, text: str) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """Lines and their records by key."""
    files: dict[str, list[tuple[str, dict[str, Any]]]] = defaultdict(list)
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        try:
            record = json.loads(line)
            if missing := {"file", "place", "key", "frame", "frames"} - set(record):
                raise ValueError(f"it has no {min(missing)}")
            files[record["key"]].append((line, record))
        except (ValueError, KeyError, TypeError) as fault:
            raise ValueError(
                f"{path}, line {number}, is damaged ({fault}): remove that line, its file is done again"
            ) from fault
    return files


def _append(file: io.FileIO, records: Sequence[dict[str, Any]]) -> None:
    text = "".join(json.dumps(record) + "\n" for record in records).encode()
    if file.write(text) != len(text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)


def _table(rows: Sequence[Sequence[Any]]) -> str:
    """Rows as CSV. A cell that a spreadsheet would take for a formula gets the path './' before it."""
    text = io.StringIO()
    safe = [[f"./{c}" if isinstance(c, str) and c[:1] in tuple("=+-@") else c for c in row] for row in rows]
    csv.writer(text, lineterminator="\n").writerows(safe)
    return text.getvalue()

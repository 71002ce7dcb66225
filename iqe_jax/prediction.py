"""What predict.py does: finds scans, runs the detector over their frames, and leaves scores and heat maps.

Files are decoded ahead in threads and batched across files. A file's lines are added to scores.jsonl in one write,
after its maps are on disk, so a run that is killed loses at most the files in work, and the same command goes on behind
them. Reading scans is data/scans.py's work, writing maps scan_maps.py's, what is on record ledger.py's.
"""

import secrets
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro
from jaxtyping import Float, Float32, UInt8, UInt16

from iqe_jax.data.pipeline import results_ahead
from iqe_jax.data.scans import MAX_PIXELS, Scan, ScanError, open_scan, printable
from iqe_jax.ledger import Item, Ledger, find, itemise

if TYPE_CHECKING:
    from iqe_jax.calibration import Calibration
    from iqe_jax.detector import Detector

_IN_FLIGHT = 2**26  # pixels decoded and not yet written, however many frames they make
BAD_FILES = 3
"""Exit status of a run that came to its end but could not read some files."""


@dataclass(frozen=True)
class Options:
    """What predict.py is told."""

    paths: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """Scans: files, folders (searched to the bottom), or patterns such as 'study/**/*.dcm'."""
    run: Path
    """Directory of a finished run of train.py or evaluate.py."""
    out: Path
    """Folder for the results; the same command goes on where a stopped one was."""
    window: tuple[float, float] | None = None
    """Centre and width of the grey values that matter, such as 40 400 for soft tissue in CT; by default the file's own,
    else percentiles."""
    axis: Literal[0, 1, 2] = 2
    """Volumes: cut into slices across this axis: 0 left to right, 1 back to front, 2 feet to head."""
    heatmaps: bool = True
    """A picture of each frame with its heat map, and of each volume a map in its geometry; --no-heatmaps: neither."""
    dicom: Literal["none", "secondary-capture"] = "none"
    """DICOM files: write the picture as a DICOM object too."""
    prevalence: float | None = None
    """Share of anomalous images where these come from, for the probability; by default the calibration pool's."""
    redact: bool = False
    """Call files file-00001 and so on in all that is printed and written; DICOM objects lose patient and study."""
    redact_key: Path | None = None
    """With --redact: a CSV file to write which number is which file; keep it where the patients' data are."""
    strict: bool = False
    """Stop at the first file that cannot be used, and not at the end."""
    batch_size: int = 16
    """Frames run at a time; changes speed, never results."""
    workers: int = 2
    """Threads that decode and write."""
    max_megapixels: float = MAX_PIXELS / 1e6
    """Largest frame to open, in millions of pixels; volumes may have four times as many voxels."""


def run_prediction(options: Options) -> int:
    """Predict all that is asked for and not yet done; returns the exit status, 0, or 3 where files could not be used.

    Raises FileNotFoundError or ValueError before any work where the run, the scans or the folder for results are not
    fit, and ValueError at a bad file under `strict`.
    """
    from iqe_jax import calibration
    from iqe_jax.detector import load
    from iqe_jax.progress import Meter, console

    _check(options)
    paths = find(options.paths, options.out, options.redact)
    fitted = calibration.load(options.run)
    detector = load(options.run)
    weights = _fingerprint(options.run)
    items = itemise(paths, options.redact)
    with Ledger(options.out, _settings(options, weights, fitted), items) as ledger:
        if options.redact_key:
            ledger.write_key(options.redact_key, paths)
        left = [item for item in items if item.key not in ledger.done]
        if len(left) < len(items):
            console.print(f"{len(items) - len(left)} of {len(items)} files are done already in {options.out}")
        if fitted is None:
            console.print(
                f"{options.run} has no calibration: no probability, no decision. evaluate.py makes it of valid images "
                "that are no support"
            )
        for sentence in fitted.withheld if fitted else ():
            console.print(f"The calibration gives {sentence}")
        job = _Job(options, detector, fitted, ledger, weights)
        with Meter("Predicting", len(items), len(items) - len(left)) as meter:
            for done, work in enumerate(job.run(left), len(items) - len(left) + 1):
                for said in [f"skipped: {work.fault}"] if work.fault else work.scan.notes if work.scan else ():
                    console.print(said, markup=False, highlight=False)
                meter.update(done, f"{ledger.failures} skipped" if ledger.failures else "")
        frames, anomalous = ledger.write_table()
        said = f"{frames} frames of {len(ledger.done)} files in {options.out}"
        said += f", {anomalous} called anomalous" if fitted is not None and fitted.threshold is not None else ""
        print(said + (f"; {ledger.failures} files could not be used, see failures.jsonl" if ledger.failures else ""))
        return BAD_FILES if ledger.failures else 0


def _check(options: Options) -> None:
    if not (options.run / "config.json").exists():
        raise FileNotFoundError(
            f"--run {options.run} is no run directory: it has no config.json. evaluate.py writes one"
        )
    for name in ("batch_size", "workers", "max_megapixels"):
        if not 0 < getattr(options, name) < np.inf:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be above 0, and finite")
    if options.prevalence is not None and not 0 < options.prevalence < 1:
        raise ValueError(f"--prevalence is {options.prevalence}; it must lie between 0 and 1")
    if options.window is not None and not (np.isfinite(options.window).all() and options.window[1] > 0):
        raise ValueError(
            f"--window is {options.window[0]:g} {options.window[1]:g}; expected a centre and a width above 0"
        )
    if options.redact_key and not options.redact:
        raise ValueError("--redact-key is for runs with --redact")


def _fingerprint(run: Path) -> str:
    """A word for the model: its adapter, and the settings that it computes by."""
    import hashlib
    import json

    from iqe_jax.config import read
    from iqe_jax.weights import adapter_file

    config = read(run / "config.json")
    hasher = hashlib.sha256(adapter_file(run).read_bytes())
    hasher.update(json.dumps([asdict(config.model), config.zero_shot], sort_keys=True).encode())
    return hasher.hexdigest()[:32]


def _settings(options: Options, weights: str, fitted: "Calibration | None") -> dict[str, Any]:
    """All that results depend on, as it stands in settings.json."""
    return {
        "weights": weights,
        "calibration": None if fitted is None else {"threshold": fitted.threshold, "curve": fitted.curve},
        "window": None if options.window is None else list(options.window),
        **{name: getattr(options, name) for name in ("axis", "heatmaps", "dicom", "prevalence", "redact")},
    }


@dataclass
class _Loaded:
    """A decoded frame on its way to the model, or a fault in its place."""

    work: "_Work"
    index: int = 0
    pixels: UInt8[np.ndarray, "height width 3"] | None = None
    prepared: Float32[np.ndarray, "side side 3"] = field(default_factory=lambda: np.zeros((0, 0, 3), np.float32))
    fault: ScanError | None = None


@dataclass
class _Work:
    """One file while it is worked on."""

    item: Item
    scan: Scan | None = None
    fault: ScanError | None = None
    records: list[dict[str, Any]] = field(default_factory=list)
    writes: list[Future] = field(default_factory=list)
    volume: UInt16[np.ndarray, "slice height width"] | None = None
    listed: bool = False

    @property
    def complete(self) -> bool:
        """Whether all its frames are scored, or it is of no use."""
        return self.fault is not None or (self.scan is not None and len(self.records) == len(self.scan))


@dataclass
class _Job:
    """The pipeline: open ahead, decode ahead, predict in batches, write behind."""

    options: Options
    detector: "Detector"
    fitted: "Calibration | None"
    ledger: Ledger
    weights: str

    def __post_init__(self) -> None:
        """Draw what the UIDs of redacted objects come from."""
        self._nonce = secrets.token_hex(16)

    def run(self, items: list[Item]) -> Iterator[_Work]:
        """Work off `items` in order, and give each when it is on record."""
        self.pool = ThreadPoolExecutor(self.options.workers, "scans")
        self.detector.batch_size = self.options.batch_size
        complete: list[_Work] = []
        try:
            for batch, only in _batches(self._frames(items), self.options.batch_size):
                self._predict(batch, only)
                # One batch behind, so that maps are written while the model works.
                yield from (self._settle(work) for work in complete)
                complete = []
                for work in (loaded.work for loaded in batch):
                    if work.complete and not work.listed:
                        work.listed = True
                        complete.append(work)
            yield from (self._settle(work) for work in complete)
        finally:
            self.pool.shutdown(cancel_futures=True)

    def _frames(self, items: list[Item]) -> Iterator[_Loaded]:
        """All frames in order, decoded ahead in threads; a file that cannot be opened is one fault."""
        opened = results_ahead(self.pool, ((0, partial(self._open, item)) for item in items), self.options.workers)

        def jobs() -> Iterator[tuple[int, Callable[[], _Loaded]]]:
            for work in opened:
                if work.scan is None:
                    yield 0, partial(_Loaded, work, fault=work.fault)
                else:
                    height, width = work.scan.size
                    for index in range(len(work.scan)):
                        if work.fault is not None:  # an earlier frame is damaged
                            break
                        yield height * width, partial(self._decode, work, index)

        return results_ahead(self.pool, jobs(), 2 * self.options.batch_size, _IN_FLIGHT)

    def _open(self, item: Item) -> _Work:
        options = self.options
        try:
            limit = int(options.max_megapixels * 1e6)
            name = printable(item.label)
            scan = open_scan(item.path, name=name, window=options.window, axis=options.axis, max_pixels=limit)
        except ScanError as fault:
            return _Work(item, fault=fault)
        return _Work(item, scan)

    def _decode(self, work: _Work, index: int) -> _Loaded:
        from PIL import Image

        from iqe_jax.data.transforms import image_array

        assert work.scan is not None
        try:
            pixels = np.round(work.scan.frame(index) * 255).astype(np.uint8)
        except ScanError as fault:
            work.fault = fault
            return _Loaded(work, index, fault=fault)
        size = self.detector.model.config.image_size
        return _Loaded(work, index, pixels, image_array(Image.fromarray(pixels), work.item.label, size))

    def _predict(self, batch: list[_Loaded], only: bool) -> None:
        """Score a batch and start to write its maps. A batch that is the only one runs no larger than need be."""
        batch = [loaded for loaded in batch if loaded.fault is None and loaded.work.fault is None]
        if not batch:
            return
        if only:  # one of a few sizes, each of which is compiled once
            self.detector.batch_size = min(2 ** (len(batch) - 1).bit_length(), self.options.batch_size)
        scores, maps = self.detector(np.stack([loaded.prepared for loaded in batch]))
        if not np.isfinite(scores).all():
            raise FloatingPointError(f"scores are not finite, such as of {batch[0].work.item.label}: use other weights")
        probabilities = self.fitted and self.fitted.probability(scores, self.options.prevalence)
        decisions = self.fitted and self.fitted.decision(scores)
        for i, (loaded, anomaly_map) in enumerate(zip(batch, maps, strict=True)):
            record = self.ledger.record(loaded.work.item, loaded.index, len(loaded.work.scan or ()), float(scores[i]))
            record["probability"] = None if probabilities is None else round(float(probabilities[i]), 6)
            record["decision"] = None if decisions is None else ("normal", "anomalous")[int(decisions[i])]
            work = loaded.work
            work.records.append(record)
            if self.options.heatmaps:
                if work.scan is not None and work.scan.kind == "nifti" and work.volume is None:
                    work.volume = np.zeros((len(work.scan), *work.scan.size), np.uint16)
                work.writes.append(self.pool.submit(self._write, loaded, anomaly_map, record))

    def _write(self, loaded: _Loaded, anomaly_map: Float[np.ndarray, "side side"], record: dict[str, Any]) -> None:
        """The map of one frame: a picture, or a slice of the volume's map."""
        from iqe_jax import scan_maps

        work, pixels = loaded.work, loaded.pixels
        assert work.scan is not None and pixels is not None
        if work.volume is not None:
            work.volume[loaded.index] = np.round(scan_maps.resized(anomaly_map, *work.scan.size) * scan_maps.LEVELS)
            return
        shown = scan_maps.picture(pixels, anomaly_map)
        stem = work.item.key if len(work.scan) == 1 else f"{work.item.key}-{loaded.index:05d}"
        record["heatmap"] = f"heatmaps/{stem}.png"
        scan_maps.write_picture(_in(self.options.out, record["heatmap"]), shown)
        if work.scan.kind == "dicom" and self.options.dicom == "secondary-capture":
            origin = scan_maps.Origin(self.weights, self.options.redact, self._nonce)
            path = _in(self.options.out, f"dicom/{stem}.dcm")
            scan_maps.write_secondary_capture(path, work.scan, loaded.index, shown, record["score"], origin)

    def _settle(self, work: _Work) -> _Work:
        """Wait for a file's maps, then put it on record."""
        for write in work.writes:
            try:
                write.result()
            except ScanError as fault:
                work.fault = fault
        if work.fault is None and work.volume is not None and work.scan is not None:
            from iqe_jax import scan_maps

            path = f"maps/{work.item.key}.nii.gz"
            try:
                scan_maps.write_volume(_in(self.options.out, path), work.scan, work.volume)
            except ScanError as fault:
                work.fault = fault
            for record in work.records:
                record["heatmap"] = path
        if work.fault is not None:
            self.ledger.fail(work.item, str(work.fault))
            if self.options.strict:
                raise work.fault
        else:
            self.ledger.add(work.item, work.records)
        return work


def _in(out: Path, relative: str) -> Path:
    """A file's place in the results, its folder made."""
    path = out / relative
    path.parent.mkdir(exist_ok=True)
    return path


def _batches(frames: Iterable[_Loaded], size: int) -> Iterator[tuple[list[_Loaded], bool]]:
    """Frames in batches of `size`, or fewer where they are large; with each, whether it is the only one."""
    batch: list[_Loaded] = []
    held, first = 0, True
    for loaded in frames:
        if batch and (len(batch) == size or held > _IN_FLIGHT):
            yield batch, False
            batch, held, first = [], 0, False
        batch.append(loaded)
        held += 0 if loaded.pixels is None else loaded.pixels.shape[0] * loaded.pixels.shape[1]
    if batch:
        yield batch, first

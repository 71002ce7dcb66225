"""Turns samples into padded batches of arrays with Grain, and counts out the index batches of training.

Decoding runs ahead in Grain's reader threads (Pillow lets go of the GIL) or, where asked for, in its worker processes.
Arrays are NumPy's: putting them on devices, and looking up features by index, is the trainer's and evaluator's work.
"""

import atexit
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing, suppress
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple, NotRequired, TypedDict, TypeVar, cast

import numpy as np
from jaxtyping import Float32, Int32

from iqe_jax.data.bmad import NAMED_AT_MOST, Sample
from iqe_jax.data.transforms import check_header, load_image, load_pair, region_shares
from iqe_jax.progress import track

T = TypeVar("T")

_AT_ONCE = 16  # files whose headers are waited for, which on a disk across a network takes milliseconds each

_live: "weakref.WeakSet[Generator]" = weakref.WeakSet()  # iterations that have not been dropped


class ImageBatch(TypedDict):
    """A batch of decoded samples. Entries without a sample are zeros with weight 0 and index 0."""

    image: Float32[np.ndarray, "batch size size 3"]  # 0 … 1
    mask: Float32[np.ndarray, "batch size size"]  # 0 … 1; zeros where there is none
    region: NotRequired[Float32[np.ndarray, "batch size size"]]  # see `region_shares`; only if asked for
    label: Float32[np.ndarray, "batch"]  # 1 for an anomaly
    weight: Float32[np.ndarray, "batch"]  # 1 for a sample, 0 for padding


class IndexBatch(NamedTuple):
    """Which samples of which set make a training step. Padding has index 0 and weight 0."""

    set_index: int
    indices: Int32[np.ndarray, "batch"]
    weight: Float32[np.ndarray, "batch"]


def check_files(samples: Sequence[Sample]) -> None:
    """Look at the headers of all images and masks, so that hours of work do not end at a file that is none.

    Pixels are not decoded, so a file whose end is missing is found when its turn comes.

    Raises ValueError naming every file that is empty, no image, of a kind that is not read or a mask of another size
    than its image; of more than `NAMED_AT_MOST` the first.
    """

    def fault(sample: Sample) -> str | None:
        try:
            check_header(sample.image, sample.mask)
        except (ValueError, OSError) as found:
            return str(found)
        return None

    with ThreadPoolExecutor(_AT_ONCE, "headers") as pool:
        jobs = ((0, partial(fault, sample)) for sample in samples)
        looked_at = track(results_ahead(pool, jobs, 4 * _AT_ONCE), "Looking at the images", total=len(samples))
        bad = [found for found in looked_at if found]
    if len(bad) == 1:
        raise ValueError(bad[0])
    if bad:
        more = [f"and {len(bad) - NAMED_AT_MOST} more"] if len(bad) > NAMED_AT_MOST else []
        lines = "\n  ".join([*bad[:NAMED_AT_MOST], *more])
        raise ValueError(f"{len(bad)} of {len(samples)} images cannot be used:\n  {lines}")


def image_batches(
    samples: Sequence[Sample | None],
    image_size: int,
    batch_size: int,
    *,
    workers: int,
    with_masks: bool,
    with_regions: bool = False,
    processes: bool = False,
) -> Iterator[ImageBatch]:
    """Decodes `samples` in their order into batches of one fixed shape; the last is padded.

    Args:
      samples: what to read; with none there are no batches. A None among them is padding.
      image_size: side to which images and masks are resized.
      batch_size: samples in a batch.
      workers: batches decoded at a time, ahead of use; 0 decodes in the calling thread when a batch is asked for.
      with_masks: whether to open mask files; otherwise all masks are zeros.
      with_regions: whether to find the connected regions of the masks, for AUPRO.
      processes: use worker processes and not threads. They take seconds to start, need a main module that can be
        imported (`if __name__ == "__main__":`), and pay off only with many cores and large images.

    Raises:
      ValueError: at once if an argument is out of range. When its batch is reached, if a file cannot be read or a mask
        is not of its image's size; likewise FileNotFoundError if a file has gone (see `load_pair`).
    """
    for name, value, least in (("image_size", image_size, 1), ("batch_size", batch_size, 1), ("workers", workers, 0)):
        if value < least:
            raise ValueError(f"{name} is {value}, must be at least {least}")
    decode = _Decode(image_size, with_masks, with_regions)
    batches = _image_batches(samples, decode, batch_size, workers, processes)
    _live.add(batches)
    return batches


def _image_batches(
    samples: Sequence[Sample | None], decode: "_Decode", batch_size: int, workers: int, processes: bool
) -> Generator[ImageBatch]:
    # Grouped before it is decoded: Grain deals out whole elements to its workers, so an element has to be a batch.
    rows = [(s.image, s.mask, s.label) if s else None for s in samples]
    groups = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    if not groups:
        return
    grain = _grain()
    batches = grain.MapDataset.source(groups).map(_DecodeBatch(decode, batch_size))
    if processes and workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads its own flags, which only absl's app.run would have parsed
        workers = min(workers, len(groups))
        options = grain.multiprocessing.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        ahead = batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)).mp_prefetch(options)
    else:
        # One batch more than there are threads, so that none waits while a batch is in use.
        ahead = batches.to_iter_dataset(
            grain.ReadOptions(num_threads=workers, prefetch_buffer_size=workers + 1 if workers else 0)
        )
    with closing(iter(ahead)) as iterator:  # stops the readers when the caller stops early
        for batch in iterator:
            if processes:
                # Worker processes hand over shared memory, which is given back as soon as nothing refers to it.
                batch = {field: np.array(values) for field, values in batch.items()}
            yield cast(ImageBatch, batch)


@cache
def _grain():
    """Grain, whose import takes half a second that a start with kept features has no need of."""
    import grain

    # A script may end in mid-iteration. Left to the interpreter, Grain's clean-up fails: modules are gone by then. Said
    # after its import, this is done before what Grain and multiprocessing do at the end.
    atexit.register(_close_all)
    return grain


def _close_all() -> None:
    for batches in list(_live):
        with suppress(ValueError):  # being run by another thread at this moment
            batches.close()


class _Decode(NamedTuple):
    """Opens one sample; a class and not a closure, because worker processes receive it pickled."""

    image_size: int
    with_masks: bool
    with_regions: bool

    def __call__(self, image: Path, mask: Path | None) -> tuple[np.ndarray, np.ndarray | None]:
        if self.with_masks and mask is not None:
            return load_pair(image, mask, self.image_size)
        return load_image(image, self.image_size), None


class _DecodeBatch(NamedTuple):
    decode: _Decode
    batch_size: int

    def __call__(self, group: list[tuple[Path, Path | None, int] | None]) -> ImageBatch:
        b, s = self.batch_size, self.decode.image_size
        batch = ImageBatch(
            image=np.zeros((b, s, s, 3), np.float32),
            mask=np.zeros((b, s, s), np.float32),
            label=np.zeros(b, np.float32),
            weight=np.zeros(b, np.float32),
        )
        if self.decode.with_regions:
            batch["region"] = np.zeros((b, s, s), np.float32)
        for slot, row in enumerate(group):
            if row is None:
                continue
            image, mask, label = row
            pixels, marks = self.decode(image, mask)
            batch["image"][slot] = pixels
            if marks is not None:
                batch["mask"][slot] = marks
                if "region" in batch:
                    batch["region"][slot] = region_shares(marks)
            batch["label"][slot], batch["weight"][slot] = label, 1
        return batch


def results_ahead(
    pool: Executor, jobs: Iterable[tuple[int, Callable[[], T]]], depth: int, room: float = float("inf")
) -> Iterator[T]:
    """The results of `jobs`, (size, what to call), in order; up to `depth` of them and sizes up to `room` run ahead."""
    waiting: deque[tuple[int, Future[T]]] = deque()
    held = 0
    for size, job in jobs:
        waiting.append((size, pool.submit(job)))
        held += size
        while len(waiting) > depth or (held > room and len(waiting) > 1):
            size, future = waiting.popleft()
            held -= size
            yield future.result()
    for _, future in waiting:
        yield future.result()


class _Plan(NamedTuple):
    """All batches of one epoch."""

    epoch: int
    set_index: Int32[np.ndarray, "steps"]
    indices: Int32[np.ndarray, "steps batch"]
    weight: Float32[np.ndarray, "steps batch"]


class LeaveOneOutBatches:
    """The index batches of training on several sets: each batch from one set, all batches of an epoch shuffled.

    `batches[step]` for any step from 0 on, however large, depends on the arguments and the step alone, so training
    resumes by number. In each epoch of `steps_per_epoch` steps every sample stands exactly once; every epoch has an
    order of its own. The last batch of a set is padded, with weight 0, and takes its place in the shuffle as any other.

    Args:
      sizes: number of samples of each set.
      batch_size: indices in a batch.
      seed: any integer from 0 on.

    Raises:
      ValueError: no sets, an empty set, a batch size below 1 or a negative seed.
    """

    # NumPy and not Grain's shuffle, which takes milliseconds for each index where sets are small.
    _mix_batches = True

    def __init__(self, sizes: Sequence[int], batch_size: int, seed: int):
        if not sizes or min(sizes) < 1:
            raise ValueError(f"every training set needs at least one sample, sizes are {list(sizes)}")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, must be at least 1")
        if seed < 0:
            raise ValueError(f"seed is {seed}, must not be negative")
        self._sizes, self._batch_size, self._seed = list(sizes), batch_size, seed
        self.steps_per_epoch = sum(-(-size // batch_size) for size in sizes)
        self._latest: _Plan | None = None

    def __getitem__(self, step: int) -> IndexBatch:
        if step < 0:
            raise IndexError(f"step is {step}: training steps are counted from 0")
        epoch, position = divmod(int(step), self.steps_per_epoch)
        plan = self._latest
        if plan is None or plan.epoch != epoch:
            plan = self._latest = self._draw(epoch)
        return IndexBatch(int(plan.set_index[position]), plan.indices[position], plan.weight[position])

    def _draw(self, epoch: int) -> _Plan:
        # The epoch is a part of the seed, so any epoch can be drawn without those before it.
        draw = np.random.default_rng([self._seed, epoch])
        plan = _Plan(
            epoch,
            np.zeros(self.steps_per_epoch, np.int32),
            np.zeros((self.steps_per_epoch, self._batch_size), np.int32),
            np.zeros((self.steps_per_epoch, self._batch_size), np.float32),
        )
        first = 0
        for number, size in enumerate(self._sizes):
            rows = slice(first, first + -(-size // self._batch_size))
            plan.set_index[rows] = number
            plan.indices[rows].ravel()[:size] = draw.permutation(size)  # a view: rows are contiguous
            plan.weight[rows].ravel()[:size] = 1
            first = rows.stop
        if self._mix_batches:
            order = draw.permutation(self.steps_per_epoch)
            plan = _Plan(epoch, *(field[order] for field in plan[1:]))
        for field in plan[1:]:
            field.flags.writeable = False  # batches are views of it
        return plan


class FewShotBatches(LeaveOneOutBatches):
    """The index batches of training on one small set: all its samples, shuffled anew in each epoch.

    As `LeaveOneOutBatches`, but of one set (`set_index` is 0), and the padded batch is the last of its epoch.

    Args:
      n: number of samples, augmented ones counted.
      batch_size: indices in a batch.
      seed: any integer from 0 on.

    Raises:
      ValueError: no samples, a batch size below 1 or a negative seed.
    """

    _mix_batches = False

    def __init__(self, n: int, batch_size: int, seed: int):
        super().__init__([n], batch_size, seed)

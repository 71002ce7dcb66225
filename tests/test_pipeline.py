"""Batches of decoded images in threads and in processes, and the index batches of training."""

import os
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iqe_jax.data.bmad import Sample
from iqe_jax.data.pipeline import FewShotBatches, LeaveOneOutBatches, check_files, image_batches, results_ahead
from iqe_jax.data.transforms import load_image, load_mask, region_shares


def make_samples(folder: Path, count: int = 7) -> list[Sample]:
    draw = np.random.default_rng(0)
    samples = []
    for i in range(count):
        image, mask = folder / f"{i}.png", folder / f"{i}_mask.png"
        Image.fromarray(draw.integers(0, 256, (20, 30, 3), np.uint8)).save(image)
        Image.fromarray((draw.integers(0, 2, (20, 30)) * 255).astype(np.uint8)).save(mask)
        samples.append(Sample(image, mask if i % 2 else None, i % 2, f"{i}"))
    return samples


def check(batches: list, samples: list[Sample], with_masks: bool = True) -> None:
    """Every field of every batch of four against the files themselves."""
    assert len(batches) == -(-len(samples) // 4)
    for number, batch in enumerate(batches):
        shapes = {k: (v.shape, v.dtype) for k, v in batch.items()}
        assert shapes == {
            "image": ((4, 16, 16, 3), np.float32),
            "mask": ((4, 16, 16), np.float32),
            "label": ((4,), np.float32),
            "weight": ((4,), np.float32),
        }
        for slot in range(4):
            i = number * 4 + slot
            if i >= len(samples):
                assert not any(batch[k][slot].any() for k in batch)
                continue
            np.testing.assert_array_equal(batch["image"][slot], load_image(samples[i].image, 16))
            mask = samples[i].mask
            expected = load_mask(mask, 16) if with_masks and mask else np.zeros((16, 16))
            np.testing.assert_array_equal(batch["mask"][slot], expected)
            assert (batch["label"][slot], batch["weight"][slot]) == (samples[i].label, 1)


def test_all_files_that_cannot_be_used_are_named_at_once(tmp_path):
    samples = make_samples(tmp_path, 100)
    check_files(samples)
    check_files([])
    assert samples[97].mask
    Image.new("L", (9, 9)).save(samples[97].mask)
    with pytest.raises(ValueError, match=r"^image \S*97\.png is 20×30 .* its mask \S*97_mask\.png is 9×9: .*equal$"):
        check_files(samples)
    samples[3].image.unlink()
    samples[40].image.write_bytes(b"")
    with pytest.raises(ValueError) as raised:
        check_files(samples)
    first, *rest = str(raised.value).split("\n  ")
    assert first == "3 of 100 images cannot be used:"
    assert [name in line for name, line in zip(("3.png", "40.png", "97.png"), rest, strict=True)] == [True] * 3
    for sample in samples[10:30]:
        sample.image.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"^23 of 100 (.*\n){20}.*\n  and 3 more$"):
        check_files(samples)


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("with_masks", [True, False])
def test_batches_in_order_with_the_last_one_padded(tmp_path, workers, with_masks):
    samples = make_samples(tmp_path)
    check(list(image_batches(samples, 16, 4, workers=workers, with_masks=with_masks)), samples, with_masks)


@pytest.mark.parametrize("count", [0, 1, 4, 8])
def test_counts_round_and_not(tmp_path, count):
    samples = make_samples(tmp_path, count)
    check(list(image_batches(samples, 16, 4, workers=2, with_masks=True)), samples)


def test_regions_are_shares_of_each_images_own(tmp_path):
    samples = make_samples(tmp_path, 6)
    batches = list(image_batches(samples, 16, 4, workers=0, with_masks=True, with_regions=True))
    found = np.concatenate([batch["region"] for batch in batches])
    for sample, shares in zip(samples, found, strict=False):
        expected = region_shares(load_mask(sample.mask, 16)) if sample.mask else np.zeros((16, 16))
        np.testing.assert_array_equal(shares, expected)
    assert not found[6:].any()


def test_worker_processes(tmp_path):
    samples = make_samples(tmp_path, 11)
    check(list(image_batches(samples, 16, 4, workers=2, with_masks=True, processes=True)), samples)
    # Stopped early, and with a bad file: workers end, and the message arrives whole.
    samples[5].image.write_bytes(b"")
    batches = image_batches(samples, 16, 4, workers=1, with_masks=True, processes=True)
    check([next(batches)], samples[:4])
    with pytest.raises(ValueError, match=r"5\.png is empty"):
        next(batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_faults_come_out_whole(tmp_path, workers):
    samples = make_samples(tmp_path)
    assert samples[5].mask
    Image.new("L", (30, 21)).save(samples[5].mask)
    batches = image_batches(samples, 16, 4, workers=workers, with_masks=True)
    check([next(batches)], samples[:4])
    with pytest.raises(ValueError, match=r"image .*5\.png is 20×30 .* mask .*5_mask\.png is 21×30"):
        next(batches)
    assert len(list(image_batches(samples, 16, 4, workers=workers, with_masks=False))) == 2  # the mask is not opened
    samples[0].image.unlink()
    with pytest.raises(FileNotFoundError, match=r"0\.png"):
        next(image_batches(samples, 16, 4, workers=workers, with_masks=True))


def test_stopping_early_and_starting_again(tmp_path):
    samples = make_samples(tmp_path, 12)
    for _ in range(20):
        batches = image_batches(samples, 16, 4, workers=2, with_masks=True)
        next(batches)
        del batches
    check(list(image_batches(samples, 16, 4, workers=2, with_masks=True)), samples)


@pytest.mark.parametrize(("name", "value"), [("image_size", 0), ("batch_size", 0), ("workers", -1)])
def test_arguments_are_checked_at_once(name, value):
    arguments: dict = {"image_size": 16, "batch_size": 4, "workers": 0, "with_masks": True, name: value}
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        image_batches([], **arguments)


def test_results_ahead_are_no_more_than_there_is_room_for():
    class Pool:
        """Counts what was begun and not yet taken."""

        held = most = 0

        def submit(self, job):
            self.held += 1
            self.most = max(self.most, self.held)
            future = Future()
            future.set_result(job())
            return future

    for depth, room, most in ((5, 25, 3), (5, 1000, 6), (2, 25, 3), (5, 1, 2)):
        pool, found = Pool(), []
        for result in results_ahead(pool, ((10, lambda i=i: i) for i in range(9)), depth, room):
            pool.held -= 1
            found.append(result)
        assert found == list(range(9)) and pool.most == most


@pytest.mark.parametrize("processes", [False, True])
def test_a_script_ends_by_itself_with_readers_running(tmp_path, processes):
    make_samples(tmp_path, 12)
    script = tmp_path / "script.py"
    script.write_text(
        "import pathlib\n"
        "from iqe_jax.data.bmad import Sample\n"
        "from iqe_jax.data.pipeline import image_batches\n"
        "if __name__ == '__main__':\n"
        f"    s = [Sample(p, None, 0, p.name) for p in sorted(pathlib.Path({str(tmp_path)!r}).glob('?.png'))]\n"
        f"    b = image_batches(s, 16, 2, workers=2, with_masks=False, processes={processes})\n"
        "    print(next(b)['image'].shape)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.run(
        [sys.executable, "-W", "error", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "(2, 16, 16, 3)\n", "")


def epoch(batches, number: int) -> list:
    return [batches[number * batches.steps_per_epoch + i] for i in range(batches.steps_per_epoch)]


def real(batch) -> list[int]:
    """The indices that count; checks the padding."""
    assert batch.indices.dtype == np.int32
    assert batch.weight.dtype == np.float32
    assert not (batch.indices.flags.writeable or batch.weight.flags.writeable)  # shared with later calls
    n = int(batch.weight.sum())
    assert n > 0
    assert (batch.weight == [1] * n + [0] * (len(batch.weight) - n)).all()
    assert not batch.indices[n:].any()
    return batch.indices[:n].tolist()


@pytest.mark.parametrize(("n", "batch_size"), [(1, 1), (1, 16), (44, 16), (48, 16), (352, 16), (5, 3)])
def test_few_shot_every_sample_once_an_epoch(n, batch_size):
    batches = FewShotBatches(n, batch_size, seed=0)
    assert batches.steps_per_epoch == -(-n // batch_size)
    orders = []
    for number in (0, 1, 2, 49):
        parts = [real(b) for b in epoch(batches, number)]
        assert [len(p) for p in parts[:-1]] == [batch_size] * (len(parts) - 1)  # the padded one is the last
        orders.append([i for part in parts for i in part])
        assert sorted(orders[-1]) == list(range(n))
        assert all(b.set_index == 0 and b.indices.shape == (batch_size,) for b in epoch(batches, number))
    if n > 5:
        assert len({tuple(o) for o in orders}) == 4


def test_leave_one_out_every_sample_once_an_epoch():
    sizes, size = [40, 7, 16, 33], 8
    batches = LeaveOneOutBatches(sizes, size, seed=0)
    assert batches.steps_per_epoch == 5 + 1 + 2 + 5
    orders, sequences = [], []
    for number in (0, 1, 7):
        seen = {s: [] for s in range(4)}
        for batch in epoch(batches, number):
            assert batch.indices.shape == (size,)
            seen[batch.set_index] += real(batch)
        assert {s: sorted(v) for s, v in seen.items()} == {s: list(range(n)) for s, n in enumerate(sizes)}
        orders.append(seen)
        sequences.append([b.set_index for b in epoch(batches, number)])
    assert orders[0][0] != orders[1][0] != orders[2][0]
    assert sequences[0] != sequences[1] != sequences[2]
    assert all(s != sorted(s) for s in sequences)  # the sets are mixed


def test_index_batches_depend_on_seed_and_step_alone():
    for make in (lambda seed: FewShotBatches(44, 16, seed), lambda seed: LeaveOneOutBatches([30, 20, 10], 8, seed)):
        whole = make(5)
        steps = [whole[i] for i in range(40)]
        for step in (39, 0, 17, 3, 17):  # a run that resumes asks a new object for any step first
            again = make(5)[step]
            assert again.set_index == steps[step].set_index
            np.testing.assert_array_equal(again.indices, steps[step].indices)
            np.testing.assert_array_equal(again.weight, steps[step].weight)
        np.testing.assert_array_equal(whole[int(np.int32(17))].indices, steps[17].indices)
        # Neighbouring seeds do not share an order, not even one epoch later.
        shifted = [b.indices.tolist() for b in epoch(make(6), 0)]
        assert shifted not in ([b.indices.tolist() for b in epoch(whole, e)] for e in range(4))
        assert whole[10**6].weight.sum() > 0


def test_every_sample_reaches_every_place():
    # Over many epochs each sample comes first about equally often: a shuffle, not a rotation of a fixed order.
    batches = FewShotBatches(10, 10, seed=1)
    counts = np.bincount([batches[e].indices[0] for e in range(2000)], minlength=10)
    assert counts.min() > 130
    assert counts.max() < 270
    followers = {(b.indices[0], b.indices[1]) for b in (batches[e] for e in range(2000))}
    assert len(followers) == 90


def test_index_batches_refuse_what_cannot_be():
    with pytest.raises(ValueError, match=r"at least one sample, sizes are \[0\]"):
        FewShotBatches(0, 4, 0)
    with pytest.raises(ValueError, match=r"sizes are \[3, 0\]"):
        LeaveOneOutBatches([3, 0], 4, 0)
    with pytest.raises(ValueError, match=r"sizes are \[\]"):
        LeaveOneOutBatches([], 4, 0)
    for make in (lambda b, s: FewShotBatches(3, b, s), lambda b, s: LeaveOneOutBatches([3], b, s)):
        with pytest.raises(ValueError, match="batch_size is 0"):
            make(0, 0)
        with pytest.raises(ValueError, match="seed is -1"):
            make(4, -1)
        with pytest.raises(IndexError, match="step is -1"):
            make(4, 0)[-1]

"""train.py and evaluate.py as separate processes: two that share the work, killed ones, told to stop, missing ones."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from iqe_jax import cache, config, processes
from iqe_jax.checkpoint import RunDirectory
from iqe_jax.data.phantoms import CLIP_DIR

ROOT = Path(__file__).parents[1]
# The phantoms' recipe at a size at which starting up is all that takes time; 44 images, 3 steps an epoch, 15 in all.
SMALL = ["--config", "phantom_fewshot", "--model.iqm-layers", "1", "--model.image-size", "48", "--data.shots", "2"]
SMALL += ["--train.epochs", "5", "--train.checkpoint-every", "1", "--eval.batch-size", "32"]


def start(script, run_dir, *more, devices=1, process=None, port=0, of=2, folder=None):
    """One process, its output in a file beside the run directory."""
    line = [sys.executable, str(ROOT / script), *SMALL, "--run-dir", str(run_dir), *more]
    if process is not None:
        line += ["--distributed", "--coordinator", f"localhost:{port}", "--processes", str(of)]
        line += ["--process-id", str(process)]
    log = run_dir.with_name(f"{run_dir.name}.{script}.{process or 0}.log")
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}
    if process is not None:  # on CPUs JAX finds kept programs in process 0 alone: the others compile at each start
        environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    with log.open("w") as file:
        return subprocess.Popen(
            line, cwd=folder or run_dir.parent, env=environment, stdout=file, stderr=subprocess.STDOUT
        )


def log_of(run_dir, script="train.py", process=0):
    return run_dir.with_name(f"{run_dir.name}.{script}.{process}.log").read_text()


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def pair(script, run_dir, *more, devices=4):
    port = free_port()
    return [start(script, run_dir, *more, devices=devices, process=i, port=port) for i in (0, 1)]


def finish(*processes, seconds=300):
    codes = [process.wait(seconds) for process in processes]
    return codes[0] if len(codes) == 1 else codes


def lines(run_dir):
    path = run_dir / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def losses(run_dir):
    logged = [json.loads(line) for line in lines(run_dir)]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in logged]


def far(one, other):
    """The largest difference between two logs of losses."""
    assert [line["step"] for line in one] == [line["step"] for line in other]
    names = ("loss", "detection", "focal", "dice")  # the last two where the set has masks
    return max(abs(a[name] - b[name]) for a, b in zip(one, other, strict=True) for name in names if name in b)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run on one device, evaluated."""
    run_dir = tmp_path_factory.mktemp("processes") / "whole"
    assert finish(start("evaluate.py", run_dir)) == 0, log_of(run_dir, "evaluate.py")
    return run_dir


@pytest.fixture(scope="module")
def shared(tmp_path_factory, whole):
    """The same run on two processes with four devices each, trained, then evaluated."""
    run_dir = tmp_path_factory.mktemp("processes") / "shared"
    assert finish(*pair("train.py", run_dir)) == [0, 0], log_of(run_dir) + log_of(run_dir, process=1)
    assert finish(*pair("evaluate.py", run_dir, "--save-maps", "png16")) == [0, 0], log_of(run_dir, "evaluate.py")
    return run_dir


def test_two_processes_of_four_devices_equal_one_device(whole, shared):
    assert far(losses(shared), losses(whole)) < 1e-5
    one, other = (json.loads((run / "metrics.json").read_text())["metrics"] for run in (whole, shared))
    for name in ("image_auroc", "pixel_auroc"):
        assert one[name] == pytest.approx(other[name], abs=1e-4)


def test_page_and_maps_come_from_both_processes(shared):
    assert len(list((shared / "maps").glob("*/*.png"))) == 200
    assert (shared / "report.html").read_text().count("<li data-index=") == 200


def test_only_process_0_speaks_and_writes(shared):
    assert "image AUROC" in log_of(shared, "evaluate.py")
    # Gloo's threads speak all at once, so that their lines are mixed by pieces of them.
    gloo = r"(\[Gloo\] Rank|is connected to|peer ranks\.|Expected number of connected peer ranks is :|\d|\s)*"
    assert re.fullmatch(gloo, log_of(shared, "evaluate.py", process=1))
    assert len(list((shared / "tensorboard").iterdir())) == 1


def test_zero_shot_features_on_disk_are_shared_by_processes(whole, tmp_path):
    more = ["--data.shots", "0", "--data.sources", "liver", "chest", "--train.steps", "6"]
    assert finish(start("train.py", tmp_path / "one", *more)) == 0, log_of(tmp_path / "one")
    disk = [*more, "--train.features", "disk"]
    assert finish(*pair("train.py", tmp_path / "two", *disk, devices=2)) == [0, 0], log_of(tmp_path / "two")
    assert far(losses(tmp_path / "two"), losses(tmp_path / "one")) < 1e-5


# ---------------------------------------------------------------------------- killed


def wait_for(moment, process, seconds=120.0):
    end = time.monotonic() + seconds
    while not moment() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)


def moments(run_dir):
    """Ten moments of a run: any time of its start, after any of its steps, and inside the writing of a checkpoint."""
    draw = random.Random(0)
    checkpoints = run_dir / "checkpoints"

    def writing():
        return any("tmp" in path.name for path in checkpoints.glob("*"))

    def written(count):
        return lambda: len(lines(run_dir)) >= count

    def after(seconds):
        end = time.monotonic() + seconds
        return lambda: time.monotonic() > end

    yield from (after(draw.uniform(0.5, 4)) for _ in range(3))
    for step in sorted(draw.sample(range(1, 14), 5)):
        yield written(step)
        yield writing


def test_killed_at_any_moment_a_run_goes_on_bit_for_bit(whole, tmp_path):
    run_dir, kills = tmp_path / "killed", 0
    for moment in moments(run_dir):
        process = start("train.py", run_dir)
        wait_for(moment, process)
        kills += process.poll() is None
        process.kill()
        process.wait()
    assert kills >= 10
    assert finish(start("evaluate.py", run_dir)) == 0, log_of(run_dir, "evaluate.py")
    assert losses(run_dir) == losses(whole)
    for file in ("adapter.safetensors", "metrics.json", "scores.csv", "kept.json"):
        assert (run_dir / file).read_bytes() == (whole / file).read_bytes(), file


def test_two_processes_killed_go_on_bit_for_bit(shared, tmp_path):
    run_dir = tmp_path / "killed"
    processes = pair("train.py", run_dir)
    wait_for(lambda: len(lines(run_dir)) >= 4, processes[0])
    for process in processes:
        process.kill()
    finish(*processes)
    assert 4 <= len(lines(run_dir)) < 15
    assert finish(*pair("train.py", run_dir)) == [0, 0], log_of(run_dir)
    assert losses(run_dir) == losses(shared)
    assert (run_dir / "adapter.safetensors").read_bytes() == (shared / "adapter.safetensors").read_bytes()


# ---------------------------------------------------------------------------- told to stop


def test_sigterm_saves_the_step_and_says_so_by_its_exit_status(whole, tmp_path):
    run_dir = tmp_path / "told"
    process = start("train.py", run_dir)
    wait_for(lambda: len(lines(run_dir)) >= 4, process)
    process.send_signal(signal.SIGTERM)
    assert finish(process) == 75
    stopped = len(lines(run_dir))
    assert 4 <= stopped < 15
    assert (run_dir / "checkpoints" / str(stopped)).is_dir()
    assert f"step {stopped} of 15 is saved" in log_of(run_dir)
    assert finish(start("train.py", run_dir)) == 0
    assert f"Going on from step {stopped}" in log_of(run_dir)
    assert losses(run_dir) == losses(whole)


def test_sigterm_to_one_process_stops_all_and_another_mesh_goes_on(whole, tmp_path):
    run_dir = tmp_path / "told"
    processes = pair("train.py", run_dir)
    wait_for(lambda: len(lines(run_dir)) >= 2, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    assert finish(*processes) == [75, 75], log_of(run_dir) + log_of(run_dir, process=1)
    stopped = len(lines(run_dir))
    assert 2 <= stopped < 15
    # One process, eight devices, parameters split: another mesh and another number of processes.
    assert finish(start("train.py", run_dir, "--mesh.fsdp", "2", "--mesh.tensor", "2", devices=8)) == 0
    assert f"Going on from step {stopped}" in log_of(run_dir)
    assert far(losses(run_dir), losses(whole)) < 1e-5


# ---------------------------------------------------------------------------- missing and dying


def test_a_missing_process_is_an_error_in_bounded_time(tmp_path):
    expected_by_process = {0: "Waiting up to 5 s for 2 processes .* DEADLINE_EXCEEDED", 1: "did not find process 0 at"}
    for process, expected in expected_by_process.items():
        run_dir = tmp_path / "run"
        alone = start("train.py", run_dir, "--timeout", "5", process=process, port=free_port())
        assert finish(alone, seconds=90) != 0
        assert re.search(expected, log_of(run_dir, process=process).replace("\n", " "))
        assert not run_dir.exists()


def test_a_dying_process_ends_the_others_in_bounded_time(whole, tmp_path):
    run_dir = tmp_path / "run"
    processes = pair("train.py", run_dir, "--timeout", "20")
    wait_for(lambda: len(lines(run_dir)) >= 2, processes[0])
    processes[1].kill()
    assert finish(*processes, seconds=120)[0] != 0


@pytest.mark.parametrize("place", [("localhost:1234", 2, 1), (None, 2, None), (None, None, 0)])
def test_a_place_among_processes_takes_the_word_that_there_are_several(place):
    with pytest.raises(ValueError, match=r"--coordinator, --processes and --process-id .* add --distributed"):
        processes.start(False, *place)


def test_a_message_may_hold_a_name_of_any_bytes(monkeypatch):
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "_allgather", lambda x: x[None])
    with pytest.raises(ValueError, match=r"could not look: *\n.*no folder h.+lle"), processes.together("look"):
        raise FileNotFoundError(f"no folder {os.fsdecode(b'h' + bytes([0xF6]) + b'lle')}")


@pytest.mark.parametrize("start", ["", "x"])  # one of which is cut in the middle of a letter
def test_a_message_may_be_longer_than_the_others_get_to_see(monkeypatch, start):
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "_allgather", lambda x: np.stack([np.zeros(processes.MESSAGE, np.uint8), x]))
    with pytest.raises(ValueError, match=r"could not look: *\n *process 1 on .*: x?ää"), processes.together("look"):
        raise FloatingPointError(start + "ä" * processes.MESSAGE)


def test_a_flag_is_set_where_every_process_has_set_it(monkeypatch):
    monkeypatch.setattr(processes, "_allgather", lambda x: np.stack([x, [True, False, False]]))
    np.testing.assert_array_equal(processes.everywhere(np.array([True, True, False])), [True, False, False])


def test_sigterm_is_heard_while_it_is_listened_for():
    before = signal.getsignal(signal.SIGTERM)
    with processes.Preemption() as preemption:
        preemption.check()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(processes.Preempted, match="told to stop"):
            preemption.check()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("count", [1, 2])
def test_a_terminal_that_hangs_up_ends_no_run_that_saves(monkeypatch, count):
    monkeypatch.setattr(processes.jax, "process_count", lambda: count)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # by which the tests would end; nohup ignores it
    try:
        with processes.Preemption():
            assert (signal.getsignal(signal.SIGHUP) is signal.SIG_IGN) == (count == 2)  # jax itself hears SIGTERM then
            if count == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_files_of_other_processes_are_waited_for(tmp_path, monkeypatch):
    asked, real = [], Path.exists

    def exists(path):
        asked.append(path)
        return len(asked) > 2 and real(path)

    (tmp_path / "a").touch()
    assert not processes.seen(tmp_path / "b")
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", exists)
        assert processes.seen(tmp_path / "a") and len(asked) == 3
    monkeypatch.setattr(processes, "NEWS_SECONDS", 0.3)
    assert not processes.seen(tmp_path / "b")
    assert not processes.seen(tmp_path / "none" / "b")


def test_what_one_process_lacks_is_said_by_all(whole, tmp_path):
    run_dir, port = tmp_path / "run", free_port()
    # The same command in two folders, of which one has the weights.
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
    (tmp_path / "with" / "clip").symlink_to(CLIP_DIR)
    line = {"process": 0, "port": port, "folder": tmp_path / "with"}
    first = start("train.py", run_dir, "--model.clip", "./clip", **line)
    second = start(
        "train.py", run_dir, "--model.clip", "./clip", **{**line, "process": 1, "folder": tmp_path / "without"}
    )
    assert finish(first, second) == [1, 1]
    for process in (0, 1):
        assert re.search(r"could not load the weights:\s+process 1 on .*clip", log_of(run_dir, process=process))
    assert not run_dir.exists()


@pytest.mark.parametrize(
    "other", ["CLIP weights in clip", "settings or images to score", "weights in adapter.safetensors"]
)
def test_processes_with_other_files_say_so(whole, tmp_path, other):
    """Each has a folder of its own, with the same names in them."""
    home = tmp_path / "0"
    shutil.copytree(cache.cache_dir() / "phantoms" / "Brain_AD", home / "sets" / "Brain_AD")
    shutil.copytree(CLIP_DIR, home / "clip")
    shutil.copy(whole / "adapter.safetensors", home)
    shutil.copytree(home, tmp_path / "1")
    if other.startswith("settings"):
        next((tmp_path / "1" / "sets" / "Brain_AD" / "test" / "good" / "img").iterdir()).unlink()
    else:
        path = tmp_path / "1" / ("clip/model.safetensors" if "CLIP" in other else "adapter.safetensors")
        with safetensors.safe_open(path, "numpy") as file:
            notes = file.metadata()
        tensors = safetensors.numpy.load_file(path)
        tensors = {name: np.asarray(1.5 * array, array.dtype) for name, array in tensors.items()}
        safetensors.numpy.save_file(tensors, path, notes)
    run_dir, port = tmp_path / "run", free_port()
    line = ["--data.root", "sets", "--data.phantoms", "False", "--model.clip", "clip"]
    line += ["--model.adapter", "adapter.safetensors"]
    started = [start("evaluate.py", run_dir, *line, process=i, port=port, folder=tmp_path / str(i)) for i in (0, 1)]
    assert finish(*started) == [1, 1]
    for process in (0, 1):
        said = " ".join(log_of(run_dir, "evaluate.py", process).split())
        assert f"processes [1] have other {other} than process 0" in said
    assert not run_dir.exists()


def test_processes_that_see_other_runs_say_so(whole, monkeypatch):
    run = RunDirectory(config.read(whole / "config.json"))
    run.agree()
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "_allgather", lambda x: np.stack([x, x + 1]))
    with pytest.raises(ValueError, match=r"\[1\] have other files in .*whole, which must be on a disk that all share"):
        run.agree()


def test_processes_with_other_settings_say_so(whole, tmp_path):
    run_dir, port = tmp_path / "run", free_port()
    first = start("train.py", run_dir, process=0, port=port)
    second = start("train.py", run_dir, "--train.seed", "1", process=1, port=port)
    assert finish(first, second) == [1, 1]
    for process in (0, 1):
        said = " ".join(log_of(run_dir, process=process).split())
        assert "processes [1] have other settings or training images than process 0" in said
    assert not run_dir.exists()

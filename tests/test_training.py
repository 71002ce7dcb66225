"""Training and evaluation on small real files, through the same functions as the command line."""

import csv
import dataclasses
import errno
import json
import os
import re
import shutil
import time
import tracemalloc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import evaluate as evaluate_script
import iqe_jax
import train as train_script
from iqe_jax import (
    cache,
    calibration,
    config,
    evaluation,
    evaluator,
    experiment,
    feature_files,
    features,
    pixel_metrics,
    processes,
    sharding,
    train_state,
    trainer,
    training_data,
)
from iqe_jax.checkpoint import Checkpoints, RunDirectory, write_whole
from iqe_jax.data.bmad import Sample, load_split
from iqe_jax.data.pipeline import FewShotBatches
from iqe_jax.data.transforms import augment, load_image, load_mask
from iqe_jax.feature_files import OnDisk
from iqe_jax.metrics import IMAGE_METRICS, defined
from iqe_jax.sharding import make_layout
from iqe_jax.weights import chosen_on, load_adapter
from tests import compiled

pytestmark = pytest.mark.usefixtures("quick_compile")
LAYOUT = make_layout(config.MeshConfig())


@pytest.fixture(scope="module")
def few_shot(tiny_root, golden_settings):
    """A recipe that trains in seconds: 4 + 4 images, 88 with augmentation, 3 epochs of 6 steps."""
    model = config.ModelConfig(**{**golden_settings, "levels": (2, 4), "iqm_layers": 1}, sigma=2.0)
    data = config.DataConfig(root=tiny_root, shots=4)
    train = config.TrainConfig(epochs=3, checkpoint_every=1, learning_rate=1e-3)
    return config.Config("tiny_fewshot", model=model, data=data, train=train, eval=config.EvalConfig(heatmaps=4))


@pytest.fixture(scope="module")
def zero_shot(few_shot):
    """The same on liver (masks) and chest (none), scored on brain."""
    data = dataclasses.replace(few_shot.data, shots=0, sources=("brain", "liver", "chest"))
    train = dataclasses.replace(few_shot.train, epochs=2)
    return dataclasses.replace(few_shot, name="tiny_zeroshot", data=data, train=train)


def at(recipe, run_dir, **train):
    return dataclasses.replace(recipe, run_dir=run_dir, train=dataclasses.replace(recipe.train, **train))


def with_own_data(recipe, tiny_root, tmp_path):
    """The recipe on a copy of the sets, which may be changed."""
    root = shutil.copytree(tiny_root, tmp_path / "sets")
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, root=root))


def losses(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def scores(run_dir):
    with (run_dir / "scores.csv").open() as file:
        return {row["image"]: float(row["score"]) for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def trained(few_shot, tmp_path_factory):
    """A finished few-shot run, evaluated."""
    run_dir = tmp_path_factory.mktemp("runs") / "few"
    evaluation.run_evaluation(at(few_shot, run_dir))
    return run_dir


def test_a_few_shot_evaluation_trains_first_and_leaves_all_results(few_shot, trained, capsys):
    log = losses(trained)
    assert [line["step"] for line in log] == list(range(1, 19))
    assert set(log[0]) == {"step", "epoch", "loss", "detection", "focal", "dice", "gradient_norm"}
    assert log[-1]["loss"] < log[0]["loss"]
    summary = json.loads((trained / "metrics.json").read_text())
    assert summary["images"] == {"normal": 10, "anomalous": 10}
    assert summary["protocol"] == "few-shot, k = 4"
    assert summary["weights"]["chosen"] == "weights of the last step"
    assert len(summary["weights"]["support"]) == 8
    assert 0 <= summary["metrics"]["image_auroc"] <= 1
    assert 0 <= summary["metrics"]["pixel_auroc"] <= 1
    assert len(scores(trained)) == 20
    pictures = sorted(path.name for path in (trained / "heatmaps").iterdir())
    assert pictures == [
        *("anomalous-00010.png", "anomalous-00019.png", "normal-00000.png", "normal-00009.png", "overview.png")
    ]
    with Image.open(trained / "heatmaps" / "overview.png") as overview:
        assert overview.size == (2 * 3 * 40 + 8, 2 * 40)
    assert list((trained / "tensorboard").iterdir())
    assert {path.name for path in (trained / "checkpoints").iterdir() if path.name.isdigit()} == {"12", "18"}
    assert config.from_json((trained / "config.json").read_text()) == at(few_shot, trained)

    capsys.readouterr()
    evaluation.run_evaluation(at(few_shot, trained))  # now only scores
    shown = capsys.readouterr()
    assert "is trained already" in shown.err.replace("\n", " ")
    assert "image AUROC" in shown.out


def test_the_detector_scores_as_the_evaluation_did(trained, tiny_root):
    detector = iqe_jax.load(trained)
    samples = load_split(tiny_root, "brain", "test")
    prediction = detector([sample.image for sample in samples])
    np.testing.assert_allclose(prediction.score, list(scores(trained).values()), atol=2e-6)
    assert list(scores(trained)) == [sample.name for sample in samples]
    assert prediction.anomaly_map.shape == (20, 40, 40)


class Stopped(Exception):
    """Stands in for a machine going away."""


def stop_at(monkeypatch, step):
    real = trainer.train_step

    def step_or_stop(state, *args, **kwargs):
        if int(state.step) == step:
            raise Stopped
        return real(state, *args, **kwargs)

    monkeypatch.setattr(trainer, "train_step", step_or_stop)


@pytest.mark.parametrize("stop", [1, 6, 7, 17])
def test_a_resumed_run_is_bit_identical(few_shot, trained, tmp_path, monkeypatch, stop):
    recipe = at(few_shot, tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, stop)
        experiment.run_training(recipe)
    assert not (tmp_path / "run" / "adapter.safetensors").exists()
    experiment.run_training(recipe)
    assert losses(tmp_path / "run") == losses(trained)
    assert (tmp_path / "run" / "adapter.safetensors").read_bytes() == (trained / "adapter.safetensors").read_bytes()


def test_a_partial_batch_runs_the_same_program(few_shot, trained, tmp_path):
    programs = train_state.step_program._cache_size()
    experiment.run_training(at(few_shot, tmp_path, epochs=1))  # 88 images: five batches of 16 and one of 8
    assert train_state.step_program._cache_size() == programs


def test_the_program_compiled_ahead_is_the_one_that_runs(few_shot, tmp_path):
    compiled = []

    def listen(event, seconds, fun_name="", **_):
        if event.endswith("backend_compile_duration") and "step_program" in fun_name:
            compiled.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for steps in (1, 2):  # from a new state, and from a checkpoint
            experiment.run_training(at(few_shot, tmp_path, steps=steps, learning_rate=3.21e-4))
            assert len(compiled) == 1
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_a_finished_run_can_be_trained_further(few_shot, trained, tmp_path):
    recipe = at(few_shot, tmp_path / "run", epochs=2)
    experiment.run_training(recipe)
    experiment.run_training(at(few_shot, tmp_path / "run", epochs=3))
    assert losses(tmp_path / "run") == losses(trained)


def test_a_run_does_not_go_backwards(few_shot, trained):
    with pytest.raises(ValueError, match="has come to step 18 already, past the 5 asked for"):
        experiment.run_training(at(few_shot, trained, steps=5))


@pytest.mark.parametrize("stop", [3, 6, 13])
def test_a_resumed_choice_of_weights_is_the_same(few_shot, tmp_path, monkeypatch, stop):
    for name in ("whole", "stopped"):
        recipe = at(few_shot, tmp_path / name, keep="valid", checkpoint_every=2)
        with monkeypatch.context() as patch:
            if name == "stopped":
                stop_at(patch, stop)
                with pytest.raises(Stopped):
                    experiment.run_training(recipe)
        experiment.run_training(recipe)
    assert losses(tmp_path / "whole") == losses(tmp_path / "stopped")
    for file in ("kept.json", "adapter.safetensors"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "stopped" / file).read_bytes()


def test_seeds_draw_other_supports_and_weights(few_shot, tmp_path):
    for seed in (1, 2):
        experiment.run_training(at(few_shot, tmp_path / str(seed), seed=seed, steps=1, epochs=1))
    kept = [json.loads((tmp_path / seed / "kept.json").read_text()) for seed in "12"]
    assert kept[0]["support"] != kept[1]["support"]
    assert losses(tmp_path / "1") != losses(tmp_path / "2")


def test_dropout_is_on_in_the_first_epoch_only(few_shot, trained, tmp_path):
    recipe = at(few_shot, tmp_path, dropout=0.3, steps=7)
    experiment.run_training(recipe)
    found, plain = losses(tmp_path), losses(trained)
    assert all(a["loss"] != b["loss"] for a, b in zip(found, plain, strict=False))
    # The seventh step runs without: its loss is a plain function of the weights before it.
    used = []
    with pytest.MonkeyPatch.context() as patch:
        real = trainer.train_step
        patch.setattr(trainer, "train_step", lambda *a, **k: used.append(k["dropout"]) or real(*a, **k))
        experiment.run_training(at(few_shot, tmp_path / "again", dropout=0.3, steps=7))
    assert used == [0.3] * 6 + [0.0]


def test_a_diverging_run_stops_and_keeps_its_last_good_checkpoint(few_shot, tmp_path):
    recipe = at(few_shot, tmp_path, learning_rate=1e-3)
    experiment.run_training(at(recipe, tmp_path, epochs=1))
    broken = at(recipe, tmp_path, epochs=3)
    with pytest.MonkeyPatch.context() as patch:
        real = trainer.train_step

        def step(state, frozen, batch, **kwargs):
            if int(state.step) != 8:
                return real(state, frozen, batch, **kwargs)
            before = jax.tree.map(np.array, state.trainable)
            batch = batch.replace(image_features=batch.image_features * np.float32(np.nan))
            state, metrics = real(state, frozen, batch, **kwargs)
            jax.tree.map(np.testing.assert_array_equal, state.trainable, before)
            return state, metrics

        patch.setattr(trainer, "train_step", step)
        with pytest.raises(FloatingPointError, match=r"step 9: .*loss is nan.* a batch of brain with .*good/00"):
            experiment.run_training(broken)
    assert [line["step"] for line in losses(tmp_path)] == list(range(1, 9))
    with Checkpoints(RunDirectory(broken)) as checkpoints:
        assert checkpoints._manager().latest_step() == 6
    experiment.run_training(broken)  # goes on from there
    assert len(losses(tmp_path)) == 18


def test_a_disk_that_fills_up_ends_a_run_that_then_goes_on(few_shot, trained, tmp_path, monkeypatch):
    from tensorboardX.event_file_writer import EventsWriter

    real, left = EventsWriter.write_event, [30]

    def write_event(self, event):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, event)

    monkeypatch.setattr(EventsWriter, "write_event", write_event)
    with pytest.raises(OSError, match=r"No space left on device: .*tensorboard"):
        experiment.run_training(at(few_shot, tmp_path))
    left[0] = 1_000_000
    experiment.run_training(at(few_shot, tmp_path))
    assert (tmp_path / "adapter.safetensors").read_bytes() == (trained / "adapter.safetensors").read_bytes()


def test_a_checkpoint_that_has_no_room_ends_a_run_that_then_goes_on(few_shot, trained, tmp_path, monkeypatch):
    real, asked = shutil.disk_usage, []

    def disk_usage(path):
        if Path(path).name == "checkpoints":
            asked.append(path)
        return SimpleNamespace(free=100_000) if len(asked) == 2 else real(path)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    words = r"checkpoint of step 12 needs \d MB in .*checkpoints, which has 0 MB free; make room"
    with pytest.raises(OSError, match=words):
        experiment.run_training(at(few_shot, tmp_path))
    experiment.run_training(at(few_shot, tmp_path))
    assert (tmp_path / "adapter.safetensors").read_bytes() == (trained / "adapter.safetensors").read_bytes()


def test_tensorboard_has_what_was_logged(trained):
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboardX.record_writer import masked_crc32c

    found = []
    (file,) = (trained / "tensorboard").iterdir()
    content = file.read_bytes()
    while content:  # length, its check, the event, its check
        size = int.from_bytes(content[:8], "little")
        body, check = content[12 : 12 + size], content[12 + size : 16 + size]
        assert masked_crc32c(body) == int.from_bytes(check, "little")
        event = Event.FromString(body)
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        content = content[16 + size :]
    expected = [(line["step"], "train/loss", np.float32(line["loss"])) for line in losses(trained)]
    assert [entry for entry in found if entry[1] == "train/loss"] == expected


def test_a_run_directory_belongs_to_one_run(few_shot, trained):
    with pytest.raises(
        ValueError, match=r"other settings \(train.seed was 0, now 5\); give this one another --run-dir"
    ):
        experiment.run_training(at(few_shot, trained, seed=5))


def test_a_damaged_checkpoint_is_named(few_shot, tmp_path):
    experiment.run_training(at(few_shot, tmp_path, epochs=1))
    for file in (tmp_path / "checkpoints" / "6").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:7])
    with pytest.raises(ValueError, match=r"checkpoints/6 cannot be restored"):
        experiment.run_training(at(few_shot, tmp_path, epochs=2))


def repaint(path, change):
    with Image.open(path) as image:
        pixels = np.asarray(image)
    Image.fromarray(change(pixels)).save(path)


@pytest.mark.parametrize("what", ["training images", "CLIP weights"])
def test_a_run_goes_on_with_what_it_was_begun_with_alone(few_shot, tiny_root, tmp_path, monkeypatch, capsys, what):
    recipe = with_own_data(few_shot, tiny_root, tmp_path)
    root = recipe.data.root
    recipe = at(recipe, tmp_path / "run", epochs=1)
    experiment.run_training(recipe)
    if what == "CLIP weights":
        real = experiment.load_model

        def load_other(*args):
            model, frozen = real(*args)
            return model, jax.tree.map(lambda x: x * 1.01, frozen)

        monkeypatch.setattr(experiment, "load_model", load_other)
        with pytest.raises(ValueError, match="run was trained with other CLIP weights"):
            experiment.run_training(recipe)
    else:
        kept = json.loads((tmp_path / "run" / "kept.json").read_text())["support"]
        (image,) = [s.image for s in load_split(root, "brain", "valid") if s.name == kept[0]]
        repaint(image, lambda pixels: 255 - pixels)
        experiment.run_training(recipe)  # these weights are what they are
        assert "is trained already, 6 steps, on other training images than" in capsys.readouterr().err.replace(
            "\n", " "
        )
    with pytest.raises(ValueError, match=f"checkpoints/6 was made on other {what} than are here now"):
        experiment.run_training(at(recipe, tmp_path / "run", epochs=2))


def test_processes_compare_their_settings_and_training_images(few_shot, tiny_root, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(experiment.processes, "same_everywhere", lambda value: said.append(value) or [1])
    recipe = with_own_data(few_shot, tiny_root, tmp_path)

    def compared(**train):
        with pytest.raises(ValueError, match=r"processes \[1\] have other settings or training images"):
            experiment.run_training(at(recipe, tmp_path / "run", **train))
        return said[-1]

    first = compared()
    assert compared() == first and compared(learning_rate=0.5) != first
    for sample in load_split(recipe.data.root, "brain", "valid"):
        repaint(sample.image, lambda pixels: 255 - pixels)
    assert compared() != first


def test_a_run_directory_has_one_training_at_a_time(few_shot, tmp_path):
    recipe = at(few_shot, tmp_path, steps=1)
    other = RunDirectory(recipe)
    other.claim()
    with other.alone(), pytest.raises(ValueError, match=r"another command is at work in .* another --run-dir"):
        experiment.run_training(recipe)
    experiment.run_training(recipe)


def test_what_chose_other_weights_is_not_finished(few_shot, golden_model, tmp_path):
    run = RunDirectory(side_by_side(few_shot, tmp_path, "valid"))
    run.claim()
    weights = jax.tree.map(np.asarray, golden_model[2])
    run.keep(weights, "last", step=6)
    run.finish(6)
    run.keep(weights, "valid", step=9, metrics={})  # by a longer training, which may be stopped after it
    assert RunDirectory(run.config).finished_at is None
    assert RunDirectory(run.config).facts("last") == {"rule": "last", "step": 6}


def test_a_small_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    def stop(*_):
        raise OSError("killed before the new file took its place")

    path = tmp_path / "kept.json"
    write_whole(path, "before")
    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(OSError, match="killed"):
        write_whole(path, "after")
    assert path.read_text() == "before"


def test_what_changes_no_number_may_change_between_a_run_and_its_continuation(few_shot, tmp_path):
    recipe = at(few_shot, tmp_path)
    RunDirectory(recipe).claim()
    free = {"epochs": 9, "steps": 3, "checkpoint_every": 2, "features": "disk", "feature_memory_gb": 1.0}
    free |= {"feature_disk_gb": 1.0, "accumulate": 2, "remat": True}
    data = dataclasses.replace(recipe.data, workers=5, processes=True)
    mesh = dataclasses.replace(recipe.mesh, fsdp=2)
    other = dataclasses.replace(at(recipe, tmp_path, **free), name="other", data=data, mesh=mesh)
    assert RunDirectory(other).path == tmp_path
    for name, value in {"dropout": 0.1, "batch_size": 8, "keep": "valid", "feature_dtype": "bfloat16"}.items():
        with pytest.raises(ValueError, match=rf"other settings \(train\.{name} was"):
            RunDirectory(at(recipe, tmp_path, **{name: value}))


@pytest.mark.parametrize("name", ["kept.json", "config.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", [b"", b"[1]\n", b'{"step": \xff}\n'])
def test_damaged_files_of_a_run_are_named(few_shot, tmp_path, name, content):
    experiment.run_training(at(few_shot, tmp_path, steps=1))
    (tmp_path / name).write_bytes(content)
    longer = at(few_shot, tmp_path, steps=2)
    if name == "metrics.jsonl" and not content:
        experiment.run_training(longer)
        return
    with pytest.raises(ValueError, match=rf"{name}(, line 1, is damaged|.*remove .* and begin again)"):
        experiment.run_training(longer)


@pytest.mark.parametrize("empty", [{"prompt_depth": 1}, {"learnable_tokens": 0}])
def test_a_model_without_some_prompts_is_saved_and_goes_on(few_shot, tmp_path, empty):
    recipe = dataclasses.replace(few_shot, model=dataclasses.replace(few_shot.model, **empty))
    for steps in (1, 2):
        experiment.run_training(at(recipe, tmp_path / "resumed", steps=steps, checkpoint_every=1))
    experiment.run_training(at(recipe, tmp_path / "whole", steps=2))
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")
    assert iqe_jax.load(tmp_path / "resumed")(np.zeros((40, 40, 3), np.uint8)).score.shape == ()


def test_a_step_that_does_not_compile_ahead_says_so_itself(few_shot, tmp_path, monkeypatch):
    class Broken:
        def lower(self, *args, **kwargs):
            raise ValueError("no such program")

        def __call__(self, *args, **kwargs):
            raise ValueError("no such program")

    monkeypatch.setattr(train_state, "step_program", Broken())
    with pytest.raises(ValueError, match="no such program"):
        experiment.run_training(at(few_shot, tmp_path, steps=1))


# ---------------------------------------------------------------------------- which weights are kept


def judged(metrics):
    return metrics["image_auroc"] + metrics["pixel_auroc"]


@pytest.mark.parametrize("keep", ["valid", "paper"])
def test_chosen_weights_are_the_best_and_labelled(few_shot, tmp_path, keep):
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        real = trainer.evaluate

        def evaluate(model, trainable, *args, **kwargs):
            result = real(model, trainable, *args, **kwargs)
            seen.append((judged(result.metrics), jax.tree.map(np.array, trainable)))
            return result

        patch.setattr(trainer, "evaluate", evaluate)
        metrics = evaluation.run_evaluation(at(few_shot, tmp_path, keep=keep))
    assert len(seen) == 3  # once an epoch
    best = int(np.argmax([score for score, _ in seen]))
    logged = [line[keep] for line in losses(tmp_path) if keep in line]
    assert [judged(line) for line in logged] == [score for score, _ in seen]
    summary = json.loads((tmp_path / "metrics.json").read_text())
    assert summary["weights"]["step"] == 6 * (best + 1)
    assert summary["weights"]["rule"] == keep
    assert ("TEST SET" in summary["weights"]["chosen"]) == (keep == "paper")
    if keep == "paper":
        assert metrics["image_auroc"] + metrics["pixel_auroc"] == pytest.approx(seen[best][0], abs=1e-6)
    detector = iqe_jax.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, dict(detector._trainable), seen[best][1])
    assert (tmp_path / "calibration.json").exists() == (keep == "paper")  # what has chosen weights calibrates nothing


def test_a_figure_chosen_on_test_data_says_so_on_screen(few_shot, tmp_path, capsys):
    evaluation.run_evaluation(at(few_shot, tmp_path, keep="paper", steps=1))
    assert "chosen on the TEST SET" in " ".join(capsys.readouterr().out.split())


def test_valid_needs_images_that_are_not_support(few_shot, tmp_path):
    recipe = dataclasses.replace(at(few_shot, tmp_path, keep="valid"), data=dataclasses.replace(few_shot.data, shots=6))
    with pytest.raises(
        ValueError, match=r"train.keep is valid, but data.shots 6 leaves 0 normal and 0 of the anomalous"
    ):
        experiment.run_training(recipe)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ("valid", "leaves 2 normal and 0 of the anomalous images"),
        ("paper", "test split of own has images of one class"),
    ],
)
def test_weights_are_chosen_by_images_of_both_classes(few_shot, tiny_root, tmp_path, keep, message):
    recipe = with_own_data(few_shot, tiny_root, tmp_path)
    if keep == "valid":
        for sample in load_split(recipe.data.root, "brain", "valid")[-2:]:
            sample.image.unlink()
            sample.mask.unlink()
    else:
        (recipe.data.root / "Brain_AD").rename(recipe.data.root / "own")  # a set that may be without anomalous images
        shutil.rmtree(recipe.data.root / "own" / "test" / "Ungood")
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, dataset="own"))
    with pytest.raises(ValueError, match=message):
        training_data.plan(at(recipe, None, keep=keep))


# ---------------------------------------------------------------------------- zero-shot


def test_zero_shot_asks_for_training(zero_shot, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no trained adapter in .*train it first: python train.py"):
        evaluation.run_evaluation(at(zero_shot, tmp_path))


@pytest.mark.parametrize(("target", "inside"), [("Brain_AD", ""), ("own", "own")])
def test_zero_shot_never_trains_on_the_target_under_another_name(tiny_root, zero_shot, tmp_path, target, inside):
    (brain,) = [path for path in tiny_root.iterdir() if "brain" in path.name.lower()]
    shutil.copytree(brain, tmp_path / (inside or target))
    data = dataclasses.replace(zero_shot.data, root=tmp_path / inside, dataset=target, sources=("brain",))
    with pytest.raises(ValueError, match=f"which is the target {target} itself"):
        training_data.plan(dataclasses.replace(zero_shot, data=data))


def test_masks_that_are_all_empty_do_not_stop_the_choice():
    empty = defined({"image_auroc": 0.75, "pixel_auroc": float("nan")})
    assert trainer._selection_score(empty) == 0.75
    assert trainer._selection_score({"image_auroc": 0.75, "pixel_auroc": 0.5}) == 1.25


def test_what_is_undefined_is_null_in_json(few_shot, tiny_root, tmp_path):
    recipe = with_own_data(few_shot, tiny_root, tmp_path)
    for sample in (*load_split(recipe.data.root, "brain", "valid"), *load_split(recipe.data.root, "brain", "test")):
        if sample.mask is not None:
            repaint(sample.mask, lambda pixels: 0 * pixels)
    run_dir = tmp_path / "run"
    evaluation.run_evaluation(at(recipe, run_dir, keep="valid", epochs=1))

    def read(text):
        return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    assert read((run_dir / "kept.json").read_text())["metrics"]["pixel_auroc"] is None
    assert read((run_dir / "metrics.json").read_text())["weights"]["metrics"]["pixel_auroc"] is None
    chosen = [line for line in map(read, (run_dir / "metrics.jsonl").read_text().splitlines()) if "valid" in line]
    assert [line["valid"]["pixel_auroc"] for line in chosen] == [None]


def test_images_that_were_trained_on_calibrate_nothing_though_the_pool_has_grown(few_shot, tiny_root, tmp_path):
    recipe = with_own_data(few_shot, tiny_root, tmp_path)
    root = recipe.data.root
    recipe = at(recipe, tmp_path / "run", epochs=1)
    evaluation.run_evaluation(recipe)
    support = set(json.loads((tmp_path / "run" / "kept.json").read_text())["support"])
    for image in load_split(root, "brain", "valid"):
        shutil.copy(image.image, image.image.with_stem(f"{image.image.stem}_more"))
        if image.mask is not None:
            shutil.copy(image.mask, image.mask.with_stem(f"{image.mask.stem}_more"))
    scored, real = [], evaluation._score

    def score(trained, own, samples, *args, **kwargs):
        scored.append({sample.name for sample in samples})
        return real(trained, own, samples, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "_score", score)
        evaluation.run_evaluation(recipe)
    assert len(scored) == 2 and scored[0] and not scored[0] & support


@pytest.mark.parametrize(
    ("shots", "part", "words"),
    [(6, None, "no valid images are left"), (4, "valid", ""), (4, "valid/Ungood", "")],
)
def test_what_cannot_be_calibrated_is_no_error(few_shot, tiny_root, tmp_path, capsys, shots, part, words):
    recipe = with_own_data(few_shot, tiny_root, tmp_path)
    if part:
        shutil.rmtree(recipe.data.root / "Brain_AD" / part)
    data = dataclasses.replace(recipe.data, shots=shots)
    recipe = dataclasses.replace(at(recipe, tmp_path / "run"), data=data)
    nothing: Any = None  # neither weights nor a signal are asked for
    evaluation.calibrate(recipe, RunDirectory(recipe), nothing, {"rule": "last"}, LAYOUT, nothing)
    assert f"Not calibrated: {words}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_names_may_hold_any_bytes(few_shot, zero_shot, tiny_root, tmp_path):
    root = shutil.copytree(tiny_root, tmp_path / "sets")
    for split in ("valid", "test"):
        for image in {sample.image.parent: sample.image for sample in load_split(root, "chest", split)}.values():
            image.rename(image.with_name(os.fsdecode(b"\xff\xfe.png")))
    data = dataclasses.replace(few_shot.data, root=root, dataset="chest", shots=6)
    experiment.run_training(dataclasses.replace(at(few_shot, tmp_path / "few", steps=1), data=data))
    data = dataclasses.replace(zero_shot.data, root=root)
    recipe = dataclasses.replace(at(zero_shot, tmp_path / "zero", steps=2, features="disk"), data=data)
    experiment.run_training(recipe)
    evaluation.run_evaluation(dataclasses.replace(recipe, data=data))


def test_zero_shot_trains_on_the_other_sets_and_scores_the_target(zero_shot, tmp_path):
    recipe = at(zero_shot, tmp_path)
    trained = experiment.run_training(recipe)
    log = losses(tmp_path)
    assert len(log) == 2 * (2 + 2)  # 20 images each of liver and chest, in batches of 16
    with_masks = [line for line in log if "dice" in line]
    assert len(with_masks) == 4  # liver's; chest has no masks
    evaluation.run_evaluation(recipe)
    detector = iqe_jax.Detector(trained.model, trained.frozen, trained.trainable, zero_shot=True)
    samples = load_split(recipe.data.root, "brain", "test")
    np.testing.assert_allclose(detector([s.image for s in samples]).score, list(scores(tmp_path).values()), atol=2e-5)


def test_zero_shot_weights_are_chosen_by_the_zero_shot_score(zero_shot, tmp_path, monkeypatch):
    asked, real = [], trainer.evaluate
    monkeypatch.setattr(trainer, "evaluate", lambda *a, **k: asked.append(k["zero_shot"]) or real(*a, **k))
    experiment.run_training(at(zero_shot, tmp_path, keep="valid", steps=1))
    assert asked == [True]
    assert iqe_jax.load(tmp_path).zero_shot


def test_where_features_are_kept_changes_no_number(zero_shot, tmp_path):
    experiment.run_training(at(zero_shot, tmp_path / "memory", features="memory"))
    experiment.run_training(at(zero_shot, tmp_path / "disk", features="disk"))
    experiment.run_training(at(zero_shot, tmp_path / "auto", feature_memory_gb=0.0))
    assert losses(tmp_path / "memory") == losses(tmp_path / "disk") == losses(tmp_path / "auto")


def test_weights_are_chosen_by_features_that_fit_beside_those_of_training(zero_shot, tmp_path, monkeypatch):
    budgets, sizes, real = {}, {}, features.of_samples

    def of_samples(*args, title, budget, **kwargs):
        budgets[title] = budget
        kept = real(*args, title=title, budget=budget, **kwargs)
        sizes[title] = kept.in_memory
        return kept

    monkeypatch.setattr(features, "of_samples", of_samples)
    experiment.run_training(at(zero_shot, tmp_path, keep="paper", steps=1, feature_memory_gb=0.01))
    assert list(budgets) == ["liver", "chest", "paper"] and all(sizes.values())
    assert budgets["paper"] == pytest.approx(1e7 - sizes["liver"] - sizes["chest"])


def test_features_are_held_once_while_they_are_gathered():
    def batches():
        for number in range(8):
            yield {"image_features": np.full((16, 1000), number, np.float32)}

    tracemalloc.start()
    try:
        found = features._joined(batches(), 125)["image_features"]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(found[:, 0], np.repeat(np.arange(8), 16)[:125])
    assert peak < found.nbytes + 3 * 16 * 1000 * 4


def test_features_take_the_memory_that_was_reckoned_with(zero_shot):
    recipe = at(zero_shot, None, features="memory", feature_dtype="bfloat16")
    model, frozen = experiment.load_model(recipe.model, LAYOUT)
    plan = training_data.plan(recipe)
    for samples, kept in zip(
        plan.training.values(), training_data.load(recipe, plan, model, frozen, LAYOUT), strict=True
    ):
        arrays = training_data._arrays(kept)
        taken = sum(array.nbytes for array in arrays.values()) - kept.labels.nbytes
        assert taken == features.size_in_bytes(model, samples, recipe)


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_features_stop_where_they_are_told_to(zero_shot, tmp_path, monkeypatch, place):
    monkeypatch.setenv("IQE_JAX_CACHE", str(tmp_path))
    recipe = at(zero_shot, None, features=place)
    model, frozen = experiment.load_model(recipe.model, LAYOUT)
    plan, asked = training_data.plan(recipe), []

    def check():
        asked.append(1)
        if len(asked) == 2:
            raise Stopped

    with pytest.raises(Stopped):
        training_data.load(recipe, plan, model, frozen, LAYOUT, check)


def test_features_on_disk_hold_no_file_open(tmp_path):
    def opened():
        return sum(1 for _ in Path("/dev/fd").iterdir())

    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    for number in range(20):
        feature_files.write(tmp_path / str(number), {"tokens": rows + number})
    before = opened()
    shards = [tmp_path / str(number) / "tokens.npy" for number in range(20)]
    array = feature_files.OnDisk(shards, np.dtype(np.float32))
    np.testing.assert_array_equal(np.stack([array[i] for i in range(40)])[[0, 1, 39]], [rows[0], rows[1], rows[1] + 19])
    assert opened() == before


def test_a_shard_that_another_run_wrote_first_stays(tmp_path):
    for value in (1, 2):
        feature_files.write(tmp_path / "0", {"tokens": np.full((2, 3), value)})
    np.testing.assert_array_equal(np.load(tmp_path / "0" / "tokens.npy"), np.ones((2, 3)))
    assert [path.name for path in tmp_path.iterdir()] == ["0"]


def test_a_disk_that_renames_no_folders_is_named(tmp_path, monkeypatch):
    def rename(path, target):
        raise OSError(errno.EMFILE, "Too many open files")  # as Cloud Storage FUSE may say

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match=r"Too many open files, on renaming a folder: '.*/0'"):
        feature_files.write(tmp_path / "0", {"tokens": np.zeros((2, 3))})
    assert not list(tmp_path.iterdir())


def test_features_that_may_not_be_read_are_no_damaged_ones(tmp_path, monkeypatch):
    feature_files.write(tmp_path / "0", {"tokens": np.zeros((2, 3), np.float32)})
    types = {"tokens": np.dtype(np.float32)}
    assert feature_files.is_whole(tmp_path / "0", types) and not feature_files.is_whole(tmp_path / "1", types)

    def refuse(*args, **kwargs):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(np, "load", refuse)
    with pytest.raises(OSError, match="Too many open files"):
        feature_files.is_whole(tmp_path / "0", types)


def test_bfloat16_features_are_close(zero_shot, tmp_path):
    for place in ("memory", "disk"):
        recipe = at(zero_shot, tmp_path / place, features=place, feature_dtype="bfloat16", steps=4)
        experiment.run_training(recipe)
    assert losses(tmp_path / "memory") == losses(tmp_path / "disk")
    experiment.run_training(at(zero_shot, tmp_path / "exact", steps=4))
    half, exact = ([line["loss"] for line in losses(tmp_path / name)] for name in ("disk", "exact"))
    assert half != exact
    np.testing.assert_allclose(half, exact, rtol=1e-2)


# ---------------------------------------------------------------------------- features on disk


def of_samples(recipe, model, frozen, samples):
    return features.of_samples(model, frozen, samples, recipe, LAYOUT, title="brain", budget=0)


def rows(kept, name):
    return np.stack([getattr(kept, name)[i] for i in range(len(kept))])


def test_masks_are_kept_as_anomalous_above_one_half():
    masks = np.array([[[0.0, 0.2], [0.5, 0.6]]], np.float32)
    batch = train_state.Batch(np.zeros((1, 1, 4, 8)), np.zeros((1, 8)), masks, np.ones(1), np.ones(1))
    np.testing.assert_array_equal(features._arrays(batch, np.dtype(np.float32))["masks"], masks > 0.5)


def test_kept_features_are_found_again_and_never_stale(few_shot, golden_model, tiny_root, monkeypatch):
    model, frozen, _ = golden_model
    recipe = dataclasses.replace(few_shot, model=model.config)
    samples = load_split(tiny_root, "brain", "test")
    first = of_samples(recipe, model, frozen, samples)
    runs = []
    real = features.run_tower
    monkeypatch.setattr(features, "run_tower", lambda *a: runs.append(1) or real(*a))
    again = of_samples(recipe, model, frozen, samples)
    assert not runs
    np.testing.assert_array_equal(rows(first, "patch_tokens"), rows(again, "patch_tokens"))
    np.testing.assert_array_equal(rows(first, "masks"), rows(again, "masks"))
    other = jax.tree.map(lambda x: x * 1.01, frozen)
    changed = of_samples(recipe, model, other, samples)
    assert len(runs) == 2
    assert np.abs(rows(changed, "patch_tokens") - rows(first, "patch_tokens")).max() > 0
    image = samples[0].image
    image.touch()
    of_samples(recipe, model, frozen, samples)
    assert len(runs) == 4


def test_kept_features_are_known_by_all_that_they_come_from(few_shot, golden_model, tiny_root, tmp_path):
    model, frozen, _ = golden_model
    root = shutil.copytree(tiny_root, tmp_path / "sets")
    samples = load_split(root, "brain", "valid")

    def key(samples=samples, feature_dtype="float32", **changes):
        changed = dataclasses.replace(model, config=dataclasses.replace(model.config, **changes))
        recipe = dataclasses.replace(at(few_shot, None, feature_dtype=feature_dtype), model=changed.config)
        return features.key_of(changed, frozen["vision"], samples, recipe)

    keys = [key(), key(samples[::-1]), key(samples[1:]), key(feature_dtype="bfloat16"), key(dtype="bfloat16")]
    keys += [key(image_size=41), key(levels=(1, 2)), key(normalisation="clip"), key(activation="quick_gelu")]
    samples[-1].mask.touch()
    assert len({*keys, key()}) == len(keys) + 1


def test_sets_are_kept_in_memory_as_far_as_they_fit_together(zero_shot):
    recipe = at(zero_shot, None)
    model, frozen = experiment.load_model(recipe.model, LAYOUT)
    plan = training_data.plan(recipe)
    first, second = (features.size_in_bytes(model, samples, recipe) for samples in plan.training.values())
    for spare, places in ((1.1, (np.ndarray, np.ndarray)), (0.5, (np.ndarray, OnDisk))):
        fitting = at(recipe, None, feature_memory_gb=(first + spare * second) / 1e9)
        kept = training_data.load(fitting, plan, model, frozen, LAYOUT)
        assert tuple(type(own.patch_tokens) for own in kept) == places


def test_support_images_are_trained_on_as_augmented(few_shot, golden_model):
    """Labels and masks in the order of the images: all of an augmentation, then the next; masks above one half."""
    model, frozen, _ = golden_model
    recipe = at(few_shot, None, features="memory")
    plan = training_data.plan(recipe)
    support = plan.training["brain"]
    (kept,) = training_data.load(recipe, plan, model, frozen, LAYOUT)
    images = np.stack([load_image(sample.image, 40) for sample in support])
    masks = [np.zeros((40, 40), np.float32) if s.mask is None else load_mask(s.mask, 40) for s in support]
    images, masks = augment(images, np.stack(masks))
    np.testing.assert_array_equal(kept.labels, [sample.label for _ in range(11) for sample in support])
    np.testing.assert_array_equal(rows(kept, "masks"), masks > 0.5)
    assert ((masks > 0) & (masks <= 0.5)).sum() > 0
    expected = model.features(frozen, images[:: len(support)])
    np.testing.assert_allclose(kept.image_features[:: len(support)], expected.image_features, atol=1e-4)


def test_a_few_shot_run_takes_the_features_that_one_before_it_kept(few_shot, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("IQE_JAX_CACHE", str(tmp_path / "cache"))
    runs, real = [], features.run_tower
    monkeypatch.setattr(features, "run_tower", lambda *a: runs.append(1) or real(*a))

    def towers(name, **settings):
        """How often a run of one step ran the tower; its loss has to be that of the first."""
        del runs[:]
        experiment.run_training(at(few_shot, tmp_path / name, steps=1, **settings))
        assert losses(tmp_path / name)[0]["loss"] == losses(tmp_path / "first")[0]["loss"]
        return len(runs)

    every = towers("first", features="memory")
    assert every == 6  # 88 images, 16 at a time
    assert not (tmp_path / "cache" / "features").exists()
    assert [towers("second"), towers("third"), towers("fourth", features="disk")] == [every, 0, 0]
    assert towers("fifth", features="memory") == every
    (folder,) = (tmp_path / "cache" / "features").iterdir()
    kept = folder / "patch_tokens.npy"
    kept.write_bytes(kept.read_bytes()[:-100])
    assert [towers("cut off"), towers("mended")] == [every, 0]
    (folder / "masks.npy").unlink()
    assert [towers("one lost"), towers("found")] == [every, 0]
    for path in load_split(few_shot.data.root, "brain", "valid"):
        path.image.touch()
    monkeypatch.setattr(features.np, "save", _full)
    assert towers("full disk") == every
    assert "not kept for the next run: no room" in capsys.readouterr().err
    assert list((tmp_path / "cache" / "features").iterdir()) == [folder]


@pytest.mark.parametrize("kind", ["few_shot", "zero_shot"])
def test_features_on_the_devices_train_the_same(kind, request, tmp_path, monkeypatch):
    """As on a GPU or TPU that has room for them; a CPU's are gathered on the host."""
    recipe, gathered = request.getfixturevalue(kind), []
    recipe = dataclasses.replace(recipe, eval=dataclasses.replace(recipe.eval, batch_size=16))
    real = training_data.batches_ahead
    monkeypatch.setattr(training_data, "batches_ahead", lambda *args: gathered.append(1) or real(*args))
    for name, memory in {"too small": 10**6, "large enough": 10**9}.items():
        monkeypatch.setattr(sharding.Layout, "memory", memory)
        experiment.run_training(at(recipe, tmp_path / name, steps=5))
        assert bool(gathered) == (name == "too small")
        del gathered[:]
    assert losses(tmp_path / "too small") == losses(tmp_path / "large enough")


def test_kept_few_shot_features_make_room_for_new_ones(few_shot, tmp_path, monkeypatch, capsys):
    root = tmp_path / "cache" / "features"
    monkeypatch.setenv("IQE_JAX_CACHE", str(tmp_path / "cache"))
    (root / "zero-shot" / "00000").mkdir(parents=True)
    (root / "zero-shot" / "00000" / "patch_tokens.npy").write_bytes(bytes(10_000_000))

    def kept(name, **settings):
        """The few-shot folders that are there after a run of one step."""
        experiment.run_training(at(few_shot, tmp_path / name, steps=1, **settings))
        folders = {labels.parent for labels in root.glob("*/labels.npy")}
        assert (root / "zero-shot" / "00000" / "patch_tokens.npy").exists()
        return folders

    assert kept("none", seed=0, feature_disk_gb=0.0) == set()
    (first,) = kept("first", seed=0)
    size = sum(path.stat().st_size for path in first.iterdir())
    (second,) = kept("second", seed=1) - {first}
    for folder, age in ((first, 200), (second, 100)):
        os.utime(folder / "labels.npy", (time.time() - age,) * 2)
    kept("first again", seed=0)  # reads it, so the second is now the one that was read longest ago
    third = kept("third", seed=2, feature_disk_gb=2.5 * size / 1e9) - {first}
    assert len(third) == 1 and second not in third and first.exists()
    assert kept("too large", seed=3, feature_disk_gb=0.5 * size / 1e9) == {first, *third}
    assert "not kept for the next run: 0.0" in capsys.readouterr().err.replace("\n", " ")


def _full(*_):
    raise OSError("no room")


def test_features_go_on_where_they_were_stopped(few_shot, golden_model, tiny_root, monkeypatch):
    model, frozen, _ = golden_model
    recipe = dataclasses.replace(few_shot, model=model.config, eval=dataclasses.replace(few_shot.eval, batch_size=3))
    samples = load_split(tiny_root, "liver", "test")
    monkeypatch.setattr(features, "SHARD", 6)
    whole = features.of_samples(model, frozen, samples, recipe, LAYOUT, title="liver", budget=1e12)
    real, runs = features.run_tower, []

    def tower(*args):
        runs.append(1)
        if len(runs) == 6:  # the fifth is still on its way to the host
            raise Stopped
        return real(*args)

    monkeypatch.setattr(features, "run_tower", tower)
    room = []
    monkeypatch.setattr(features, "check_room", lambda folder, needed, title: room.append(needed))
    with pytest.raises(Stopped):
        of_samples(recipe, model, frozen, samples)
    resumed = of_samples(recipe, model, frozen, samples)
    assert room == [features.size_in_bytes(model, samples, recipe), room[0] / 2]
    assert len(runs) == 6 + 3  # 7 batches of 3; the two shards of 6 that were whole are not computed again
    np.testing.assert_array_equal(rows(resumed, "patch_tokens"), rows(whole, "patch_tokens"))
    np.testing.assert_array_equal(rows(resumed, "masks"), rows(whole, "masks"))
    files = sorted(cache.cache_dir().glob("features/*/0000[012]/*.npy"), key=lambda path: path.stat().st_mtime)[-9:]
    damaged = {path.parent.name: path for path in files}
    assert len(damaged) == 3
    damaged["00000"].write_bytes(b"")
    damaged["00001"].write_bytes(damaged["00001"].read_bytes()[:200])
    damaged["00002"].unlink()
    del runs[:]
    monkeypatch.setattr(features, "run_tower", lambda *args: runs.append(1) or real(*args))
    mended = of_samples(recipe, model, frozen, samples)
    assert len(runs) == 6  # the fourth shard is whole
    np.testing.assert_array_equal(rows(mended, "patch_tokens"), rows(whole, "patch_tokens"))


def test_one_batch_may_fill_several_shards(few_shot, golden_model, tiny_root, tmp_path, monkeypatch):
    monkeypatch.setenv("IQE_JAX_CACHE", str(tmp_path))
    model, frozen, _ = golden_model
    recipe = dataclasses.replace(few_shot, model=model.config, eval=dataclasses.replace(few_shot.eval, batch_size=16))
    samples = load_split(tiny_root, "liver", "test")
    monkeypatch.setattr(features, "SHARD", 3)
    kept = of_samples(recipe, model, frozen, samples)
    whole = features.of_samples(model, frozen, samples, recipe, LAYOUT, title="liver", budget=1e12)
    np.testing.assert_array_equal(rows(kept, "patch_tokens"), rows(whole, "patch_tokens"))


def test_a_full_disk_is_found_out_before_any_work(few_shot, golden_model, tiny_root, monkeypatch):
    model, frozen, _ = golden_model
    recipe = dataclasses.replace(few_shot, model=model.config)
    usage = features.shutil.disk_usage(tiny_root)._replace(free=1000)
    monkeypatch.setattr(features.shutil, "disk_usage", lambda path: usage)
    samples = load_split(tiny_root, "chest", "test")
    with pytest.raises(OSError, match=r"features of brain need 0.0 GB .* set \$IQE_JAX_CACHE"):
        of_samples(recipe, model, frozen, samples)


# ---------------------------------------------------------------------------- the command line


def arguments(recipe, run_dir, *more):
    model = recipe.model
    return [
        *("--config", "brain_fewshot", "--run-dir", str(run_dir), "--data.root", str(recipe.data.root)),
        *("--model.clip", model.clip, "--model.image-size", "40", "--model.levels", "2", "4", "--model.sigma", "2"),
        *("--model.iqm-layers", "1", "--model.iqm-heads", "4", "--model.iqm-width", "96"),
        *more,
    ]


def test_brain_fewshot_on_the_real_layout(few_shot, tmp_path, capsys):
    """The command of the README, at reduced size: a random CLIP in OpenAI's format, a folder as MVFA packs it."""
    evaluate_script.main(arguments(few_shot, tmp_path, "--train.steps", "3", "--data.shots", "2"))
    shown = " ".join(capsys.readouterr().out.split())
    assert "brain_fewshot: brain, few-shot, k = 2, seed 0" in shown
    assert "pixel AUROC" in shown
    summary = json.loads((tmp_path / "metrics.json").read_text())
    assert summary["data"] == str(few_shot.data.root)


def test_train_then_evaluate(few_shot, tmp_path):
    line = arguments(few_shot, tmp_path, "--train.steps", "2")
    train_script.main(line)
    before = (tmp_path / "adapter.safetensors").read_bytes()
    evaluate_script.main(line)
    assert (tmp_path / "adapter.safetensors").read_bytes() == before


def test_a_dry_run_prints_bytes_and_leaves_nothing(few_shot, tmp_path, capsys):
    train_script.main(arguments(few_shot, tmp_path / "run", "--dry-run"))
    shown = " ".join(capsys.readouterr().out.split())
    for word in ("frozen parameters", "trainable parameters", "optimiser", "activations", "Kept features"):
        assert word in shown
    # 88 augmented images of 2 levels, 25 patches, width 128; an embedding of 64; and a mask
    assert f"{88 * (2 * 25 * 128 * 4 + 64 * 4 + 40 * 40) / 1e6:.1f} MB" in shown
    assert "in the memory of each process, and once on disk for the next run" in shown
    train_script.main(arguments(few_shot, tmp_path / "run", "--dry-run", "--train.keep", "paper"))
    kept = (88 + len(load_split(few_shot.data.root, "brain", "test"))) * (2 * 25 * 128 * 4 + 64 * 4 + 40 * 40)
    assert f"{kept / 1e6:.1f} MB" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit, match="no data folder at nowhere"):
        train_script.main(arguments(few_shot, tmp_path / "run", "--dry-run", "--data.root", "nowhere"))


def test_a_dry_run_compiles_the_step_that_the_run_takes(few_shot, tmp_path, monkeypatch):
    asked, real = [], experiment.train_footprint
    monkeypatch.setattr(experiment, "train_footprint", lambda *a, **k: asked.append(k["masks"]) or real(*a, **k))
    for dataset in ("chest", "brain"):
        data = dataclasses.replace(few_shot.data, dataset=dataset)
        experiment.dry_run(dataclasses.replace(at(few_shot, tmp_path), data=data))
    assert asked == [False, True]


@pytest.mark.parametrize("begun", [True, False])
def test_a_dry_run_shows_what_will_be_run(few_shot, tmp_path, monkeypatch, begun):
    steps, scorings = [], []
    monkeypatch.setattr(experiment, "train_footprint", lambda *a, masks: steps.append(masks))
    monkeypatch.setattr(experiment, "evaluation_footprints", lambda *a, masks: scorings.append(masks) or [])
    monkeypatch.setattr(experiment, "footprint_table", lambda *a, **k: "")
    model = dataclasses.replace(few_shot.model, adapter="given.pth")
    recipe = dataclasses.replace(few_shot, model=model, data=dataclasses.replace(few_shot.data, dataset="chest"))
    recipe = at(recipe, tmp_path / "run")
    if begun:
        RunDirectory(recipe).claim()
        (tmp_path / "run" / "checkpoints").mkdir()
    experiment.dry_run(recipe, scoring=True)
    assert (steps, scorings) == ([False] * begun, [False])


def test_a_dry_run_of_a_given_adapter_asks_for_no_training_sets(few_shot, tiny_root, tmp_path, capsys):
    (brain,) = [path for path in tiny_root.iterdir() if "brain" in path.name.lower()]
    shutil.copytree(brain, tmp_path / "sets" / brain.name)
    line = arguments(
        few_shot, tmp_path / "run", "--dry-run", "--data.root", str(tmp_path / "sets"), "--data.shots", "0"
    )
    evaluate_script.main([*line, "--model.adapter", "given.pth"])
    shown = capsys.readouterr().out
    assert "frozen parameters" in shown and "optimiser" in shown and "Kept features" not in shown
    with pytest.raises(SystemExit, match="is not in"):
        evaluate_script.main(line)


def test_an_official_checkpoint_is_scored_without_training(few_shot, golden_files, golden_settings, tmp_path):
    recipe = dataclasses.replace(few_shot, model=dataclasses.replace(few_shot.model, **golden_settings))
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, adapter=str(golden_files[1])))
    metrics = evaluation.run_evaluation(at(recipe, tmp_path))
    pixels = {f"pixel_{name}" for name in ("auroc", "ap", "f1_max", "aupro")}
    assert set(metrics) == {*IMAGE_METRICS, *pixels, *(f"{name}_error" for name in pixels)}
    assert not (tmp_path / "checkpoints").exists()


def test_a_given_adapter_has_no_seeds_to_compare(few_shot, golden_files, tmp_path):
    model = dataclasses.replace(few_shot.model, adapter=str(golden_files[1]))
    recipe = dataclasses.replace(few_shot, model=model, eval=dataclasses.replace(few_shot.eval, seeds=3))
    with pytest.raises(ValueError, match=r"eval.seeds is 3, but model.adapter gives the weights"):
        evaluation.run_evaluation(at(recipe, tmp_path))


def test_a_given_adapter_has_no_rules_to_compare(few_shot, golden_files, tmp_path):
    model = dataclasses.replace(few_shot.model, adapter=str(golden_files[1]))
    with pytest.raises(ValueError, match=r"eval\.protocols compares weights that a run keeps"):
        evaluation.run_evaluation(dataclasses.replace(side_by_side(few_shot, tmp_path, "paper"), model=model))


@pytest.mark.parametrize("shots", [4, 6])  # 6 are the whole pool: with nothing to calibrate on, scoring comes first
def test_scoring_stops_where_it_is_told_to(few_shot, golden_files, golden_settings, tmp_path, monkeypatch, shots):
    model = config.ModelConfig(**golden_settings, adapter=str(golden_files[1]))
    monkeypatch.setattr(evaluation.Preemption, "reached", lambda _: True)
    recipe = dataclasses.replace(few_shot, model=model, data=dataclasses.replace(few_shot.data, shots=shots))
    with pytest.raises(processes.Preempted):
        evaluation.run_evaluation(at(recipe, tmp_path / "run"))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.json"}


@pytest.fixture(scope="module")
def scored(few_shot, golden_model, tiny_root):
    """Ten images scored by two adapters, 2 at a time, with the maps that were handed over, and in which order."""
    model, frozen, trainable = golden_model
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, score="max"))
    samples = load_split(tiny_root, "brain", "test")[5:15]
    events, maps = [], []
    found = evaluator.evaluate_each(
        model,
        {"first": trainable, "second": jax.tree.map(lambda x: x * 1.1, trainable)},
        frozen,
        features.stream(model, frozen, samples, 2, few_shot.data, LAYOUT),
        zero_shot=False,
        layout=LAYOUT,
        keep_maps=(1, 6, 9),
        on_maps=lambda first, batch: events.append(first) or maps.extend(batch),
        check=lambda: events.append("check"),
    )
    return found, maps, events


def test_maps_are_those_of_the_images_asked_for_by_the_first_adapter(scored):
    found, maps, _ = scored
    assert list(found["first"].maps) == [1, 6, 9] and not found["second"].maps
    for number, segmentation in found["first"].maps.items():
        np.testing.assert_array_equal(segmentation, maps[number])
    np.testing.assert_allclose([x.max() for x in maps], found["first"].reductions["max"], rtol=1e-6)
    assert np.abs(found["first"].scores - found["second"].scores).max() > 1e-5


def test_the_score_is_the_one_that_the_config_asks_for(scored):
    for found in scored[0].values():
        np.testing.assert_array_equal(found.scores, found.reductions["max"])
        assert np.abs(found.reductions["official"] - found.scores).max() > 1e-3


def test_no_more_than_a_few_batches_wait(scored):
    assert scored[2] == [*["check"] * 3, 0, "check", 2, "check", 4, 6, 8]


def test_scores_that_are_no_numbers_stop_an_evaluation(few_shot, golden_model, tiny_root):
    model, frozen, trainable = golden_model
    batches = features.stream(model, frozen, load_split(tiny_root, "brain", "test")[:2], 2, few_shot.data, LAYOUT)
    broken = jax.tree.map(lambda x: x * np.nan, trainable)
    with pytest.raises(FloatingPointError, match="the score of image 0 is nan"):
        evaluator.evaluate(model, broken, frozen, batches, zero_shot=False, layout=LAYOUT)


def test_counters_of_pixels_are_widened_in_time(few_shot, golden_files, golden_settings, tmp_path, monkeypatch):
    model = config.ModelConfig(**golden_settings, adapter=str(golden_files[1]))
    recipe = dataclasses.replace(few_shot, model=model, eval=dataclasses.replace(few_shot.eval, batch_size=4))
    before = evaluation.run_evaluation(at(recipe, tmp_path / "before"))
    widened, real = [], pixel_metrics.widened
    monkeypatch.setattr(pixel_metrics, "widened", lambda counts: widened.append(counts) or real(counts))
    monkeypatch.setattr(pixel_metrics, "MOST", 5 * 40 * 40)
    assert evaluation.run_evaluation(at(recipe, tmp_path / "after")) == before
    assert len(widened) == 1


def test_training_starts_from_a_given_adapter(few_shot, golden_files, golden_settings, tmp_path):
    model = dataclasses.replace(few_shot.model, **golden_settings, adapter=str(golden_files[1]))
    recipe = dataclasses.replace(at(few_shot, tmp_path, steps=1, learning_rate=1e-9), model=model)
    trained = experiment.run_training(recipe)
    start = load_adapter(trained.model, golden_files[1])
    np.testing.assert_allclose(trained.trainable["dense"]["kernel"], start["dense"]["kernel"], atol=1e-7)


def test_a_run_trained_from_a_given_adapter_is_scored_with_its_own(few_shot, golden_files, golden_settings, tmp_path):
    model = dataclasses.replace(few_shot.model, **golden_settings, adapter=str(golden_files[1]))
    recipe = dataclasses.replace(at(few_shot, tmp_path, steps=3), model=model)
    trained = experiment.run_training(recipe)
    evaluation.run_evaluation(recipe)
    assert json.loads((tmp_path / "metrics.json").read_text())["weights"]["rule"] == "last"
    samples = load_split(recipe.data.root, "brain", "test")
    detector = iqe_jax.Detector(trained.model, trained.frozen, trained.trainable, zero_shot=False)
    np.testing.assert_allclose(detector([s.image for s in samples]).score, list(scores(tmp_path).values()), atol=2e-5)


def test_an_evaluation_tells_what_its_threshold_does_and_keeps_what_was_asked_of_it(tmp_path, capsys):
    phantoms = config.load("phantom_fewshot")
    recipe = at(phantoms, tmp_path, steps=1)
    evaluation.run_evaluation(recipe)
    found = json.loads((tmp_path / "metrics.json").read_text())["at_threshold"]
    assert found["target"] == {"specificity": 0.95}
    assert found["true_positives"] + found["false_negatives"] == 100
    assert found["false_positives"] + found["true_negatives"] == 100
    assert "at the calibrated threshold" in " ".join(capsys.readouterr().out.split())
    calibration.main(["--run", str(tmp_path), "--sensitivity", "0.9"])
    chosen = calibration.load(tmp_path)
    evaluation.run_evaluation(recipe)
    again = calibration.load(tmp_path)
    assert chosen is not None and again is not None and again.target == {"sensitivity": 0.9}
    assert again.threshold == pytest.approx(chosen.threshold)


def test_a_part_of_a_published_set_is_called_one(few_shot, golden_files, golden_settings, tmp_path, capsys):
    model = config.ModelConfig(**golden_settings, adapter=str(golden_files[1]))
    evaluation.run_evaluation(at(dataclasses.replace(few_shot, model=model), tmp_path))
    said = " ".join(capsys.readouterr().err.split())
    assert "test images, the published set brain has 3715: figures cannot be set beside published ones" in said


def test_a_calibration_belongs_to_the_given_adapter_that_it_was_made_with(
    few_shot, golden_files, golden_settings, tmp_path
):
    given = Path(shutil.copy(golden_files[1], tmp_path))
    model = dataclasses.replace(few_shot.model, **golden_settings, adapter=str(given))
    recipe = dataclasses.replace(at(few_shot, tmp_path / "run"), model=model)
    evaluation.run_evaluation(recipe)
    assert len(calibration.load(tmp_path / "run").labels) == 4  # the support may have trained it: same seed, same draw
    given.write_bytes(given.read_bytes() + b" ")
    with pytest.raises(ValueError, match="was made with other weights than those of"):
        calibration.load(tmp_path / "run")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--data.root", "nowhere"), "no data folder at nowhere.*docs/data.md"),
        (("--data.dataset", "resc"), "set 'resc' is not in"),
        (("--data.shots", "7"), "7 normal and 7 anomalous images were asked for, but there are 6 and 6"),
        (("--model.clip", "nowhere.pt"), "nowhere.pt"),
        (("--model.iqm-heads", "5"), "must divide"),
        (("--data.support-list", "nowhere.txt"), "no support list at nowhere.txt"),
        (("--model.adapter", "nowhere.pth"), "nowhere.pth does not exist"),
    ],
)
def test_what_is_missing_is_said_before_any_work(few_shot, tmp_path, more, message):
    run_dir = tmp_path / "run"
    with pytest.raises(SystemExit, match=message) as stop:
        evaluate_script.main(arguments(few_shot, run_dir, *more))
    assert str(stop.value).startswith("evaluate.py: ")
    assert not run_dir.exists()


def test_an_official_support_list_is_used_as_it_stands(few_shot, tmp_path):
    listed = tmp_path / "2-shot.txt"
    listed.write_text("n-0: 003.png 001.png\na-0: 000.png 005.png\n")
    data = dataclasses.replace(few_shot.data, support_list=listed, shots=2)
    recipe = dataclasses.replace(at(few_shot, tmp_path / "run", steps=1), data=data)
    experiment.run_training(recipe)
    support = json.loads((tmp_path / "run" / "kept.json").read_text())["support"]
    assert support == ["good/003.png", "good/001.png", "ungood/000.png", "ungood/005.png"]
    listed.write_text(
        "n-0: 003.png 001.png\na-0: 000.png 005.png\nn-1: 002.png 004.png\na-1: 001.png 003.png\n"
        "n-2: 000.png 001.png\na-2: 000.png\n"
    )
    runs = experiment.seeds(dataclasses.replace(recipe, eval=dataclasses.replace(recipe.eval, seeds=3)))
    assert training_data.plan(next(runs)).names == support
    assert training_data.plan(next(runs)).names == ["good/002.png", "good/004.png", "ungood/001.png", "ungood/003.png"]
    with pytest.raises(ValueError, match=r"row 2 of .* names 2 normal and 1 anomalous images"):
        training_data.plan(next(runs))
    four = dataclasses.replace(recipe, run_dir=tmp_path / "four", data=dataclasses.replace(data, shots=4))
    with pytest.raises(ValueError, match=r"names 2 normal and 2 anomalous images, but data\.shots is 4"):
        experiment.run_training(four)


def test_without_weights_the_message_says_what_to_get(few_shot, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = ["--config", "brain_fewshot", "--run-dir", str(tmp_path / "run"), "--data.root", str(few_shot.data.root)]
    with pytest.raises(SystemExit, match="openai/clip-vit-large-patch14-336"):
        evaluate_script.main(line)


def test_an_unreadable_image_is_named(few_shot, tiny_root, tmp_path):
    recipe = with_own_data(few_shot, tiny_root, tmp_path)
    (recipe.data.root / "Brain_AD/test/Ungood/img/003.png").write_bytes(b"\x89PNG\r\n")
    run = at(recipe, tmp_path / "run", steps=1)
    for work in (evaluation.run_evaluation, lambda config: experiment.dry_run(config, scoring=True)):
        with pytest.raises(ValueError, match=r"Ungood/img/003\.png cannot be read"):
            work(run)
        assert not (tmp_path / "run").exists()  # before any work
    experiment.run_training(run)  # which does not need it
    experiment.dry_run(run)


@pytest.mark.parametrize(("split", "keep"), [("valid", "valid"), ("test", "paper")])
def test_an_unreadable_image_that_weights_are_chosen_by_is_named_before_training(
    few_shot, tiny_root, tmp_path, split, keep
):
    recipe = with_own_data(few_shot, tiny_root, tmp_path)
    for path in (recipe.data.root / f"Brain_AD/{split}/good/img").iterdir():
        path.write_bytes(b"")
    run = at(recipe, tmp_path / "run", steps=1, keep=keep)
    for work in (experiment.run_training, experiment.dry_run):
        with pytest.raises(ValueError, match=r"images cannot be used:\n  .*is empty"):
            work(run)
    assert not (tmp_path / "run").exists()


def test_a_bad_image_of_the_pool_is_named_before_training(few_shot, tiny_root, tmp_path):
    recipe = with_own_data(few_shot, tiny_root, tmp_path)
    pool = load_split(recipe.data.root, "brain", "valid")
    support = {sample.name for sample in training_data.plan(recipe).training["brain"]}
    next(sample.image for sample in pool if sample.name not in support).write_bytes(b"no image")
    run = at(recipe, tmp_path / "run", steps=1)
    for work in (evaluation.run_evaluation, lambda config: experiment.dry_run(config, scoring=True)):
        with pytest.raises(ValueError, match=r"valid/.* cannot be read"):
            work(run)
    assert not (tmp_path / "run").exists()


def test_a_step_takes_another_learning_rate_than_its_state_was_made_with(golden_model):
    model, frozen, _ = golden_model
    state = train_state.shapes_laid_out(model, (1e-4, 1e-2), LAYOUT)
    batch = train_state.batch_shapes(model, LAYOUT, 4, np.float32, masks=True)
    settings = train_state.step_settings(model, config.TrainConfig(learning_rate=0.00123), 0.0, LAYOUT)
    with LAYOUT.active():
        after, _ = train_state.step_program.eval_shape(state, frozen, batch, **settings)
    assert jax.tree.map(np.shape, after) == jax.tree.map(np.shape, state)


def test_padding_of_a_batch_changes_neither_loss_nor_gradients(golden_model):
    model, frozen, trainable = golden_model
    draw = np.random.default_rng(0)
    shapes = {"patch_tokens": (3, 4, 25, 128), "image_features": (3, 64), "masks": (3, 40, 40)}
    arrays = {name: draw.random(shape, np.float32) for name, shape in shapes.items()}
    arrays["labels"] = np.array([0, 1, 1], np.float32)

    def batch(arrays, weight):
        tokens = np.moveaxis(arrays["patch_tokens"], 1, 0)
        return train_state.Batch(**{**arrays, "patch_tokens": tokens}, weight=np.array(weight, np.float32))

    small = batch(arrays, [1, 1, 1])
    padded = {name: np.concatenate([array, array[:2] * 0.3]) for name, array in arrays.items()}
    padded = batch(padded, [1, 1, 1, 0, 0])

    one, other = (compiled.gradients(trainable, model, frozen, batch) for batch in (small, padded))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), one, other)


def test_rows_that_fill_a_batch_up_for_the_devices_count_nothing():
    chosen = training_data._chosen(FewShotBatches(5, 3, seed=0), 0, np.arange(4))
    np.testing.assert_array_equal(chosen.weight, [1, 1, 1, 0])
    np.testing.assert_array_equal(chosen.indices[3], chosen.indices[0])


def test_few_training_images_are_told_apart_by_all_their_bytes(tmp_path):
    image, seen = tmp_path / "a.png", set()
    for content in (b"one", b"two"):
        image.write_bytes(content)
        seen.add(training_data.Plan({"brain": [Sample(image, None, 0, "good/a.png")]}, {}).digest)
    assert len(seen) == 2


# ---------------------------------------------------------------------------- several rules and several seeds


def side_by_side(recipe, run_dir, *rules, **train):
    return dataclasses.replace(
        at(recipe, run_dir, **train), eval=dataclasses.replace(recipe.eval, protocols=rules, heatmaps=0)
    )


@pytest.fixture(scope="module")
def followed(few_shot, tmp_path_factory):
    """A run that follows all three rules, evaluated, and what it showed."""
    import contextlib
    import io

    run_dir, shown = tmp_path_factory.mktemp("runs") / "rules", io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "160")
        evaluation.run_evaluation(side_by_side(few_shot, run_dir, "last", "valid", "paper"))
    return run_dir, shown.getvalue()


def test_rules_side_by_side_keep_what_each_keeps_alone(few_shot, trained, followed, tmp_path):
    run_dir, _ = followed
    rules = json.loads((run_dir / "metrics.json").read_text())["rules"]
    assert list(rules) == ["last", "valid", "paper"]
    assert (run_dir / "adapter.safetensors").read_bytes() == (trained / "adapter.safetensors").read_bytes()
    evaluation.run_evaluation(at(few_shot, tmp_path, keep="paper"))
    alone = json.loads((tmp_path / "metrics.json").read_text())
    assert rules["paper"]["image_auroc"] == alone["metrics"]["image_auroc"]
    assert rules["paper"]["step"] == alone["weights"]["step"]
    assert (run_dir / "adapter-paper.safetensors").read_bytes() == (tmp_path / "adapter.safetensors").read_bytes()
    assert [rule["chosen_on_test_data"] for rule in rules.values()] == [False, False, True]
    best = max(rule["image_auroc"] + rule["pixel_auroc"] for rule in rules.values())
    assert rules["paper"]["image_auroc"] + rules["paper"]["pixel_auroc"] == pytest.approx(best, abs=1e-6)


def test_rules_side_by_side_resume_bit_for_bit(few_shot, followed, tmp_path, monkeypatch):
    run_dir, _ = followed
    recipe = side_by_side(few_shot, tmp_path / "run", "valid", "paper", checkpoint_every=2)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 8)
        experiment.run_training(recipe)
    experiment.run_training(recipe)
    assert losses(tmp_path / "run") == losses(run_dir)
    for file in ("kept.json", "adapter.safetensors", "adapter-valid.safetensors", "adapter-paper.safetensors"):
        assert (tmp_path / "run" / file).read_bytes() == (run_dir / file).read_bytes(), file


def test_a_choice_cannot_be_made_afterwards(few_shot, trained, followed):
    with pytest.raises(ValueError, match=r"was trained without --eval\.protocols valid"):
        evaluation.run_evaluation(side_by_side(few_shot, trained, "valid"))
    experiment.run_training(side_by_side(few_shot, followed[0], "paper"))  # fewer can be shown
    assert config.from_json((followed[0] / "config.json").read_text()).rules == ("last", "valid", "paper")


def test_paper_is_marked_wherever_it_is_shown(few_shot, followed, tmp_path, monkeypatch, capsys):
    run_dir, shown = followed
    listed = shown.splitlines()
    first = next(i for i, line in enumerate(listed) if "paper" in line)
    for line, words in zip(listed[first + 1 :], ("chosen on", "the TEST SET"), strict=False):
        assert line.index(words) - listed[first].index("paper") in range(-20, 20)
    assert "paper: chosen on the TEST SET" in shown
    with (run_dir / "scores-paper.csv").open() as file:
        assert {row["weights"] for row in csv.DictReader(file)} == {"paper, chosen on test data"}
    with (run_dir / "scores.csv").open() as file:
        assert {row["weights"] for row in csv.DictReader(file)} == {"last"}
    assert json.loads((run_dir / "kept.json").read_text())["others"]["paper"]["chosen_on_test_data"]
    chosen = [line for line in losses(run_dir) if "paper" in line]
    assert len(chosen) == 3
    assert all(line["chosen_on_test_data"] for line in chosen)
    # Every JSON file: whatever holds figures under the name paper says so beside them.
    for path in run_dir.glob("*.json"):
        for name, found in named(json.loads(path.read_text())):
            if name == "paper" and isinstance(found, dict):
                assert found["chosen_on_test_data"] is True, path
    # The mark goes with the weights, to another run and to what is trained from them.
    monkeypatch.setenv("COLUMNS", "160")
    given = dataclasses.replace(few_shot.model, adapter=str(run_dir / "adapter-paper.safetensors"))
    recipe = dataclasses.replace(at(few_shot, tmp_path / "given"), model=given)
    capsys.readouterr()
    evaluation.run_evaluation(recipe)
    shown = capsys.readouterr()
    assert "the given adapter, chosen on the TEST SET" in shown.out
    assert re.search(r"Calibration on .*; weights chosen on the TEST SET\n", shown.err)
    for path, mark in ((tmp_path / "given", True), (run_dir, False)):
        calibration.main(["--run", str(path), "--specificity", "0.9"])  # made again, it keeps the mark
        assert capsys.readouterr().out.strip().endswith("weights chosen on the TEST SET") == mark
        assert json.loads((path / "calibration.json").read_text())["chosen_on_test_data"] is mark
    assert json.loads((tmp_path / "given" / "metrics.json").read_text())["weights"]["chosen_on_test_data"] is True
    experiment.run_training(dataclasses.replace(at(few_shot, tmp_path / "on", steps=1), model=given))
    assert json.loads((tmp_path / "on" / "kept.json").read_text())["chosen_on_test_data"] is True
    assert chosen_on(tmp_path / "on" / "adapter.safetensors") == "brain"
    assert chosen_on(run_dir / "adapter.safetensors") is None


def named(tree):
    """Every (key, value) of nested objects."""
    for name, value in tree.items() if isinstance(tree, dict) else []:
        yield name, value
        yield from named(value)


def test_an_evaluation_has_intervals_and_every_reduction(trained):
    summary = json.loads((trained / "metrics.json").read_text())
    assert set(summary["intervals"]) == set(IMAGE_METRICS)
    for name, (low, high) in summary["intervals"].items():
        assert low <= summary["metrics"][name] <= high
    assert list(summary["reductions"]) == ["official", "mean", "max", "top"]
    assert summary["reductions"]["official"]["image_auroc"] == summary["metrics"]["image_auroc"]
    assert {*IMAGE_METRICS} == set(summary["reductions"]["max"])
    assert summary["rules"]["last"]["pixel_aupro"] == summary["metrics"]["pixel_aupro"]
    with (trained / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:7] == [*("image", "label", "score", "score_official", "score_mean", "score_max", "score_top")]
    assert all(row["score"] == row["score_official"] for row in rows)
    assert all(float(r["score_mean"]) <= float(r["score_top"]) <= float(r["score_max"]) for r in rows)


def test_no_run_holds_the_weights_of_those_before_it(few_shot, tmp_path, monkeypatch):
    held = []

    def train_run(config, layout, preemption):
        assert all(trained() is None for trained in held)
        trained = experiment.Trained(None, {}, {})  # pyright: ignore[reportArgumentType]
        held.append(weakref.ref(trained))
        return trained

    monkeypatch.setattr(experiment, "train_run", train_run)
    asked = dataclasses.replace(few_shot.eval, seeds=3)
    assert experiment.run_training(dataclasses.replace(at(few_shot, tmp_path), eval=asked)) is held[-1]()
    assert len(held) == 3


def test_several_seeds_have_a_directory_each_and_a_summary(few_shot, tmp_path, capsys):
    asked = dataclasses.replace(few_shot.eval, seeds=2, heatmaps=0)
    metrics = evaluation.run_evaluation(dataclasses.replace(at(few_shot, tmp_path, steps=2, seed=3), eval=asked))
    runs = [json.loads((tmp_path / f"seed{seed}" / "metrics.json").read_text()) for seed in (3, 4)]
    assert runs[0]["weights"]["support"] != runs[1]["weights"]["support"]
    found = json.loads((tmp_path / "seeds3-4.json").read_text())
    assert found["seeds"] == [3, 4]
    auroc = found["rules"]["last"]["image_auroc"]
    assert auroc["values"] == [run["metrics"]["image_auroc"] for run in runs]
    assert auroc["mean"] == metrics["image_auroc"] == pytest.approx(np.mean(auroc["values"]))
    assert auroc["interval"][0] <= auroc["mean"] <= auroc["interval"][1]
    assert "seed 3 to 4 (mean over seeds)" in " ".join(capsys.readouterr().out.split())

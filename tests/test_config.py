"""Recipes, overrides, and one clear message for each thing that can be wrong with them."""

import dataclasses
import errno
from pathlib import Path

import pytest

from iqe_jax import cli, config

REAL = {
    f"{name}_{kind}" for name in ("brain", "liver", "resc", "oct17", "chest", "his") for kind in ("fewshot", "zeroshot")
}


def parse(*arguments):
    return cli.parse(arguments, program="train.py", description="Train.")[1]


def test_there_is_a_recipe_for_every_set_and_protocol():
    assert set(config.names()) == REAL | {"phantom_fewshot", "phantom_zeroshot", "custom_fewshot"}


@pytest.mark.parametrize("name", config.names())
def test_recipes_are_valid_and_survive_json(name):
    recipe = config.load(name)
    config.check(recipe)
    assert recipe.name == name
    assert recipe.zero_shot == name.endswith("zeroshot")
    assert recipe.data.phantoms == name.startswith("phantom")
    assert config.from_json(config.to_json(recipe)) == recipe


# SPEC sections 1 to 6, and what is ours where SPEC says that the official choice leaks or is a setting.
PUBLISHED = {
    "clip": "openai/clip-vit-large-patch14-336",
    "image_size": 240,
    "levels": (6, 12, 18, 24),
    "templates": ("a photo of a normal <|class|>.", "a photo of a abnormal <|class|>."),
    "prompt_len": 2,
    "learnable_tokens": 1,
    "prompt_depth": None,
    "use_global": True,
    "iqm_layers": 4,
    "iqm_heads": 8,
    "iqm_width": 3072,
    "start": "random",
    "fusion_weight": 0.8,
    "score": "official",
    "sigma": 8.0,
    "activation": "gelu",
    "normalisation": "none",
    "dtype": "float32",
}
TRAINING = {"epochs": 50, "steps": None, "batch_size": 16, "learning_rate": 1e-4, "temperature_learning_rate": 0.01}
TRAINING |= {"dropout": 0.0, "dropout_epochs": 1, "keep": "last", "feature_dtype": "float32"}


@pytest.mark.parametrize("name", sorted(REAL))
def test_real_recipes_are_the_published_setting(name):
    recipe = config.load(name)
    model, train = dataclasses.asdict(recipe.model), dataclasses.asdict(recipe.train)
    assert {field: model[field] for field in PUBLISHED} == PUBLISHED
    assert {field: train[field] for field in TRAINING} == TRAINING
    assert recipe.data.dataset == name.split("_")[0]
    assert recipe.data.shots == (4 if name.endswith("fewshot") else 0)
    assert recipe.data.sources == ("brain", "liver", "resc", "oct17", "chest", "his")


def test_overrides_are_typed():
    found = parse(
        *(
            "--config",
            "brain_fewshot",
            "--train.steps",
            "100",
            "--model.levels",
            "1",
            "2",
            "--model.use-global",
            "False",
        ),
        *("--data.support-list", "lists/4-shot.txt", "--model.templates", "good", "bad"),
    )
    assert found.train.steps == 100
    assert found.model.levels == (1, 2)
    assert found.model.use_global is False
    assert found.data.support_list == Path("lists/4-shot.txt")
    assert found.model.templates == ("good", "bad")
    assert config.from_json(config.to_json(found)) == found
    assert parse("--config=brain_fewshot") == config.load("brain_fewshot")


def test_the_run_directory_tells_set_shots_and_seed():
    assert parse("--config", "brain_fewshot", "--train.seed", "3").directory == Path(
        "runs/brain_fewshot/brain-k4-seed3"
    )
    assert parse("--config", "brain_fewshot", "--run-dir", "x").directory == Path("x")


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--config NAME" in text
    for section in (config.ModelConfig, config.DataConfig, config.TrainConfig, config.EvalConfig):
        prefix = section.__name__.removesuffix("Config").lower()
        for field in dataclasses.fields(section):
            assert f"--{prefix}.{field.name.replace('_', '-')}" in text
    assert "Share of the query maps in the segmentation" in " ".join(text.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--config NAME is required, one of: brain_fewshot"),
        (("--config", "brian_fewshot"), "there is no such recipe in configs/; there are brain_fewshot"),
        (("--config", "brain_fewshot", "--model.sigma", "-1"), "model.sigma is -1.0; it must be 0 or more"),
        (("--config", "brain_fewshot", "--train.batch-size", "0"), "train.batch_size is 0; it must be above 0"),
        (("--config", "brain_fewshot", "--eval.batch-size", "0"), "eval.batch_size is 0; it must be above 0"),
        (("--config", "brain_fewshot", "--train.learning-rate", "nan"), "train.learning_rate is nan"),
        (("--config", "brain_fewshot", "--model.sigma", "inf"), "model.sigma is inf; it must be 0 or more, and finite"),
        (
            ("--config", "brain_fewshot", "--train.learning-rate", "inf"),
            "learning_rate is inf; it must be above 0",
        ),
        (("--config", "brain_fewshot", "--train.seed", "4294967296"), "train.seed is 4294967296; seeds must be below"),
        (("--config", "brain_fewshot", "--model.levels", "3", "3"), "must list different blocks"),
        (("--config", "brain_fewshot", "--train.dropout", "1"), "must be in \\[0, 1\\)"),
        (("--config", "brain_fewshot", "--model.fusion-weight", "1.5"), "must be in \\[0, 1\\]"),
        (("--config", "brain_zeroshot", "--data.support-list", "a.txt"), "data.shots is 0"),
    ],
)
def test_a_wrong_value_gets_one_line(arguments, message):
    with pytest.raises(SystemExit, match=message) as stop:
        parse(*arguments)
    assert str(stop.value).startswith("train.py: ")
    assert "\n" not in str(stop.value)


ABOVE_0 = ["model.image_size", "model.prompt_len", "model.prompt_depth", "model.iqm_layers", "model.iqm_heads"]
ABOVE_0 += ["model.iqm_width", "train.epochs", "train.steps", "train.batch_size", "train.learning_rate"]
ABOVE_0 += ["train.eval_every", "train.checkpoint_every", "train.accumulate", "eval.batch_size", "eval.seeds"]
ABOVE_0 += ["mesh.fsdp", "mesh.tensor", "mesh.data"]
FROM_0 = ["model.learnable_tokens", "model.sigma", "data.shots", "data.workers", "data.support_row", "train.seed"]
FROM_0 += ["train.temperature_learning_rate", "train.feature_memory_gb", "train.feature_disk_gb", "train.dropout"]
FROM_0 += ["train.dropout_epochs", "eval.heatmaps", "model.fusion_weight"]


@pytest.mark.parametrize(("name", "value"), [*((n, 0) for n in ABOVE_0), *((n, -1) for n in FROM_0)])
def test_no_number_may_be_too_small(name, value):
    section, field = name.split(".")
    recipe = config.load("brain_fewshot")
    changed = dataclasses.replace(getattr(recipe, section), **{field: value})
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        config.check(dataclasses.replace(recipe, **{section: changed}))


def test_parts_of_a_batch_are_equal():
    with pytest.raises(SystemExit, match=r"train\.accumulate is 3; it must divide train.batch_size 16"):
        parse("--config", "brain_fewshot", "--train.accumulate", "3")


@pytest.mark.parametrize("arguments", [("--train.stepz", "1"), ("--train.steps", "many"), ("--train.keep", "best")])
def test_unknown_fields_and_types_are_named(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--config", "brain_fewshot", *arguments)
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert arguments[0].removeprefix("--") in shown.out + shown.err


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("normalisation", "CLIP", "model.normalisation is 'CLIP'; it must be one of none, clip"),
        ("use_global", 1, "model.use_global is 1; it must be one of True, False"),
        ("sigma", -1.0, "model.sigma is -1.0; it must be 0 or more"),
    ],
)
def test_a_config_file_with_a_value_that_cannot_work_is_refused(tmp_path, field, value, message):
    recipe = config.load("brain_fewshot")
    path = tmp_path / "config.json"
    path.write_text(config.to_json(recipe))
    assert config.read(path) == recipe
    path.write_text(
        config.to_json(dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, **{field: value})))
    )
    with pytest.raises(ValueError, match=rf"config\.json cannot be read \({message}"):
        config.read(path)


def test_a_config_file_with_an_unknown_field_is_refused():
    with pytest.raises(ValueError, match=r"unknown config field train\.speed"):
        config.from_json('{"name": "x", "train": {"speed": 3}}')


def test_tracebacks_are_for_those_who_ask(monkeypatch):
    with pytest.raises(SystemExit, match=r"train\.py: no weights"), cli.user_errors("train.py"):
        raise FileNotFoundError("no weights")
    with pytest.raises(SystemExit, match=r"train\.py: the loss is nan"), cli.user_errors("train.py"):
        raise FloatingPointError("the loss is nan")
    with pytest.raises(SystemExit, match="the same command goes on"), cli.user_errors("train.py"):
        raise KeyboardInterrupt
    monkeypatch.setenv("IQE_JAX_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError), cli.user_errors("train.py"):
        raise FileNotFoundError("no weights")


@pytest.mark.parametrize(
    ("place", "fault", "said"),
    [
        ("cache/tfds", errno.EROFS, True),
        ("cache", errno.ENOSPC, True),
        ("cached", errno.EROFS, False),
        (None, errno.EROFS, False),
        ("cache/tfds", errno.ENOENT, False),
    ],
)
def test_the_cache_may_lie_elsewhere(monkeypatch, tmp_path, place, fault, said):
    monkeypatch.setenv("IQE_JAX_CACHE", str(tmp_path / "cache"))
    error = OSError(fault, "it is so", place and str(tmp_path / place))
    with pytest.raises(SystemExit, match="it is so") as raised, cli.user_errors("train.py"):
        raise error
    assert ("set $IQE_JAX_CACHE to a folder" in str(raised.value)) == said

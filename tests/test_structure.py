"""The shape of the project, held: imports point one way, models make no mesh, data no parameters, files stay small."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("iqe_jax", "convert", "configs")
    for path in (ROOT / folder).rglob("*.py")
}
# Lower may not import higher.
LAYERS = [
    ["iqe_jax.cache", "iqe_jax.config", "iqe_jax.cpu", "iqe_jax.progress"],
    ["iqe_jax.models"],
    ["iqe_jax.data"],
    ["iqe_jax.losses", "iqe_jax.metrics", "iqe_jax.pixel_metrics", "iqe_jax.optim"],
    ["convert"],
    ["iqe_jax.processes", "iqe_jax.sharding"],
    ["iqe_jax.weights"],
    ["iqe_jax.train_state", "iqe_jax.feature_files"],
    ["iqe_jax.features", "iqe_jax.checkpoint", "iqe_jax.evaluator"],
    ["iqe_jax.training_data", "iqe_jax.detector", "iqe_jax.saved_maps", "iqe_jax.ledger", "iqe_jax.calibration"],
    ["iqe_jax.report", "iqe_jax.report_page", "iqe_jax.report_figures"],
    ["iqe_jax.scan_maps"],
    ["iqe_jax.footprint"],
    ["iqe_jax.chips"],
    ["iqe_jax.scaling"],
    ["iqe_jax.trainer"],
    ["iqe_jax.experiment"],
    ["iqe_jax.evaluation"],
    ["iqe_jax.reproduce_tables"],
    [
        "iqe_jax.reproduce",
        "iqe_jax.compare",
        "iqe_jax.prediction",
        "iqe_jax.export",
        "iqe_jax.export_loader",
        "iqe_jax.batching",
        "iqe_jax.service",
        "iqe_jax.web",
        "iqe_jax.serve",
    ],
]
# The scripts that made the phantoms' CLIP, which train towers and write weights as any user of the library would.
SCRIPTS = {"iqe_jax.data.phantoms.train_clip"}


def imports(path):
    """Absolute names of all modules that a file imports, at the top or inside functions."""
    package = ".".join(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parts, base]).rstrip(".")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def layer(name):
    found = [i for i, names in enumerate(LAYERS) if any(name == n or name.startswith(f"{n}.") for n in names)]
    return found[0] if found else None


def test_every_module_has_a_layer():
    named = {name for name in MODULES if layer(name) is not None}
    assert set(MODULES) - named == {"iqe_jax", "iqe_jax.cli"} | {n for n in MODULES if n.split(".")[0] == "configs"}


@pytest.mark.parametrize("name", sorted(set(MODULES) - SCRIPTS))
def test_imports_point_one_way(name):
    own = layer(name)
    if own is not None:
        above = [other for other in imports(MODULES[name]) if (place := layer(other)) is not None and place > own]
        assert not above


def importers(package):
    return {n for n, p in MODULES.items() if any(i == package or i.startswith(f"{package}.") for i in imports(p))}


def test_only_the_loading_and_saving_of_weights_imports_convert():
    outside = {name for name in importers("convert") if name.split(".")[0] != "convert"}
    assert outside == {"iqe_jax.weights"} | SCRIPTS


def test_only_convert_imports_torch():
    assert {name.split(".")[0] for name in importers("torch")} == {"convert"}


def test_data_sees_no_parameters_and_models_no_files():
    models = {n for package in ("iqe_jax.models", "flax", "jax", "optax") for n in importers(package)}
    assert {name for name in models - SCRIPTS if name.startswith("iqe_jax.data")} == set()
    files = {n for package in ("pathlib", "os", "PIL", "tensorflow_datasets", "grain") for n in importers(package)}
    assert {name for name in files if name.startswith("iqe_jax.models")} == set()


@pytest.mark.parametrize(
    "path", [*MODULES.values(), ROOT / "train.py", ROOT / "evaluate.py", ROOT / "predict.py"], ids=str
)
def test_files_are_short_and_say_what_they_are_for(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 350
    assert ast.get_docstring(ast.parse(text))

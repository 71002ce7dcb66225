"""A trained run as a folder that needs only jax to run: `python -m iqe_jax.export RUN --out model`.

  program.jax_export   the model as StableHLO for CPU, CUDA and TPU, any batch size; `jax.export` reads it
  weights.safetensors  its weights, which the program takes as arguments
  model.json           how to prepare images, what the score is, how the weights were chosen, versions, checksums
  loader.py            what runs it; vendor/ has what jax needs to read the program
  README.md            a model card

The folder is checked against the Detector before it takes its place.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import shutil
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from jax import export

from iqe_jax import calibration, cli, report
from iqe_jax.checkpoint import read_facts
from iqe_jax.config import Config, read
from iqe_jax.data.phantoms import MARK
from iqe_jax.detector import Detector, load
from iqe_jax.models.clip import Templates
from iqe_jax.models.iqe_clip import IqeClip, Params
from iqe_jax.progress import console
from iqe_jax.weights import chosen_on

PROGRAM = "iqe_jax.export"
FORMAT = "iqe-jax export 1"  # first field of model.json, by which a folder is known as ours
PLATFORMS = ("cpu", "cuda", "tpu")
# The largest difference from the Detector, by compute type: the compiler may round intermediates of bfloat16 elsewhere.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
SCORES = {
    "few": "mean over the pixels of the text maps' mean plus the query maps' mean, in [0, 2]",
    "zero": "sum over levels and both branches of the mean over the patches, in [0, {twice_the_levels}]",
    "mean": "mean of the anomaly map, in [0, 1]",
    "max": "maximum of the anomaly map, in [0, 1]",
    "top": "mean of the highest hundredth of the anomaly map, in [0, 1]",
}


@dataclass(frozen=True)
class Options:
    """What to export and where to."""

    run: Annotated[Path, tyro.conf.Positional]
    """Directory of a finished run of train.py or evaluate.py."""
    out: Path = Path("model")
    """Folder to write. One that is there is replaced if it is empty or an earlier export, else refused."""


def export_run(run: Path, out: Path) -> dict[str, Any]:
    """Write the run's model into `out`, whole or not at all, and return what model.json says.

    Raises FileNotFoundError when there is no finished run, ValueError when `out` holds something else or when the
    export does not give what the Detector gives.
    """
    _check_target(out)
    detector = load(run)
    config = read(run / "config.json")
    weights_chosen, calibrated = chosen(run, config), calibration.load(run)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place, so that it gets there by a rename; removed whatever happens.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary) / "new"
        folder.mkdir()
        weights = write_program(detector, folder)
        shutil.copy(Path(__file__).with_name("export_loader.py"), folder / "loader.py")
        _vendor_flatbuffers(folder / "vendor")
        about = describe(config, detector, weights_chosen, calibrated)
        about |= {"parameters": sum(x.size for x in weights.values()), "files": _checksums(folder)}
        (folder / "model.json").write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(model_card(about), encoding="utf-8")
        _verify(detector, folder)
        if out.exists():
            out.rename(Path(temporary) / "old")
        folder.rename(out)
    return about


def _check_target(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    try:
        ours = json.loads((out / "model.json").read_text(encoding="utf-8"))["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours and any(out.iterdir()):
        raise ValueError(f"--out {out} holds files that are no export; name a new or empty folder")


def chosen(run: Path, config: Config) -> dict[str, Any]:
    """How the run's weights were chosen, in words too. Raises ValueError when training is not over."""
    kept = read_facts(run) or {"rule": "given"}
    if kept["rule"] == "given" and config.model.adapter and chosen_on(config.model.adapter):
        kept["chosen_on_test_data"] = True
    if kept["rule"] != "given" and kept.get("finished_at") is None:
        raise ValueError(f"training in {run} has not come to its end; give its command again, then export")
    # The names of support images stay behind: they may be patients'.
    known = {name: kept[name] for name in ("rule", "step", "metrics") if name in kept}
    return known | {"chosen": report.chosen(kept), "chosen_on_test_data": report.on_test_data(kept)}


def write_program(detector: Detector, folder: Path) -> dict[str, np.ndarray]:
    """Write program.jax_export and weights.safetensors into `folder`; returns the weights."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    model, trees = _used_words(detector.model, detector.weights)
    leaves, structure = jax.tree.flatten_with_path(trees)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]

    def program(weights: dict[str, jax.Array], images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images (batch, S, S, 3) → scores (batch,), maps (batch, S, S)."""
        tree = jax.tree.unflatten(structure, [weights[name] for name in names])
        features = model.features(tree["frozen"], images)
        outputs = model.predict(model.head(tree["trainable"], tree["frozen"], features))
        return model.image_score(outputs, zero_shot=detector.zero_shot), outputs["segmentation"]

    weights = {name: np.asarray(x, np.float32, order="C") for name, (_, x) in zip(names, leaves, strict=True)}
    size = model.config.image_size
    images = jax.ShapeDtypeStruct((*export.symbolic_shape("batch"), size, size, 3), np.float32)
    exported = export.export(jax.jit(program), platforms=PLATFORMS)(weights, images)
    (folder / "program.jax_export").write_bytes(exported.serialize())
    try:
        save_file(weights, folder / "weights.safetensors")
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(f"{folder / 'weights.safetensors'} cannot be written: {error}") from error
    (folder / "weights.safetensors").chmod((folder / "program.jax_export").stat().st_mode)  # safetensors hides them
    return weights


def _used_words(model: IqeClip, weights: dict[str, Params]) -> tuple[IqeClip, dict[str, Params]]:
    """The model with a token table of only the words of its templates: 150 MB less at full size, the same result."""
    ids, places = np.unique(np.concatenate([np.array(row) for row in model.templates.ids]), return_inverse=True)
    ends = np.cumsum([len(row) for row in model.templates.ids])[:-1]
    rows = tuple(tuple(row.tolist()) for row in np.split(places, ends))
    frozen = dict(weights["frozen"])
    frozen["text"] = {**frozen["text"], "token_embedding": frozen["text"]["token_embedding"][ids]}
    clip = replace(model.clip, vocab_size=len(ids))
    return replace(model, clip=clip, templates=Templates(rows, -1)), {**weights, "frozen": frozen}


def describe(
    config: Config, detector: Detector, kept: dict[str, Any], calibrated: calibration.Calibration | None
) -> dict[str, Any]:
    """What model.json says, but for the files. No path of this machine and no name of an image is in it."""
    model = detector.model.config
    kind = model.score if model.score != "official" else ("zero" if detector.zero_shot else "few")
    own = config.data.dataset
    trained_on = [name for name in config.data.sources if name != own] if config.zero_shot else [own]
    on_phantoms = config.data.phantoms or (config.data.root / MARK).exists()
    return {
        "format": FORMAT,
        "recipe": config.name,
        "dataset": own,
        "trained_on": trained_on,
        "note": report.PHANTOMS if on_phantoms else None,
        "protocol": "zero-shot" if config.zero_shot else f"few-shot, k = {config.data.shots}",
        "weights": kept,
        "image_size": model.image_size,
        "images": {
            "shape": ["batch", model.image_size, model.image_size, 3],
            "dtype": "float32",
            "range": [0, 1],
            "channels": "RGB; grey images three times the same",
            "resize": "in 8 bits to S×S with Pillow's BICUBIC filter, which antialiases; the aspect ratio is not kept",
        },
        "score": {
            "kind": "official " + kind + "-shot" if model.score == "official" else kind,
            "definition": SCORES[kind].format(twice_the_levels=2 * len(model.levels)),
            "higher_is": "more anomalous",
        },
        "anomaly_map": f"(batch, {model.image_size}, {model.image_size}) in [0, 1], higher where more anomalous",
        "calibration": None if calibrated is None else _rule(calibrated),
        "clip": Path(model.clip).name if Path(model.clip).exists() else model.clip,
        "compute_type": model.dtype,
        "platforms": list(PLATFORMS),
        "versions": {"iqe_jax": _version(), "jax": jax.__version__, "python": platform.python_version()},
    }


def _rule(calibrated: calibration.Calibration) -> dict[str, Any]:
    """What turns a score into a probability and a decision, without the scores it was fitted on."""
    kept = ("target", "threshold", "achieved", "curve", "prevalence", "withheld")
    return {name: getattr(calibrated, name) for name in kept}


def _version() -> str:
    try:
        return importlib.metadata.version("iqe-jax")
    except importlib.metadata.PackageNotFoundError:
        return "run from its sources"


def _vendor_flatbuffers(folder: Path) -> None:
    """Copy FlatBuffers' Python runtime (Apache-2.0, its notices in each file): jax.export needs it, jax lacks it."""
    spec = importlib.util.find_spec("flatbuffers")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("jax.export needs the package flatbuffers: pip install flatbuffers")
    source = Path(spec.submodule_search_locations[0])
    shutil.copytree(source, folder / "flatbuffers", ignore=shutil.ignore_patterns("__pycache__", "flexbuffers.py"))


def _checksums(folder: Path) -> dict[str, Any]:
    found = {}
    for name in ("program.jax_export", "weights.safetensors"):
        with (folder / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found[name] = {"sha256": digest, "bytes": (folder / name).stat().st_size}
    return found


def _verify(detector: Detector, folder: Path) -> None:
    """Run what was written, through its own loader, and compare. Raises ValueError when it differs."""
    spec = importlib.util.spec_from_file_location("iqe_jax_exported_loader", folder / "loader.py")
    assert spec is not None and spec.loader is not None
    loader = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(loader)
    sys.path[:] = path
    size = detector.model.config.image_size
    images = np.random.default_rng(0).random((2, size, size, 3), np.float32)
    expected = [detector(image) for image in images]
    scores, maps = loader.load(folder)(images)
    worst = max(
        np.abs(scores - [e.score for e in expected]).max(), np.abs(maps - [e.anomaly_map for e in expected]).max()
    )
    limit = TOLERANCE[detector.model.config.dtype]
    if not worst <= limit:
        raise ValueError(f"the exported program differs from the Detector by {worst:.2g}, more than {limit:g}")
    console.print(f"Checked against the Detector on two images of noise: largest difference {worst:.1g}")


def model_card(about: dict[str, Any]) -> str:
    """The README of the folder, from what model.json says."""
    import jinja2

    template = (Path(__file__).parent / "templates" / "model_card.md").read_text(encoding="utf-8")
    return jinja2.Template(template, undefined=jinja2.StrictUndefined, keep_trailing_newline=True).render(about)


def main(argv: list[str]) -> None:
    """Export the run that `argv` names."""
    options = tyro.cli(Options, args=argv, prog=PROGRAM, description=__doc__)
    with cli.started(cli.Launch(), PROGRAM):
        about = export_run(options.run, options.out)
        size = sum(file["bytes"] for file in about["files"].values()) / 1e6
        console.print(f"Written to {options.out}, {size:.0f} MB; {options.out / 'README.md'} says how to run it")
        if about["weights"]["chosen_on_test_data"]:
            console.print(f"Mind: {about['weights']['chosen']}; model.json and README.md say so")


if __name__ == "__main__":
    main(sys.argv[1:])

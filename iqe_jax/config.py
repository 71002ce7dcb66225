"""Every setting there is: frozen dataclasses with their help texts, and recipes loaded by name.

A recipe is a file `configs/NAME.py` with a function `config() -> Config`. The command line is read in cli.py;
nothing here reads data, weights or devices.
"""

import dataclasses
import importlib
import json
import math
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")
MeshAxis = Literal["data", "fsdp", "tensor"]
Rule = Literal["last", "valid", "paper"]


@dataclass(frozen=True)
class ModelConfig:
    """The method. Defaults are the published full-size model on ViT-L/14-336."""

    clip: str = "openai/clip-vit-large-patch14-336"
    """CLIP's weights: a Hugging Face directory or hub id, OpenAI's .pt archive, a state dict, or an open_clip file."""
    tokenizer: str | None = None
    """Directory or hub id of a tokenizer, for weights that carry none and templates other than the default two."""
    adapter: str | None = None
    """Trained weights, an official .pth or our .safetensors: training starts from them, and evaluation scores them
    where the run has trained nothing."""
    image_size: int = 240
    """Side S in pixels that images are resized to; need not be a multiple of the patch."""
    levels: tuple[int, ...] = (6, 12, 18, 24)
    """Vision blocks, counted from 1, whose outputs are the feature levels."""
    templates: tuple[str, str] = ("a photo of a normal <|class|>.", "a photo of a abnormal <|class|>.")
    """Prompt templates, normal then anomalous; the class tokens stand at the end of each."""
    prompt_len: int = 2
    """Class-based prompt tokens P."""
    learnable_tokens: int = 1
    """Learnable text tokens N per layer."""
    prompt_depth: int | None = None
    """Text layers, from the first, that get learnable tokens of their own; none given: all of them."""
    use_global: bool = True
    """Let the image's embedding enter the class and query tokens."""
    iqm_layers: int = 4
    """Layers of the instance-aware query module."""
    iqm_heads: int = 8
    """Attention heads of the instance-aware query module."""
    iqm_width: int = 3072
    """MLP width of the instance-aware query module."""
    start: Literal["random", "clip"] = "random"
    """Initial weights: drawn, or such that the text branch begins as CLIP's own comparison of patches and templates."""
    fusion_weight: float = 0.8
    """Share of the query maps in the segmentation; the text maps have the rest."""
    score: Literal["official", "mean", "max", "top"] = "official"
    """Image score: the official one, which averages over the image and so misses small lesions; the segmentation's
    mean; its maximum; or the mean of its highest hundredth."""
    sigma: float = 8.0
    """Standard deviation in pixels of the Gaussian blur on the segmentation; 0 turns it off."""
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    """Activation of CLIP's MLPs: gelu as in the published numbers, quick_gelu as OpenAI's weights were trained."""
    normalisation: Literal["none", "clip"] = "none"
    """Pixel normalisation: none as in the published numbers, or CLIP's mean and standard deviation."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type. Parameters, norms, softmaxes and maps are float32 under either."""


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and how many are shown."""

    root: Path = Path("data")
    """Folder that holds the data sets' folders (Brain_AD, Liver_AD, …); see docs/data.md."""
    dataset: str = "brain"
    """Target set: brain, liver, resc, oct17, chest, his, or the name of a folder of the same shape under `root`."""
    sources: tuple[str, ...] = ("brain", "liver", "resc", "oct17", "chest", "his")
    """Zero-shot: sets whose test splits are trained on; the target is left out of them by itself."""
    shots: int = 4
    """Few-shot: k, the number of normal and of anomalous support images. 0 is zero-shot."""
    support_list: Path | None = None
    """Few-shot: an official k-shot.txt list of support images, in place of a draw from `train.seed`."""
    support_row: int = 0
    """Few-shot: which draw of `support_list`: 0 reads its lines n-0 and a-0."""
    phantoms: bool = False
    """Render the phantom sets under `root` where they are missing. Never on for real data."""
    workers: int = 2
    """Batches of images decoded at a time, ahead of their use."""
    processes: bool = False
    """Decode in worker processes, not threads: worth it with many cores and large images."""


@dataclass(frozen=True)
class TrainConfig:
    """How the adapter is trained."""

    epochs: int = 50
    """Passes over the training images."""
    steps: int | None = None
    """Optimiser steps, in place of `epochs`."""
    batch_size: int = 16
    """Images per step."""
    learning_rate: float = 1e-4
    """Adam's learning rate."""
    temperature_learning_rate: float = 0.01
    """Adam's learning rate of `prompt_temp` alone."""
    dropout: float = 0.0
    """Dropout of the query module in the first `dropout_epochs`; the official few-shot runs had 0.1 for one epoch."""
    dropout_epochs: int = 1
    """Epochs that `dropout` is on."""
    seed: int = 0
    """Seed of the support draw, the initial weights, the order of batches and dropout."""
    keep: Rule = "last"
    """Weights kept: those of the last step, the best on the held-out part of the target's valid pool, or, as the
    official code does and marked wherever shown, the best on the test set."""
    eval_every: int = 1
    """Epochs between two evaluations when weights are chosen by valid or paper."""
    checkpoint_every: int = 5
    """Epochs between two checkpoints that a stopped run resumes from; the last step is always saved."""
    features: Literal["auto", "memory", "disk"] = "auto"
    """Where frozen features are kept for training. Zero-shot: auto takes memory while they fit in `feature_memory_gb`,
    else disk. Few-shot: in memory, and by auto and disk in $IQE_JAX_CACHE too, for the next run on the same images;
    those of the images that `keep` chooses weights by are kept as zero-shot's are."""
    feature_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the kept features; bfloat16 halves their size. A model that computes in bfloat16 keeps them so."""
    feature_memory_gb: float = 8.0
    """Largest size in GB of features of whole splits, zero-shot's and those that weights are chosen by, kept in memory
    under `features` auto."""
    feature_disk_gb: float = 10.0
    """Largest size in GB of few-shot's features kept for later runs; those that were read longest ago make room."""
    accumulate: int = 1
    """Micro-batches that a step takes its batch in, one after the other (gradient accumulation): less memory, same step
    up to rounding, and with dropout other masks."""
    remat: bool = False
    """Compute activations again in the backward pass and do not hold them (rematerialisation): less memory, more work,
    same step."""

    @property
    def rates(self) -> tuple[float, float]:
        """Adam's learning rates, of all and of `prompt_temp`."""
        return self.learning_rate, self.temperature_learning_rate


@dataclass(frozen=True)
class EvalConfig:
    """How the test set is scored."""

    batch_size: int | None = None
    """Images, on all devices together, that the image tower and the scoring take at once; changes speed, never results.
    None given: as many as the memory of a GPU or TPU suggests, and 16 on CPUs."""
    protocols: tuple[Rule, ...] = ()
    """Rules of keeping weights to show side by side with `train.keep`, each by the weights it keeps; the run has to be
    trained with them. paper is marked wherever shown."""
    seeds: int = 1
    """Runs to make, with seeds and support draws from `train.seed` on, each in a directory of its own; then a summary
    with means and intervals is written."""
    heatmaps: int = 8
    """Heat maps written as pictures, half of normal and half of anomalous images; 0 writes none."""
    report: bool | None = None
    """Write report.html, a page that opens offline, with curves and a gallery of the most wrong images; none given:
    for phantoms only. evaluate.py takes `--report` and `--no-report` for short."""
    save_maps: Literal["none", "png16", "npz"] = "none"
    """Write all segmentations into maps/: as 16-bit PNG (65535 is 1), or NumPy archives. `--save-maps` is
    short for it in evaluate.py."""


@dataclass(frozen=True)
class RuleConfig:
    """The one table of sharding: by which axes of the mesh each logical axis is split, one after the other."""

    batch: tuple[MeshAxis, ...] = ("data", "fsdp")
    """Images, in every array that has them, activations too."""
    embed: tuple[MeshAxis, ...] = ("fsdp",)
    """Width of the residual streams, in parameters only."""
    heads: tuple[MeshAxis, ...] = ("tensor",)
    """Attention heads, in parameters; activations follow them."""
    head_dim: tuple[MeshAxis, ...] = ()
    """Width of one attention head."""
    mlp: tuple[MeshAxis, ...] = ("tensor",)
    """Width of the MLPs' middle, in parameters; activations follow them."""
    vocab: tuple[MeshAxis, ...] = ()
    """Rows of the token table."""


@dataclass(frozen=True)
class MeshConfig:
    """How many devices each axis of the mesh has; one device, eight or a pod run the same code."""

    data: int = -1
    """Devices that split the batch and hold all parameters; -1 takes what the other two leave."""
    fsdp: int = 1
    """Devices that split the batch and the parameters too."""
    tensor: int = 1
    """Devices that split heads and MLPs; must divide the number of heads in every tower."""
    rules: RuleConfig = field(default_factory=RuleConfig)


@dataclass(frozen=True)
class Config:
    """One experiment."""

    name: str = "custom"
    """Name of the recipe; names the run directory too."""
    run_dir: Path | None = None
    """Directory of checkpoints, logs and results, where a stopped run resumes. Default: runs/NAME/SET-kK-seedS."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    @property
    def directory(self) -> Path:
        """The run directory."""
        data = self.data
        return self.run_dir or Path("runs") / self.name / f"{data.dataset}-k{data.shots}-seed{self.train.seed}"

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Rules by which weights are kept and shown, the run's own first."""
        return tuple(dict.fromkeys((self.train.keep, *self.eval.protocols)))

    @property
    def zero_shot(self) -> bool:
        """Whether the target set contributes no training image."""
        return self.data.shots == 0


def names() -> list[str]:
    """The recipes in `configs/`, sorted."""
    import configs

    return sorted(module.name for module in pkgutil.iter_modules(configs.__path__) if not module.name.startswith("_"))


def load(name: str) -> Config:
    """The recipe `name`, with `name` written into it. Raises ValueError, listing the recipes, when there is none."""
    if name not in names():
        raise ValueError(f"--config {name}: there is no such recipe in configs/; there are {', '.join(names())}")
    recipe: Callable[[], Config] = importlib.import_module(f"configs.{name}").config
    return dataclasses.replace(recipe(), name=name)


def check(config: Config) -> None:
    """Raise ValueError naming the first field whose value cannot work, whatever the data and weights are."""
    model, train, data = config.model, config.train, config.data
    for section in ("model", "data", "train", "eval"):
        _check_choices(getattr(config, section), f"{section}.")
    positive = {
        "model.image_size": model.image_size,
        "model.prompt_len": model.prompt_len,
        "model.iqm_layers": model.iqm_layers,
        "model.iqm_heads": model.iqm_heads,
        "model.iqm_width": model.iqm_width,
        "train.epochs": train.epochs,
        "train.batch_size": train.batch_size,
        "train.learning_rate": train.learning_rate,
        "train.eval_every": train.eval_every,
        "train.checkpoint_every": train.checkpoint_every,
        "train.accumulate": train.accumulate,
        "mesh.fsdp": config.mesh.fsdp,
        "mesh.tensor": config.mesh.tensor,
        "eval.seeds": config.eval.seeds,
    }
    optional = {"train.steps": train.steps, "eval.batch_size": config.eval.batch_size}
    optional["model.prompt_depth"] = model.prompt_depth
    positive |= {name: value for name, value in optional.items() if value is not None}
    not_negative = {
        "model.learnable_tokens": model.learnable_tokens,
        "model.sigma": model.sigma,
        "data.shots": data.shots,
        "data.workers": data.workers,
        "data.support_row": data.support_row,
        "train.temperature_learning_rate": train.temperature_learning_rate,
        "train.feature_memory_gb": train.feature_memory_gb,
        "train.feature_disk_gb": train.feature_disk_gb,
        "train.dropout_epochs": train.dropout_epochs,
        "train.seed": train.seed,
        "eval.heatmaps": config.eval.heatmaps,
    }
    for name, value in positive.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; it must be above 0, and finite")
    for name, value in not_negative.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}; it must be 0 or more, and finite")
    if train.seed + config.eval.seeds > 2**32:
        raise ValueError(f"train.seed is {train.seed}; seeds must be below 2**32")
    if config.mesh.data < 1 and config.mesh.data != -1:
        raise ValueError(f"mesh.data is {config.mesh.data}; it must be above 0, or -1 for all devices left")
    if train.batch_size % train.accumulate:
        raise ValueError(f"train.accumulate is {train.accumulate}; it must divide train.batch_size {train.batch_size}")
    if not 0 <= train.dropout < 1:
        raise ValueError(f"train.dropout is {train.dropout}; it must be in [0, 1)")
    if not 0 <= model.fusion_weight <= 1:
        raise ValueError(f"model.fusion_weight is {model.fusion_weight}; it must be in [0, 1]")
    if not model.levels or len(set(model.levels)) < len(model.levels) or min(model.levels) < 1:
        raise ValueError(f"model.levels is {model.levels}; it must list different blocks, counted from 1")
    if config.zero_shot and data.support_list:
        raise ValueError("data.support_list is for few-shot runs, but data.shots is 0")


def _check_choices(section: Any, prefix: str) -> None:
    """Raise ValueError naming a field of which there are but a few values, and which has another."""
    for name, hint in get_type_hints(type(section)).items():
        value = getattr(section, name)
        choices = (True, False) if hint is bool else get_args(hint) if get_origin(hint) is Literal else ()
        if choices and not any(value is choice or (value == choice and isinstance(value, str)) for choice in choices):
            raise ValueError(f"{prefix}{name} is {value!r}; it must be one of {', '.join(map(str, choices))}")


def to_json(config: Config) -> str:
    """The whole config as indented JSON, readable back by `from_json`."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n"


def from_json(text: str) -> Config:
    """The config that `to_json` wrote. Raises ValueError naming an unknown field."""
    return _build(Config, json.loads(text), "")


def read(path: Path) -> Config:
    """The config.json of a run. Raises ValueError naming the file where it is damaged or of another version."""
    try:
        config = from_json(path.read_text())
        check(config)
        return config
    except (ValueError, TypeError, KeyError, AttributeError) as fault:
        raise ValueError(
            f"{path} cannot be read ({fault}): bring it back, or remove {path.parent} and begin again"
        ) from fault


def _build(cls: type[T], values: dict[str, Any], prefix: str) -> T:
    fields = {f.name: f for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    if unknown := set(values) - set(fields):
        raise ValueError(f"unknown config field {prefix}{sorted(unknown)[0]}")
    sections = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig, "eval": EvalConfig}
    sections |= {"mesh": MeshConfig, "rules": RuleConfig}
    arguments = {}
    for name, value in values.items():
        if isinstance(value, dict):
            value = _build(sections[name], value, f"{name}.")
        elif isinstance(value, list):
            value = tuple(value)
        elif value is not None and "Path" in str(fields[name].type):
            value = Path(value)
        arguments[name] = value
    return cls(**arguments)

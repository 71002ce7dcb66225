"""CLIP weights in and out: every form they are published in → this project's tree, and back to a Hugging Face folder.

`load_clip` tells the forms apart by looking; `save_clip` writes the one form that carries sizes, weights and tokenizer
together. Names are in clip_names.py, configs in clip_config.py,
the reading of files in files.py, text in clip_tokenizer.py.

    python -m convert.clip ViT-L-14-336px.pt --out weights/clip --tokenizer openai/clip-vit-large-patch14
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from convert.clip_config import Activation, hugging_face_config, read_settings, to_clip_config
from convert.clip_names import HEAD_WIDTH, HUGGING_FACE, OPENAI
from convert.clip_tokenizer import TOKENIZER_FILES, ClipTokenizer, has_tokenizer
from convert.command import run
from convert.engine import to_ours, to_theirs
from convert.files import fetch, is_hub_id, read_tensors, write_file
from iqe_jax.models.clip import ClipConfig

# In a folder the first of these that is there is read. open_clip's come last: some hub repositories carry both.
WEIGHT_FILES = [
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
]
_HUB_FILES = ["config.json", "open_clip_config.json", *TOKENIZER_FILES]
_HUB_WEIGHTS = [  # tried in turn, so that one form is downloaded and not all
    ["model.safetensors", "model.safetensors.index.json", "model-*.safetensors"],
    ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"],
    ["open_clip_model.safetensors", "open_clip_pytorch_model.safetensors"],
    ["open_clip_pytorch_model.bin"],
]


@dataclass(frozen=True)
class LoadedClip:
    """A CLIP checkpoint: sizes, the frozen tree (float32), the tokenizer, and the activation it was trained with.

    `hidden_act` is None where the file does not say: plain state dicts and open_clip's weights without their config.
    """

    config: ClipConfig
    params: dict[str, Any]
    tokenizer: ClipTokenizer
    hidden_act: Activation | None


def load_clip(source: str | Path, tokenizer: str | Path | None = None) -> LoadedClip:
    """Load CLIP weights from a folder, a file or a Hugging Face hub id.

    Folders: Hugging Face's (`config.json` with `model.safetensors`, shards, or `pytorch_model.bin`) and open_clip's.
    Files: OpenAI's TorchScript archive `.pt`; a state dict in `.pt`, `.pth`, `.bin` or `.safetensors`, under OpenAI's,
    open_clip's or Hugging Face's names. Half precision becomes float32. Nothing is unpickled freely.

    `tokenizer` (a folder or hub id) replaces the source's own. Raises FileNotFoundError for what is not there and
    ValueError for what is no CLIP ViT these towers can run; the message lists all that is wrong.
    """
    path = _locate(source)
    weights = _weights_in(path) if path.is_dir() else path
    tensors = read_tensors(weights)
    hugging_face = _is_hugging_face(tensors, weights)
    settings = read_settings(weights, hugging_face, required=path.is_dir())
    _check_kind(tensors, weights, settings)

    params, sizes = to_ours(tensors, HUGGING_FACE if hugging_face else OPENAI, str(weights))
    config = to_clip_config(sizes, settings, weights)
    own = path if path.is_dir() and has_tokenizer(path) else None
    text = ClipTokenizer(tokenizer if tokenizer is not None else own, config.vocab_size, config.context_length)
    act = settings.get("hidden_act")
    if "input_resolution" in tensors:  # one of OpenAI's own archives, all of which were trained with QuickGELU
        act = "quick_gelu"
    return LoadedClip(config, params, text, act)


def save_clip(
    config: ClipConfig,
    params: Mapping[str, Any],
    out_dir: str | Path,
    dtype: Literal["float32", "float16"] = "float32",
    *,
    hidden_act: Activation = "quick_gelu",
    tokenizer: str | Path | None = None,
    force: bool = False,
) -> None:
    """Write `config` and the frozen tree to `out_dir` as a Hugging Face CLIP folder, which transformers can open.

    `tokenizer` (a folder or hub id) is copied in. Every file appears whole or not at all, `config.json` last, so that a
    folder with one is complete. Raises FileExistsError where `out_dir` holds a checkpoint already and `force` is not
    set, and ValueError where the tree does not fit `config` or, as float16, does not fit its range.
    """
    out = Path(out_dir)
    held = [out / name for name in ("config.json", *WEIGHT_FILES) if (out / name).exists()]
    if held and not force:
        raise FileExistsError(f"{held[0]} exists; choose another folder, or pass force (--force) to replace it")
    tensors, sizes = to_theirs(params, HUGGING_FACE, "the tree to save")
    if (found := to_clip_config(sizes, {"image_size": config.image_size}, out)) != config:
        raise ValueError(f"the tree does not fit its configuration: expected {config}, found {found}")
    if dtype == "float16":
        with np.errstate(over="ignore"):
            tensors = {name: array.astype(np.float16) for name, array in tensors.items()}
        if large := [name for name, array in tensors.items() if not np.isfinite(array).all()]:
            raise ValueError(f"values too large for float16 in {', '.join(large[:10])}; save as float32")
    text = ClipTokenizer(tokenizer, config.vocab_size, config.context_length)
    folder, ends = text.folder(), text.ends()

    from safetensors.numpy import save_file

    out.mkdir(parents=True, exist_ok=True)
    for path in held:  # config.json first: what is being replaced stops being a checkpoint before it stops being whole
        path.unlink()
    if folder and folder.resolve() != out.resolve():
        for file in filter(Path.is_file, (folder / name for name in TOKENIZER_FILES)):
            write_file(out / file.name, partial(shutil.copyfile, file))
    # transformers asks for this entry in the header.
    write_file(out / "model.safetensors", lambda temporary: save_file(tensors, temporary, {"format": "pt"}))
    content = json.dumps(hugging_face_config(config, dtype, hidden_act, ends), indent=2) + "\n"
    write_file(out / "config.json", lambda temporary: temporary.write_text(content, encoding="utf-8"))


def _locate(source: str | Path) -> Path:
    path = Path(source)
    if path.exists():
        return path
    if not is_hub_id(source):
        raise FileNotFoundError(
            f"{source} does not exist; expected a CLIP folder, a weights file, or a hub id such as "
            "openai/clip-vit-large-patch14-336"
        )
    for weights in _HUB_WEIGHTS:
        folder = fetch(str(source), [*_HUB_FILES, *weights], "its weights")
        if any((folder / name).is_file() for name in WEIGHT_FILES):
            break
    else:
        raise FileNotFoundError(f"{source} has no CLIP weights on the hub, looked for {', '.join(WEIGHT_FILES)}")
    return folder


def _weights_in(folder: Path) -> Path:
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} has no CLIP weights, looked for {', '.join(WEIGHT_FILES)}")


def _is_hugging_face(tensors: Mapping[str, np.ndarray], weights: Path) -> bool:
    if any(name.startswith(("vision_model.", "text_model.")) for name in tensors):
        return True
    if any(name.startswith("visual.") for name in tensors):
        return False
    first = ", ".join(list(tensors)[:5]) or "none at all"
    raise ValueError(f"{weights} has no CLIP weights: expected names with visual. or vision_model., found {first}")


def _check_kind(tensors: Mapping[str, np.ndarray], weights: Path, settings: Mapping[str, Any]) -> None:
    """Relatives of the CLIP ViT that deserve a better message than a list of all their tensors."""
    if any(name.startswith(("visual.layer1.", "visual.attnpool.")) for name in tensors):
        raise ValueError(f"{weights} is a CLIP with a ResNet image tower; a ViT is needed, such as ViT-L/14-336")
    if any(name.startswith("visual.trunk.") for name in tensors):
        raise ValueError(f"{weights} is a CLIP with a timm image tower; a plain ViT is needed, such as ViT-L/14-336")
    projection = tensors.get("text_projection", tensors.get("text_projection.weight"))
    if projection is not None and projection.ndim == 2 and projection.shape[0] != projection.shape[1]:
        raise ValueError(
            f"{weights} has a text tower whose width differs from the joint embedding (text projection "
            f"{list(projection.shape)}); the method puts embeddings into the text tower as tokens: they must be equal"
        )
    # The one public CLIP whose shapes do not give away that its heads (80 wide) are not the usual ones.
    kernel = tensors.get("visual.conv1.weight")
    if kernel is not None and kernel.shape[0] == 1280 and "vision_heads" not in settings:
        raise ValueError(f"{weights} looks like a ViT-H, whose heads are 80 wide; expected heads {HEAD_WIDTH} wide")


def main(
    source: Annotated[str, tyro.conf.Positional],
    out: Path,
    tokenizer: str | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    hidden_act: Activation | None = None,
    force: bool = False,
) -> None:
    """Convert CLIP weights of any published form to a Hugging Face folder that this project and transformers open.

    Args:
        source: Weights file (OpenAI's .pt archive, a state dict, .safetensors), folder, or hub id.
        out: Folder to write.
        tokenizer: Folder or hub id whose tokenizer to put in, for sources that have none.
        dtype: Type to write; what is read is float32 or less.
        hidden_act: Activation to record; needed only where the source does not say.
        force: Replace a checkpoint that is there already.
    """
    clip = load_clip(source, tokenizer)
    act = hidden_act or clip.hidden_act
    if act is None:
        act = "quick_gelu"
        print("note: the source does not name its activation; recorded quick_gelu, which --hidden-act changes")
    save_clip(clip.config, clip.params, out, dtype, hidden_act=act, tokenizer=clip.tokenizer.source, force=force)
    text = "with" if clip.tokenizer.source else "without"
    print(f"wrote {out}, {text} a tokenizer: {clip.config}")


if __name__ == "__main__":
    run(main, "convert.clip")

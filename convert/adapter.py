"""Adapters in and out: the official IQE-CLIP `.pth` checkpoints ↔ this project's trainable tree.

The official file nests one state dict per module beside bare tensors; its names, joined by `/`, stand in the table
below its sections in the file's order. Both directions are exact, `prompt_text_projection` included, which nothing
computes with. Our own form is a `.safetensors` file whose names are the tree's paths.

    python -m convert.adapter official.pth --out adapter.safetensors --iqm-heads 8
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from convert.command import run
from convert.engine import Rule, Sizes, Table, check_ours, flatten, to_ours, to_theirs, unflatten
from convert.files import TORCH_SUFFIXES, import_torch, read_metadata, read_tensors, read_torch, to_numpy, write_file

FORMAT = "iqe_jax adapter"


def _norm(theirs: str, ours: str) -> list[Rule]:
    return [
        Rule(f"{theirs}.weight", f"{ours}/scale", "dim -> dim"),
        Rule(f"{theirs}.bias", f"{ours}/bias", "dim -> dim"),
    ]


def _linear(theirs: str, ours: str, weight: str, bias: str) -> list[Rule]:
    return [Rule(f"{theirs}.weight", f"{ours}/kernel", weight), Rule(f"{theirs}.bias", f"{ours}/bias", bias)]


def _attention(theirs: str, ours: str) -> list[Rule]:
    rules = []
    for part in ("query", "key", "value"):
        weight, bias = "(heads head_width) dim -> dim heads head_width", "(heads head_width) -> heads head_width"
        rules += _linear(f"{theirs}.attention.{part}", f"{ours}/{part}", weight, bias)
    weight = "dim (heads head_width) -> heads head_width dim"
    rules += _linear(f"{theirs}.output.dense", f"{ours}/out", weight, "dim -> dim")
    return rules + _norm(f"{theirs}.output.LayerNorm", f"{ours}/norm")


def _iqm_layer() -> list[Rule]:
    theirs, ours, rules = "iqm/encoder.layer.{layers}", "iqm/layer_{layers}", []
    for part in ("attention", "crossattention", "text_crossattention"):
        rules += _attention(f"{theirs}.{part}", f"{ours}/{part}")
    intermediate, output = "intermediate_query", "output_query"
    rules += _linear(f"{theirs}.{intermediate}.dense", f"{ours}/{intermediate}", "mlp dim -> dim mlp", "mlp -> mlp")
    rules += _linear(f"{theirs}.{output}.dense", f"{ours}/{output}", "dim mlp -> mlp dim", "dim -> dim")
    return rules + _norm(f"{theirs}.{output}.LayerNorm", f"{ours}/output_norm")


def _table(heads: int | None) -> Table:
    """The official checkpoint; its shapes do not tell how many heads the query module has, ours do (None)."""

    def derive(sizes: Sizes) -> Sizes:
        dim = sizes.get("dim")
        if heads is None:
            if dim is not None and sizes.get("heads", 1) * sizes.get("head_width", dim) != dim:
                raise ValueError(
                    f"the query module has {sizes['heads']} heads {sizes['head_width']} wide, expected {dim} in all"
                )
            return {}
        if heads < 1 or (dim is not None and dim % heads):
            raise ValueError(f"iqm_heads is {heads}, expected a divisor of the width {dim}")
        return {"heads": heads} | ({} if dim is None else {"head_width": dim // heads})

    conv = "{0} 1 3 -> 3 1 {0}", "{0} -> {0}"
    prompts = "prompts"
    return Table(
        "an IQE-CLIP adapter",
        (
            *_linear(
                "trainable_linearlayer/fc.{levels}",
                "dense",
                "(levels dim) width -> levels width dim",
                "(levels dim) -> levels dim",
            ),
            Rule("New_Lan_Embed/prompt_query", f"{prompts}/prompt_query", "1 class dim -> 1 class dim"),
            Rule("New_Lan_Embed/prompt_temp", "prompt_temp", "->"),
            *_linear("New_Lan_Embed/prompt_linear1.fc", f"{prompts}/class_conv", *(c.format("class") for c in conv)),
            *_norm("iqm/layernorm", "iqm/layernorm"),
            *_iqm_layer(),
            Rule("query_tokens", f"{prompts}/query_tokens", "1 2 dim -> 1 2 dim"),
            *_linear("query_linear/fc", f"{prompts}/query_conv", *(c.format("2") for c in conv)),
            Rule("prompt_text_projection", f"{prompts}/prompt_text_projection", "dim dim' -> dim dim'"),
            Rule("prompt_embeddings", f"{prompts}/prompt_embeddings", "1 slots dim -> 1 slots dim"),
            Rule("deep_prompt_embeddings", f"{prompts}/deep_prompt_embeddings", "deep slots dim -> deep slots dim"),
            *_linear("prompt_proj", f"{prompts}/prompt_proj", "dim' dim -> dim dim'", "dim -> dim"),
            *_norm("prompt_norm", f"{prompts}/prompt_norm"),
        ),
        derive,
    )


def load_adapter(source: str | Path, iqm_heads: int | None = None) -> dict[str, Any]:
    """Load an adapter, official (`.pth`, `.pt`, `.bin`) or ours (`.safetensors`), as the nested float32 trainable tree.

    Every size is read from the tensors, save the number of heads in the query module, which an official checkpoint
    does not show: `iqm_heads` is required for it (the published ones have 8) and, if given, checked for ours.
    Tensors may be parameters and may have been saved from a GPU; nothing is unpickled freely. Raises FileNotFoundError,
    and ValueError with all tensors that are missing, left over, misshapen or not finite.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected an adapter, .pth (official) or .safetensors (ours)")
    if path.suffix == ".safetensors":
        tree, sizes = check_ours(unflatten(read_tensors(path)), _table(None), str(path))
        kind = read_metadata(path).get("format", FORMAT)
        if kind != FORMAT:
            raise ValueError(f"{path} holds {kind!r}, expected {FORMAT!r}")
        if iqm_heads not in (None, sizes["heads"]):
            raise ValueError(f"{path} has {sizes['heads']} heads in its query module, iqm_heads says {iqm_heads}")
        return tree
    if iqm_heads is None:
        raise ValueError(
            f"{path}: an official checkpoint does not show how many heads its query module has; give iqm_heads "
            "(--iqm-heads), which is 8 for the published ones"
        )
    return to_ours(to_numpy(flatten(read_torch(path)), path), _table(iqm_heads), str(path))[0]


def read_notes(source: str | Path) -> dict[str, str]:
    """What the header of an adapter of ours says beside its format; nothing for an official one."""
    path = Path(source)
    notes = read_metadata(path) if path.suffix == ".safetensors" else {}
    return {name: text for name, text in notes.items() if name != "format"}


def _ordered(file: bytes) -> bytes:
    """A safetensors file with its notes in order, which the library leaves to chance: equal weights, equal files."""
    end = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + file[end:]


def save_adapter(
    params: Mapping[str, Any], path: str | Path, *, force: bool = False, notes: Mapping[str, str] | None = None
) -> None:
    """Write the trainable tree, official if `path` ends in `.pth` (`.pt`, `.bin`), ours if it ends in `.safetensors`.

    `notes` go into the header of ours; an official file has no place for them.

    The file appears whole or not at all. Raises FileExistsError where it exists and `force` is not set, and ValueError
    for another suffix or a tree that is no adapter.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", *TORCH_SUFFIXES):
        raise ValueError(f"{path} must end in .pth (official) or .safetensors (ours)")
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists; choose another name, or pass force (--force) to replace it")
    if path.suffix == ".safetensors":
        from safetensors.numpy import save

        tree, _ = check_ours(params, _table(None), "the adapter to save")
        arrays = {name: np.asarray(array, order="C") for name, array in flatten(tree).items()}
        found = _ordered(save(arrays, {"format": FORMAT, **(notes or {})}))
        write_file(path, lambda temporary: temporary.write_bytes(found))
    else:
        torch = import_torch(path)
        tensors, _ = to_theirs(params, _table(None), "the adapter to save")
        nested = unflatten({name: torch.from_numpy(array) for name, array in tensors.items()})
        write_file(path, lambda temporary: torch.save(nested, temporary))


def main(
    source: Annotated[Path, tyro.conf.Positional], out: Path, iqm_heads: int | None = None, force: bool = False
) -> None:
    """Convert an adapter between the official PyTorch form (.pth) and this project's (.safetensors), by suffix.

    Args:
        source: Adapter to read.
        out: File to write; its suffix says in which form.
        iqm_heads: Heads of the query module; required to read .pth, 8 for the published checkpoints.
        force: Replace the output if it exists.
    """
    params = load_adapter(source, iqm_heads)
    notes = read_notes(source)
    save_adapter(params, out, force=force, notes=notes)
    if notes and Path(out).suffix != ".safetensors":
        print(f"{out} has no place for what {source} notes: {notes}")
    levels, width, dim = params["dense"]["kernel"].shape
    heads = params["iqm"]["layer_0"]["attention"]["query"]["kernel"].shape[1]
    layers = sum(name.startswith("layer_") for name in params["iqm"])
    print(
        f"wrote {out}: {levels} levels of width {width}, embedding {dim}, query module {layers} layers, {heads} heads"
    )


if __name__ == "__main__":
    run(main, "convert.adapter")

"""For the conversion tests: small CLIP checkpoints in every published form, as real files, and what compares trees."""

import json
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import CLIPConfig, CLIPModel

from convert.clip_names import HUGGING_FACE, OPENAI
from convert.engine import flatten, to_ours, to_theirs
from tests.parity.golden import TINY, state_dicts

SIZES = {**TINY, "vision_layers": 2, "text_layers": 2, "text_heads": 2, "embed": 128}


def openai_state(sizes=SIZES) -> dict[str, np.ndarray]:
    """A CLIP under OpenAI's names."""
    return {name: np.array(array) for name, array in state_dicts(sizes)[0].items()}


def half(state):
    """The same in half precision, as OpenAI publishes it (the parameters that their code converts, and the rest)."""
    return {name: np.array(array, np.float16) for name, array in state.items()}


def torch_state(state):
    return {name: torch.from_numpy(np.array(array)) for name, array in state.items()}


@cache
def reference_model() -> CLIPModel:
    """A random CLIPModel of awkward sizes: image side no multiple of the patch, widths that differ, several heads."""
    torch.manual_seed(0)
    text = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2, "num_hidden_layers": 3}
    text |= {"vocab_size": 600, "max_position_embeddings": 20, "bos_token_id": 598, "eos_token_id": 599}
    vision = {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 3, "num_hidden_layers": 2}
    vision |= {"image_size": 52, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128)).eval()
    with torch.no_grad():  # transformers starts norms at one and biases at zero, which would hide a mix-up
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "proj" in name or "fc" in name:
                parameter.mul_(3)
    return model


class Node(torch.nn.Module):
    """A module that is nothing but its children and parameters."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def module_tree(state) -> torch.nn.Module:
    """A module whose state dict has just the given names."""
    root = Node()
    for name, tensor in torch_state(state).items():
        *parents, leaf = name.split(".")
        node = root
        for parent in parents:
            if parent not in dict(node.named_children()):
                node.add_module(parent, Node())
            node = node.get_submodule(parent)
        if tensor.is_floating_point():
            node.register_parameter(leaf, torch.nn.Parameter(tensor))
        else:
            node.register_buffer(leaf, tensor)
    return root


def write_torchscript(state, path: Path) -> None:
    """OpenAI's published form: a scripted archive in half precision with three integer buffers."""
    extra = {"input_resolution": np.array(48), "context_length": np.array(77), "vocab_size": np.array(49408)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(module_tree(half(state) | extra)), path)


def write_tokenizer(folder: Path, vocab_size_before_ends: int = 0) -> list[str]:
    """A CLIP tokenizer that knows single bytes only; returns its vocabulary in order of ids."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    bytes_ = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(rest))]
    filler = [f"filler{i}" for i in range(vocab_size_before_ends - 512)]
    vocab = [*bytes_, *(b + "</w>" for b in bytes_), *filler, "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return vocab


def write_form(form: str, state, folder: Path) -> Path:
    """One source of the named form in `folder`, holding `state` in half precision."""
    state = half(state)
    hugging_face = to_theirs(to_ours(state, OPENAI, "test")[0], HUGGING_FACE, "test")[0]
    hugging_face = {name: array.astype(np.float16) for name, array in hugging_face.items()}
    settings = {"model_type": "clip", "projection_dim": 128}
    settings["text_config"] = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2}
    settings["vision_config"] = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2}
    settings["vision_config"] |= {"image_size": 48, "patch_size": 8}
    if form.startswith("folder"):
        (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    match form:
        case "torchscript":
            write_torchscript(state, folder / "ViT.pt")
            return folder / "ViT.pt"
        case "state dict":
            torch.save(torch_state(state), folder / "clip.pth")
            return folder / "clip.pth"
        case "state dict, legacy format":
            torch.save(torch_state(state), folder / "clip.bin", _use_new_zipfile_serialization=False)
            return folder / "clip.bin"
        case "nested, DataParallel":
            prefixed = {f"module.{name}": t for name, t in torch_state(state).items()}
            torch.save({"epoch": 3, "state_dict": prefixed}, folder / "clip.pt")
            return folder / "clip.pt"
        case "nested, model_state_dict":
            torch.save({"model_state_dict": torch_state(hugging_face)}, folder / "clip.pt")
            return folder / "clip.pt"
        case "parameters":
            torch.save({k: torch.nn.Parameter(t) for k, t in torch_state(state).items()}, folder / "clip.pt")
            return folder / "clip.pt"
        case "open_clip file":
            save_file(state, folder / "open_clip_model.safetensors")
            return folder / "open_clip_model.safetensors"
        case "Hugging Face file":
            save_file(hugging_face, folder / "weights.safetensors")
            return folder / "weights.safetensors"
        case "folder, safetensors":
            save_file(hugging_face, folder / "model.safetensors")
        case "folder, pytorch_model.bin":
            positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
            positions |= {"vision_model.embeddings.position_ids": torch.arange(37)[None]}
            torch.save(torch_state(hugging_face) | positions, folder / "pytorch_model.bin")
        case "folder, shards":
            names = sorted(hugging_face)
            shards = {f"model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
            for file, held in shards.items():
                save_file({name: hugging_face[name] for name in held}, folder / file)
            index = {"metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        case "open_clip folder":
            torch.save(torch_state(state), folder / "open_clip_pytorch_model.bin")
            vision = {"image_size": 48, "layers": 2, "width": 128, "patch_size": 8}
            model = {"embed_dim": 128, "quick_gelu": True, "vision_cfg": vision, "text_cfg": {"heads": 2}}
            (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}), encoding="utf-8")
    return folder


def same(one, other):
    """Two trees hold the same float32 values, bit by bit."""
    one, other = flatten(one), flatten(other)
    assert sorted(one) == sorted(other)
    for name in one:
        assert np.asarray(one[name]).dtype == np.float32
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def message(call, *args, **kwargs):
    """What the ValueError says that the call must raise."""
    with pytest.raises(ValueError) as caught:
        call(*args, **kwargs)
    return str(caught.value)

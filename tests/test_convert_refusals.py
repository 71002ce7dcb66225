"""CLIP files that must be refused, and how it is said: damage, traps, other models, and configs that do not fit."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from convert.clip import load_clip
from tests.clip_files import message, openai_state, reference_model, torch_state, write_torchscript


@pytest.fixture(scope="module")
def state():
    return openai_state()


@pytest.fixture(scope="module")
def reference_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hugging_face")
    reference_model().save_pretrained(folder)
    return folder


def test_all_problems_in_one_message(state, tmp_path):
    broken = dict(state)
    for name in ("ln_final.bias", "visual.transformer.resblocks.0.attn.in_proj_weight"):
        del broken[name]
    broken["visual.proj"] = np.zeros((128, 5), np.float32)
    broken["visual.ln_pre.weight"] = np.zeros((1, 128), np.float32)
    broken["stray"] = np.zeros(3, np.float32)
    broken["transformer.resblocks.123456789.ln_1.bias"] = np.zeros(128, np.float32)
    broken["logit_scale"] = np.array(np.nan, np.float32)
    broken["text_projection"] = np.zeros((128, 128), np.int8)
    save_file(broken, tmp_path / "clip.safetensors")
    said = message(load_clip, tmp_path / "clip.safetensors")
    for part in (
        f"{tmp_path / 'clip.safetensors'} does not fit a CLIP ViT under OpenAI's names: 8 problems",
        "missing (2)", "ln_final.bias [128]", "visual.transformer.resblocks.0.attn.in_proj_weight [384, 128]",
        "left over (2)", "stray [3]", "transformer.resblocks.123456789.ln_1.bias",
        "misshapen (2)", "visual.proj expected [128, 128], found [128, 5]", "expected [128], found [1, 128]",
        "not usable (2)", "logit_scale has 1 of 1 values not finite", "text_projection holds int8",
    ):  # fmt: skip
        assert part in said, part


def test_long_lists_are_cut_but_counted(state, tmp_path):
    first = {name: array for name, array in state.items() if name.startswith("visual.")}
    save_file(first, tmp_path / "clip.safetensors")
    said = message(load_clip, tmp_path / "clip.safetensors")
    missing = len(state) - len(first) - 12  # the blocks of the text tower: one is sure to be there, two were
    assert f"missing ({missing})" in said
    assert f"… and {missing - 12} more" in said


def test_not_finite_weights(state, tmp_path):
    table = state["token_embedding.weight"].copy()
    table[5, :3] = np.inf
    torch.save(torch_state(state | {"token_embedding.weight": table}), tmp_path / "clip.pt")
    assert f"has 3 of {table.size} values not finite" in message(load_clip, tmp_path / "clip.pt")


@pytest.mark.parametrize("name", ["clip.pt", "clip.pth", "clip.bin", "clip.safetensors"])
@pytest.mark.parametrize("damage", ["empty", "cut short", "noise", "pointer"])
def test_damaged_files(name, damage, state, tmp_path):
    path = tmp_path / name
    if name.endswith("safetensors"):
        save_file(state, path)
    elif name == "clip.pt":
        write_torchscript(state, path)
    else:
        torch.save(torch_state(state), path)
    data = path.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    noise = np.random.default_rng(0).bytes(5000)
    path.write_bytes({"empty": b"", "cut short": data[: len(data) // 2], "noise": noise, "pointer": pointer}[damage])
    said = message(load_clip, path)
    assert str(path) in said
    assert {"empty": "is empty", "pointer": "Git LFS"}.get(damage, "cannot be read as a") in said


class Trap:
    """What runs when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("legacy", [True, False])
def test_nothing_is_unpickled_freely(legacy, state, tmp_path):
    trap = Trap(tmp_path / "sprung")
    with (tmp_path / "plain.bin").open("wb") as file:
        pickle.dump({"visual.proj": trap}, file)
    torch.save({"visual.proj": trap}, tmp_path / "torch.pt", _use_new_zipfile_serialization=not legacy)
    for name in ("plain.bin", "torch.pt"):
        assert "cannot be read as a PyTorch file of plain tensors" in message(load_clip, tmp_path / name)
    assert not (tmp_path / "sprung").exists()


def test_other_models_are_told_apart(state, tmp_path):
    def said(tensors):
        save_file(tensors, tmp_path / "clip.safetensors")
        return message(load_clip, tmp_path / "clip.safetensors")

    resnet = {"visual.layer1.0.conv1.weight": np.zeros((4, 4), np.float32), "logit_scale": np.zeros((), np.float32)}
    assert "ResNet" in said(resnet)
    assert "timm" in said({"visual.trunk.norm.weight": np.zeros(4, np.float32)})
    assert "no CLIP weights" in said({"encoder.weight": np.zeros(4, np.float32)})
    assert "they must be equal" in said(state | {"text_projection": np.zeros((128, 64), np.float32)})
    assert "heads are 80 wide" in said(state | {"visual.conv1.weight": np.zeros((1280, 3, 8, 8), np.float32)})
    assert "multiple of 64" in said({k: v[..., :100] if k.startswith("visual") else v for k, v in state.items()})


DOUBLE = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c.update(model_type="siglip"), "expected 'clip'"),
        (lambda c: c.update(projection_dim=256), "they must be equal"),
        (
            lambda c: c["text_config"].update(num_attention_heads=4),
            "4 heads for a width of 128",
        ),
        (lambda c: c["vision_config"].update(intermediate_size=700), "intermediate_size 700, expected 768"),
        (lambda c: c["vision_config"].update(layer_norm_eps=1e-6), "layer_norm_eps 1e-06"),
        (lambda c: c["vision_config"].update(hidden_act="relu"), "hidden_act 'relu'"),
        (lambda c: c["text_config"].update(hidden_act="gelu"), "hidden_act differs"),
        (lambda c: c["vision_config"].update(image_size=64), "image_size 64, expected 48"),
        (
            lambda c: c["vision_config"].update(hidden_size=256, intermediate_size=1024, num_attention_heads=4),
            "heads 4",
        ),
        (lambda c: c["vision_config"].update(image_size="52"), "image_size '52', expected a positive number"),
    ],
)
def test_configs_that_do_not_fit(change, expected, reference_folder, tmp_path):
    content = json.loads((reference_folder / "config.json").read_text(encoding="utf-8"))
    change(content)
    (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8")
    shutil.copy(reference_folder / "model.safetensors", tmp_path)
    assert expected in message(load_clip, tmp_path)


def test_sources_that_are_not_there(reference_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_clip(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"looked for model\.safetensors"):
        load_clip(tmp_path)
    shutil.copy(reference_folder / "model.safetensors", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load_clip(tmp_path)
    shutil.copy(reference_folder / "config.json", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}), encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"one\.safetensors, two\.safetensors"):
        load_clip(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../one.safetensors"}}), encoding="utf-8")
    assert "same folder" in message(load_clip, tmp_path)
    (tmp_path / "weights.h5").write_bytes(b"x")
    assert "no known form" in message(load_clip, tmp_path / "weights.h5")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    assert "holds a list" in message(load_clip, tmp_path / "list.pt")
    torch.save({"visual.proj": torch.zeros(1), "epoch": 3}, tmp_path / "mixed.pt")
    assert "epoch (int)" in message(load_clip, tmp_path / "mixed.pt")

"""Adapter conversion: the official checkpoint to our tree and back, bit for bit, and what must be refused."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from convert.adapter import load_adapter, main, save_adapter
from convert.command import run
from convert.engine import flatten, unflatten
from tests.clip_files import message, same
from tests.parity.golden import TINY, state_dicts

SIZES = {**TINY, "deep_len": 3, "text_layers": 5, "prompt_len": 4, "features": [2, 3, 4], "vision_width": 192}


@pytest.fixture(params=[TINY, SIZES], ids=["tiny", "other sizes"])
def adapter(request):
    return state_dicts(request.param)[1]


def write_official(adapter, path, wrap=lambda tensor: tensor):
    flat = {name: wrap(torch.from_numpy(np.array(array))) for name, array in flatten(adapter).items()}
    torch.save(unflatten(flat), path)
    return path


def test_official_to_ours_and_back(adapter, tmp_path):
    tree = load_adapter(write_official(adapter, tmp_path / "official.pth"), iqm_heads=4)
    save_adapter(tree, tmp_path / "ours.safetensors")
    save_adapter(load_adapter(tmp_path / "ours.safetensors"), tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert list(back) == list(adapter)
    for section, content in adapter.items():
        assert isinstance(back[section], dict) == isinstance(content, dict)
        if isinstance(content, dict):
            assert sorted(back[section]) == sorted(content)
    for name, tensor in flatten(back).items():
        expected = np.asarray(flatten(adapter)[name])
        assert tensor.dtype == torch.float32
        assert tensor.shape == expected.shape, name
        np.testing.assert_array_equal(tensor.numpy(), expected, err_msg=name)


def test_ours_to_official_and_back(adapter, tmp_path):
    tree = load_adapter(write_official(adapter, tmp_path / "official.pth"), iqm_heads=4)
    save_adapter(tree, tmp_path / "again.pth")
    same(load_adapter(tmp_path / "again.pth", iqm_heads=4), tree)


def test_tree(tmp_path):
    """Where things end up, against arrays written out by hand."""
    adapter = state_dicts(TINY)[1]
    tree = load_adapter(write_official(adapter, tmp_path / "official.pth"), iqm_heads=4)
    for level in range(4):
        weight = adapter["trainable_linearlayer"][f"fc.{level}.weight"]
        np.testing.assert_array_equal(tree["dense"]["kernel"][level], weight.T)
    x = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    weight = adapter["iqm"]["encoder.layer.1.crossattention.attention.key.weight"]
    key = np.einsum("d,dhe->he", x, tree["iqm"]["layer_1"]["crossattention"]["key"]["kernel"])
    np.testing.assert_allclose(key.reshape(64), weight @ x, atol=1e-5)
    weight = adapter["iqm"]["encoder.layer.0.attention.output.dense.weight"]
    out = np.einsum("he,hed->d", x.reshape(4, 16), tree["iqm"]["layer_0"]["attention"]["out"]["kernel"])
    np.testing.assert_allclose(out, weight @ x, atol=1e-5)
    np.testing.assert_array_equal(tree["prompts"]["prompt_proj"]["kernel"], adapter["prompt_proj.weight"].T)
    np.testing.assert_array_equal(tree["prompts"]["prompt_text_projection"], adapter["prompt_text_projection"])
    convolution = adapter["New_Lan_Embed"]["prompt_linear1.fc.weight"]
    np.testing.assert_array_equal(tree["prompts"]["class_conv"]["kernel"][:, 0], convolution[:, 0].T)
    assert tree["prompt_temp"].shape == ()


def test_parameters_and_half_precision(tmp_path):
    adapter = state_dicts(TINY)[1]
    wrapped = write_official(adapter, tmp_path / "parameters.pth", torch.nn.Parameter)
    plain = write_official(adapter, tmp_path / "plain.pth")
    same(load_adapter(wrapped, 4), load_adapter(plain, 4))
    lower = write_official(adapter, tmp_path / "half.pth", torch.Tensor.half)
    rounded = unflatten({name: np.float16(array) for name, array in flatten(load_adapter(plain, 4)).items()})
    same(load_adapter(lower, 4), unflatten({k: np.float32(v) for k, v in flatten(rounded).items()}))


def test_tensors_saved_from_a_gpu(tmp_path):
    """A file whose tensors say `cuda:0`, made by renaming the device in one that says `cpu`."""
    import zipfile

    plain = write_official(state_dicts(TINY)[1], tmp_path / "plain.pth")
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(tmp_path / "cuda.pth", "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("data.pkl"):
                assert data.count(b"X\x03\x00\x00\x00cpu") == 1
                data = data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            target.writestr(name, data)
    same(load_adapter(tmp_path / "cuda.pth", 4), load_adapter(plain, 4))


def test_heads(tmp_path):
    path = write_official(state_dicts(TINY)[1], tmp_path / "official.pth")
    assert "--iqm-heads" in message(load_adapter, path)
    assert "expected a divisor of the width 64" in message(load_adapter, path, 7)
    assert "expected a divisor" in message(load_adapter, path, 0)
    tree = load_adapter(path, 8)
    assert tree["iqm"]["layer_0"]["attention"]["query"]["kernel"].shape == (64, 8, 8)
    save_adapter(tree, tmp_path / "ours.safetensors")
    same(load_adapter(tmp_path / "ours.safetensors", 8), tree)
    assert "has 8 heads" in message(load_adapter, tmp_path / "ours.safetensors", 4)


def test_all_problems_in_one_message(tmp_path):
    adapter = state_dicts(TINY)[1]
    del adapter["prompt_norm.bias"], adapter["trainable_linearlayer"]["fc.2.bias"]
    adapter["iqm"]["encoder.layer.0.output_query.dense.weight"] = np.zeros((64, 95), np.float32)
    adapter["prompt_embeddings"] = np.full((1, 1, 64), np.nan, np.float32)
    adapter["optimizer"] = {"step": np.zeros(1, np.float32)}
    said = message(load_adapter, write_official(adapter, tmp_path / "official.pth"), 4)
    for part in (
        "official.pth does not fit an IQE-CLIP adapter: 5 problems",
        "missing (2)", "prompt_norm.bias [64]", "trainable_linearlayer/fc.2.bias [64]",
        "misshapen (1)", "iqm/encoder.layer.0.output_query.dense.weight expected [64, 96], found [64, 95]",
        "left over (1)", "optimizer/step [1]",
        "not usable (1)", "prompt_embeddings has 64 of 64 values not finite",
    ):  # fmt: skip
        assert part in said, part


def test_our_own_file_is_checked(tmp_path):
    path = tmp_path / "ours.safetensors"
    tree = load_adapter(write_official(state_dicts(TINY)[1], tmp_path / "official.pth"), 4)
    save_adapter(tree, path)
    tensors = load_file(path)
    assert tensors["iqm/layer_0/attention/query/kernel"].shape == (64, 4, 16)
    del tensors["prompt_temp"]
    save_file(tensors, path)
    assert "prompt_temp []" in message(load_adapter, path)
    tensors |= {name: array[:, :3].copy() for name, array in tensors.items() if array.shape == (64, 4, 16)}
    tensors |= {name: array[:3].copy() for name, array in tensors.items() if array.shape[:2] == (4, 16)}
    save_file(tensors, path)
    assert "3 heads 16 wide, expected 64 in all" in message(load_adapter, path)
    save_file(flatten(tree), path, {"format": "something else"})
    assert "expected 'iqe_jax adapter'" in message(load_adapter, path)


def test_sources_and_targets_that_cannot_be(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_adapter(tmp_path / "absent.pth", 4)
    path = write_official(state_dicts(TINY)[1], tmp_path / "official.pth")
    tree = load_adapter(path, 4)
    with pytest.raises(FileExistsError, match="--force"):
        save_adapter(tree, path)
    assert "must end in" in message(save_adapter, tree, tmp_path / "adapter.npz")
    del tree["prompt_temp"]
    assert "prompt_temp" in message(save_adapter, tree, tmp_path / "new.pth")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["official.pth"]
    path.write_bytes(path.read_bytes()[:3000])
    assert "cannot be read as a PyTorch file" in message(load_adapter, path, 4)


def test_command_line(tmp_path, monkeypatch):
    path = write_official(state_dicts(TINY)[1], tmp_path / "official.pth")
    out = tmp_path / "ours.safetensors"
    command = [sys.executable, "-m", "convert.adapter", str(path), "--out", str(out), "--iqm-heads", "4"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    assert "4 levels of width 128, embedding 64, query module 2 layers, 4 heads" in done.stdout
    monkeypatch.setattr("sys.argv", command[2:])
    with pytest.raises(SystemExit, match=r"^error: .*ours\.safetensors exists; .*--force"):
        run(main, "convert.adapter")
    monkeypatch.setattr("sys.argv", ["adapter", str(out), "--out", str(path), "--force"])
    run(main, "convert.adapter")
    same(load_adapter(path, 4), load_adapter(out))

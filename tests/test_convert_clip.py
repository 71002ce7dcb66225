"""CLIP conversion: every published form to the same tree, the towers against transformers, and what must be refused."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn
from safetensors.numpy import load_file, save_file
from transformers import CLIPModel

from convert.clip import load_clip, main, save_clip
from convert.clip_names import HUGGING_FACE, OPENAI
from convert.clip_tokenizer import KNOWN_IDS, ClipTokenizer
from convert.command import run
from convert.engine import Rule, Table, to_ours, to_theirs
from iqe_jax.data.phantoms import CLIP_DIR
from iqe_jax.models.clip import ClipConfig, TextTower, VisionTower
from tests.clip_files import (
    SIZES,
    half,
    message,
    openai_state,
    reference_model,
    same,
    torch_state,
    write_form,
    write_tokenizer,
    write_torchscript,
)
from tests.parity.golden import PROMPTS

PROMPT = "a photo of a normal <|class|>."


@pytest.fixture(scope="module")
def state():
    return openai_state()


@pytest.fixture(scope="module")
def reference_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hugging_face")
    reference_model().save_pretrained(folder)
    return folder


@pytest.fixture
def reference():
    return reference_model()


# The towers, run on converted weights


def test_image_tower_is_transformers(reference, reference_folder):
    clip = load_clip(reference_folder)
    assert clip.hidden_act == "quick_gelu"
    assert asdict(clip.config) == {
        "image_size": 52, "patch_size": 8, "vision_width": 192, "vision_layers": 2, "vision_heads": 3, "embed_dim": 128,
        "text_layers": 3, "text_heads": 2, "context_length": 20, "vocab_size": 600,
    }  # fmt: skip
    images = np.random.default_rng(0).random((2, 52, 52, 3), np.float32)
    with torch.no_grad():
        pixels = torch.from_numpy(images.transpose(0, 3, 1, 2))
        expected = reference.get_image_features(pixel_values=pixels).pooler_output.numpy()
        hidden = reference.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states
    tower = VisionTower(clip.config, (1, 2), activation="quick_gelu")
    taps, features = tower.apply({"params": clip.params["vision"]}, jnp.asarray(images))
    np.testing.assert_allclose(np.asarray(features), expected, atol=1e-5)
    for tap, block in zip(np.asarray(taps), hidden[1:], strict=True):
        # Not normalised, and with outliers: transformers' own rounding error in float32 is 7e-7 of the largest.
        np.testing.assert_allclose(tap, block[:, 1:].numpy(), rtol=0, atol=2e-6 * float(block.abs().max()))


def test_text_tower_is_transformers(reference, reference_folder):
    clip = load_clip(reference_folder)
    ids = np.random.default_rng(1).integers(0, 598, (3, 12))
    ends = np.array([5, 11, 8])
    ids[:, 0], ids[np.arange(3), ends] = 598, 599
    with torch.no_grad():
        expected = reference.get_text_features(input_ids=torch.from_numpy(ids)).pooler_output.numpy()
    tower = TextTower(clip.config, activation="quick_gelu")
    features = tower.apply({"params": clip.params["text"]}, jnp.asarray(ids), jnp.asarray(ends), method="encode")
    np.testing.assert_allclose(np.asarray(features), expected, atol=1e-5)


def test_tree_is_what_the_towers_declare(reference_folder):
    clip = load_clip(reference_folder)
    key, ids = jax.random.key(0), jnp.zeros((1, 4), int)
    vision = jax.eval_shape(VisionTower(clip.config, (1,)).init, key, jnp.zeros((1, 52, 52, 3)))
    encode = partial(TextTower(clip.config).init, method="encode")
    text = jax.eval_shape(encode, key, ids, jnp.array([3]))
    for name, declared in (("vision", vision), ("text", text)):
        shapes = jax.tree.map(lambda array: array.shape, nn.meta.unbox(declared["params"]))
        assert shapes == jax.tree.map(np.shape, clip.params[name])


# Every form to the same tree


FORMS = {  # form → the activation it tells of
    "torchscript": "quick_gelu",
    "state dict": None,
    "state dict, legacy format": None,
    "nested, DataParallel": None,
    "nested, model_state_dict": None,
    "parameters": None,
    "open_clip file": None,
    "Hugging Face file": None,
    "folder, safetensors": "quick_gelu",
    "folder, pytorch_model.bin": "quick_gelu",
    "folder, shards": "quick_gelu",
    "open_clip folder": "quick_gelu",
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_tree(form, state, tmp_path):
    clip = load_clip(write_form(form, state, tmp_path))
    same(clip.params, to_ours(half(state), OPENAI, "expected")[0])
    assert clip.config == ClipConfig(48, 8, 128, 2, 2, 128, 2, 2, 77, 49408)
    assert clip.hidden_act == FORMS[form]
    assert clip.tokenizer(PROMPT) == list(KNOWN_IDS[PROMPT])


def test_bfloat16_is_upcast(state, tmp_path):
    from safetensors.torch import save_file as save_torch

    lower = {name: t.to(torch.bfloat16) for name, t in torch_state(state).items()}
    save_torch(lower, tmp_path / "clip.safetensors")
    torch.save(lower, tmp_path / "clip.pt")
    expected = to_ours({name: t.float().numpy() for name, t in lower.items()}, OPENAI, "expected")[0]
    same(load_clip(tmp_path / "clip.safetensors").params, expected)
    same(load_clip(tmp_path / "clip.pt").params, expected)


def test_round_trip_is_bit_equal(state, tmp_path):
    save_file(state, tmp_path / "openai.safetensors")
    first = load_clip(tmp_path / "openai.safetensors")
    save_clip(first.config, first.params, tmp_path / "out", hidden_act="gelu")
    second = load_clip(tmp_path / "out")
    assert second.config == first.config
    assert second.hidden_act == "gelu"
    same(first.params, second.params)
    back, _ = to_theirs(second.params, OPENAI, "back")
    assert sorted(back) == sorted(state)
    for name, array in state.items():
        assert back[name].shape == array.shape
        np.testing.assert_array_equal(back[name], array)


def test_transformers_opens_what_is_saved(reference, reference_folder, tmp_path):
    write_tokenizer(tmp_path / "tokenizer", 598)
    clip = load_clip(reference_folder, tmp_path / "tokenizer")
    out = tmp_path / "out"
    save_clip(clip.config, clip.params, out, tokenizer=clip.tokenizer.source)
    expected = {"config.json", "model.safetensors", "vocab.json", "merges.txt", "tokenizer_config.json"}
    assert {path.name for path in out.iterdir()} == expected
    opened: Any = CLIPModel.from_pretrained(out, output_loading_info=True)
    model, report = opened
    assert not any(report.values())
    for name, tensor in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert (model.config.text_config.bos_token_id, model.config.text_config.eos_token_id) == (598, 599)
    again = load_clip(out)
    ids = again.tokenizer("a cat")
    assert (ids[0], ids[-1]) == (598, 599)
    assert ids == clip.tokenizer("a cat")


def test_saving_half_precision(reference_folder, tmp_path):
    clip = load_clip(reference_folder)
    save_clip(clip.config, clip.params, tmp_path / "half", "float16")
    assert {array.dtype.name for array in load_file(tmp_path / "half/model.safetensors").values()} == {"float16"}
    same(load_clip(tmp_path / "half").params, jax.tree.map(lambda a: np.float32(np.float16(a)), clip.params))
    large = {**clip.params, "logit_scale": np.float32(1e6)}
    assert "logit_scale" in message(save_clip, clip.config, large, tmp_path / "large", "float16")
    assert not (tmp_path / "large").exists()


def test_saving_keeps_what_is_there(reference_folder, tmp_path):
    clip = load_clip(reference_folder)
    save_clip(clip.config, clip.params, tmp_path)
    before = (tmp_path / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(FileExistsError, match="--force"):
        save_clip(clip.config, clip.params, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == before
    save_clip(clip.config, clip.params, tmp_path, "float16", force=True)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["dtype"] == "float16"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_saving_checks_the_tree(reference_folder, tmp_path):
    clip = load_clip(reference_folder)
    text = {name: array for name, array in clip.params["text"].items() if name != "ln_final"}
    said = message(save_clip, clip.config, {**clip.params, "text": text}, tmp_path / "out")
    assert "missing (2)" in said
    assert "text/ln_final/bias [128]" in said
    wrong = ClipConfig(**{**asdict(clip.config), "patch_size": 16})
    assert "patch_size=16" in message(save_clip, wrong, clip.params, tmp_path / "out")


# Tokenizers


def test_tokenizer_of_the_checkpoint(reference_folder, tmp_path):
    folder = tmp_path / "clip"
    shutil.copytree(reference_folder, folder)
    vocab = write_tokenizer(folder, 598)
    ids = load_clip(folder).tokenizer("Cat")
    assert [vocab[i] for i in ids] == ["<|startoftext|>", "c", "a", "t</w>", "<|endoftext|>"]


def test_ids_of_a_tokenizer_json_are_those_of_transformers(tmp_path):
    from transformers import CLIPTokenizer

    write_tokenizer(tmp_path / "vocabulary", 598)
    CLIPTokenizer.from_pretrained(tmp_path / "vocabulary").save_pretrained(tmp_path / "json")
    (tmp_path / "json" / "tokenizer_config.json").unlink()  # start and end are CLIP's where nothing else is said
    for folder in (tmp_path / "json", CLIP_DIR):
        assert (folder / "tokenizer.json").is_file()
        ours, theirs = ClipTokenizer(folder, 49408, 77), CLIPTokenizer.from_pretrained(folder)
        assert ours.ends() == (theirs.bos_token_id, theirs.eos_token_id)
        for text in (*KNOWN_IDS, "A  Cat,\nit's 2 o'clock…", "naïve ü 猫 🙂", ""):
            assert ours(text) == theirs(text)["input_ids"], text


def test_texts_without_a_tokenizer(reference_folder):
    tokenizer = ClipTokenizer(None, 49408, 77)
    assert [tokenizer(text) for text in KNOWN_IDS] == [list(ids) for ids in KNOWN_IDS.values()]
    assert "--tokenizer or --model.tokenizer" in message(tokenizer, "a cat")
    assert "--tokenizer" in message(load_clip(reference_folder).tokenizer, PROMPT)  # 600 tokens: not that vocabulary


def test_known_ids_are_the_goldens():
    assert {text: list(ids) for text, ids in KNOWN_IDS.items()} == PROMPTS


def test_tokenizers_that_do_not_fit(tmp_path):
    write_tokenizer(tmp_path / "large", 1000)
    assert "only 600 tokens" in message(ClipTokenizer(tmp_path / "large", 600, 77), "cat")
    write_tokenizer(tmp_path / "short")
    assert "takes 4" in message(ClipTokenizer(tmp_path / "short", 514, 4), "cat")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        ClipTokenizer(tmp_path, 514, 77)("cat")
    with pytest.raises(FileNotFoundError, match="hub id"):
        ClipTokenizer(tmp_path / "absent", 514, 77)("cat")
    (tmp_path / "short/vocab.json").write_text("{", encoding="utf-8")
    assert "cannot be loaded" in message(ClipTokenizer(tmp_path / "short", 514, 77), "cat")


def test_tokenizer_without_start_and_end_tokens(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "cat": 1, "[S]": 2, "[E]": 3}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="[S]", eos_token="[E]").save_pretrained(tmp_path)
    assert "begin with its start token 2" in message(ClipTokenizer(tmp_path, 4, 77), "a cat")


# The hub


@pytest.fixture
def offline_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_hub_id_offline_says_what_to_get(offline_cache):
    with pytest.raises(FileNotFoundError) as caught:
        load_clip("openai/clip-vit-large-patch14-336")
    assert "hf download openai/clip-vit-large-patch14-336 --local-dir DIR" in str(caught.value)
    with pytest.raises(FileNotFoundError, match="its tokenizer could not be fetched"):
        ClipTokenizer("someone/clip", 49408, 77)(PROMPT)


def test_hub_id_from_the_cache(offline_cache, reference_folder):
    repository = offline_cache / "models--someone--clip"
    revision = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(revision, encoding="utf-8")
    shutil.copytree(reference_folder, repository / "snapshots" / revision)
    same(load_clip("someone/clip").params, load_clip(reference_folder).params)


def test_hub_downloads_one_form_of_the_weights(monkeypatch, reference_folder, tmp_path):
    asked = []

    def fetch(repo, allow_patterns):
        asked.append(allow_patterns)
        if "pytorch_model.bin" in allow_patterns:
            torch.save(torch_state(load_file(reference_folder / "model.safetensors")), tmp_path / "pytorch_model.bin")
        return str(tmp_path)

    shutil.copy(reference_folder / "config.json", tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    same(load_clip("someone/old-clip").params, load_clip(reference_folder).params)
    assert len(asked) == 2
    assert not any("open_clip_model.safetensors" in patterns or "*" in patterns for patterns in asked)


# The command line and the engine's own corners


def test_command_line(state, tmp_path, capsys, monkeypatch):
    write_torchscript(state, tmp_path / "ViT.pt")
    monkeypatch.setattr("sys.argv", ["clip", str(tmp_path / "ViT.pt"), "--out", str(tmp_path / "out")])
    run(main, "convert.clip")
    assert "without a tokenizer" in capsys.readouterr().out
    same(load_clip(tmp_path / "out").params, load_clip(tmp_path / "ViT.pt").params)
    with pytest.raises(SystemExit, match=r"^error: .*config\.json exists; .*--force"):
        run(main, "convert.clip")


def test_reading_safetensors_leaves_torch_alone(reference_folder):
    code = f"import sys, convert.clip as c; c.load_clip({str(reference_folder)!r}); print('torch' in sys.modules)"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "False"


def test_layouts_must_hold_the_same_axes():
    table = Table("nothing", (Rule("a", "b", "x y -> y"),))
    assert "different axes" in message(to_ours, {"a": np.zeros((2, 2))}, table, "test")


def test_no_two_rules_share_a_name():
    for table in (OPENAI, HUGGING_FACE):
        names = [name for rule in table.rules for name in rule.sources]
        paths = [rule.path for rule in table.rules]
        assert len(set(names)) == len(names)
        assert len(set(paths)) == len(paths)


def test_sizes_are_those_of_the_file():
    sizes = {**SIZES, "patch": 4, "native": 20, "vision_width": 64, "embed": 64, "vision_layers": 1}
    _, found = to_ours(openai_state(sizes), OPENAI, "test")
    assert (found["patch"], found["grid"], found["width"], found["dim"], found["vision"]) == (4, 5, 64, 64, 1)

"""The phantom sets are laid out like the real ones and no gift to a trivial detector; the tiny CLIP is a real CLIP."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from iqe_jax.data.phantoms import CLIP_DIR, COUNTS, MARK, SETS, batches, make_phantoms, render

PROMPTS = ["a photo of a normal <|class|>.", "a photo of a abnormal <|class|>."]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    make_phantoms(folder)
    return folder


def pictures(root: Path, name: str, split: str, label: str, kind: str = "img") -> list[Path]:
    return sorted((root / SETS[name].folder / split / label / kind).iterdir())


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("name", SETS)
def test_layout_is_that_of_the_real_set(root, name):
    expected = {
        "brain": "Brain_AD",
        "liver": "Liver_AD",
        "resc": "Retina_RESC_AD",
        "oct17": "Retina_OCT2017_AD",
        "chest": "Chest_AD",
        "his": "Histopathology_AD",
    }
    suffix = ".jpeg" if name == "oct17" else ".png"
    masked = name in ("brain", "liver", "resc")
    assert SETS[name].folder == expected[name]
    for split, least in (("valid", 24), ("test", 100)):
        for label in ("good", "Ungood"):
            found = pictures(root, name, split, label)
            assert len(found) >= least
            assert {path.suffix for path in found} == {suffix}
            kinds = {path.name for path in (root / SETS[name].folder / split / label).iterdir()}
            assert kinds == ({"img", "anomaly_mask"} if masked and label == "Ungood" else {"img"})
        if masked:
            masks = pictures(root, name, split, "Ungood", "anomaly_mask")
            assert [path.name for path in masks] == [path.name for path in pictures(root, name, split, "Ungood")]


def test_nothing_is_left_beside_the_sets(root):
    assert {path.name for path in root.iterdir()} == {MARK} | {kind.folder for kind in SETS.values()}
    assert {(root / kind.folder).stat().st_mode & 0o777 for kind in SETS.values()} == {0o755}  # others may read them


@pytest.mark.parametrize("name", ["brain", "liver", "resc"])
def test_masks_hold_a_visible_part_and_only_two_values(root, name):
    for path in pictures(root, name, "test", "Ungood", "anomaly_mask"):
        mask = read(path)
        assert mask.dtype == np.uint8
        assert mask.shape == (128, 128)
        assert set(np.unique(mask)) == {0, 255}, path
        assert 0.0005 < (mask > 0).mean() < 0.4, path


@pytest.mark.parametrize("name", SETS)
def test_mask_is_empty_exactly_for_normal_pictures(name):
    for number in range(6):
        image, mask = render(name, np.random.default_rng((5, number)), False)
        assert image.shape == (128, 128, 3)
        assert image.dtype == mask.dtype == np.uint8
        assert not mask.any()
        assert render(name, np.random.default_rng((5, number)), True)[1].any()


@pytest.mark.parametrize("name", SETS)
def test_brightness_alone_does_not_find_anomalies(root, name):
    labels, means, peaks = [], [], []
    for label in ("good", "Ungood"):
        for path in pictures(root, name, "test", label):
            image = read(path)
            labels.append(label == "Ungood")
            means.append(image.mean())
            peaks.append(image.max())
    for scores in (means, peaks):
        area = roc_auc_score(labels, scores)
        assert max(area, 1 - area) < 0.70


def test_same_seed_same_bytes_and_other_seed_others(root, tmp_path):
    make_phantoms(tmp_path / "again", ["resc"])
    make_phantoms(tmp_path / "other", ["resc"], seed=1)
    for path in pictures(root, "resc", "valid", "Ungood"):
        inside = path.relative_to(root)
        assert (tmp_path / "again" / inside).read_bytes() == path.read_bytes()
        assert (tmp_path / "other" / inside).read_bytes() != path.read_bytes()


def test_no_picture_is_drawn_twice(root):
    for name in SETS:
        seen = [
            path.read_bytes()
            for split in COUNTS
            for label in ("good", "Ungood")
            for path in pictures(root, name, split, label)
        ]
        assert len(set(seen)) == len(seen)


def test_lost_files_are_drawn_again_and_others_left_alone(root, tmp_path):
    make_phantoms(tmp_path, ["liver"])
    image = pictures(tmp_path, "liver", "test", "Ungood")[3]
    mask = image.parent.parent / "anomaly_mask" / image.name
    kept = pictures(tmp_path, "liver", "test", "Ungood")[4]
    kept.write_bytes(b"left alone")
    image.unlink()
    mask.unlink()
    make_phantoms(tmp_path, ["liver"])
    for path in (image, mask):
        assert path.read_bytes() == (root / path.relative_to(tmp_path)).read_bytes()
    assert kept.read_bytes() == b"left alone"


def test_a_set_is_whole_or_absent(tmp_path, monkeypatch):
    import iqe_jax.data.phantoms as phantoms

    calls = 0

    def stops_half_way(*arguments):
        nonlocal calls
        calls += 1
        if calls > 100:
            raise KeyboardInterrupt
        return render(*arguments)

    monkeypatch.setattr(phantoms, "render", stops_half_way)
    with pytest.raises(KeyboardInterrupt):
        make_phantoms(tmp_path, ["oct17"])
    assert list(tmp_path.iterdir()) == []


def test_phantoms_are_not_mixed_into_other_data(tmp_path):
    real = tmp_path / "Brain_AD" / "test" / "good" / "img" / "00123.png"
    real.parent.mkdir(parents=True)
    real.write_bytes(b"a real scan")
    with pytest.raises(FileExistsError, match=r"00123\.png"):
        make_phantoms(tmp_path, ["brain"])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [real]


def test_unknown_set_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"knee.*brain"):
        make_phantoms(tmp_path, ["brain", "knee"])
    with pytest.raises(ValueError, match="knee"):
        render("knee", np.random.default_rng(0), False)
    assert list(tmp_path.iterdir()) == []


def test_clip_folder_is_small_and_complete():
    names = {path.name for path in CLIP_DIR.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} <= names
    assert sum(path.stat().st_size for path in CLIP_DIR.iterdir()) <= 6 * 2**20
    config = json.loads((CLIP_DIR / "config.json").read_text())
    assert config["projection_dim"] == config["text_config"]["hidden_size"]
    for tower in (config["text_config"], config["vision_config"]):
        assert tower["hidden_act"] == "gelu"
        assert tower["layer_norm_eps"] == 1e-5
        assert tower["hidden_size"] == 64 * tower["num_attention_heads"]


def test_tokenizer_tells_the_prompts_apart_and_knows_every_character():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(CLIP_DIR, local_files_only=True)
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    assert ids[0] != ids[1]
    for row in (*ids, tokenizer("Ünknown wörds, 日本 #42!")["input_ids"]):
        assert row[0] == tokenizer.bos_token_id
        assert row[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in row[1:-1]
    words = tokenizer.convert_ids_to_tokens(ids[0][1:-1])
    assert "".join(words).replace("</w>", "") == PROMPTS[0].replace(" ", "")


@pytest.fixture(scope="module")
def torch_clip():
    from transformers import CLIPModel

    model, report = CLIPModel.from_pretrained(CLIP_DIR, local_files_only=True, output_loading_info=True)  # pyright: ignore
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return model.float().eval()


def test_torch_opens_it_and_pictures_find_their_captions(torch_clip):
    import torch

    size = 48
    batch = batches.draw_batch(str(CLIP_DIR), seed=99, step=0, size=size, side=96, held_out=True)
    pixels = torch.tensor(batch.images / np.float32(255)).permute(0, 3, 1, 2)
    with torch.no_grad():
        image = torch_clip.visual_projection(torch_clip.vision_model(pixels).pooler_output)
        text = torch_clip.text_projection(torch_clip.text_model(torch.tensor(batch.captions).long()).pooler_output)
    image, text = (x / x.norm(dim=-1, keepdim=True) for x in (image, text))
    found = batch.caption_groups[(image @ text.T).argmax(1).numpy()] == batch.caption_groups
    assert found.mean() > 5 / size  # chance is about 1 / size


def test_its_own_towers_agree_with_torch(torch_clip):
    import jax
    import torch

    from convert.clip import load_clip
    from iqe_jax.models.clip import TextTower, VisionTower

    clip = load_clip(CLIP_DIR)
    batch = batches.draw_batch(str(CLIP_DIR), seed=98, step=0, size=4, side=96, held_out=True)
    pixels = batch.images / np.float32(255)
    with jax.default_matmul_precision("highest"):
        vision_tower: Any = VisionTower(clip.config, (1, clip.config.vision_layers))
        taps, features = vision_tower.apply({"params": clip.params["vision"]}, pixels)
        text_tower: Any = TextTower(clip.config)
        text = text_tower.apply({"params": clip.params["text"]}, batch.captions, batch.caption_ends, method="encode")
    with torch.no_grad():
        vision = torch_clip.vision_model(torch.tensor(pixels).permute(0, 3, 1, 2), output_hidden_states=True)
        image = torch_clip.visual_projection(vision.pooler_output)
        words = torch_clip.text_projection(torch_clip.text_model(torch.tensor(batch.captions).long()).pooler_output)
    np.testing.assert_allclose(taps[-1], vision.hidden_states[-1][:, 1:].numpy(), atol=2e-4)
    np.testing.assert_allclose(features, image.numpy(), atol=2e-4)
    np.testing.assert_allclose(text, words.numpy(), atol=2e-4)


def test_scenes_never_draw_an_anomaly(monkeypatch):
    from iqe_jax.data.phantoms import scenes

    asked = []

    def spied(draw):
        def drawn(rng, anomalous):
            asked.append(anomalous)
            return draw(rng, anomalous)

        return drawn

    monkeypatch.setattr(scenes, "MODALITIES", {name: spied(draw) for name, draw in scenes.MODALITIES.items()})
    for number in range(40):
        scenes.draw(np.random.default_rng((7, number)), anatomy_share=0.5)
    assert asked
    assert not any(asked)

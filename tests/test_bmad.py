"""Listing of data sets: every layout that is accepted and every fault that is reported."""

import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from iqe_jax.data.bmad import SETS, Sample, load_split


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("IQE_JAX_CACHE", str(tmp_path / "cache"))


def put(path: Path, value: int = 128, size: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (size, size), value).save(path)
    return path


def make_set(
    folder: Path,
    *,
    splits=("valid", "test"),
    ungood="Ungood",
    img="img",
    masks: str | None = "anomaly_mask",
    suffix=".png",
    good=3,
    bad=2,
) -> Path:
    """A set of tiny images; normal and anomalous ones share their file names, as BMAD's may."""
    for split in splits:
        for i in range(good):
            put(folder / split / "good" / img / f"{i:03}{suffix}", 60 + i)
        for i in range(bad):
            put(folder / split / ungood / img / f"{i:03}{suffix}", 160 + i)
            if masks:
                put(folder / split / ungood / masks / f"{i:03}{suffix}", 255)
    return folder


def shown(samples: list[Sample]) -> list[tuple[str, int, str | None]]:
    return [(s.name, s.label, s.mask and s.mask.name) for s in samples]


WITH_MASKS = [
    ("good/000.png", 0, None),
    ("good/001.png", 0, None),
    ("good/002.png", 0, None),
    ("ungood/000.png", 1, "000.png"),
    ("ungood/001.png", 1, "001.png"),
]


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("split", ["valid", "test"])
def test_mvfa_layout_of_the_six_sets(tmp_path, name, split):
    spec = SETS[name]
    make_set(tmp_path / spec.folders[0], masks="anomaly_mask" if spec.has_masks else None)
    samples = load_split(tmp_path, name, split)
    assert shown(samples) == [(n, label, mask if spec.has_masks else None) for n, label, mask in WITH_MASKS]
    home = tmp_path / spec.folders[0] / split
    assert samples[0].image == home / "good/img/000.png"
    assert samples[-1].image == home / "Ungood/img/001.png"
    if spec.has_masks:
        assert samples[-1].mask == home / "Ungood/anomaly_mask/001.png"
    assert all(s.image.is_file() and (s.mask is None or s.mask.is_file()) for s in samples)


def test_spec_table_of_the_sets():
    assert {k: s.folders[0] for k, s in SETS.items()} == {
        "brain": "Brain_AD",
        "liver": "Liver_AD",
        "resc": "Retina_RESC_AD",
        "oct17": "Retina_OCT2017_AD",
        "chest": "Chest_AD",
        "his": "Histopathology_AD",
    }
    assert [s.test for s in SETS.values()] == [3715, 1493, 1805, 968, 17194, 1997]
    assert [s.valid for s in SETS.values()] == [83, 166, 115, 32, 1490, 236]
    assert [s.has_masks for s in SETS.values()] == [True, True, True, False, False, False]


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("brain", "BraTS2021_slice"),
        ("brain", "Brain"),
        ("brain", "brain_ad"),
        ("liver", "hist_DIY"),
        ("liver", "Liver_AD/hist_DIY"),
        ("liver", "Liver/Train/hist_DIY"),
        ("resc", "RESC"),
        ("resc", "Retina_RESC_AD/RESC"),
    ],
)
def test_raw_bmad_names_and_wrapped_archives(tmp_path, name, folder):
    make_set(tmp_path / folder, splits=("train", "val", "test"), ungood="ungood", masks="label")
    assert shown(load_split(tmp_path, name, "valid")) == WITH_MASKS
    assert shown(load_split(tmp_path, name, "test")) == WITH_MASKS


@pytest.mark.parametrize(
    ("name", "folder"), [("his", "camelyon16"), ("oct17", "OCT2017"), ("chest", "Chest-RSNA"), ("chest", "Chest-AD")]
)
@pytest.mark.parametrize("img", ["img", "", "Img"])
def test_image_level_sets_with_and_without_img(tmp_path, name, folder, img):
    make_set(tmp_path / folder, img=img, masks=None, suffix=".jpeg")
    put(tmp_path / folder / "test/Ungood/label/000.jpeg")  # image-level sets have no masks, whatever lies there
    samples = load_split(tmp_path, name, "test")
    assert [(s.name, s.mask) for s in samples] == [
        (f"{p}/{i:03}.jpeg", None) for p, n in (("good", 3), ("ungood", 2)) for i in range(n)
    ]


def test_masks_beside_images_without_img_folder(tmp_path):
    make_set(tmp_path / "Brain", img="", masks="label")
    assert shown(load_split(tmp_path, "brain", "test")) == WITH_MASKS


def test_swapped_levels_of_the_raw_liver_archive(tmp_path):
    for part, n in (("img/good", 3), ("img/Ungood", 2), ("label/Ungood", 2)):
        for i in range(n):
            put(tmp_path / "hist_DIY/test" / part / f"{i:03}.png")
    assert shown(load_split(tmp_path, "liver", "test")) == WITH_MASKS


def test_folder_named_by_the_user(tmp_path):
    make_set(tmp_path / "my scans" / "heads")
    assert shown(load_split(tmp_path, "brain", "test", folder="my scans/heads")) == WITH_MASKS
    assert shown(load_split(tmp_path / "my scans", "brain", "test", folder="heads")) == WITH_MASKS
    with pytest.raises(FileNotFoundError, match=r"set 'brain' is not in .*tried 'hearts'; it holds heads"):
        load_split(tmp_path / "my scans", "brain", "test", folder="hearts")


def test_further_sets_by_folder_name_or_as_root(tmp_path):
    make_set(tmp_path / "skin")
    make_set(tmp_path / "teeth", masks=None)
    assert shown(load_split(tmp_path, "skin", "valid")) == WITH_MASKS
    assert shown(load_split(tmp_path / "skin", "skin", "valid")) == WITH_MASKS
    assert [s.mask for s in load_split(tmp_path, "teeth", "valid")] == [None] * 5
    make_set(tmp_path / "Brain_AD")
    assert shown(load_split(tmp_path / "Brain_AD", "brain", "test")) == WITH_MASKS


def test_several_sets_in_one_folder(tmp_path):
    make_set(tmp_path / "Brain_AD/first")
    make_set(tmp_path / "Brain_AD/second")
    with pytest.raises(ValueError, match=r"Brain_AD holds several sets, first, second: name one of them"):
        load_split(tmp_path, "brain", "test")
    assert shown(load_split(tmp_path, "Brain_AD/second", "test")) == WITH_MASKS


def test_root_of_another_set_is_not_taken(tmp_path):
    for folder in ("Liver_AD", "LIVER-AD"):
        make_set(tmp_path / folder)
        with pytest.raises(ValueError, match=rf"'brain' was asked for, but .*{folder} is the folder of 'liver'"):
            load_split(tmp_path / folder, "brain", "test")


def test_what_is_left_out_is_said_once(tmp_path, capsys):
    make_set(tmp_path / "Brain_AD")
    good = tmp_path / "Brain_AD" / "test" / "good" / "img"
    (good / "patient0").mkdir()
    for name in ("patient0/1.png", "patient0/2.png", "1.ima", "2.IMA", "IM0001", ".hidden"):
        (good / name).touch()
    for _ in range(2):
        load_split(tmp_path, "brain", "test")
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("left out") == 1
    assert "test/good/img that are left out: 2 in the folder patient0, 2 .ima, 1 without an ending; images are" in said


def test_suffixes_hidden_files_and_strange_names(tmp_path):
    home = make_set(tmp_path / "Brain_AD", good=0, bad=0) / "test"
    for name in ("a.PNG", "b.jpg", "c.jpeg", "d.bmp", "e.tif", "f.TIFF", "ü ß.png", "[x]*.png"):
        put(home / "good/img" / name)
    for junk in ("Thumbs.db", ".DS_Store", "._a.png", "notes.txt", "a.gif"):
        (home / "good/img" / junk).write_bytes(b"x")
    (home / "good/img/folder.png").mkdir()
    put(home / "Ungood/img/x.jpg")
    put(home / "Ungood/img/y.png")
    put(home / "Ungood/anomaly_mask/x.png")  # another suffix
    put(home / "Ungood/anomaly_mask/y.bmp")
    put(home / "Ungood/anomaly_mask/y.png")  # the same name goes first
    put(home / "Ungood/anomaly_mask/unused.png")  # no image of that name: ignored
    put(home / "good/anomaly_mask/a.png")  # masks of normal images: ignored
    put(home / "good/label/a.png")
    samples = load_split(tmp_path, "brain", "test")
    assert [s.image.name for s in samples[:8]] == sorted(
        ["a.PNG", "b.jpg", "c.jpeg", "d.bmp", "e.tif", "f.TIFF", "ü ß.png", "[x]*.png"]
    )
    assert shown(samples)[8:] == [("ungood/x.jpg", 1, "x.png"), ("ungood/y.png", 1, "y.png")]
    assert all(s.mask is None for s in samples[:8])


def test_names_that_are_not_utf8(tmp_path):
    home = make_set(tmp_path / "Brain_AD") / "test"
    (home / "good/img/000.png").rename(home / "good/img" / os.fsdecode(b"\xff.png"))
    samples = load_split(tmp_path, "brain", "test")
    assert all(s.image.is_file() for s in samples)
    assert os.fsencode(samples[2].image.name) == b"\xff.png"


def test_symlinks_and_loops(tmp_path):
    make_set(tmp_path / "elsewhere" / "Brain_AD")
    root = tmp_path / "root"
    root.mkdir()
    (root / "Brain_AD").symlink_to(tmp_path / "elsewhere/Brain_AD")
    (root / "Liver_AD").symlink_to(root / "Liver_AD")  # points at itself
    images = tmp_path / "elsewhere/Brain_AD/test/good/img"
    (images / "round.png").symlink_to(images / "round.png")
    (images / "gone.png").symlink_to(images / "nothing.png")
    (images / "up").symlink_to(images.parent)
    (images / "zlink.png").symlink_to(images / "000.png")
    (root / "nest").mkdir()
    (root / "nest/loop").symlink_to(root / "nest")
    assert [s.name for s in load_split(root, "brain", "test")[:4]] == [
        f"good/{n}.png" for n in ("000", "001", "002", "zlink")
    ]
    with pytest.raises(FileNotFoundError, match="liver"):
        load_split(root, "liver", "test")
    with pytest.raises(FileNotFoundError, match="neither a 'valid'"):
        load_split(root, "nest", "test")


def test_missing_root_says_what_to_get(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data folder at .*nowhere: download .*docs/data\.md"):
        load_split(tmp_path / "nowhere", "brain", "test")
    put(tmp_path / "file.png")
    with pytest.raises(FileNotFoundError, match="no data folder at"):
        load_split(tmp_path / "file.png", "brain", "test")


def test_missing_set_lists_names_tried_and_there(tmp_path):
    make_set(tmp_path / "Liver_AD")
    (tmp_path / "readme.txt").write_text("x")
    with pytest.raises(
        FileNotFoundError, match=r"tried 'Brain_AD', 'Brain', .*it holds Liver_AD, readme\.txt"
    ) as fault:
        load_split(tmp_path, "brain", "test")
    assert "docs/data.md" in str(fault.value)
    with pytest.raises(FileNotFoundError, match=r"tried 'brian'; .*Known sets are brain, liver"):
        load_split(tmp_path, "brian", "test")
    (tmp_path / "void").mkdir()
    with pytest.raises(FileNotFoundError, match="it holds nothing"):
        load_split(tmp_path / "void", "brain", "test")


def test_missing_parts(tmp_path):
    home = make_set(tmp_path / "Brain_AD")
    with pytest.raises(ValueError, match="split is 'train'"):
        load_split(tmp_path, "brain", "train")  # type: ignore[arg-type]
    shutil.rmtree(home / "valid")
    with pytest.raises(FileNotFoundError, match=r"no 'valid' or 'val' folder in .*Brain_AD; it holds test"):
        load_split(tmp_path, "brain", "valid")
    shutil.rmtree(home / "test/good/img")
    (home / "test/good/img").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no images in .*test/good/img .*it holds nothing"):
        load_split(tmp_path, "brain", "test")
    shutil.rmtree(home / "test/good")
    with pytest.raises(FileNotFoundError, match=r"no 'good' folder in .*test; it holds Ungood"):
        load_split(tmp_path, "brain", "test")
    put(home / "test/good/img/0.png")
    shutil.rmtree(home / "test/Ungood")
    with pytest.raises(FileNotFoundError, match=r"no 'Ungood' folder in .*test; it holds good"):
        load_split(tmp_path, "brain", "test")
    shutil.rmtree(home / "test")
    (home / "train/good").mkdir(parents=True)
    with pytest.raises(
        FileNotFoundError, match=r"Brain_AD has neither a 'valid' \(or 'val'\) nor a 'test'.*holds train"
    ):
        load_split(tmp_path, "brain", "test")


def test_missing_masks_are_all_named_up_to_a_limit(tmp_path):
    home = make_set(tmp_path / "Brain_AD", bad=30)
    masks = home / "test/Ungood/anomaly_mask"
    for i in (4, 7):
        (masks / f"{i:03}.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of 30 anomalous images .* in .*anomaly_mask: 004\.png, 007\.png$"):
        load_split(tmp_path, "brain", "test")
    for mask in masks.iterdir():
        mask.unlink()
    with pytest.raises(FileNotFoundError, match=r"30 of 30 .*019\.png and 10 more$"):
        load_split(tmp_path, "brain", "test")
    masks.rmdir()
    with pytest.raises(FileNotFoundError, match=r"'brain' has masks, but .*'anomaly_mask' or 'label'"):
        load_split(tmp_path, "brain", "test")


def test_order_of_many_records(tmp_path):
    # More than ten, where an order by text or by hash would show.
    make_set(tmp_path / "Brain_AD", good=25, bad=13)
    names = [s.name for s in load_split(tmp_path, "brain", "test")]
    assert names == [f"good/{i:03}.png" for i in range(25)] + [f"ungood/{i:03}.png" for i in range(13)]

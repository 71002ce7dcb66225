"""The prepared copy of a listing: when it is made, when it is used, and what becomes of one that is not whole."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from iqe_jax.cache import cache_dir
from iqe_jax.data import bmad_builder
from iqe_jax.data.bmad import load_split
from tests.test_bmad import WITH_MASKS, make_set, put, shown


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("IQE_JAX_CACHE", str(tmp_path / "cache"))


def test_prepared_copy_is_reused_and_a_changed_folder_prepared_anew(tmp_path, monkeypatch):
    prepared = []
    real = bmad_builder.prepare
    monkeypatch.setattr(bmad_builder, "prepare", lambda *a: (prepared.append(a), real(*a))[1])
    home = make_set(tmp_path / "Brain_AD")
    first = load_split(tmp_path, "brain", "test")
    assert load_split(tmp_path, "brain", "test") == first
    assert load_split(home, "brain", "test") == first  # the same folder, however it was named
    assert len(prepared) == 1
    load_split(tmp_path, "brain", "valid")
    assert len(prepared) == 2
    put(home / "test/good/img/003.png")
    assert [s.name for s in load_split(tmp_path, "brain", "test")].count("good/003.png") == 1
    assert len(prepared) == 3
    os.utime(home / "test/Ungood/anomaly_mask/000.png", ns=(1, 1))  # a newer mask
    load_split(tmp_path, "brain", "test")
    assert len(prepared) == 4
    shutil.copytree(tmp_path / "Brain_AD", tmp_path / "copy")
    assert load_split(tmp_path, "copy", "test")[0].image == tmp_path / "copy/test/good/img/000.png"
    assert len(prepared) == 5


def test_damaged_prepared_copy_is_made_again(tmp_path):
    make_set(tmp_path / "Brain_AD")
    first = load_split(tmp_path, "brain", "test")
    (digest,) = (cache_dir() / "tfds").iterdir()
    for file in [p for p in digest.rglob("*") if p.is_file()]:
        file.unlink()
        assert load_split(tmp_path, "brain", "test") == first
    (record,) = digest.rglob("*.array_record*")
    record.write_bytes(record.read_bytes()[:20])
    assert load_split(tmp_path, "brain", "test") == first


def test_failed_preparation_leaves_nothing(tmp_path, monkeypatch):
    def broken(data_dir, split, rows):
        (data_dir / "half").write_bytes(b"x")
        raise KeyboardInterrupt

    make_set(tmp_path / "Brain_AD")
    with monkeypatch.context() as patch:
        patch.setattr(bmad_builder, "prepare", broken)
        with pytest.raises(KeyboardInterrupt):
            load_split(tmp_path, "brain", "test")
    assert list((cache_dir() / "tfds").iterdir()) == []
    # What a killed run left: not used, and swept away once it is old.
    left, at_work = cache_dir() / "tfds/.preparing-old", cache_dir() / "tfds/.preparing-now"
    left.mkdir(), at_work.mkdir()
    os.utime(left, (1, 1))
    assert len(load_split(tmp_path, "brain", "test")) == 5
    assert not left.exists()
    assert at_work.exists()  # of another process


@pytest.mark.parametrize("shown_late", [False, True])
def test_another_process_was_first(tmp_path, monkeypatch, shown_late):
    make_set(tmp_path / "Brain_AD")
    real, is_dir = bmad_builder.prepare, Path.is_dir

    def late(data_dir, split, rows):
        real(data_dir, split, rows)
        monkeypatch.setattr(bmad_builder, "prepare", real)
        load_split(tmp_path, "brain", "test")
        if shown_late:  # as by NFS
            monkeypatch.setattr(Path, "is_dir", lambda path: path.parent.name != "tfds" and is_dir(path))

    monkeypatch.setattr(bmad_builder, "prepare", late)
    assert shown(load_split(tmp_path, "brain", "test")) == WITH_MASKS
    assert len(list((cache_dir() / "tfds").iterdir())) == 1


def test_quiet_lazy_and_without_tensorflow(tmp_path):
    make_set(tmp_path / "Brain_AD")
    code = (
        "import sys, pathlib\n"
        "from iqe_jax.data.bmad import load_split\n"
        "assert 'tensorflow_datasets' not in sys.modules\n"
        f"assert len(load_split(pathlib.Path({str(tmp_path)!r}), 'brain', 'test')) == 5\n"
        "assert 'tensorflow_datasets' in sys.modules and 'tensorflow' not in sys.modules and 'jax' not in sys.modules\n"
    )
    root = Path(__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")

"""The paper's table on a small set in a process of its own, resumed, and its four forms."""

import csv
import dataclasses
import io
import json
import os
import shutil
import signal
import sys

import pytest

from iqe_jax import evaluation, reproduce
from iqe_jax.data.bmad import SETS

pytestmark = pytest.mark.usefixtures("quick_compile")


def arguments(root, settings, out):
    model = ["--model.clip", settings["clip"], "--model.image-size", "40", "--model.levels", "2", "4"]
    model += ["--model.iqm-layers", "1", "--model.iqm-heads", "4", "--model.iqm-width", "96", "--model.sigma", "2"]
    asked = ["--data.root", str(root), "--out", str(out), "--sets", "brain", "--shots", "2", "--seeds", "2"]
    return [*asked, *model, "--train.steps", "1", "--eval.protocols", "paper"]


@pytest.fixture(scope="module")
def made(tiny_root, golden_settings, tmp_path_factory):
    """The command line of a small table, made, and where."""
    out = tmp_path_factory.mktemp("table")
    line = arguments(tiny_root, golden_settings, out)
    reproduce.main(line)
    return line, out


def test_a_table_is_made_in_four_forms_with_every_mark(made):
    _, out = made
    found = json.loads((out / "table.json").read_text())
    last, paper = found["rows"]
    assert (last["set"], last["protocol"], last["runs"], last["weights"]) == ("brain", "k = 2", 2, "last")
    runs = [json.loads((out / "runs" / f"brain-k2-seed{i}" / "metrics.json").read_text()) for i in (0, 1)]
    assert last["metrics"]["image_auroc"]["values"] == [run["metrics"]["image_auroc"] for run in runs]
    assert last["peak_bytes"] > 1e8
    assert last["seconds"] > 0
    assert last["published"] is None  # MVFA-AD's README has no figure for k = 2
    assert [row["chosen_on_test_data"] for row in (last, paper)] == [False, True]
    rows = list(csv.DictReader(io.StringIO((out / "table.csv").read_text())))
    assert [row["chosen_on_test_data"] for row in rows] == ["False", "True"]
    assert float(rows[0]["pixel_aupro_low"]) <= float(rows[0]["pixel_aupro"]) <= float(rows[0]["pixel_aupro_high"])
    for form in ("md", "tex"):
        marked = [line for line in (out / f"table.{form}").read_text().splitlines() if "paper, chosen" in line]
        assert len(marked) == 1
        assert "chosen on the TEST SET" in marked[0]


def test_finished_runs_are_read_back_and_missing_ones_made(made, monkeypatch):
    line, out = made
    started = []
    monkeypatch.setattr(reproduce, "_start", lambda cell, out: started.append(cell.name))
    before = json.loads((out / "table.json").read_text())["rows"]
    reproduce.main(line)
    assert not started
    assert json.loads((out / "table.json").read_text())["rows"] == before
    (out / "runs" / "brain-k2-seed1" / "cost.json").unlink()  # as if killed before its end
    reproduce.main(line)
    assert started == ["brain-k2"]
    assert json.loads((out / "table.json").read_text())["rows"][0]["runs"] == 1
    evaluated, watched = [], []
    monkeypatch.setattr(evaluation, "run_evaluation", lambda run: evaluated.append(run.train.seed))
    monkeypatch.setattr(reproduce, "_stop_with_parent", lambda: watched.append(1))
    reproduce.run_cell(out / "runs" / "brain-k2.json")
    assert (evaluated, watched) == ([1], [1])
    reproduce.main(line)
    row = json.loads((out / "table.json").read_text())["rows"][0]
    costs = [json.loads((out / "runs" / f"brain-k2-seed{i}" / "cost.json").read_text()) for i in (0, 1)]
    assert [cost["resumed"] for cost in costs] == [False, True] and row["resumed"]
    assert row["seconds"] == sum(cost["seconds"] for cost in costs) / 2
    assert row["peak_bytes"] == max(cost["peak_bytes"] for cost in costs)
    assert "| > " in (out / "table.md").read_text()


def test_a_cell_ends_with_the_process_that_started_it(monkeypatch):
    told = []
    monkeypatch.setattr(os, "kill", lambda *args: told.append(args))
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # whose other end has closed
    reproduce._stop_with_parent()
    assert told == [(os.getpid(), signal.SIGTERM)]


@pytest.mark.parametrize(
    ("words", "code", "error", "message"),
    [
        ("first words\\nlast words", 1, ValueError, r"brain, k = 2: last words \(all of it in .*brain-k2\.log\)"),
        ("reproduce: an old one\\nreproduce: two bad:\\n  a\\n  b", 1, ValueError, r"k = 2: two bad:\n  a\n  b \(all"),
        ("reproduce: an old one\\nTraceback\\nKeyError", 1, ValueError, r"k = 2: KeyError \(all"),
        ("", 1, ValueError, r"k = 2:  \(all"),
        ("words", 75, SystemExit, "^75$"),
    ],
)
def test_a_cell_that_fails_is_no_result(made, tmp_path, monkeypatch, words, code, error, message):
    _, (cell,) = reproduce.cells(made[0])
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\nprintf '{words}\\n'\nexit {code}\n")
    program.chmod(0o755)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(error, match=message):
        reproduce._start(cell, tmp_path)


def test_runs_of_another_length_are_not_taken_for_those_asked_for(made, monkeypatch):
    line, out = made
    started = []
    monkeypatch.setattr(reproduce, "_start", lambda cell, out: started.append(cell.name))
    reproduce.main([*line, "--train.steps", "2"])
    assert started == ["brain-k2"]
    assert json.loads((out / "table.json").read_text())["rows"][0]["runs"] == 0
    cost = out / "runs" / "brain-k2-seed0" / "cost.json"
    before = cost.read_text()
    cost.write_text("{}")
    with pytest.raises(SystemExit, match=r"cost.json is damaged .* remove it"):
        reproduce.main(line)
    cost.write_text(before)


def test_each_seed_takes_a_row_of_a_support_list():
    line = ["--shots", "4", "--seeds", "3", "--data.support-list", "4-shot.txt", "--data.support-row", "2"]
    _, listed = reproduce.cells(line)
    assert [run.data.support_row for run in listed[0].runs] == [2, 3, 4]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--sets", "knee"), "--sets has knee; there are brain"),
        (("--seeds", "0"), "must be above 0"),
        (("--eval.seeds", "2"), "--eval.seeds are for train.py and evaluate.py"),
        (("--run-dir", "here"), "--run-dir and --eval.seeds are for"),
        (("--data.root", "nowhere"), "no data folder at nowhere"),
        (("--train.learning-rate", "1"), "holds a run with other settings"),
    ],
)
def test_what_cannot_be_is_said_before_any_run(made, more, message):
    with pytest.raises(SystemExit, match=message):
        reproduce.main([*made[0], *more])


def test_a_damaged_test_image_is_said_before_any_run(made, tiny_root, tmp_path):
    root = shutil.copytree(tiny_root, tmp_path / "sets")
    (root / "Brain_AD/test/Ungood/img/003.png").write_bytes(b"no image")
    with pytest.raises(SystemExit, match=r"Ungood/img/003\.png cannot be read"):
        reproduce.main([*made[0], "--data.root", str(root), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_figures_of_a_part_of_a_published_set_say_so(made, monkeypatch):
    _, out = made
    options, listed = reproduce.cells(made[0])
    for whole in (False, True):
        if whole:
            spec = dataclasses.replace(SETS["brain"], test=20)
            monkeypatch.setitem(SETS, "brain", spec)
        reproduce.write_tables(options, listed, "the command")
        for form in ("md", "tex"):
            text = (out / f"table.{form}").read_text()
            assert ("brain, 20 of 3715 images" in text) != whole
            assert ("cannot be set beside published ones" in text) != whole
        assert [row["images"] for row in csv.DictReader(io.StringIO((out / "table.csv").read_text()))] == ["20", "20"]
        assert {row["published_images"] for row in json.loads((out / "table.json").read_text())["rows"]} == {
            20 if whole else 3715
        }


def test_help_asks_for_no_recipe(capsys):
    with pytest.raises(SystemExit):
        reproduce.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "there is no --config" in shown
    assert "--config NAME" not in shown


def test_without_a_choice_all_of_the_papers_table_is_listed():
    _, listed = reproduce.cells([])
    assert [cell.name for cell in listed[::6]] == ["brain-k0", "brain-k2", "brain-k4", "brain-k8", "brain-k16"]
    assert {len(cell.runs) for cell in listed} == {5}
    assert len({run.directory for cell in listed for run in cell.runs}) == 6 * 5 * 5


def test_published_figures_stand_beside_real_data_and_never_beside_phantoms(tmp_path):
    for phantoms in (False, True):
        more = ["--phantoms"] if phantoms else []
        options, listed = reproduce.cells([*more, "--zero-shot", "--out", str(tmp_path / str(phantoms))])
        options.out.mkdir()
        reproduce.write_tables(options, listed, "the command")
        text = (options.out / "table.md").read_text()
        assert ("0.7863 / 0.7980" in text) != phantoms
        first = next(csv.DictReader(io.StringIO((options.out / "table.csv").read_text())))
        figures = [first[f"mvfa_ad_image_auroc_{of}"] for of in ("paper", "code")]
        assert figures == (["", ""] if phantoms else ["0.7863", "0.798"])
        assert ("MVFA-AD" in text) != phantoms
        assert ("say nothing about real data" in text) == phantoms
        assert (reproduce.SOURCE in (options.out / "table.tex").read_text()) != phantoms

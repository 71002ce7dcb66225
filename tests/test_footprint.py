import dataclasses
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from rich.console import Console

from iqe_jax import scaling
from iqe_jax.chips import Chip, seconds_to_exchange
from iqe_jax.config import ModelConfig, load
from iqe_jax.footprint import (
    Collective,
    Footprint,
    collectives,
    evaluation_footprints,
    footprint_table,
    in_bytes,
    train_footprint,
)
from iqe_jax.scaling import main, predicted_row, topology_devices
from iqe_jax.sharding import make_layout
from iqe_jax.weights import describe

pytestmark = pytest.mark.usefixtures("quick_compile")
ROOT = Path(__file__).parents[1]
PROGRAM = """\
HloModule jit_step, is_scheduled=true
%a (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %all-reduce.1 = (f32[768,8,96]{0,2,1:T(8,128)S(1)}, /*index=1*/bf16[4]{0}) all-reduce(%x, %y), channel_id=1, \
replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, to_apply=%add, metadata={op_name="jit(step)/dot_general"}
  %use = f32[768,8,96]{0,2,1} get-tuple-element(%all-reduce.1), index=0
  %ag = (f32[2,4]{1,0}, f32[16,4]{1,0}) all-gather-start(%z), channel_id=2, replica_groups=[2,8]<=[16], dimensions={0}
  %agd = f32[16,4]{1,0} all-gather-done(%ag)
  %again = f32[16,4]{1,0} all-gather(%z), channel_id=2, replica_groups=[2,8]<=[16], dimensions={0}
  %rs = f32[4]{0} reduce-scatter(%w), channel_id=3, replica_groups={{0,1},{2,3}}, dimensions={0}, to_apply=%add
  %cp = (f32[4]{0}, f32[4]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%w), source_target_pairs={{0,1}}
  ROOT %all-reduce-start.5 = pred[] all-reduce-start(%v), replica_groups={}, to_apply=%or
}
"""


def test_collectives_of_a_program():
    found = collectives(PROGRAM, devices=16)
    assert found == (
        Collective("all-reduce", 768 * 8 * 96 * 4 + 8, 4, ("f32[768,8,96]", "bf16[4]"), "jit(step)/dot_general"),
        Collective("all-gather", 256, 8, ("f32[16,4]",), ""),
        Collective("reduce-scatter", 32, 2, ("f32[4]",), ""),
        Collective("collective-permute", 16, 2, ("f32[4]",), ""),
        Collective("all-reduce", 1, 16, ("pred[]",), ""),
    )


def test_time_of_an_exchange():
    def seconds(kind, group):
        return seconds_to_exchange(Collective(kind, 800, group, (), ""), links=100.0)

    assert seconds("all-reduce", 4) == pytest.approx(12)
    assert seconds("all-gather", 4) == seconds("reduce-scatter", 4) == pytest.approx(6)
    assert seconds("collective-permute", 2) == pytest.approx(8)
    assert seconds("all-reduce", 1) == 0


def test_prediction_is_compute_plus_exchange():
    chip = Chip("v5e", flops=100.0, memory=1000.0, bandwidth=10.0, links=100.0, source="")
    exchange = (Collective("all-reduce", 800, 4, (), ""),)
    parts = {"frozen": 10, "trainable": 10, "batch": 5}
    # 6 passes × 100 FLOPs take 6 s, memory 4 s, the exchange 12 s.
    found = [Footprint("train step", 4, 64, parts, 20, 8, 8, 7, 0, 0, 100.0, 40.0, exchange, 1.0)]
    row = predicted_row(found, found, chip, 4, {"data": 4}, passes=6)
    assert (row.compute, row.communication, row.memory) == (6, 12, 32)
    assert row.efficiency == pytest.approx(6 / 18) and row.images_per_second == pytest.approx(64 / 18)
    # One chip does its own 16 images in 3 s, or in 1.5 s where memory is free: four do 64 in 18 s.
    one = [Footprint("train step", 1, 16, parts, 20, 8, 8, 7, 0, 0, 25.0, 30.0, (), 1.0)]
    row = predicted_row(found, one, chip, 4, {"data": 4}, passes=6)
    assert row.efficiency == pytest.approx(3 / 18) and row.efficiency_flops == pytest.approx(1.5 / 18)


def test_sizes_are_readable():
    assert [in_bytes(n) for n in (12, 1500, 2_500_000, 1.61e10)] == ["12 B", "1.5 kB", "2.5 MB", "16.10 GB"]


def test_published_model_needs_no_weights():
    model = describe(ModelConfig())
    assert model.grid == 17 and model.clip.vision_width == 1024 and model.templates.end == 49407
    assert [len(ids) for ids in model.templates.ids] == [12, 12]


def test_footprint_on_one_device():
    config = load("phantom_fewshot")
    model = describe(config.model)
    layout = make_layout(config.mesh, jax.devices()[:1])
    train = train_footprint(model, config, layout)
    tower, scoring = evaluation_footprints(model, config, layout)
    assert train.collectives == tower.collectives == scoring.collectives == ()
    assert train.parts["optimiser"] == pytest.approx(2 * train.parts["trainable"], rel=0.01)
    assert train.needed >= sum(train.parts.values()) and train.flops > 0 and tower.accessed > 0
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(footprint_table("What it needs", [train, tower, scoring], features=("in memory", 10**9)))
    text = console.export_text()
    for words in ("frozen parameters", "optimiser", "Kept features: 1.00 GB, in memory", "scoring"):
        assert words in text


def test_what_an_image_takes_is_about_what_the_compiler_says():
    config = load("phantom_fewshot")
    model = describe(config.model)
    layout = make_layout(config.mesh, jax.devices()[:1])
    few, more = (
        evaluation_footprints(
            model, dataclasses.replace(config, eval=dataclasses.replace(config.eval, batch_size=size)), layout
        )
        for size in (4, 12)
    )
    each = sum(b.needed - a.needed for a, b in zip(few, more, strict=True)) / 8
    assert model.bytes_at_work / 4 < each < model.bytes_at_work


EIGHT = """
import dataclasses, jax
from iqe_jax.config import load
from iqe_jax.footprint import train_footprint
from iqe_jax.sharding import make_layout
from iqe_jax.weights import describe
assert len(jax.devices()) == 8
config = load("phantom_fewshot")
model = describe(dataclasses.replace(config.model, levels=(6,), iqm_layers=1))
for mesh in (config.mesh, dataclasses.replace(config.mesh, fsdp=4)):
    found = train_footprint(model, config, make_layout(mesh))
    print(*sorted(found.by_kind()), found.parts["trainable"], sum(c.bytes for c in found.collectives))
"""


def run(*arguments, devices):
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_traffic_between_eight_devices():
    data, fsdp = (line.split() for line in run("-c", EIGHT, devices=8).strip().splitlines())
    *kinds, trainable, exchanged = data
    assert kinds == ["all-reduce"]
    # Gradients, and the keys and values of the text prefix that all images share.
    assert 0.5 * int(trainable) < int(exchanged) < 1.5 * int(trainable)
    assert "all-gather" in fsdp and int(fsdp[-2]) < int(trainable)


def test_steps_that_do_not_fall_into_equal_parts_are_refused(tmp_path):
    line = ["--config", "phantom_fewshot", "--measure", "--per-chip", "15", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"train.accumulate is 4; it must divide the 15 images of a step"):
        main([*line, "--train.accumulate", "4"])


def test_the_work_of_one_micro_batch_is_no_prediction_of_a_steps():
    config = load("phantom_fewshot")
    model = describe(config.model)
    layout = make_layout(config.mesh, jax.devices()[:1])
    parted = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulate=4))
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(footprint_table("What it needs", [train_footprint(model, parted, layout)]))
    assert "a micro-batch" in console.export_text()
    with pytest.raises(SystemExit, match=r"compilers count a loop once"):
        main(["--config", "phantom_fewshot", "--topology", "v5e:4x4", "--train.accumulate", "4"])


@pytest.mark.parametrize("name", ["h100:4x4", "v5e", "v5e:", "v5e:4x4:2", "v5e:abc", "v5e:4x", "v5e:0x4"])
def test_a_topology_that_is_none_is_named(name):
    with pytest.raises(SystemExit, match=rf"--topology {name}: expected one of v4, .* such as v5e:4x4"):
        main(["--config", "phantom_fewshot", "--topology", name])


def test_a_missing_tpu_compiler_is_named_with_its_version(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(ValueError, match=r"pip install 'libtpu==[\d.]+\*'"):
        topology_devices("v5e:4x4")


def test_measuring_says_what_it_is(tmp_path):
    arguments = ("--config", "phantom_fewshot", "--measure", "--per-chip", "2", "--repeats", "2")
    arguments += ("--model.levels", "6", "--model.iqm-layers", "1", "--model.start", "random")
    printed = run("-m", "iqe_jax.scaling", *arguments, "--out", str(tmp_path), devices=2)
    assert "MEASURED" in printed and "share its cores" in printed.replace("\n", " ")
    content = json.loads((tmp_path / "scaling.json").read_text())
    assert content["kind"] == "measured" and content["title"].startswith("MEASURED on cpu")
    assert [row["chips"] for row in content["rows"]] == [1, 2] and [row["batch"] for row in content["rows"]] == [2, 4]
    first, second = (row["images_per_second"] / row["chips"] for row in content["rows"])
    assert [row["efficiency"] for row in content["rows"]] == pytest.approx([1, second / first])
    for row in content["rows"]:
        assert row["seconds"] > 0 and math.isclose(row["images_per_second"], row["batch"] / row["seconds"])
    assert (tmp_path / "scaling.md").read_text().startswith("**MEASURED on cpu")
    assert (tmp_path / "scaling.png").stat().st_size > 1000


def test_measuring_takes_as_many_images_a_chip_on_every_mesh(monkeypatch):
    config = load("phantom_fewshot")
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, tensor=2))

    def layout(mesh, devices):  # of more devices than there are
        shape = {"data": len(devices) // mesh.tensor, "tensor": mesh.tensor}
        return SimpleNamespace(mesh=SimpleNamespace(shape=shape), padded=lambda size: size)

    monkeypatch.setattr(scaling, "make_layout", layout)
    monkeypatch.setattr(scaling.jax, "devices", lambda: [SimpleNamespace(device_kind="chip")] * 4)
    monkeypatch.setattr(scaling, "_timed", lambda model, config, layout, size, repeats: 0.5 * size)
    rows = list(scaling.measure(describe(config.model), config, per_chip=3, repeats=1))
    assert [(row.chips, row.batch, row.efficiency) for row in rows] == [(2, 6, 1.0), (4, 12, 0.5)]

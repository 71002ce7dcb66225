"""Meshes of 8 fake devices against one device, and where every array lies."""

import json
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iqe_jax import processes
from iqe_jax.config import MeshConfig, RuleConfig
from iqe_jax.sharding import behind, make_layout, reader_groups

TESTS = Path(__file__).parent
Device = namedtuple("Device", ["process_index", "row"])
MESHES = ["data", "fsdp", "tensor", "mixed"]


@pytest.fixture(scope="module")
def found(tmp_path_factory, quick_compile):
    """What tests/meshes.py found."""
    path = tmp_path_factory.mktemp("meshes") / "found.json"
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": str(TESTS.parent)}
    done = subprocess.run(
        [sys.executable, str(TESTS / "meshes.py"), str(path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


@pytest.mark.parametrize("mesh", MESHES)
def test_loss_gradients_and_five_steps_equal_one_device(found, mesh):
    assert found[mesh]["loss"] < 1e-5
    assert found[mesh]["gradients"] < 1e-5  # in parts of the largest gradient
    assert found[mesh]["steps"] < 1e-5


@pytest.mark.parametrize("mesh", MESHES)
def test_pixels_counted_on_several_devices_are_those_of_one(found, mesh):
    assert found[mesh]["pixels"] == 0


@pytest.mark.parametrize("mesh", MESHES)
def test_batches_taken_on_the_devices_are_those_gathered_on_the_host(found, mesh):
    assert found[mesh]["taken"] == 0 and found[mesh]["taken where"]


@pytest.mark.parametrize("mesh", MESHES)
def test_a_state_lies_where_the_step_compiled_ahead_expects_it(found, mesh):
    assert found[mesh]["ahead"]


@pytest.mark.parametrize("case", ["accumulated", "padded, remat", "padded, accumulated on a mesh"])
def test_padding_accumulation_and_rematerialisation_change_no_loss(found, case):
    assert found[case]["steps"] < 1e-5


@pytest.mark.parametrize(
    ("memory", "asked", "size"),
    [(0, None, 16), (16e9, None, 64), (3e9, None, 8), (1e8, None, 1), (16e9, 5, 5), (0, 5, 5)],
    ids=["cpu", "large", "small", "tiny", "asked", "asked on a cpu"],
)
def test_images_at_once_follow_the_memory(memory, asked, size):
    layout = make_layout(MeshConfig(), jax.devices()[:1])
    assert layout.memory == 0  # a CPU does not say
    vars(layout)["memory"] = int(memory)
    assert layout.at_once(asked, 50_000_000) == size


@pytest.mark.parametrize(("memory", "asked", "size"), [(3e9, None, 64), (1e8, None, 8), (3e9, 5, 8), (0, None, 16)])
def test_images_at_once_are_as_many_on_each_device(memory, asked, size):
    layout = make_layout(MeshConfig(), jax.devices()[:1])
    vars(layout).update(memory=int(memory), batch_shards=8)
    assert layout.at_once(asked, 50_000_000) == size


def test_images_whose_features_all_processes_get_fit_on_every_device(monkeypatch):
    layout = make_layout(MeshConfig(), jax.devices()[:1])
    vars(layout).update(memory=16_000_000_000, batch_shards=256)
    assert layout.gathered_at_once(16384, 4_700_000) == 16384
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert layout.gathered_at_once(16384, 4_700_000) == 256  # 212 fit, made up to what the devices share evenly
    assert layout.gathered_at_once(16384, 470_000) == 2304
    assert layout.gathered_at_once(512, 470_000) == 512
    vars(layout)["memory"] = 0
    assert layout.gathered_at_once(16384, 4_700_000) == 16384


def test_the_least_number_of_all_processes_may_be_large(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    gather = processes.multihost_utils
    larger = np.array([[70_000_000_000]]).view(np.uint8)
    monkeypatch.setattr(gather, "process_allgather", lambda x, tiled: np.asarray(jnp.concatenate([larger, x])))
    assert processes.least(60_000_000_000) == 60_000_000_000


def without_single(split, mesh):
    """A split without the axes that have one device, which XLA leaves out of some names and not of others."""
    kept = [[name for name in axes.split(" × ") if mesh.get(name, 1) > 1] or ["-"] for axes in split.split(" | ")]
    while kept and kept[-1] == ["-"]:
        kept.pop()
    return " | ".join(" × ".join(names) for names in kept)


@pytest.mark.parametrize("mesh", MESHES)
def test_every_array_lies_where_the_golden_says(found, mesh):
    golden = json.loads((TESTS / "shardings.json").read_text())
    golden = {name: without_single(split, found[mesh]["mesh"]) for name, split in golden.items()}
    places = {name: without_single(split, found[mesh]["mesh"]) for name, split in found[mesh]["places"].items()}
    own = {n: s for n, s in places.items() if not n.startswith("opt_state") and "block_1" not in n}
    assert own == golden
    for name, split in places.items():
        if "block_1" in name:
            assert split == places[name.replace("block_1", "block_0")]
        for moment in ("mu", "nu"):
            if f"inner_state/0/{moment}/" in name:
                assert split == places["trainable/" + name.split(f"/{moment}/")[1]]


def test_one_device_is_a_mesh_too():
    layout = make_layout(MeshConfig())
    assert dict(layout.mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert layout.padded(13) == 13
    np.testing.assert_array_equal(layout.rows(5), np.arange(5))
    x = np.random.default_rng(0).random((5, 3))
    np.testing.assert_array_equal(layout.local(layout.place(x, 5)), x.astype(np.float32))


def test_a_mesh_that_does_not_fit_the_devices_is_refused():
    with pytest.raises(ValueError, match="do not make the 1 devices"):
        make_layout(MeshConfig(data=2))
    with pytest.raises(ValueError, match=r"mesh\.rules\.embed is .* twice"):
        make_layout(MeshConfig(rules=RuleConfig(embed=("fsdp", "fsdp"))))


@pytest.mark.parametrize(
    ("held", "groups"),
    [
        ([[0, 1], [2, 3]], [[0], [1]]),
        ([[0, 1, 2, 3], [0, 1, 2, 3]], [[0, 1]]),
        ([[0, 1, 2], [1, 2, 3]], None),
        ([[0, 1, 2], [3]], None),
    ],
    ids=["apart", "the same", "overlapping", "of two sizes"],
)
def test_processes_hold_parts_of_a_batch_of_one_size_that_do_not_overlap(held, groups):
    devices = [Device(process, row) for process, rows in enumerate(held) for row in rows]
    batch = SimpleNamespace(devices_indices_map=lambda _: {d: (slice(d.row, d.row + 1),) for d in devices})
    layout: Any = SimpleNamespace(batch_shards=4, batch=batch, mesh=SimpleNamespace(shape={"data": 4}))
    if groups:
        assert reader_groups(layout) == groups
    else:
        with pytest.raises(ValueError, match="processes would hold overlapping parts of a batch"):
            reader_groups(layout)


def test_a_mesh_that_does_not_fit_the_model_names_every_parameter(found):
    assert "dense/kernel: 6 does not divide by 4 (tensor)" in found["misfit"]
    assert "--mesh.rules" in found["misfit"]
    assert len(jax.devices()) == 1  # as every other test has it


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_arrays_come_to_the_host_while_the_devices_work_on(count):
    said = []

    def made():
        for i in range(count):
            said.append(f"made {i}")
            yield {"a": SimpleNamespace(number=i, copy_to_host_async=lambda i=i: said.append(f"sent {i}"))}

    for tree in behind(made()):
        said.append(f"used {tree['a'].number}")
    turns = [(f"made {i}", f"sent {i}", f"used {i - 1}") for i in range(count + 1)]
    expected = [word for turn in turns for word in turn if word not in ("used -1", f"made {count}", f"sent {count}")]
    assert said == expected

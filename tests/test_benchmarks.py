import dataclasses
import json
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from benchmarks import cost, kernels, model_parts, speed
from benchmarks.measure import Report, Target, in_turns
from iqe_jax.config import load
from iqe_jax.models import clip
from iqe_jax.models.iqe_clip import Features
from iqe_jax.weights import describe

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def model():
    return describe(load("phantom_fewshot").model)


def test_every_section_runs_and_is_written_down(tmp_path):
    speed.main(["--batch", "2", "--repeats", "1", "--pixels", "500000", "--out", str(tmp_path)])
    content = json.loads((tmp_path / "speed.json").read_text())
    rows = {(row["section"], row["name"]): row for row in content["rows"]}
    sections = {section for section, _ in rows}
    expected = {"matrix product", "tower", "text, prompted", "head", "inference", "pixel metrics", "input", "start"}
    expected |= {"query module (IQM)", "training step, kept features", "training step, with the tower"}
    expected |= {"tower's attention, a block"}
    assert sections == expected
    for part in ("tower", "text, prompted", "query module (IQM)", "head", "inference", "training step, kept features"):
        assert {name for section, name in rows if section == part} == {"ours", "PyTorch"}
    assert ("tower's attention, a block", "JAX's own") in rows
    assert all(np.isfinite(row["seconds"]).all() and min(row["seconds"]) > 0 for row in content["rows"])
    assert rows["tower", "ours"]["flops"] > 0 and content["matrix_product_flops"] > 0 and content["batch"] == 2
    # Figures that do not hang on how busy the machine is hold at any size.
    targets = {target["name"]: target for target in content["targets"]}
    assert len(targets) == 12
    for name in ("AUROC, difference from the exact one", "AP, difference from the exact one"):
        assert targets[name]["held"]
    text = (tmp_path / "speed.md").read_text()
    assert "| tower | ours | 2 |" in text and "of the matrix product" in text
    assert (tmp_path / "speed.png").stat().st_size > 1000


def test_batch_is_chosen_by_memory(model):
    class Device:
        def __init__(self, limit, used):
            self.limit, self.used = limit, used

        def memory_stats(self):
            return {"bytes_limit": self.limit, "bytes_in_use": self.used}

    large = model_parts.batch_for_memory(model, Device(2e9, 0))
    small = model_parts.batch_for_memory(model, Device(2e9, 1.9e9))
    assert 1 <= small < large <= 1024 and large & (large - 1) == 0
    assert model_parts.batch_for_memory(model, Device(2e9, 0), limit=4) == 4
    assert model_parts.batch_for_memory(model, jax.devices()[0], limit=2) == 2  # a CPU says nothing of its memory


def compiled_flops(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def test_cost_model_is_what_the_compiler_counts(model, monkeypatch):
    monkeypatch.setattr(clip, "_image_by_image", jax.nn.dot_product_attention)  # what is in a loop counts once
    jax.clear_caches()  # blocks that were traced before have the loop
    frozen = jax.eval_shape(lambda key: meta.unbox(model.init_frozen(key)), jax.random.key(0))
    trainable = jax.eval_shape(lambda key: meta.unbox(model.init(key)), jax.random.key(0))

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def tower(frozen, images):
        return model.features(frozen, images)

    side, found = model.config.image_size, []
    for images in (2, 4):
        counted = compiled_flops(tower, {"vision": frozen["vision"]}, array(images, side, side, 3))
        assert cost.tower(model, images) == pytest.approx(counted, rel=0.05)
        features = Features(
            array(len(model.config.levels), images, model.grid**2, model.clip.vision_width),  # pyright: ignore
            array(images, model.clip.embed_dim),  # pyright: ignore
        )
        head = compiled_flops(
            lambda t, f, x: model.predict(model.head(t, f, x))["segmentation"], trainable, frozen, features
        )
        assert cost.head(model, images) == pytest.approx(head, rel=0.15)
        found.append(head)
    # What does not grow with the images is the prompts' shared prefix.
    assert found[1] < 2 * found[0]


def test_in_turns_warms_up_and_keeps_the_order():
    order = []
    times = in_turns({name: lambda name=name: order.append(name) for name in "ab"}, 2)
    assert order == ["a", "b", "a", "b", "a", "b"] and all(len(seconds) == 2 for seconds in times.values())


def test_a_call_ahead_is_given_before_the_last_is_waited_for():
    given, waited = [], []

    class Pending:
        def __init__(self):
            given.append(self)

        def block_until_ready(self):
            time.sleep(0.01)
            waited.append((given.index(self), len(given)))

    (times,) = in_turns({"": Pending}, 1, turn=0.05, ahead=True).values()
    first, *middle, last = waited  # which call was waited for, and how many had been given by then
    assert first == (0, 1) and last == (len(given) - 1, len(given))
    assert middle and all(count == call + 2 for call, count in middle)
    assert len(times) == 1 and times[0] >= 0.01


def test_a_turn_takes_its_time():
    calls = []
    (times,) = in_turns({"": lambda: time.sleep(0.01) or calls.append(0)}, 2, turn=0.05).values()
    assert 1 + 2 * 2 <= len(calls) <= 1 + 2 * 5 and len(times) == 2 and min(times) >= 0.01


def trace(*events):
    """A trace as the profiler writes it: of a GPU with one stream and of the process that drives it."""
    names = [(1, None, "process_name", "/device:GPU:0"), (2, None, "process_name", "/host:CPU")]
    names += [(1, 7, "thread_name", "Stream #7"), (1, 8, "thread_name", "Steps"), (2, 7, "thread_name", "Stream #7")]
    described = [{"ph": "M", "pid": p, "tid": t, "name": kind, "args": {"name": n}} for p, t, kind, n in names]
    return described + [{"ph": "X", "pid": p, "tid": t, "name": name, "dur": 1e6 * s} for p, t, name, s in events]


def test_a_profile_adds_up_what_ran_on_the_gpu():
    ours = [("nvjet_sm90_tst_128x160", 6), ("gemm_fusion_dot_12", 3), ("nvjet_sm90_tst_64x8", 3), ("Memset 0", 0.3)]
    ours += [
        ("cudnn_generated_fort_native_sdpa_sm90_flash", 0.9),
        ("attention_to_all", 0.6),
        ("tokens_gradient", 1.2),
        ("loop_add_fusion_3", 0.6),
        ("fusion_690", 0.9),
    ]
    ours += [("loop_transpose_fusion_1", 0.3), ("fused_attention", 2.4), ("input_reduce_fusion_4", 0.9), ("what", 0.3)]
    found = kernels.by_kind(trace(*((1, 7, *event) for event in ours), (1, 8, "step", 50), (2, 7, "python", 50)))
    assert found == pytest.approx(
        {
            "products, cuBLAS": 3,
            "gradient of the dense features, one pass": 0.4,
            "products, Triton": 1,
            "attention of the query module, one pass": 0.8,
            "sums, maxima and norms": 0.6,
            "attention of the image tower": 0.5,
            "copies, transpositions, types": 0.2,
            "element by element": 0.2,
            "other": 0.1,
            "all": 6.8,
        }
    )
    kinds = list(found)
    assert (kinds[0], kinds[-1]) == ("products, cuBLAS", "all")
    assert kernels.by_kind(trace((2, 7, "python", 50))) == {}


def test_on_a_gpu_other_figures_have_to_hold(model, monkeypatch):
    class Card:
        device_kind = "NVIDIA H200"

    half = dataclasses.replace(model, config=dataclasses.replace(model.config, dtype="bfloat16"))
    report = Report(1, facts={"seconds to compile the training step": 1.0})
    for section, seconds, flops in (("tower", 10.0, 6000e12), ("inference", 10.0, 6100e12)):
        report.add(section, "ours", [seconds], images=20, flops=flops)
    report.add("tower", "PyTorch", [6.0], images=10)
    report.add("training step, kept features", "ours", [0.8], images=20)
    parts = SimpleNamespace(model=half, device="gpu", batch=20, peer_images=10)
    monkeypatch.setattr(jax, "devices", lambda: [Card()])
    model_parts._targets(parts, report)
    found = {target.name: (target.value, target.held) for target in report.targets}
    assert found["tower ÷ PyTorch's tower, an image"] == (pytest.approx(10 / 12), True)
    assert found["tower, share of the peak rate"] == (pytest.approx(600 / 989), True)
    assert found["inference, share of the peak rate"] == (pytest.approx(610 / 989), True)
    name = "training step on kept features, times the tower's images a second"
    assert found[name] == (pytest.approx(12.5), True)


def test_targets_say_whether_they_hold():
    report = Report(1)
    report.target("share", 0.9, 0.8, at_least=True)
    report.target("ratio", 1.2, 1.0)
    assert [target.held for target in report.targets] == [True, False]
    assert str(Target("ratio", 1.2, 1.0)).startswith("MISS  ratio: 1.2 (target ≤ 1)")


def test_a_profile_is_of_a_gpu():
    with pytest.raises(SystemExit, match="--device is cpu; add --device gpu"):
        speed.main(["--profile"])

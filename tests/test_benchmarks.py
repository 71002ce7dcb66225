import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from benchmarks import cost, model_parts, speed
from benchmarks.measure import Report, Target, in_turns
from iqe_jax.config import load
from iqe_jax.models import layers
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
    expected |= {"training step, kept features", "training step, with the tower"}
    assert sections == expected
    for part in ("tower", "head", "training step, kept features"):
        assert {name for section, name in rows if section == part} == {"ours", "PyTorch"}
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
    monkeypatch.setattr(layers, "_image_by_image", jax.nn.dot_product_attention)  # what is in a loop counts once
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


def test_targets_say_whether_they_hold():
    report = Report(1)
    report.target("share", 0.9, 0.8, at_least=True)
    report.target("ratio", 1.2, 1.0)
    assert [target.held for target in report.targets] == [True, False]
    assert str(Target("ratio", 1.2, 1.0)).startswith("MISS  ratio: 1.2 (target ≤ 1)")

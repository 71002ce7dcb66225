"""Programs with the image tower: which of them oneDNN multiplies for, and that it changes nothing else."""

import platform
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from iqe_jax import programs
from iqe_jax.config import load
from iqe_jax.models.layers import _image_by_image, product
from iqe_jax.weights import describe

ON_X86 = platform.machine().lower() in ("x86_64", "amd64")


def model(name, **settings):
    config = load(name).model
    return describe(type(config)(**{**vars(config), **settings}))


def test_large_float32_towers_are_multiplied_by_onednn():
    large = programs.ONEDNN if ON_X86 else None
    assert programs.tower_options(model("brain_fewshot")) == large
    assert programs.tower_options(model("brain_fewshot", dtype="bfloat16")) is None
    assert programs.tower_options(model("phantom_fewshot")) is None


def test_options_that_jaxlib_does_not_know_are_left_out(monkeypatch):
    monkeypatch.setattr(programs, "ONEDNN", {"xla_cpu_of_another_time": True})
    monkeypatch.setattr(programs, "_known", programs._known.__wrapped__)  # asked anew
    assert programs.tower_options(model("brain_fewshot")) is None


# Where a test before has turned JAX's compile cache on, as cli.py does, and compiling takes long enough to be kept.
@pytest.mark.filterwarnings("ignore:Error writing persistent compilation cache entry.*ToProto")
def test_a_program_is_the_same_by_onednn(monkeypatch):
    small = model("phantom_fewshot", start="random")
    frozen = jax.jit(lambda key: meta.unbox(small.init_frozen(key)))(jax.random.key(0))
    images = jax.random.uniform(jax.random.key(1), (3, 96, 96, 3))

    @partial(programs.TowerProgram, static_argnames="model")
    def run(model, frozen, images):
        return model.features(frozen, images)

    plain = run(small, frozen, images)
    monkeypatch.setattr(programs, "LEAST_WIDTH", 1)
    used = "__onednn_fusion" in run.lower(small, frozen, images).compile().as_text()
    assert used or not ON_X86
    for ours, theirs in zip(jax.tree.leaves(plain), jax.tree.leaves(run(small, frozen, images)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5 * float(jnp.abs(ours).max()))


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_attention_image_by_image_is_attention(kind):
    for tokens, batch in ((20, 5), (300, 3), (300, 9)):  # a loop of single images, of several, and of none
        key = jax.random.key(tokens)
        query, of, value = 3 * jax.random.normal(key, (3, batch, tokens, 4, 16), jnp.dtype(kind))
        expected = jax.nn.dot_product_attention(*(x.astype(jnp.float32) for x in (query, of, value)))
        found = jax.jit(_image_by_image)(query, of, value)
        assert found.dtype == query.dtype
        np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=2e-5 if kind == "float32" else 0.05)


def test_products_of_bfloat16_are_summed_in_float32():
    a, b = jax.random.normal(jax.random.key(0), (2, 300, 300), jnp.bfloat16)
    exact = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    found = jax.jit(product)(a, b)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=2**-8, atol=1e-4)
    gradient = jax.grad(lambda a: product(a, b).astype(jnp.float32).sum())(a)
    np.testing.assert_allclose(
        np.asarray(gradient, np.float64)[0], np.asarray(b, np.float64).sum(1), rtol=0.02, atol=0.1
    )

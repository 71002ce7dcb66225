"""The one-pass attention kernels against plain JAX, run by Pallas' interpreter; and what stands around them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from iqe_jax.models import fused_attention, fused_kernels, layers
from iqe_jax.models.shared import Shared

SCALE = 0.2


def drawn(batch, tokens, dim, rows, dtype):
    draw, shapes = np.random.default_rng(0), ((batch, rows, dim), (batch, tokens, dim), (batch, rows, dim))
    return tuple(jnp.asarray(draw.standard_normal(shape, np.float32), dtype) for shape in shapes)


def distance(found, reference):
    found, reference = (np.asarray(x, np.float64) for x in (found, reference))
    return np.linalg.norm(found - reference) / np.linalg.norm(reference)


# Neither number of tokens is a multiple of a block's; 384 is no power of two.
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize("tokens, dim, rows", [(41, 384, 16), (7, 128, 32)])
def test_kernels_are_the_formula_and_its_gradient(tokens, dim, rows, dtype, tolerance):
    arrays = drawn(3, tokens, dim, rows, dtype)

    def formula(rows, tokens):
        weights = jax.nn.softmax(jnp.einsum("nrd,nld->nrl", rows, tokens) * SCALE)
        return jnp.einsum("nrl,nld->nrd", weights, tokens)

    queries, context, gradient = (x.astype(jnp.float32) for x in arrays)
    attended, back = jax.vjp(formula, queries, context)
    of_rows, of_tokens = back(gradient)

    for forth, backward, how in (
        (fused_kernels.kernel, fused_kernels.kernel_back, {"interpret": True}),
        (fused_attention.plain, fused_attention.plain_back, {}),
    ):
        found, total = forth(*arrays[:2], scale=SCALE, **how)
        assert distance(found, attended) < tolerance
        mean = (found.astype(jnp.float32) * gradient).sum(-1)
        rows_back, weights, logits = backward(*arrays, total, mean, scale=SCALE, **how)
        assert distance(rows_back, of_rows) < tolerance
        np.testing.assert_allclose(np.asarray(weights, np.float32).sum(1), 1, atol=tolerance)
        factors = jnp.einsum("nlr,nrd->nld", weights, gradient) + jnp.einsum("nlr,nrd->nld", logits, queries)
        assert distance(factors, of_tokens) < tolerance


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize("tokens, dim, rows", [(41, 384, (16, 32, 2)), (7, 128, (16,))])
def test_kernel_of_the_gradient_is_its_sum(tokens, dim, rows, dtype, tolerance):
    draw, shapes = np.random.default_rng(2), [(3, tokens, dim), (3, 1, dim), (3, tokens)]
    shapes += [shape for count in rows for shape in ((3, tokens, count), (3, count, dim))]
    arrays = [jnp.asarray(draw.standard_normal(shape, np.float32), dtype) for shape in shapes]
    array, bias, shares, *factors = (np.asarray(x, np.float64) for x in arrays)
    expected = shares[..., None] * (array + bias)
    expected += sum(left @ right for left, right in zip(factors[::2], factors[1::2], strict=True))
    for found in (
        fused_kernels.kernel_gradient(*arrays, interpret=True),
        fused_attention.plain_gradient(*arrays),
    ):
        assert found.dtype == dtype
        assert distance(found, expected) < tolerance


def test_shared_attends_the_same_with_and_without_the_kernels(monkeypatch):
    def loss(rows, tokens, bias):
        shared = Shared(tokens, (16, 16, 16), bias)
        attended, total = shared.attend(rows, SCALE)
        return (jnp.sin(attended).sum() + total.sum() + shared.unit_dot(rows + attended).std()).astype(jnp.float32)

    rows, tokens, _ = drawn(4, 9, 128, 16, jnp.float32)
    rows, tokens = rows.reshape(2, 2, 16, 128), tokens.reshape(2, 2, 9, 128)
    bias = tokens[:, :1, :1] / 2
    found = []
    for fits in (False, True):
        monkeypatch.setattr(fused_attention, "fits", lambda *_, fits=fits: fits)
        found.append(jax.value_and_grad(loss, (0, 1, 2))(rows, tokens, bias))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *found)


# Less than a block of tokens, one whole block, and several of which the last is not full.
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize("tokens, dim", [(5, 32), (64, 64), (150, 64)])
def test_kernel_of_all_tokens_is_attention(tokens, dim, dtype, tolerance):
    draw = np.random.default_rng(1).standard_normal((3, 2, tokens, 3, dim), np.float32)
    arrays = jnp.asarray(2 * draw, dtype)
    found = fused_kernels.kernel_all(*arrays, interpret=True)
    assert found.dtype == dtype
    assert distance(found, jax.nn.dot_product_attention(*arrays.astype(jnp.float32))) < tolerance


# At full size, where the interpreter would take long; whether Triton takes what comes of it only a GPU can tell.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_kernels_are_lowered_to_triton_where_no_gpu_is():
    def half(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    def single(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    tokens, rows, image = half(4, 289, 768), half(4, 16, 768), half(4, 290, 16, 64)
    factors = [half(4, *shape) for count in (16, 16, 2) for shape in ((289, count), (count, 768))]
    hopper = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", 132, "cuda"))
    for kernel, arrays in (
        (partial(fused_kernels.kernel, scale=SCALE), (rows, tokens)),
        (partial(fused_kernels.kernel_back, scale=SCALE), (rows, tokens, rows, single(4, 16), single(4, 16))),
        (fused_kernels.kernel_gradient, (tokens, half(4, 1, 768), single(4, 289), *factors)),
        (fused_kernels.kernel_all, (image, image, image)),
    ):
        with use_abstract_mesh(hopper):
            text = jax.jit(kernel).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("stablehlo.custom_call") == 1 and "triton" in text


def test_kernels_are_for_one_hopper_gpu_and_known_sizes(monkeypatch):
    monkeypatch.setattr(fused_attention, "capability", lambda: 9.0)
    rows, tokens, _ = drawn(2, 9, 256, 16, jnp.bfloat16)
    image = jnp.zeros((2, 290, 3, 64), jnp.bfloat16)
    assert fused_attention.fits(rows, tokens) and fused_attention.fits_all(image)
    assert not fused_attention.fits_all(image.astype(jnp.float32))
    assert not fused_attention.fits_all(jnp.tile(image, (1, 2, 1, 1)))
    assert not fused_attention.fits_all(jnp.tile(image, 2))
    assert not fused_attention.fits(rows.astype(jnp.float32), tokens.astype(jnp.float32))
    assert not fused_attention.fits(rows[:, :12], tokens)
    assert not fused_attention.fits(rows[..., :96], tokens[..., :96])
    assert not fused_attention.fits(jnp.tile(rows, (1, 4, 1)), tokens)
    assert not fused_attention.fits(jnp.tile(rows, 8), jnp.tile(tokens, 8))
    monkeypatch.setattr(fused_attention, "find_spec", lambda name: None)
    assert not fused_attention.fits(rows, tokens) and not fused_attention.fits_all(image)
    monkeypatch.setattr(fused_attention, "find_spec", lambda name: name)
    monkeypatch.setattr(fused_attention, "whole", lambda: False)
    assert not fused_attention.fits(rows, tokens) and not fused_attention.fits_all(image)
    monkeypatch.setattr(fused_attention, "whole", lambda: True)
    monkeypatch.setattr(fused_attention, "capability", lambda: 8.0)
    assert not fused_attention.fits(rows, tokens) and not fused_attention.fits_all(image)
    assert layers.capability() == 0.0  # of a CPU

"""The fast forms against textbook ones, and each setting against what it says it does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import linen as nn
from flax.core import meta

from iqe_jax import train_state
from iqe_jax.config import MeshConfig, ModelConfig, TrainConfig
from iqe_jax.models import iqm, layers
from iqe_jax.models.clip import (
    CLIP_MEAN,
    CLIP_STD,
    ClipConfig,
    PatchEmbedding,
    Templates,
    TextTower,
    _image_by_image,
    resize_positions,
)
from iqe_jax.models.iqe_clip import INITIAL_TEMPERATURE, IqeClip, blur_matrix, upsampling_matrix
from iqe_jax.models.iqm import BERT_EPS, Iqm, QueryAttention, reads
from iqe_jax.models.layers import ACTIVATIONS, LayerNorm, product
from iqe_jax.models.shared import Shared
from iqe_jax.optim import optimiser
from iqe_jax.sharding import make_layout
from iqe_jax.train_state import Batch, objective
from tests import compiled

CLIP = ClipConfig(
    image_size=24,
    patch_size=8,
    vision_width=64,
    vision_layers=2,
    vision_heads=1,
    embed_dim=128,
    text_layers=3,
    text_heads=2,
    context_length=20,
    vocab_size=50,
)
CONFIG = ModelConfig(image_size=24, levels=(1, 2), iqm_layers=2, iqm_heads=4, iqm_width=96, learnable_tokens=3, sigma=2)
TEMPLATES = Templates(((48, 3, 4, 5), (48, 3, 9, 8, 7, 6)), 49)  # of different length


def model(**settings):
    return IqeClip(CLIP, dataclasses.replace(CONFIG, **settings), TEMPLATES)


def drawn(init, *inputs):
    """Parameters of the shapes that `init` gives, all of them noise, so that no bias or scale is at its start."""
    draw = np.random.default_rng(0)
    shapes = meta.unbox(jax.eval_shape(init, jax.random.key(0), *inputs))

    def values(path, x):
        centre = {"scale": 1.0, "prompt_temp": INITIAL_TEMPERATURE, "logit_scale": INITIAL_TEMPERATURE}
        return jnp.asarray(draw.normal(centre.get(path[-1].key, 0.0), 0.1, x.shape), jnp.float32)

    return jax.tree.map_with_path(values, shapes)


@pytest.fixture(scope="module")
def weights():
    return drawn(model().init), drawn(model().init_frozen)


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).random((3, 24, 24, 3), np.float32)


@jax.jit
def encode(text, ids, ends):
    return TextTower(CLIP).apply({"params": text}, ids, ends, method="encode")


@jax.jit
def encode_prompted(text, learnable, class_tokens):
    return TextTower(CLIP).apply({"params": text}, TEMPLATES, learnable, class_tokens, method="encode_prompted")


# ------------------------------------------------------------------------------------------------ textbook forms


def norm(x, parameters, eps=1e-5):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + eps) * parameters["scale"] + parameters["bias"]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gelu(x):
    return np.asarray(jax.scipy.stats.norm.cdf(x) * x)


def attention(query, key, value, mask=0.0):
    """[tokens, heads, head_dim] each."""
    logits = np.einsum("qhe,khe->hqk", query, key) / np.sqrt(query.shape[-1]) + mask
    return np.einsum("hqk,khe->qhe", softmax(logits), value)


def block(x, p, mask):
    h = norm(x, p["ln_1"])
    qkv = np.einsum("tw,wche->cthe", h, p["attn"]["qkv"]["kernel"]) + p["attn"]["qkv"]["bias"][:, None]
    x = x + np.einsum("the,hew->tw", attention(*qkv, mask), p["attn"]["out"]["kernel"]) + p["attn"]["out"]["bias"]
    h = gelu(norm(x, p["ln_2"]) @ p["mlp"]["fc"]["kernel"] + p["mlp"]["fc"]["bias"])
    return x + h @ p["mlp"]["proj"]["kernel"] + p["mlp"]["proj"]["bias"]


def textbook_text(text, learnable, class_tokens, context=20):
    """Each image and template by itself, padded to the whole context, with every slot in the sequence."""
    mask = np.triu(np.full((context, context), -np.inf), 1)
    rows = []
    for tokens in class_tokens:
        row = []
        for ids in TEMPLATES.ids:
            sequence = np.concatenate([text["token_embedding"][list(ids)], tokens])
            sequence = sequence + text["position_embedding"][: len(sequence)]
            x = np.concatenate([sequence[:1], learnable[0], sequence[1:]])
            last = len(x) - 1
            x = np.concatenate([x, np.ones((context - len(x), x.shape[1]), np.float32)])
            for i in range(CLIP.text_layers):
                if 0 < i < len(learnable):
                    x[1 : 1 + learnable.shape[1]] = learnable[i]
                x = block(x, text[f"block_{i}"], mask)
            row.append(x[last])
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_prompted_text_tower(weights, depth):
    text = jax.tree.map(np.asarray, weights[1]["text"])
    draw = np.random.default_rng(1)
    learnable = draw.normal(size=(depth, 3, 128)).astype(np.float32)
    class_tokens = draw.normal(size=(2, 4, 128)).astype(np.float32)
    found = encode_prompted(text, learnable, class_tokens)
    np.testing.assert_allclose(found, textbook_text(text, learnable, class_tokens), rtol=0, atol=2e-5)


def test_no_learnable_tokens_leaves_the_plain_text_tower(weights):
    """With no prompt tokens and a token's own embedding as class token, the prompted way is the plain one."""
    text = weights[1]["text"]
    class_tokens = jnp.broadcast_to(text["token_embedding"][11], (1, 1, 128))
    prompted = encode_prompted(text, jnp.zeros((1, 0, 128)), class_tokens)
    projected = TextTower(CLIP).apply({"params": text}, prompted, method="project")
    for row, ids in enumerate(TEMPLATES.ids):
        plain = encode(text, jnp.array([[*ids, 11]]), jnp.array([len(ids)]))
        np.testing.assert_allclose(projected[0, row], plain[0], atol=2e-5)


def textbook_iqm(p, query, dense, text, heads):
    """Post-norm decoder on one image and level, all keys and values formed."""

    def attend(x, context, q):
        def project(name, y):
            return np.einsum("td,dhe->the", y, q[name]["kernel"]) + q[name]["bias"]

        attended = attention(project("query", x), project("key", context), project("value", context))
        out = np.einsum("the,hed->td", attended, q["out"]["kernel"]) + q["out"]["bias"]
        return norm(x + out, q["norm"], BERT_EPS)

    x = norm(query, p["layernorm"], BERT_EPS)
    for i in range(2):
        q = p[f"layer_{i}"]
        x = attend(x, x, q["attention"])
        x = attend(x, dense, q["crossattention"])
        x = attend(x, text, q["text_crossattention"])
        hidden = gelu(x @ q["intermediate_query"]["kernel"] + q["intermediate_query"]["bias"])
        out = hidden @ q["output_query"]["kernel"] + q["output_query"]["bias"]
        x = norm(x + out, q["output_norm"], BERT_EPS)
    return x


def test_query_module(weights):
    p = jax.tree.map(np.asarray, weights[0]["iqm"])
    draw = np.random.default_rng(2)
    query, dense, text = (draw.normal(size=s).astype(np.float32) for s in ((3, 2, 128), (2, 3, 9, 128), (3, 2, 128)))

    @jax.jit
    def features(query, dense, text):
        return Iqm(128, 2, 4, 96).apply({"params": p}, query, Shared(dense, reads(2, 4)), text)

    found = features(query, dense, text)
    for level in range(2):
        for image in range(3):
            expected = textbook_iqm(p, query[image], dense[level, image], text[image], 4)
            np.testing.assert_allclose(found[level, image], expected, atol=2e-5)


def test_norms_of_the_query_module_have_eps_1e_12():
    x = np.random.default_rng(0).normal(0, 1e-4, (1, 2, 64)).astype(np.float32)  # of a variance that a larger ε drowns
    expected = torch.nn.functional.layer_norm(torch.from_numpy(x), (64,), eps=1e-12)
    start, attention = Iqm(64, 0, 4, 96), QueryAttention(64, 4)
    params = {"params": {"layernorm": {"scale": jnp.ones(64), "bias": jnp.zeros(64)}}}
    np.testing.assert_allclose(start.apply(params, x, Shared(jnp.zeros((1, 1, 9, 64)), ()), x)[0], expected, rtol=1e-3)
    params = jax.tree.map(jnp.zeros_like, meta.unbox(attention.init(jax.random.key(0), x, x)))
    params["params"]["norm"]["scale"] = jnp.ones(64)
    np.testing.assert_allclose(attention.apply(params, x, x), expected, rtol=1e-3)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_folding_changes_neither_values_nor_gradients(dropout):
    draw = np.random.default_rng(3)
    x, context = (draw.normal(size=s).astype(np.float32) for s in ((2, 2, 64), (2, 7, 64)))
    module = QueryAttention(64, 4, dropout=dropout)
    params = drawn(module.init, x, context)
    key = {"dropout": jax.random.key(5)}

    def total(params, x, context, folded):
        read = Shared(context, (8, 8)) if folded else context
        return (module.apply(params, x, read, rngs=key) * np.arange(64)).sum()

    for value in ("value", "gradient"):
        function = total if value == "value" else jax.grad(total, argnums=(0, 1, 2))
        with jax.default_matmul_precision("float32"):
            one, other = (jax.jit(function, static_argnums=3)(params, x, context, folded) for folded in (False, True))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-3), one, other)


def test_gradient_of_shared_tokens_is_that_of_each_product_by_itself():
    draw = np.random.default_rng(8)
    array, bias, x = (draw.normal(size=s).astype(np.float32) for s in ((2, 7, 16), (1, 1, 16), (2, 3, 16)))

    def attend(x, tokens):
        weights = jax.nn.softmax(jnp.einsum("brd,bld->blr", x, tokens) / 4, 1)
        return jnp.einsum("blr,bld->brd", weights, tokens)

    def total(array, bias, x, together):
        read, tokens = Shared(array, (3, 3, 1, 1, 4), bias), array + bias
        one = read.attend(x, 0.25)[0] if together else attend(x, tokens)
        other = read.attend(one[:, :1] * x[0, 0], 0.25)[0] if together else attend(one[:, :1] * x[0, 0], tokens)
        axes = jnp.concatenate([one, other], 1)
        unit = tokens / jnp.linalg.norm(tokens, axis=-1, keepdims=True)
        found = read.unit_dot(axes) if together else jnp.einsum("bld,brd->blr", unit, axes)
        tokens = read.tokens() if together else tokens  # read otherwise, too
        return (found**3).sum() + (one**2).sum() + (other**3).sum() + (tokens**2).sum()

    gradient = jax.jit(jax.value_and_grad(total, (0, 1, 2)), static_argnums=3)
    with jax.default_matmul_precision("float32"):
        one, other = (gradient(array, bias, x, together) for together in (True, False))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), one, other)


def test_products_of_a_float32_step_are_full_float32_on_the_way_back_too(weights, pixels):
    features = compiled.features(model(), weights[1], pixels)
    batch = Batch(features.patch_tokens, features.image_features, np.ones((3, 24, 24)), np.ones(3), np.ones(3))

    def loss(trainable):
        return objective(model(), trainable, weights[1], batch)[0]

    counts = []
    for function in (loss, jax.grad(loss)):
        lines = jax.jit(function).lower(weights[0]).as_text().splitlines()
        products = [line for line in lines if "stablehlo.dot_general" in line]
        assert not [line for line in products if "precision = [HIGHEST, HIGHEST]" not in line]
        counts.append(len(products))
    assert counts[1] > counts[0] > 20


def test_updates_are_those_of_the_official_adam():
    """SPEC section 5. A first gradient as small as ε halves the first step, which tells its size."""
    start = {"kernel": torch.zeros(3), "prompt_temp": torch.zeros(1)}
    gradients = [
        {"kernel": [1e-8, -0.5, 2.0], "prompt_temp": [0.3]},
        {"kernel": [3e-8, 0.1, 2.0], "prompt_temp": [-0.1]},
    ]
    groups = [{"params": [start["kernel"]], "lr": 1e-4}, {"params": [start["prompt_temp"]], "lr": 0.01}]
    official = torch.optim.Adam(groups, betas=(0.5, 0.999), eps=1e-8)
    params = {name: jnp.zeros(len(x)) for name, x in start.items()}
    ours = optimiser(1e-4, 0.01)
    state = ours.init(params)
    for gradient in gradients:
        for name, values in gradient.items():
            start[name].grad = torch.tensor(values)
        official.step()
        updates, state = jax.jit(ours.update)({name: jnp.array(x) for name, x in gradient.items()}, state, params)
        params = optax.apply_updates(params, updates)
        for name, expected in start.items():
            np.testing.assert_allclose(params[name], expected, rtol=2e-5)


def test_a_learning_rate_for_no_parameter_is_an_error():
    with pytest.raises(KeyError, match="no parameter 'prompt_temp'"):
        optimiser(1e-4, 1e-2).init({"kernel": jnp.ones(2)})


def test_an_update_copies_no_moment():
    params = {"kernel": jnp.ones((512, 512)), "prompt_temp": jnp.ones(())}
    state = optimiser(1e-4, 1e-2).init(params)

    def update(params, state, gradients):
        updates, state = optimiser(1e-4, 1e-2).update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    memory = jax.jit(update, donate_argnums=(0, 1)).lower(params, state, params).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < params["kernel"].nbytes / 2


def test_maps_are_the_two_channel_softmax_upsampled():
    logits = np.random.default_rng(4).normal(size=(2, 3, 9, 2)).astype(np.float32)
    channels = torch.from_numpy(logits).permute(0, 1, 3, 2).reshape(6, 2, 3, 3)
    up = torch.nn.functional.interpolate(channels, (24, 24), mode="bilinear", align_corners=True)
    expected = up.softmax(1)[:, 1].reshape(2, 3, 24, 24)
    found = compiled.maps(model(), jnp.asarray(logits[..., 1] - logits[..., 0]))
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(("grid", "side"), [(1, 5), (2, 2), (5, 40), (17, 240), (7, 3)])
def test_upsampling(grid, side):
    points = torch.arange(grid, dtype=torch.float32).square()[None, None, :, None]
    expected = torch.nn.functional.interpolate(points, (side, 1), mode="bilinear", align_corners=True)[0, 0, :, 0]
    np.testing.assert_allclose(upsampling_matrix(grid, side) @ points[0, 0, :, 0].numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize(("side", "sigma"), [(40, 8.0), (96, 3.0), (10, 8.0)])
def test_blur(side, sigma):
    from scipy.ndimage import gaussian_filter

    image = np.random.default_rng(5).random((side, side))
    blur = blur_matrix(side, sigma)
    expected = gaussian_filter(image, sigma, truncate=4, mode="reflect")
    np.testing.assert_allclose(blur @ image @ blur.T, expected, atol=1e-6)


def test_no_blur():
    np.testing.assert_array_equal(blur_matrix(7, 0), np.eye(7))


# ------------------------------------------------------------------------------------------------ the image tower


@pytest.mark.parametrize("side", [24, 29, 8])
def test_patches_are_a_strided_convolution(side):
    images = np.random.default_rng(6).random((2, side, side, 3), np.float32)
    embedding = PatchEmbedding(8, 16)
    params = meta.unbox(embedding.init(jax.random.key(0), images))
    kernel = torch.from_numpy(np.array(params["params"]["kernel"]).transpose(3, 2, 0, 1).copy())
    convolved = torch.conv2d(torch.from_numpy(images.transpose(0, 3, 1, 2)), kernel, stride=8)
    np.testing.assert_allclose(embedding.apply(params, images), convolved.flatten(2).swapaxes(1, 2), atol=1e-5)


@pytest.mark.parametrize("grid", [17, 24, 5])
def test_position_table_is_resized_as_torch_does(grid):
    table = np.random.default_rng(7).normal(size=(24 * 24 + 1, 5)).astype(np.float32)
    patches = torch.from_numpy(table[1:].reshape(24, 24, 5)).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(patches, (grid, grid), mode="bicubic", antialias=True)
    expected = np.concatenate([table[:1], resized[0].permute(1, 2, 0).reshape(-1, 5).numpy()])
    np.testing.assert_allclose(resize_positions(jnp.asarray(table), grid), expected, atol=1e-5)


def test_clip_normalisation_is_of_the_pixels(weights, pixels):
    normalised = (pixels - np.array(CLIP_MEAN, np.float32)) / np.array(CLIP_STD, np.float32)
    expected = compiled.features(model(), weights[1], normalised)
    found = compiled.features(model(normalisation="clip"), weights[1], pixels)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def test_blocks_of_a_tower_are_traced_once(weights, pixels):
    program = jax.make_jaxpr(model().features)(weights[1], pixels)
    blocks = [x.params["jaxpr"] for x in program.eqns if x.params.get("name") == "_traced_once"]
    assert len(blocks) == CLIP.vision_layers and all(block is blocks[0] for block in blocks)


def test_levels_are_counted_from_one(weights, pixels):
    both = compiled.features(model(), weights[1], pixels).patch_tokens
    np.testing.assert_array_equal(compiled.features(model(levels=(2,)), weights[1], pixels).patch_tokens[0], both[1])


def test_activations():
    x = torch.linspace(-4, 4, 41)
    np.testing.assert_allclose(ACTIVATIONS["gelu"](x.numpy()), torch.nn.functional.gelu(x), atol=1e-6)
    np.testing.assert_allclose(ACTIVATIONS["quick_gelu"](x.numpy()), x * torch.sigmoid(1.702 * x), atol=1e-6)


@pytest.mark.parametrize("eps", [1e-5, 1e-6, 1e-12])
def test_layer_norm_uses_its_eps(eps):
    x = np.random.default_rng(8).normal(0, 1e-3, (4, 32)).astype(np.float32)  # variance near the larger eps
    found = LayerNorm(eps).apply({"params": {"scale": jnp.full(32, 2.0), "bias": jnp.ones(32)}}, x)
    layer = torch.nn.functional.layer_norm(torch.from_numpy(x), (32,), eps=eps)
    np.testing.assert_allclose(found, 2 * layer + 1, atol=1e-5)


def test_the_trained_norm_in_the_text_tower_has_eps_1e_6(weights):
    x = np.random.default_rng(9).normal(0, 1e-3, (2, 2, 128)).astype(np.float32)
    found = model()._adapter().apply({"params": weights[0]}, x, method="norm")
    p = jax.tree.map(np.asarray, weights[0]["prompts"]["prompt_norm"])
    np.testing.assert_allclose(found, norm(x, p, 1e-6), atol=1e-4)
    assert np.abs(found - norm(x, p, 1e-5)).max() > 1e-2


# ------------------------------------------------------------------------------------------------ settings


def head(weights, pixels, key=None, dropout=0.0, **settings):
    m = model(**settings)
    features = compiled.features(m, weights[1], pixels)
    return compiled.head(m, weights[0], weights[1], features, dropout=dropout, dropout_key=key)


def test_the_activation_setting_reaches_both_towers(weights, pixels):
    one, other = model(), model(activation="quick_gelu")
    features = compiled.features(one, weights[1], pixels)
    assert np.abs(compiled.features(other, weights[1], pixels).patch_tokens - features.patch_tokens).max() > 1e-3
    texts = [compiled.head(m, *weights, features)["text_embeddings"] for m in (one, other)]
    assert np.abs(texts[0] - texts[1]).max() > 1e-4


def test_pixels_are_normalised_as_clip_was_trained():
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    assert (list(CLIP_MEAN), list(CLIP_STD)) == (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)


def test_norms_and_softmaxes_of_a_bfloat16_model_are_float32(weights, pixels):
    m = model(dtype="bfloat16")

    def predict(trainable, frozen, pixels):
        return m.predict(m.head(trainable, frozen, m.features(frozen, pixels)))

    lines = jax.jit(predict).lower(*weights, pixels).as_text().splitlines()
    for name in ("exponential", "rsqrt", "sqrt"):
        found = [line for line in lines if f".{name} " in line]
        assert found and not [line for line in found if "bf16" in line], name


def test_dropout_acts_only_where_a_key_is_given(weights, pixels):
    off = head(weights, pixels)["query_features"]
    np.testing.assert_array_equal(head(weights, pixels, dropout=0.5)["query_features"], off)
    np.testing.assert_array_equal(head(weights, pixels, jax.random.key(0))["query_features"], off)
    one, again, other = (head(weights, pixels, jax.random.key(i), 0.5)["query_features"] for i in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - off).max() > 0.1
    assert np.abs(one - other).max() > 0.1


def test_dropout_is_where_the_official_decoder_has_it(weights, monkeypatch):
    """SPEC section 4: on the query tokens, on all attention weights, and on each projection's output."""
    seen, real, m = [], iqm._dropout, model()
    monkeypatch.setattr(iqm, "_dropout", lambda module, x, rate: seen.append((x.shape, rate)) or real(module, x, rate))
    features = jax.eval_shape(lambda pixels: m.features(weights[1], pixels), np.zeros((3, 24, 24, 3), np.float32))
    dropped = {"dropout": 0.25, "dropout_key": jax.random.key(0)}
    jax.eval_shape(lambda features: m.head(weights[0], weights[1], features, **dropped), features)
    levels, images, queries, patches, heads, dim = 2, 3, 2, 9, CONFIG.iqm_heads, 128
    few, many = (levels, images, queries, queries, heads), (levels, images, patches, queries * heads)
    outputs = (levels, images, queries, dim)
    layer = [few, outputs, many, outputs, few, outputs, outputs]  # to itself, the patches, the text; the MLP
    assert seen == [(shape, 0.25) for shape in (outputs, *layer * CONFIG.iqm_layers)]


def test_what_dropout_leaves_is_scaled_up():
    class Drop(nn.Module):
        @nn.compact
        def __call__(self, x):
            return iqm._dropout(self, x, 0.25)

    found = np.asarray(Drop().apply({}, jnp.ones((400, 500)), rngs={"dropout": jax.random.key(0)}))
    assert set(np.unique(found)) == {np.float32(0), np.float32(1 / 0.75)}
    assert found.mean() == pytest.approx(1, abs=0.01)


def test_what_is_dropped_of_an_image_does_not_depend_on_those_after_it():
    class Drop(nn.Module):
        @nn.compact
        def __call__(self, x):
            return iqm._dropout(self, x, 0.25)

    few, many = (Drop().apply({}, jnp.ones((4, n, 30)), rngs={"dropout": jax.random.key(0)}) for n in (3, 5))
    np.testing.assert_array_equal(few, many[:, :3])
    assert len(np.unique(np.asarray(few).reshape(12, 30), axis=0)) == 12  # every level of every image has its own


def test_dropout_leaves_dense_and_text_features_alone(weights, pixels):
    off, on = head(weights, pixels), head(weights, pixels, jax.random.key(0), 0.5)
    for name in ("dense_features", "text_embeddings", "logits_text"):
        np.testing.assert_array_equal(on[name], off[name])


def test_without_the_global_term_prompts_do_not_see_the_image(weights, pixels):
    found = head(weights, pixels, use_global=False)
    for name in ("class_tokens", "query_tokens", "text_embeddings"):
        np.testing.assert_array_equal(found[name][0], found[name][1])
    assert np.abs(np.diff(head(weights, pixels)["class_tokens"], axis=0)).max() > 0


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_number_of_prompt_tokens(pixels, weights, tokens):
    m = model(learnable_tokens=tokens, prompt_len=tokens or 1, prompt_depth=2)
    trainable = drawn(m.init)
    assert trainable["prompts"]["deep_prompt_embeddings"].shape == (1, tokens, 128)
    found = compiled.head(m, trainable, weights[1], compiled.features(m, weights[1], pixels))
    assert found["class_tokens"].shape == (3, tokens or 1, 128)
    assert np.isfinite(found["scores_text"]).all()


def test_image_scores(weights, pixels):
    prediction = compiled.predict(model(), head(weights, pixels))
    flat = np.sort(np.asarray(prediction["segmentation"]).reshape(3, -1))
    np.testing.assert_allclose(prediction["score_mean"], flat.mean(1), atol=1e-6)
    np.testing.assert_allclose(prediction["score_max"], flat[:, -1], atol=1e-6)
    np.testing.assert_allclose(prediction["score_top"], flat[:, -6:].mean(1), atol=1e-6)  # 576 pixels
    chosen = {("official", True): "zero", ("official", False): "few", ("max", True): "max", ("top", False): "top"}
    for (score, zero_shot), name in chosen.items():
        found = model(score=score).image_score(prediction, zero_shot=zero_shot)
        np.testing.assert_array_equal(found, prediction[f"score_{name}"])


def test_maps_do_not_pass_one(weights, pixels):
    outputs = head(weights, pixels)
    sure = {name: jnp.full_like(x, 40) if name.startswith("logits") else x for name, x in outputs.items()}
    for sigma in (0.5, 2.0, 8.0):
        found = compiled.predict(model(sigma=sigma), sure)
        for name in ("segmentation", "score_mean", "score_max", "score_top"):
            assert 1 - 1e-6 < np.max(found[name]) <= 1


def test_a_start_from_clip_is_clips_own_comparison(weights, pixels):
    """With no other prompt tokens the text branch starts as patches against texts, each as CLIP embeds it."""
    frozen = jax.tree.map(lambda x: x, weights[1])
    frozen["vision"]["ln_post"]["bias"] = jnp.zeros(64)  # the start leaves it out
    m = model(learnable_tokens=0, prompt_len=1, start="clip")
    trainable = train_state.create(m, TrainConfig(), frozen, make_layout(MeshConfig())).trainable
    features = compiled.features(m, frozen, pixels)
    found = compiled.head(m, trainable, frozen, features)
    rows = []
    for ids in TEMPLATES.ids:
        row = encode(frozen["text"], jnp.array([[*ids, 49]]), jnp.array([len(ids)]))
        rows.append(row[0] / np.linalg.norm(row[0]))
    np.testing.assert_allclose(found["text_embeddings"], np.broadcast_to(rows, (3, 2, 128)), atol=2e-5)
    tokens = norm(np.asarray(features.patch_tokens), frozen["vision"]["ln_post"]) @ frozen["vision"]["proj"]["kernel"]
    tokens /= np.linalg.norm(tokens, axis=-1, keepdims=True)
    expected = np.exp(frozen["logit_scale"]) * tokens @ (rows[1] - rows[0])
    np.testing.assert_allclose(found["logits_text"], expected, atol=2e-4)


def test_fusion_weight(weights, pixels):
    outputs = head(weights, pixels, sigma=0.0)
    query, text = (compiled.predict(model(fusion_weight=w, sigma=0.0), outputs)["segmentation"] for w in (1.0, 0.0))
    mixed = compiled.predict(model(fusion_weight=0.25, sigma=0.0), outputs)
    np.testing.assert_allclose(mixed["segmentation"], 0.25 * query + 0.75 * text, atol=1e-6)
    np.testing.assert_allclose(mixed["maps_query"].mean(0), query, atol=1e-6)


def test_bfloat16_is_close_to_float32(weights, pixels):
    exact = compiled.predict(model(), head(weights, pixels))
    m = model(dtype="bfloat16")
    features = compiled.features(m, weights[1], pixels)
    assert features.patch_tokens.dtype == jnp.bfloat16
    half = compiled.predict(m, compiled.head(m, weights[0], weights[1], features))
    assert half["segmentation"].dtype == jnp.float32
    np.testing.assert_allclose(half["segmentation"], exact["segmentation"], atol=0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": (1, 3)}, "has 2 vision blocks"),
        ({"image_size": 7}, "one patch has 8 pixels"),
        ({"iqm_heads": 3}, "must divide CLIP's embedding width 128"),
        ({"prompt_depth": 4}, "has 3 text layers"),
        ({"prompt_len": 15}, "places for 20"),
    ],
)
def test_config_and_clip_must_go_together(settings, message):
    with pytest.raises(ValueError, match=message):
        model(**settings)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_attention_image_by_image_is_attention(kind):
    for tokens, batch in ((20, 5), (300, 3), (300, 9)):  # a loop of single images, of several, and of none
        draw = np.random.default_rng(tokens).standard_normal((3, batch, tokens, 4, 16), np.float32)
        query, of, value = jnp.asarray(3 * draw, jnp.dtype(kind))
        expected = jax.nn.dot_product_attention(*(x.astype(jnp.float32) for x in (query, of, value)))
        found = jax.jit(_image_by_image)(query, of, value)
        assert found.dtype == query.dtype
        np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=2e-5 if kind == "float32" else 0.05)


def test_three_products_are_the_one():
    draw = np.random.default_rng(4)
    x, kernel, bias = (draw.normal(size=s).astype(np.float32) for s in ((2, 5, 12), (12, 3, 2, 6), (3, 2, 6)))
    for one, other in zip(layers._one_product(x, kernel, bias), layers._three_products(x, kernel, bias), strict=True):
        assert one.shape == (2, 5, 2, 6)
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_products_of_bfloat16_are_summed_in_float32():
    a, b = jnp.asarray(np.random.default_rng(0).standard_normal((2, 300, 300), np.float32), jnp.bfloat16)
    exact = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    found = jax.jit(product)(a, b)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=2**-8, atol=1e-4)
    gradient = jax.grad(lambda a: product(a, b).astype(jnp.float32).sum())(a)
    np.testing.assert_allclose(
        np.asarray(gradient, np.float64)[0], np.asarray(b, np.float64).sum(1), rtol=0.02, atol=0.1
    )


@pytest.mark.parametrize(
    ("rows", "outer", "apart"), [(256, 4096, True), (255, 4096, False), (1024, 1024, True), (1023, 1024, False)]
)
@pytest.mark.parametrize("amd", [True, False])
def test_products_that_a_cpu_makes_with_rows_apart(rows, outer, apart, amd, monkeypatch):
    monkeypatch.setattr(layers, "on_amd", lambda: amd)
    draw = np.random.default_rng(0)
    a, b, levels = (draw.standard_normal(shape, np.float32) for shape in ((1, rows, 8), (8, outer), (2, 1, 1)))
    exact = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    anew = jax.jit(lambda a, b: product(a, b))  # what is traced for the other vendor is not this
    lowered = anew.trace(a, b).lower(lowering_platforms=("cpu",)).as_text()
    assert (f"x{outer + 16}xf32" in lowered) == (apart and amd)
    np.testing.assert_allclose(product(a, b), exact, atol=1e-4)

    def gradients(product):
        total = jax.grad(lambda a, b: jnp.square(product(a, b)).sum(), (0, 1))
        return total(a, b), jax.vmap(total)(levels * a, levels * b)  # levels multiply each by a kernel of their own

    for found, expected in zip(
        jax.tree.leaves(gradients(product)), jax.tree.leaves(gradients(jnp.matmul)), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-2)

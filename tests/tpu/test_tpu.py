"""The full-size train step compiled by the TPU compiler, with no TPU: its memory and its traffic.

Not collected by default: the compiler (libtpu) has to be importable, which .ci/run sees to for this folder alone.
"""

import dataclasses
import math

import jax
import pytest

from iqe_jax.chips import CHIPS
from iqe_jax.config import MeshConfig, load
from iqe_jax.footprint import train_footprint
from iqe_jax.scaling import topology_devices
from iqe_jax.sharding import make_layout
from iqe_jax.train_state import shapes_laid_out
from iqe_jax.weights import describe

jax.config.update("jax_platforms", "cpu")  # the TPU compiler is a library here, not a device

PER_CHIP = 16


@pytest.mark.parametrize(
    ("topology", "fsdp", "tensor", "devices"),
    [
        ("v4:2x2x4", 2, 1, 16),
        ("v5e:4x4", 4, 1, 16),
        ("v5p:4x4x4", 1, 2, 64),
        ("v6e:4x4", 2, 2, 16),
        ("tpu7x:2x2x1", 2, 1, 8),
    ],
)
def test_slices_of_every_kind_make_meshes_of_small_axes(topology, fsdp, tensor, devices):
    layout = make_layout(MeshConfig(fsdp=fsdp, tensor=tensor), topology_devices(topology))
    assert dict(layout.mesh.shape) == {"data": devices // fsdp // tensor, "fsdp": fsdp, "tensor": tensor}


def test_full_size_step_fits_and_exchanges_only_gradients():
    config, chips = load("brain_zeroshot"), 256
    # bfloat16 compiles in a fifth of the time that float32's six passes a product take.
    model = describe(dataclasses.replace(config.model, dtype="bfloat16"))
    layout = make_layout(config.mesh, topology_devices("v5e:16x16"))
    assert layout.batch_shards == chips
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=PER_CHIP * chips))

    found = train_footprint(model, config, layout)

    assert found.seconds > 0 and found.devices == chips and found.batch_size == PER_CHIP * chips
    assert 1e9 < found.needed < CHIPS["v5e"].memory
    assert {c.kind for c in found.collectives} <= {"all-reduce", "reduce-scatter", "all-gather"}
    assert {c.group for c in found.collectives} == {chips}
    # In float32 the gradients have the parameters' bytes; computed in bfloat16, those of the products have half.
    rates = (config.train.learning_rate, config.train.temperature_learning_rate)
    shapes = shapes_laid_out(model, rates, layout)
    gradients = sum(math.prod(x.shape) * 4 for x in jax.tree.leaves(shapes.trainable))
    assert gradients == found.parts["trainable"]
    # What is reduced that is no parameter's gradient: keys and values of the prompt's prefix, which all images share.
    clip = model.clip
    prefix = max(len(ids) for ids in model.templates.ids) + model.config.learnable_tokens
    shared = clip.text_layers * 2 * 2 * prefix * clip.embed_dim * 4
    small = 1024  # losses, counts of images, and the sums of dice
    total = sum(c.bytes for c in found.collectives)
    assert gradients / 2 * 0.9 < total <= gradients + shared + small

"""Train the tiny CLIP that ships with the phantoms, from nothing, on drawn scenes and their captions.

    python -m iqe_jax.data.phantoms.train_clip --out DIR

Contrastive in two grains: pictures against captions, as CLIP is, and single patches against the phrase for what is
there, so that patch tokens at several depths say what they show. Scenes come from scenes.py and batches from
batches.py; the towers are the project's own, and the result is a Hugging Face CLIP folder like any other.
"""

import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import tyro
from flax import linen as nn
from jaxtyping import Array, Float

from iqe_jax.data.pipeline import results_ahead
from iqe_jax.models.clip import ClipConfig, TextTower, VisionTower
from iqe_jax.models.layers import LayerNorm, l2_normalise

from . import batches

LEVELS = (2, 4, 6)
"""Blocks whose patch tokens are held against phrases."""
SMALL, NATIVE = 64, 96
"""Sides of the pictures: small ones are cheap and come first, the native ones settle the position table."""
BATCH = 48


def configuration(vocab_size: int) -> ClipConfig:
    """The sizes of the tiny CLIP."""
    return ClipConfig(
        image_size=NATIVE,
        patch_size=8,
        vision_width=128,
        vision_layers=6,
        vision_heads=2,
        embed_dim=128,
        text_layers=3,
        text_heads=2,
        context_length=batches.CONTEXT,
        vocab_size=vocab_size,
    )


def initialise(config: ClipConfig, seed: int) -> dict[str, Any]:
    """Fresh parameters of both towers, in the tree of `convert.clip`."""
    vision_key, text_key, patch_key = jax.random.split(jax.random.key(seed), 3)
    images = jnp.zeros((1, NATIVE, NATIVE, 3))
    vision = nn.unbox(VisionTower(config, LEVELS).init(vision_key, images))["params"]
    ids = jnp.zeros((1, 4), jnp.int32)
    text = nn.unbox(TextTower(config).init(text_key, ids, jnp.zeros(1, jnp.int32), method="encode"))["params"]
    # Pixels in [0, 1] are mostly mean: damp it in the patch filters, or every patch starts out looking the same.
    kernel = jax.random.normal(patch_key, vision["patch_embedding"]["kernel"].shape)
    vision["patch_embedding"]["kernel"] = 0.06 * (kernel - 0.8 * kernel.mean((0, 1), keepdims=True))
    return {"vision": vision, "text": text, "logit_scale": jnp.log(jnp.float32(1 / 0.07))}


def _matrices(params: dict[str, Any]) -> Any:
    """Which axes Muon takes as a matrix's input and output: those of kernels inside blocks; None leaves it to Adam."""
    axes = {
        "qkv": optax.contrib.MuonDimensionNumbers((0,), (1, 2, 3)),
        "out": optax.contrib.MuonDimensionNumbers((0, 1), (2,)),
        "fc": optax.contrib.MuonDimensionNumbers((0,), (1,)),
        "proj": optax.contrib.MuonDimensionNumbers((0,), (1,)),
    }

    def of(path: tuple[Any, ...], _: Array) -> optax.contrib.MuonDimensionNumbers | None:
        names = [entry.key for entry in path]
        return axes.get(names[-2]) if names[-1] == "kernel" else None

    return jax.tree_util.tree_map_with_path(of, params)


def _matching(
    logits: Float[Array, "left right"], same: Float[Array, "left right"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Symmetric contrastive loss where a row may have several matches, and how often the best of a row is one."""
    hidden = jnp.finfo(logits.dtype).min

    def one_way(logits: jax.Array, same: jax.Array) -> jax.Array:
        real = same.sum(1) > 0
        log_p = jax.nn.log_softmax(jnp.where(same.sum(0) > 0, logits, hidden), 1)
        loss = -(same * jnp.where(same > 0, log_p, 0.0)).sum(1) / jnp.maximum(same.sum(1), 1)
        return (loss * real).sum() / real.sum()

    found = jnp.take_along_axis(same, jnp.where(same.sum(0) > 0, logits, hidden).argmax(1)[:, None], 1)[:, 0] > 0
    real = same.sum(1) > 0
    return (one_way(logits, same) + one_way(logits.T, same.T)) / 2, (found * real).sum() / real.sum()


def loss_and_numbers(
    params: dict[str, Any], config: ClipConfig, batch: dict[str, Array]
) -> tuple[Array, dict[str, Array]]:
    """The loss of one batch (a `Batch` as a dict of arrays), and its parts by name."""
    images = batch["images"].astype(jnp.float32) / 255.0
    vision: Any = VisionTower(config, LEVELS)
    taps, image_features = vision.apply({"params": params["vision"]}, images)
    tower: Any = TextTower(config)

    def encode(ids: Array, ends: Array) -> Array:
        return l2_normalise(tower.apply({"params": params["text"]}, ids, ends, method="encode"))

    captions = encode(batch["captions"], batch["caption_ends"])
    phrases = encode(batch["phrases"], batch["phrase_ends"])
    scale = jnp.exp(jnp.minimum(params["logit_scale"], jnp.log(100.0)))

    groups = batch["caption_groups"]
    same = (groups[:, None] == groups[None, :]).astype(jnp.float32)
    contrastive, retrieval = _matching(scale * l2_normalise(image_features) @ captions.T, same)

    place = jnp.broadcast_to(batch["patches"][None, :, :, None], (len(LEVELS), *batch["patches"].shape, 1))
    tokens = jnp.take_along_axis(taps, place, 2)  # [level, batch, region, width]
    tokens = LayerNorm().apply({"params": params["vision"]["ln_post"]}, tokens)
    regions = l2_normalise(tokens @ params["vision"]["proj"]["kernel"])  # [level, batch, region, dim]
    regions = regions.reshape(len(LEVELS), -1, regions.shape[-1])
    match = jax.nn.one_hot(batch["patch_phrases"].ravel(), len(phrases)) * batch["patch_used"].ravel()[:, None]
    dense, accuracy = jax.vmap(lambda r: _matching(scale * r @ phrases.T, match))(regions)
    numbers = {
        "contrastive": contrastive,
        "retrieval": retrieval,
        "patch_loss": dense.mean(),
        "patch_top1": accuracy[-1],
    }
    return contrastive + dense.mean(), numbers


def _drawn(folder: Path, seed: int, sides: list[int]) -> Iterator[dict[str, Array]]:
    """The batches of all steps, drawn ahead by a worker process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        draw = partial(batches.draw_batch, str(folder), seed)
        jobs = ((0, partial(draw, step, BATCH, side)) for step, side in enumerate(sides))
        yield from map(asdict, results_ahead(pool, jobs, 4))


def held_out(params: dict[str, Any], config: ClipConfig, folder: Path, seed: int, count: int = 4) -> dict[str, float]:
    """The loss's parts on scenes of held-out seeds, averaged over `count` batches at the native size."""
    measure = jax.jit(lambda params, batch: loss_and_numbers(params, config, batch)[1])
    drawn = [asdict(batches.draw_batch(str(folder), seed, i, BATCH, NATIVE, held_out=True)) for i in range(count)]
    results = [measure(params, batch) for batch in drawn]
    return {name: float(np.mean([result[name] for result in results])) for name in results[0]}


def main(out: Path, steps: int = 1000, seed: int = 0, learning_rate: float = 1.5e-3, native_share: float = 0.3) -> None:
    """Train the tiny CLIP and write it.

    Args:
        out: Folder to write, in the Hugging Face layout; must hold no checkpoint yet.
        steps: Optimiser steps, of 48 pictures each.
        seed: Seed of parameters and scenes.
        learning_rate: The peak, after a warm-up over a twentieth of the steps; then a cosine to zero.
        native_share: Share of the steps, the last ones, at 96 × 96 pixels instead of 64 × 64.
    """
    from convert.clip import load_clip, save_clip

    if (out / "config.json").exists():
        raise FileExistsError(f"{out / 'config.json'} exists; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    config = configuration(batches.build_tokenizer(out, seed))
    params = initialise(config, seed)
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, max(steps // 20, 1), steps)
    matrices: Any = _matrices  # optax asks for a wider type than it needs
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            schedule,
            weight_decay=0.03,
            adam_b2=0.98,
            muon_weight_dimension_numbers=matrices,
            consistent_rms=0.2,
        ),
    )
    state = optimiser.init(params)

    @jax.jit
    def update(params, state, batch):
        gradients, numbers = jax.grad(loss_and_numbers, has_aux=True)(params, config, batch)
        updates, state = optimiser.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, numbers

    def save() -> None:
        save_clip(
            config, jax.tree.map(np.asarray, params), out, "float16", hidden_act="gelu", tokenizer=out, force=True
        )

    small = round(steps * (1 - native_share))
    sides = [SMALL] * small + [NATIVE] * (steps - small)
    start, running = time.monotonic(), {}
    for step, batch in enumerate(_drawn(out, seed, sides), 1):
        params, state, numbers = update(params, state, batch)
        for name, value in numbers.items():
            running[name] = 0.95 * running.get(name, float(value)) + 0.05 * float(value)
        if step % 20 == 0 or step == steps:
            spent = (time.monotonic() - start) / 60
            left = spent * sum(sides[step:]) / sum(sides[:step])
            text = "  ".join(f"{name} {value:.3f}" for name, value in running.items())
            print(f"step {step}/{steps}  {text}  {spent:.1f} min, {left:.1f} left", file=sys.stderr, flush=True)
        if step % 200 == 0:
            save()  # so that a run that is stopped leaves something to look at
    save()
    text = "  ".join(f"{name} {v:.4f}" for name, v in held_out(load_clip(out).params, config, out, seed).items())
    spent = (time.monotonic() - start) / 60
    print(f"wrote {out} after {steps} steps in {spent:.1f} min; on held-out scenes: {text}")


if __name__ == "__main__":
    tyro.cli(main)

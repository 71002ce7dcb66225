"""One optimiser step as a pure, jitted function of a state, the frozen text tower and a batch of kept features."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from flax.core import meta
from jaxtyping import Array, Float, Int

from iqe_jax import losses
from iqe_jax.config import TrainConfig
from iqe_jax.models.iqe_clip import Features, IqeClip, Params
from iqe_jax.models.start import start_from_clip
from iqe_jax.optim import optimiser

AnyArray = jax.Array | np.ndarray  # made on the host, turned into the device's by the step


@struct.dataclass
class Batch:
    """Kept features of B images with what supervises them. `masks` is None for sets that have none."""

    patch_tokens: Float[AnyArray, "batch level patch width"]
    image_features: Float[AnyArray, "batch dim"]
    masks: Float[AnyArray, "batch side side"] | None
    labels: Float[AnyArray, " batch"]
    weight: Float[AnyArray, " batch"]

    def features(self) -> Features:
        """The features as the model takes them, level first."""
        return Features(jnp.moveaxis(self.patch_tokens, 1, 0), jnp.asarray(self.image_features))


@struct.dataclass
class TrainState:
    """All that a step changes, and all that a checkpoint holds."""

    step: Int[Array, ""]
    trainable: dict[str, Any]
    opt_state: optax.OptState


_init = jax.jit(IqeClip.init, static_argnums=0)


def create(model: IqeClip, config: TrainConfig, frozen: Params, trainable: Params | None = None) -> TrainState:
    """The state before the first step: parameters started as `model.config.start` says, or the given ones."""
    if trainable is None:
        key = jax.random.fold_in(jax.random.key(config.seed), 0)
        params = meta.unbox(_init(model, key))
        if model.config.start == "clip":
            params = start_from_clip(model, params, frozen)
    else:
        # Copied, as steps overwrite the state in place and the given arrays are not ours to overwrite.
        params = jax.tree.map(jnp.array, dict(trainable))
    rates = (config.learning_rate, config.temperature_learning_rate)
    return TrainState(jnp.zeros((), jnp.int32), params, optimiser(*rates).init(params))


def objective(
    model: IqeClip,
    trainable: Params,
    frozen: Params,
    batch: Batch,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The total loss and its terms by name: `detection`, and `focal` and `dice` where the batch has masks."""
    outputs = model.head(trainable, frozen, batch.features(), dropout=dropout, dropout_key=dropout_key)
    scores = jnp.concatenate([outputs["scores_query"], outputs["scores_text"]])
    labels, weight = jnp.asarray(batch.labels), jnp.asarray(batch.weight)
    terms = {"detection": losses.detection(scores, labels, weight)}
    if batch.masks is not None:
        maps = model.maps(jnp.concatenate([outputs["logits_query"], outputs["logits_text"]]))
        masks = jnp.asarray(batch.masks)
        terms["focal"] = losses.focal(maps, masks, weight)
        terms["dice"] = losses.dice(maps, masks, weight)
    return sum(terms.values(), jnp.float32(0)), terms


def train_step(
    state: TrainState, frozen: Mapping[str, Any], batch: Batch, *, model: IqeClip, config: TrainConfig, dropout: float
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One Adam step; `state` is given up to it.

    Returns the new state, and `loss`, its terms and `gradient_norm`, all before the update.
    """
    rates = (config.learning_rate, config.temperature_learning_rate)
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    return _step(state, frozen, batch, key, model=model, rates=rates, dropout=dropout)


# Compiled for what shapes the program and no more: seeds and lengths of runs share one.
@partial(jax.jit, static_argnames=("model", "rates", "dropout"), donate_argnames="state")
def _step(
    state: TrainState,
    frozen: Mapping[str, Any],
    batch: Batch,
    key: jax.Array,
    *,
    model: IqeClip,
    rates: tuple[float, float],
    dropout: float,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    dropout_key = jax.random.fold_in(key, state.step) if dropout > 0 else None
    (loss, terms), gradients = jax.value_and_grad(objective, argnums=1, has_aux=True)(
        model, state.trainable, frozen, batch, dropout, dropout_key
    )
    updates, opt_state = optimiser(*rates).update(gradients, state.opt_state, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    metrics = {"loss": loss, **terms, "gradient_norm": optax.tree.norm(gradients)}
    return TrainState(state.step + 1, trainable, opt_state), metrics  # pyright: ignore[reportArgumentType]

"""One optimiser step as a pure, jitted function of a state, the frozen text tower and a batch of kept features."""

import contextlib
import threading
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from flax.core import meta
from jaxtyping import Array, Float, Int, UInt32

from iqe_jax import losses
from iqe_jax.config import TrainConfig
from iqe_jax.models.iqe_clip import Features, IqeClip, Params
from iqe_jax.models.layers import split
from iqe_jax.models.start import start_from_clip
from iqe_jax.optim import optimiser
from iqe_jax.sharding import Layout, laid_out

AnyArray = jax.Array | np.ndarray  # made on the host, turned into the device's by the step


@struct.dataclass
class Batch:
    """Kept features of B images with what supervises them. `masks` is None for sets that have none.

    `patch_tokens` have the levels first, as the model takes them. `regions` has 1/area of the connected region that a
    pixel belongs to; only the scoring of a test set needs it.
    """

    patch_tokens: Float[AnyArray, "level batch patch width"]
    image_features: Float[AnyArray, "batch dim"]
    masks: Float[AnyArray, "batch side side"] | None
    labels: Float[AnyArray, " batch"]
    weight: Float[AnyArray, " batch"]
    regions: Float[AnyArray, "batch side side"] | None = None

    def features(self) -> Features:
        """The features as the model takes them."""
        return Features(jnp.asarray(self.patch_tokens), jnp.asarray(self.image_features))

    def map(self, function: Callable[[AnyArray, int], Any]) -> "Batch":
        """`function(array, axis)` of every array there is, where `axis` is that of the images."""
        rest: Any = self.replace(patch_tokens=None)  # pyright: ignore[reportAttributeAccessIssue]
        return jax.tree.map(lambda x: function(x, 0), rest).replace(patch_tokens=function(self.patch_tokens, 1))

    def placed(self, layout: Layout, size: int) -> "Batch":
        """The whole batch of `size` images, laid out, from this process's rows of it on the host."""
        return self.map(lambda x, axis: layout.place(x, size, axis))


def rows_of_step(config: TrainConfig, layout: Layout) -> int:
    """Rows of a step's batch: each of its parts is filled up until it splits evenly over the devices."""
    return layout.padded(config.batch_size // config.accumulate) * config.accumulate


def batch_shapes(model: IqeClip, layout: Layout, size: int, dtype: Any, *, masks: bool) -> Batch:
    """The shapes of a Batch of `size` images with patch tokens of `dtype`, as `Batch.placed` lays it out."""

    def array(*shape: int) -> Any:
        return jax.ShapeDtypeStruct((size, *shape), jnp.float32, sharding=layout.batch)

    settings = model.config
    shape = (len(settings.levels), size, model.grid**2, model.clip.vision_width)
    tokens: Any = jax.ShapeDtypeStruct(shape, dtype, sharding=layout.batch_at(1))
    supervision = array(settings.image_size, settings.image_size) if masks else None
    return Batch(tokens, array(model.clip.embed_dim), supervision, array(), array())


@struct.dataclass
class TrainState:
    """All that a step changes, and all that a checkpoint holds. `key` is the data of dropout's random key."""

    step: Int[Array, ""]
    trainable: dict[str, Any]
    opt_state: optax.OptState
    key: UInt32[Array, " words"]


@partial(jax.jit, static_argnames=("model", "rates"))
def _initial(model: IqeClip, rates: tuple[float, float], seed: jax.Array) -> TrainState:
    """The state before the first step, with the boxes that say by which rule each array is split."""
    root = jax.random.key(seed)
    params = model.init(jax.random.fold_in(root, 0))
    key = jax.random.key_data(jax.random.fold_in(root, 1))
    return TrainState(jnp.zeros((), jnp.int32), params, optimiser(*rates).init(params), key)


@cache
def state_shardings(model: IqeClip, rates: tuple[float, float], layout: Layout) -> TrainState:
    """Where each array of a TrainState lies. Raises ValueError as `Layout.shardings`."""
    return layout.shardings(_boxed(model, rates, layout))


def shapes_laid_out(model: IqeClip, rates: tuple[float, float], layout: Layout) -> TrainState:
    """The shapes of a TrainState with where each lies; nothing is drawn. Raises ValueError as `Layout.shardings`."""
    return laid_out(_boxed(model, rates, layout), state_shardings(model, rates, layout))


def _boxed(model: IqeClip, rates: tuple[float, float], layout: Layout) -> TrainState:
    """The shapes in boxes that say by which rule each array is split; traced as by `_create`, and so once for both."""
    seed = jax.ShapeDtypeStruct((), jnp.uint32, sharding=layout.replicated)
    with layout.traced():
        return _initial.eval_shape(model, rates, seed)


@partial(jax.jit, static_argnames=("model", "rates", "layout"))
def _create(model: IqeClip, rates: tuple[float, float], seed: jax.Array, frozen: Params, layout: Layout) -> TrainState:
    state = meta.unbox(_initial(model, rates, seed))
    if model.config.start == "clip":
        state = state.replace(trainable=start_from_clip(model, state.trainable, frozen))
    return jax.lax.with_sharding_constraint(state, state_shardings(model, rates, layout))


def create(
    model: IqeClip, config: TrainConfig, frozen: Params, layout: Layout, trainable: Params | None = None
) -> TrainState:
    """The state before the first step, laid out: parameters as `model.config.start` says, or the given ones.

    What is drawn depends on `config.seed`, never on the mesh. Raises ValueError where the mesh does not fit the model.
    """
    shardings = state_shardings(model, config.rates, layout)
    needed = {} if model.config.start == "random" else frozen
    with layout.active():
        state = _create(model, config.rates, jnp.uint32(config.seed), needed, layout)
    if trainable is not None:
        state = state.replace(trainable=layout.put(trainable, shardings.trainable))
    return state


def objective(
    model: IqeClip,
    trainable: Params,
    frozen: Params,
    batch: Batch,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
    *,
    count: Float[Array, ""] | None = None,
    remat: bool = False,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The total loss and its terms by name: `detection`, and `focal` and `dice` where the batch has masks.

    `count` is the number of images to average over, where `batch` is a part of a larger one. With `remat` the way back
    computes the head's and the maps' activations again, each when its turn comes, and the way forth holds none.
    """
    labels, weight = jnp.asarray(batch.labels), jnp.asarray(batch.weight)
    count = weight.sum() if count is None else count

    def head(trainable: Params) -> tuple[jax.Array, jax.Array]:
        outputs = model.head(trainable, frozen, batch.features(), dropout=dropout, dropout_key=dropout_key)
        scores = jnp.concatenate([outputs["scores_query"], outputs["scores_text"]])
        return scores, jnp.concatenate([outputs["logits_query"], outputs["logits_text"]])

    def pixel_terms(logits: jax.Array, masks: jax.Array) -> dict[str, jax.Array]:
        maps = model.maps(logits)
        return {
            "focal": losses.focal(maps, masks, weight, count),
            "dice": losses.dice(maps, masks, weight, count),
        }

    scores, logits = (jax.checkpoint(head) if remat else head)(trainable)
    terms = {"detection": losses.detection(scores, labels, weight, count)}
    if batch.masks is not None:
        terms |= (jax.checkpoint(pixel_terms) if remat else pixel_terms)(logits, jnp.asarray(batch.masks))
    return sum(terms.values(), jnp.float32(0)), terms


def train_step(
    state: TrainState,
    frozen: Mapping[str, Any],
    batch: Batch,
    *,
    model: IqeClip,
    config: TrainConfig,
    dropout: float,
    layout: Layout,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One Adam step; `state` is given up to it.

    Returns the new state, and `loss`, its terms and `gradient_norm`, all before the update.
    """
    with layout.active():
        return step_program(state, frozen, batch, **step_settings(model, config, dropout, layout))


def compile_ahead(
    state: TrainState,
    frozen: Mapping[str, Any],
    batch: Batch,
    *,
    model: IqeClip,
    config: TrainConfig,
    dropout: float,
    layout: Layout,
) -> threading.Event:
    """Compile, in a thread, what `train_step` will run on arguments like these, which may be shapes.

    The event returned is set when that is over. It can be waited for where Ctrl-C may come, unlike the thread: a join
    that is broken off makes Python 3.11 take the thread for ended, and end under it.
    """

    def shape(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    arguments = jax.tree.map(shape, (state, frozen, batch))

    def compile_step() -> None:
        # Were it to fail, the step itself would fail as well, and say so where it is heard.
        try:
            with contextlib.suppress(Exception), layout.active():
                step_program.lower(*arguments, **step_settings(model, config, dropout, layout)).compile()
        finally:
            compiled.set()

    compiled = threading.Event()
    threading.Thread(target=compile_step, name="compile").start()
    return compiled


def step_settings(model: IqeClip, config: TrainConfig, dropout: float, layout: Layout) -> dict[str, Any]:
    """The static arguments of `step_program`: what shapes the program and no more, so seeds and lengths share one."""
    how = {"rates": config.rates, "accumulate": config.accumulate, "remat": config.remat}
    return {"model": model, "dropout": dropout, "layout": layout, **how}


@partial(
    jax.jit, static_argnames=("model", "rates", "dropout", "accumulate", "remat", "layout"), donate_argnames="state"
)
def step_program(
    state: TrainState,
    frozen: Mapping[str, Any],
    batch: Batch,
    *,
    model: IqeClip,
    rates: tuple[float, float],
    dropout: float,
    accumulate: int,
    remat: bool,
    layout: Layout,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """The compiled step under `train_step`; to be called or lowered while `layout` is active."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    count = jnp.asarray(batch.weight).sum()
    gradient = jax.value_and_grad(objective, argnums=1, has_aux=True)

    def of_part(part: Batch, index: jax.Array | int):
        dropout_key = jax.random.fold_in(key, index) if dropout > 0 else None
        return gradient(model, state.trainable, frozen, part, dropout, dropout_key, count=count, remat=remat)

    if accumulate == 1:
        (loss, terms), gradients = of_part(batch, 0)
    else:
        parts = _parts(batch, accumulate)
        result = jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], parts), 0)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), result)

        def add(total, numbered):
            return jax.tree.map(jnp.add, total, of_part(*numbered)), None

        ((loss, terms), gradients), _ = jax.lax.scan(add, zeros, (parts, jnp.arange(accumulate)))
    # Behind the barrier, since squares that Adam needs as well would be written down for both.
    norm = optax.tree.norm(jax.lax.optimization_barrier(gradients))
    metrics = {"loss": loss, **terms, "gradient_norm": norm}
    updates, opt_state = optimiser(*rates).update(gradients, state.opt_state, state.trainable)
    trainable = cast(dict[str, Any], optax.apply_updates(state.trainable, updates))
    # No weight is changed by a gradient that is not finite. And as the new weights wait for the norm of all gradients,
    # nothing can still want the old ones: otherwise XLA copies those on a CPU, to write the new ones in their place.
    trainable = jax.tree.map(partial(jnp.where, jnp.isfinite(norm)), trainable, state.trainable)
    after = TrainState(state.step + 1, trainable, opt_state, state.key)
    after = jax.lax.with_sharding_constraint(after, state_shardings(model, rates, layout))
    return after, jax.lax.with_sharding_constraint(metrics, layout.replicated)


def _parts(batch: Batch, count: int) -> Batch:
    """The batch as `count` smaller ones, stacked. Neighbours go to different parts, so that no row changes device."""

    def rows(x: AnyArray, axis: int) -> jax.Array:
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        x = jnp.moveaxis(jnp.asarray(x).reshape(*before, -1, count, *after), axis + 1, 0)
        return split(x, *(None,) * (axis + 1), "batch", *(None,) * len(after))

    return batch.map(rows)

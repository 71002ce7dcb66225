"""The model's functions, each compiled as a whole: called as they are, every primitive is compiled by itself."""

import jax

from iqe_jax import train_state
from iqe_jax.models.iqe_clip import IqeClip

features = jax.jit(IqeClip.features, static_argnums=0)
head = jax.jit(IqeClip.head, static_argnums=0, static_argnames="dropout")
maps = jax.jit(IqeClip.maps, static_argnums=0)
predict = jax.jit(IqeClip.predict, static_argnums=0)
objective = jax.jit(train_state.objective, static_argnums=0)


def _loss(trainable, model, frozen, batch):
    return train_state.objective(model, trainable, frozen, batch)[0]


gradients = jax.jit(jax.grad(_loss), static_argnums=1)

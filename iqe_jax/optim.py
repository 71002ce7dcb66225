"""The optimiser: Adam on the trainable tree, with a learning rate of its own for the temperature."""

from collections.abc import Hashable

import jax
import jax.numpy as jnp
import optax

TEMPERATURE = "prompt_temp"


def optimiser(learning_rate: float, temperature_learning_rate: float) -> optax.GradientTransformation:
    """Adam, β = (0.5, 0.999), ε = 1e-8, no decay, as the official code sets it; `prompt_temp` has its own rate."""

    # Were it to see that β₁ = 1 − β₁, XLA would write the update with the old first moment in place of the new one, and
    # on a CPU copy every old one for that.
    b1 = jax.lax.optimization_barrier(jnp.float32(0.5))

    def adam(learning_rate: float) -> optax.GradientTransformation:
        return optax.adam(learning_rate, b1=b1, b2=0.999, eps=1e-8)

    rates: dict[Hashable, optax.GradientTransformation] = {
        "rest": adam(learning_rate),
        "temperature": adam(temperature_learning_rate),
    }
    return optax.partition(rates, _groups)


def _groups(params: dict) -> dict:
    """'temperature' for `prompt_temp`, 'rest' for all else. KeyError if there is no such parameter."""
    groups = jax.tree.map(lambda _: "rest", params)
    if TEMPERATURE not in groups:
        raise KeyError(f"no parameter {TEMPERATURE!r} to give its learning rate to")
    groups[TEMPERATURE] = "temperature"
    return groups

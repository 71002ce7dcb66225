"""The training objective: detection on scores, focal and dice on maps, summed over both branches and all levels.

Every term takes `weight`, 1 for an image and 0 for padding, so that a partial batch needs no program of its own, and
`count`, the images to average over: those of the whole batch where only a part of it is given.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SMOOTHING = 1e-5


def detection(
    scores: Float[Array, "level batch"],
    labels: Float[Array, " batch"],
    weight: Float[Array, " batch"],
    count: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Binary cross entropy of each score in [0, 1] *taken as a logit*, as officially; summed over levels."""
    losses = jax.nn.softplus(scores) - labels * scores
    return (losses * weight).sum() / (weight.sum() if count is None else count)


def focal(
    maps: Float[Array, "level batch side side"],
    masks: Float[Array, "batch side side"],
    weight: Float[Array, " batch"],
    count: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Focal loss, γ = 2, of anomalous maps in [0, 1] against masks > 0.5: mean over pixels, sum over levels."""
    anomalous = jnp.clip(masks > 0.5, SMOOTHING, 1 - SMOOTHING)
    p = (1 - anomalous) * (1 - maps) + anomalous * maps + SMOOTHING
    losses = -jnp.square(1 - p) * jnp.log(p)
    return (losses.mean((-2, -1)) * weight).sum() / (weight.sum() if count is None else count)


def dice(
    maps: Float[Array, "level batch side side"],
    masks: Float[Array, "batch side side"],
    weight: Float[Array, " batch"],
    count: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Dice loss of anomalous maps in [0, 1] against masks > 0.5: mean over images, sum over levels."""
    anomalous = (masks > 0.5).astype(maps.dtype)
    overlap = (maps * anomalous).sum((-2, -1))
    both = (maps + anomalous).sum((-2, -1))  # one sum, which a GPU makes on the pass that makes the others
    losses = 1 - (2 * overlap + 1) / (both + 1)
    return (losses * weight).sum() / (weight.sum() if count is None else count)

"""Where training starts from. The official checkpoints fix names and shapes, not that: both ways here are ours.

`random` draws everything, as `IqeClip.init` does; `clip` changes the draw so that the text branch begins as CLIP's own
zero-shot comparison of patches with the two templates, which matters where a few images cannot teach it anew.
"""

from typing import Any

import jax.numpy as jnp

from iqe_jax.models.iqe_clip import IqeClip, Params


def start_from_clip(model: IqeClip, trainable: Params, frozen: Params) -> dict[str, Any]:
    """`trainable` with those parameters replaced that CLIP has an answer for.

    Dense layers start as CLIP's projection of a patch token into the joint space (its final norm's scale folded in,
    its bias left out), the last class token as the end token that CLIP reads a text at, the temperature as CLIP's, and
    both convolutions at zero, so that the image's embedding enters the tokens only as far as training asks for it.
    """
    vision, text, prompts = frozen["vision"], frozen["text"], trainable["prompts"]
    projection = vision["ln_post"]["scale"][:, None] * vision["proj"]["kernel"]  # [width, dim]
    projection = projection - projection.mean(0)  # the norm takes off each token's mean
    end = text["token_embedding"][model.templates.end]
    return {
        **trainable,
        "dense": {
            "kernel": jnp.broadcast_to(projection, trainable["dense"]["kernel"].shape),
            "bias": jnp.zeros_like(trainable["dense"]["bias"]),
        },
        "prompts": {
            **prompts,
            "prompt_query": prompts["prompt_query"].at[0, -1].set(end),
            "class_conv": {name: jnp.zeros_like(value) for name, value in prompts["class_conv"].items()},
            "query_conv": {name: jnp.zeros_like(value) for name, value in prompts["query_conv"].items()},
        },
        "prompt_temp": jnp.asarray(frozen["logit_scale"], jnp.float32),
    }

"""The small JSON files beside CLIP weights: what they add to the tensors' shapes, and the one this project writes.

Sizes come from the tensors; a config adds the activation and the native image size, and may contradict, which is an
error. Read as plain JSON rather than through transformers, which would import PyTorch.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from convert.clip_names import HEAD_WIDTH
from convert.engine import Sizes
from convert.files import read_json
from iqe_jax.models.clip import ClipConfig

Activation = Literal["quick_gelu", "gelu"]

# What a Hugging Face config.json leaves out means: transformers' defaults.
_DEFAULTS = {
    "text_config": {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8},
    "vision_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "image_size": 224},
}
_COMMON_DEFAULTS = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}


def read_settings(weights: Path, hugging_face: bool, *, required: bool) -> dict[str, Any]:
    """What the config beside the weights adds to their shapes: `hidden_act`, `image_size`; and the heads it claims.

    Empty where there is none, which for Hugging Face's folders (`required`) is a FileNotFoundError. Raises one
    ValueError for all that makes it no CLIP these towers can run.
    """
    path = weights.with_name("config.json" if hugging_face else "open_clip_config.json")
    if not path.is_file():
        if hugging_face and required:
            raise FileNotFoundError(f"{path} is missing: a Hugging Face CLIP folder has it beside its weights")
        return {}
    content = read_json(path)
    return _hugging_face_settings(content, path) if hugging_face else _open_clip_settings(content, path)


def _hugging_face_settings(content: dict[str, Any], path: Path) -> dict[str, Any]:
    if content.get("model_type") != "clip":
        raise ValueError(f"{path} is for a model of type {content.get('model_type')!r}, expected 'clip'")
    towers, problems = {}, []
    for key, defaults in _DEFAULTS.items():
        # Old files give the sizes under text_config_dict and vision_config_dict, and there those count.
        given = (content.get(key) or {}) | (content.get(f"{key}_dict") or {})
        tower = towers[key] = _COMMON_DEFAULTS | defaults | given
        odd = [name for name in defaults if type(tower[name]) is not int or tower[name] < 1]
        odd += ["layer_norm_eps"] * (not isinstance(tower["layer_norm_eps"], float))
        if odd:
            problems += [f"{key}: {name} {tower[name]!r}, expected a positive number" for name in odd]
            continue
        width, heads = tower["hidden_size"], tower["num_attention_heads"]
        if width != heads * HEAD_WIDTH:
            problems.append(f"{key}: {heads} heads for a width of {width}, expected heads {HEAD_WIDTH} wide")
        if tower["intermediate_size"] != 4 * width:
            problems.append(f"{key}: intermediate_size {tower['intermediate_size']}, expected {4 * width}")
        if not math.isclose(tower["layer_norm_eps"], 1e-5):
            problems.append(f"{key}: layer_norm_eps {tower['layer_norm_eps']}, expected 1e-05")
        if tower["hidden_act"] not in ("quick_gelu", "gelu"):
            problems.append(f"{key}: hidden_act {tower['hidden_act']!r}, expected 'quick_gelu' or 'gelu'")
    text, vision = towers["text_config"], towers["vision_config"]
    if text["hidden_act"] != vision["hidden_act"]:
        problems.append(f"hidden_act differs, text {text['hidden_act']!r}, image {vision['hidden_act']!r}")
    if text["hidden_size"] != (dim := content.get("projection_dim", 512)):
        problems.append(
            f"text width {text['hidden_size']} and projection_dim {dim} differ; the method puts embeddings into the "
            "text tower as tokens, so they must be equal"
        )
    if problems:
        raise ValueError(f"{path} is not a CLIP these towers can run:\n  " + "\n  ".join(problems))
    return {
        "hidden_act": vision["hidden_act"],
        "image_size": vision["image_size"],
        "vision_heads": vision["num_attention_heads"],
        "text_heads": text["num_attention_heads"],
    }


def _open_clip_settings(content: dict[str, Any], path: Path) -> dict[str, Any]:
    model = content.get("model_cfg", content)
    vision, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
    width = vision.get("width", 768)
    head_width = vision.get("head_width", HEAD_WIDTH)
    if head_width != HEAD_WIDTH:
        raise ValueError(f"{path}: image tower heads are {head_width} wide, expected {HEAD_WIDTH}")
    settings = {"hidden_act": "quick_gelu" if model.get("quick_gelu", False) else "gelu"}
    settings["vision_heads"] = width // head_width
    if "heads" in text:
        settings["text_heads"] = text["heads"]
    return settings | ({"image_size": vision["image_size"]} if isinstance(vision.get("image_size"), int) else {})


def to_clip_config(sizes: Sizes, settings: Mapping[str, Any], origin: Path) -> ClipConfig:
    """Sizes as the tensors have them; the config beside them may refine the image size and must not contradict."""
    patch, grid = sizes["patch"], sizes["grid"]
    image_size = settings.get("image_size", patch * grid)
    claims = {"image_size": image_size // patch * patch, "vision_heads": None, "text_heads": None}
    facts = {"image_size": patch * grid, "vision_heads": sizes["vision_heads"], "text_heads": sizes["text_heads"]}
    claims |= {key: settings[key] for key in ("vision_heads", "text_heads") if key in settings}
    wrong = [f"{key} {claims[key]}, expected {facts[key]}" for key in facts if claims[key] not in (None, facts[key])]
    if wrong:
        raise ValueError(f"the configuration of {origin} does not fit its tensors: {'; '.join(wrong)}")
    return ClipConfig(
        image_size=image_size,
        patch_size=patch,
        vision_width=sizes["width"],
        vision_layers=sizes["vision"],
        vision_heads=sizes["vision_heads"],
        embed_dim=sizes["dim"],
        text_layers=sizes["text"],
        text_heads=sizes["text_heads"],
        context_length=sizes["context"],
        vocab_size=sizes["vocab"],
    )


def hugging_face_config(config: ClipConfig, dtype: str, hidden_act: str, ends: tuple[int, int]) -> dict[str, Any]:
    """The content of `config.json`; `ends` are the ids of the start and end tokens."""

    def tower(width: int, heads: int, layers: int) -> dict[str, Any]:
        return {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "hidden_act": hidden_act,
            "layer_norm_eps": 1e-5,
            "projection_dim": config.embed_dim,
        }

    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "dtype": dtype,
        "projection_dim": config.embed_dim,
        "text_config": {
            "model_type": "clip_text_model",
            **tower(config.embed_dim, config.text_heads, config.text_layers),
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.context_length,
            "bos_token_id": ends[0],
            "eos_token_id": ends[1],
            "pad_token_id": ends[1],
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            **tower(config.vision_width, config.vision_heads, config.vision_layers),
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "num_channels": 3,
        },
    }

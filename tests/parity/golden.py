"""Seeded weights and images behind the golden outputs, NumPy only.

tiny.npz holds what the official PyTorch IQE-CLIP (commit b6ddd11) computes in float32 on the CPU from
exactly these weights and images. Every array is drawn by name, so the order of keys does not matter.

    clip, adapter = state_dicts(TINY)      # official tensor names; `clip` is at its native resolution
    images, masks, labels = samples(TINY)  # (B,3,S,S) in [0,1], (B,1,S,S) in {0,1}, (B,)
"""

import math
import zlib

import numpy as np

TINY = {
    "vision_width": 128,
    "vision_layers": 4,
    "patch": 8,
    "native": 48,
    "image": 40,
    "embed": 64,
    "text_heads": 1,
    "text_layers": 3,
    "features": [1, 2, 3, 4],
    "prompt_len": 2,
    "deep_len": 1,
    "iqm_layers": 2,
    "iqm_heads": 4,
    "iqm_inter": 96,
    "batch": 4,
    "seed": 7,
}
CONTEXT, VOCAB = 77, 49408
PROMPTS = {  # token ids of the two templates, start and end tokens included
    "a photo of a normal <|class|>.": [49406, 320, 1125, 539, 320, 5967, 27, 347, 1874, 91, 29, 269, 49407],
    "a photo of a abnormal <|class|>.": [49406, 320, 1125, 539, 320, 40934, 27, 347, 1874, 91, 29, 269, 49407],
}


def rng(tag, seed):
    return np.random.RandomState((zlib.crc32(tag.encode()) ^ seed) & 0x7FFFFFFF)


def seeded(name, shape, seed):
    """One tensor, scaled by the kind of tensor that its name says it is."""
    r = rng(name, seed).standard_normal(shape).astype(np.float32)
    n = name.lower()
    if name.endswith(("logit_scale", "prompt_temp")):
        return np.float32(np.float32(math.log(1 / 0.07)) + 0.1 * r)
    if ("ln_" in n or "norm" in n) and n.endswith("weight"):
        return np.float32(1 + 0.1 * r)
    if n.endswith("bias"):
        return np.float32(0.05 * r)
    if len(shape) >= 2:
        fan_in = shape[0] if n.endswith(("proj", "projection")) and len(shape) == 2 else int(np.prod(shape[1:]))
        if "embedding" in n or "prompt_query" in n or "query_tokens" in n:
            return np.float32(0.3 * r)
        return np.float32(r / math.sqrt(fan_in))
    return np.float32(0.3 * r)


def _tower(prefix, width, layers):
    for i in range(layers):
        b = f"{prefix}transformer.resblocks.{i}."
        yield from {
            b + "attn.in_proj_weight": (3 * width, width),
            b + "attn.in_proj_bias": (3 * width,),
            b + "attn.out_proj.weight": (width, width),
            b + "attn.out_proj.bias": (width,),
            b + "ln_1.weight": (width,),
            b + "ln_1.bias": (width,),
            b + "ln_2.weight": (width,),
            b + "ln_2.bias": (width,),
            b + "mlp.c_fc.weight": (4 * width, width),
            b + "mlp.c_fc.bias": (4 * width,),
            b + "mlp.c_proj.weight": (width, 4 * width),
            b + "mlp.c_proj.bias": (width,),
        }.items()


def clip_shapes(s):
    """OpenAI CLIP names and shapes, at the native image size."""
    w, e, grid = s["vision_width"], s["embed"], s["native"] // s["patch"]
    return {
        "positional_embedding": (CONTEXT, e),
        "text_projection": (e, e),
        "logit_scale": (),
        "token_embedding.weight": (VOCAB, e),
        "ln_final.weight": (e,),
        "ln_final.bias": (e,),
        "visual.class_embedding": (w,),
        "visual.positional_embedding": (grid * grid + 1, w),
        "visual.proj": (w, e),
        "visual.conv1.weight": (w, 3, s["patch"], s["patch"]),
        "visual.ln_pre.weight": (w,),
        "visual.ln_pre.bias": (w,),
        "visual.ln_post.weight": (w,),
        "visual.ln_post.bias": (w,),
        **dict(_tower("visual.", w, s["vision_layers"])),
        **dict(_tower("", e, s["text_layers"])),
    }


def adapter_shapes(s):
    """The official checkpoint, nested as torch.save wrote it: {section: {name: shape}}, bare tensors by name."""
    w, e, h = s["vision_width"], s["embed"], s["iqm_inter"]
    iqm: dict[str, tuple[int, ...]] = {"layernorm.weight": (e,), "layernorm.bias": (e,)}
    for i in range(s["iqm_layers"]):
        b = f"encoder.layer.{i}."
        for part in ("attention", "crossattention", "text_crossattention"):
            for k in ("attention.query", "attention.key", "attention.value", "output.dense"):
                iqm[f"{b}{part}.{k}.weight"], iqm[f"{b}{part}.{k}.bias"] = (e, e), (e,)
            iqm[f"{b}{part}.output.LayerNorm.weight"] = iqm[f"{b}{part}.output.LayerNorm.bias"] = (e,)
        iqm[f"{b}intermediate_query.dense.weight"], iqm[f"{b}intermediate_query.dense.bias"] = (h, e), (h,)
        iqm[f"{b}output_query.dense.weight"], iqm[f"{b}output_query.dense.bias"] = (e, h), (e,)
        iqm[f"{b}output_query.LayerNorm.weight"] = iqm[f"{b}output_query.LayerNorm.bias"] = (e,)
    return {
        "trainable_linearlayer": {
            f"fc.{i}.{k}": v for i in range(len(s["features"])) for k, v in (("weight", (e, w)), ("bias", (e,)))
        },
        "New_Lan_Embed": {
            "prompt_query": (1, s["prompt_len"], e),
            "prompt_temp": (),
            "prompt_linear1.fc.weight": (s["prompt_len"], 1, 3),
            "prompt_linear1.fc.bias": (s["prompt_len"],),
        },
        "iqm": iqm,
        "query_tokens": (1, 2, e),
        "query_linear": {"fc.weight": (2, 1, 3), "fc.bias": (2,)},
        "prompt_text_projection": (e, e),
        "prompt_embeddings": (1, s["deep_len"], e),
        "deep_prompt_embeddings": (s["text_layers"] - 1, s["deep_len"], e),
        "prompt_proj.weight": (e, e),
        "prompt_proj.bias": (e,),
        "prompt_norm.weight": (e,),
        "prompt_norm.bias": (e,),
    }


_SECTION = {
    "trainable_linearlayer": "iqe.trainable_layer",
    "New_Lan_Embed": "iqe.New_Lan_Embed",
    "iqm": "iqe.iqm",
    "query_tokens": "iqe.query_tokens",
    "query_linear": "iqe.query_linear",
}


def state_dicts(s):
    """-> (clip, adapter): flat OpenAI CLIP state dict; the official adapter checkpoint, nested as in its .pth file."""
    clip = {k: seeded("clip." + k, v, s["seed"]) for k, v in clip_shapes(s).items()}
    adapter = {}
    for k, v in adapter_shapes(s).items():
        root = _SECTION.get(k, "clip." + k)
        if isinstance(v, dict):
            adapter[k] = {n: seeded(f"{root}.{n}", shape, s["seed"]) for n, shape in v.items()}
        else:
            adapter[k] = seeded(root, v, s["seed"])
    return clip, adapter


def samples(s, tag="images"):
    """Images with a bright disc on every second one; tag 'step0', 'step1', … are the batches of the training run."""
    n, size, r = s["batch"], s["image"], rng(tag, s["seed"])
    yy, xx = np.mgrid[:size, :size] / size
    x, m = np.zeros((n, 3, size, size), np.float32), np.zeros((n, 1, size, size), np.float32)
    y = np.zeros(n, np.float32)
    for i in range(n):
        waves = np.sin(6 * xx * (1 + r.rand()) + r.rand() * 6), np.cos(5 * yy * (1 + r.rand()) + r.rand() * 6)
        b = 0.35 + 0.25 * waves[0] * waves[1]
        if i % 2:
            cy, cx, radius = 0.25 + 0.5 * r.rand(), 0.25 + 0.5 * r.rand(), 0.1 + 0.15 * r.rand()
            disc = (yy - cy) ** 2 + (xx - cx) ** 2 < radius**2
            b, m[i, 0], y[i] = b + 0.5 * disc, disc, 1
        x[i] = np.clip(b[None] + 0.05 * r.standard_normal((3, size, size)), 0, 1)
    return x, m, y

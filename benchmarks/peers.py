"""The same work in plain PyTorch: transformers' CLIP tower, and IQE-CLIP's head written down as the paper states it.

Keys and values are formed, prompts run whole through the text tower, both channels of the logits are upsampled: what
one writes first. Weights are random, since only the time is looked at. Torch is imported where it is used.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from iqe_jax.models.iqe_clip import IqeClip


class Pending:
    """What PyTorch has been told to compute; it is waited for as JAX's arrays are. `found` is all that came with it."""

    def __init__(self, value: Any, found: Any = None) -> None:
        """Mark where `value` stands among what its GPU was told to do; a CPU has done it already."""
        self.value, self.found, self._done = value, found, None
        if value.is_cuda:
            import torch

            self._done = torch.cuda.Event()
            self._done.record()

    def block_until_ready(self) -> None:
        """Wait for it, and not for what came after."""
        if self._done is not None:
            self._done.synchronize()


def torch_or_none(threads: int) -> Any:
    """The module, set to `threads` threads, or None where it is not installed."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    return torch


def device_name(device: str) -> str:
    """PyTorch's word for `--device`."""
    return "cuda" if device == "gpu" else device


def product(size: int, dtype: str, device: str) -> Callable[[], Any]:
    """A call that multiplies a matrix of `size` × `size` by itself."""
    import torch

    a = torch.randn(size, size, dtype=getattr(torch, dtype), device=device)

    def run() -> Any:
        with torch.inference_mode():
            return Pending(a @ a)

    return run


def tower(model: IqeClip, images: np.ndarray, dtype: str, device: str) -> Callable[[], Any]:
    """A call that runs transformers' CLIP vision tower on `images` (B, S, S, 3), with every block's output."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    clip, size = model.clip, model.config.image_size
    config = CLIPVisionConfig(
        hidden_size=clip.vision_width,
        intermediate_size=4 * clip.vision_width,
        num_hidden_layers=clip.vision_layers,
        num_attention_heads=clip.vision_heads,
        patch_size=clip.patch_size,
        image_size=size,
        projection_dim=clip.embed_dim,
        hidden_act="gelu",
        attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]
    )
    peer: Any = CLIPVisionModelWithProjection(config)  # its type does not know what transformers wraps `to` in
    peer = peer.eval().to(device, getattr(torch, dtype))
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(device, getattr(torch, dtype))

    def run() -> Any:
        with torch.inference_mode():
            found = peer(pixel_values=pixels, output_hidden_states=True)
            return Pending(found.image_embeds, found)

    return run


def head(model: IqeClip, batch: dict[str, np.ndarray], dtype: str, device: str) -> dict[str, Callable[..., Any]]:
    """Calls on kept features: `text`, `iqm`, `head` (to the segmentation), `training` (an Adam step of the adapter).

    `batch` has `patch_tokens` (K, B, L, W), `image_features` (B, D), `masks` (B, S, S) and `labels` (B). The head takes
    what a call of `tower` returned instead, if that is given to it.
    """
    import torch

    from benchmarks.torch_head import TextbookHead, loss

    kind = getattr(torch, dtype)
    peer = TextbookHead(model).to(device, kind)
    given = {name: torch.from_numpy(np.array(value)).to(device, kind) for name, value in batch.items()}
    trained = [p for p in peer.parameters() if p.requires_grad]
    adam = torch.optim.Adam(trained, lr=1e-4, betas=(0.5, 0.999))

    with torch.inference_mode():
        dense = [layer(tokens) for tokens, layer in zip(given["patch_tokens"], peer.dense, strict=True)]
        embedded = peer.texts(given["image_features"])

    def text() -> Any:
        with torch.inference_mode():
            return Pending(peer.texts(given["image_features"]))

    def iqm() -> Any:
        with torch.inference_mode():
            return Pending(torch.stack([peer.queries(given["image_features"], x, embedded) for x in dense]))

    def run(tower: Pending | None = None) -> Any:
        tokens, image_features = given["patch_tokens"], given["image_features"]
        with torch.inference_mode():
            if tower is not None:
                tokens = torch.stack([tower.found.hidden_states[level][:, 1:] for level in model.config.levels])
                image_features = tower.value
            return Pending(peer.segment(peer(tokens, image_features)))

    def step() -> Any:
        adam.zero_grad()
        value = loss(peer, peer(given["patch_tokens"], given["image_features"]), given["masks"], given["labels"])
        value.backward()
        adam.step()
        return Pending(value)

    return {"text": text, "iqm": iqm, "head": run, "training": step}

"""From a model config to arrays in memory: CLIP's frozen weights, the tokenised templates and a trained adapter.

The one module that imports `convert`; everything else takes parameter trees.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.core import meta

from iqe_jax import processes
from iqe_jax.config import ModelConfig, read
from iqe_jax.models.clip import ClipConfig, Templates
from iqe_jax.models.iqe_clip import IqeClip, Params
from iqe_jax.sharding import Layout

# The published model's CLIP, of which every size is known without its weights.
PUBLISHED = "openai/clip-vit-large-patch14-336"
_PUBLISHED_SIZES = ClipConfig(
    image_size=336,
    patch_size=14,
    vision_width=1024,
    vision_layers=24,
    vision_heads=16,
    embed_dim=768,
    text_layers=12,
    text_heads=12,
    context_length=77,
    vocab_size=49408,
)


CHOSEN_ON = "chosen_on_test_data_of"  # in an adapter's header


def load_model(config: ModelConfig, layout: Layout | None = None) -> tuple[IqeClip, Params]:
    """The model of `config` and CLIP's frozen parameters, laid out, or on the default device where no layout is given.

    With a layout all processes have to call it. Raises FileNotFoundError or ValueError, naming the file and what to
    do, when weights or tokenizer cannot be had, do not go with the config, or are not the same on all processes.
    """
    from convert.clip import load_clip

    with processes.together("load the weights"):
        clip = load_clip(config.clip, config.tokenizer)
        model = IqeClip(clip.config, config, _templates(clip.tokenizer, config))
    if layout is None:
        return model, jax.device_put(clip.params)
    processes.agree(f"CLIP weights in {config.clip}", digest(clip.params, 64))
    if layout.mesh.size == 1:  # where there is nothing to split, the rules need not be asked: that traces both towers
        return model, layout.put(clip.params, jax.tree.map(lambda _: layout.replicated, clip.params))
    return model, layout.put(clip.params, frozen_shardings(model, layout))


def describe(config: ModelConfig) -> IqeClip:
    """The model of `config` without its weights where it is the published one, which then need not be there.

    Any other is read from its folder or file; raises as `load_model`.
    """
    from convert.clip import load_clip
    from convert.clip_tokenizer import ClipTokenizer

    if config.clip != PUBLISHED or Path(config.clip).exists():
        clip = load_clip(config.clip, config.tokenizer)
        return IqeClip(clip.config, config, _templates(clip.tokenizer, config))
    sizes = _PUBLISHED_SIZES
    tokenizer = ClipTokenizer(config.tokenizer, sizes.vocab_size, sizes.context_length)
    return IqeClip(sizes, config, _templates(tokenizer, config))


def _templates(tokenizer: Callable[[str], list[int]], config: ModelConfig) -> Templates:
    tokens = [tokenizer(text) for text in config.templates]
    return Templates(tuple(tuple(ids[:-1]) for ids in tokens), tokens[0][-1])


def frozen_shardings(model: IqeClip, layout: Layout) -> dict[str, Any]:
    """Where each array of the frozen tree lies. Raises ValueError where the mesh does not fit the model."""
    return layout.shardings(jax.eval_shape(model.init_frozen, jax.random.key(0)))


def adapter_file(directory: Path) -> Path:
    """The file of a run's weights: those it trains, or a given adapter that it only scores. It need not be there.

    Raises ValueError for a directory whose config.json is damaged.
    """
    own, stored = directory / "adapter.safetensors", directory / "config.json"
    if begun(directory) or not stored.exists():
        return own
    given = read(stored).model.adapter
    return Path(given) if given else own


def begun(directory: Path) -> bool:
    """Whether training has left anything in a run directory."""
    return any((directory / name).exists() for name in ("adapter.safetensors", "kept.json", "checkpoints"))


def load_adapter(model: IqeClip, source: str | Path) -> Params:
    """A trained adapter for `model`, from an official .pth or our .safetensors, as NumPy arrays.

    Raises FileNotFoundError or ValueError, the latter listing every parameter that is missing, left over or of
    another shape than the model's.
    """
    return fit_adapter(model, read_adapter(source, model.config.iqm_heads), source)


def fit_adapter(model: IqeClip, adapter: Params, source: str | Path) -> Params:
    """`adapter` as it is, if it has `model`'s names and shapes; raises as `load_adapter`."""
    expected = meta.unbox(jax.eval_shape(model.init, jax.random.key(0)))
    want = {jax.tree_util.keystr(path, simple=True, separator="/"): x.shape for path, x in _leaves(expected)}
    found = {jax.tree_util.keystr(path, simple=True, separator="/"): x.shape for path, x in _leaves(adapter)}
    problems = [f"missing: {name} {want[name]}" for name in want if name not in found]
    problems += [f"left over: {name} {found[name]}" for name in found if name not in want]
    problems += [
        f"wrong shape: {name} is {found[name]}, the config makes it {want[name]}"
        for name in want
        if found.get(name, want[name]) != want[name]
    ]
    if problems:
        raise ValueError(f"{source} does not fit the model that the config describes:\n  " + "\n  ".join(problems))
    return adapter


def read_adapter(source: str | Path, iqm_heads: int | None = None) -> dict[str, Any]:
    """A trained adapter as NumPy arrays, of whatever sizes it has; see `convert.adapter.load_adapter`."""
    from convert.adapter import load_adapter

    return load_adapter(source, iqm_heads)


def save_adapter(adapter: Params, path: Path, *, chosen_on: str | None = None) -> None:
    """Write a trained adapter, whole or not at all, in place of one that is there.

    `chosen_on` names the set whose test data the weights were chosen on, which the file says from then on.
    """
    from convert.adapter import save_adapter

    notes = {CHOSEN_ON: chosen_on} if chosen_on else {}
    save_adapter(jax.tree.map(np.asarray, dict(adapter)), path, force=True, notes=notes)


def chosen_on(source: str | Path) -> str | None:
    """The set whose test data an adapter's weights were chosen on, as its file says; None where it says nothing."""
    from convert.adapter import read_notes

    return read_notes(source).get(CHOSEN_ON)


def adapter_settings(adapter: Params) -> dict[str, int]:
    """The fields of ModelConfig that an adapter's shapes tell."""
    prompts, iqm = adapter["prompts"], adapter["iqm"]
    return {
        "prompt_len": prompts["prompt_query"].shape[1],
        "learnable_tokens": prompts["prompt_embeddings"].shape[1],
        "prompt_depth": prompts["deep_prompt_embeddings"].shape[0] + 1,
        "iqm_heads": iqm["layer_0"]["attention"]["query"]["kernel"].shape[1],
        "iqm_layers": sum(name.startswith("layer_") for name in iqm),
        "iqm_width": iqm["layer_0"]["intermediate_query"]["kernel"].shape[1],
    }


def digest(tree: Mapping[str, Any], first: int | None = None) -> str:
    """A short fingerprint of all names, shapes and values of a parameter tree, or of each array's `first` values."""
    hasher = hashlib.blake2b(digest_size=16)
    for path, leaf in _leaves(tree):
        array = np.asarray(leaf)
        hasher.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        hasher.update(np.ascontiguousarray(array if first is None else array.flat[:first]).data)
    return hasher.hexdigest()


def _leaves(tree: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    return jax.tree.leaves_with_path(dict(tree))

"""A trained model behind one call: images in, anomaly scores and maps out. The Python face of the project.

detector = iqe_jax.load("runs/brain_fewshot/brain-k4-seed0")
detector = iqe_jax.load(clip="ViT-L-14-336px.pt", adapter="official.pth", iqm_heads=8)
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from jaxtyping import Float

from iqe_jax.config import Config, ModelConfig, check, read
from iqe_jax.data.transforms import decoded, image_array, load_image, reading
from iqe_jax.models.iqe_clip import IqeClip, Params
from iqe_jax.models.layers import TOWER_OPTIONS
from iqe_jax.weights import adapter_file, adapter_settings, fit_adapter, load_adapter, load_model, read_adapter

Images = np.ndarray | jax.Array | PIL.Image.Image | str | Path | Sequence[Any]


class Prediction(NamedTuple):
    """What the detector says of one image, or with a leading axis of several.

    `score` is higher for anomalous images: officially in [0, 2] few-shot and in [0, 2K] zero-shot, in [0, 1] where the
    model's `score` setting is another. `anomaly_map` (S, S) is in [0, 1].
    """

    score: Float[np.ndarray, "*batch"]
    anomaly_map: Float[np.ndarray, "*batch side side"]


class Detector:
    """A model with its weights. Call it with images; `outputs` gives every intermediate."""

    def __init__(self, model: IqeClip, frozen: Params, trainable: Params, *, zero_shot: bool, batch_size: int = 16):
        """Bundle a model and its parameter trees; `load` is the usual way to get one.

        `zero_shot` chooses which of the two image scores is given; `batch_size` bounds how many images are run at once.
        """
        self.model, self.zero_shot, self.batch_size = model, zero_shot, batch_size
        self._frozen, self._trainable = frozen, trainable

    def __call__(self, images: Images) -> Prediction:
        """Score images and map their anomalies.

        Args:
            images: one image or several. An image is an array (H, W, 3), uint8 or float in [0, 1], a PIL image, or the
                path of an image file; several are an array (B, H, W, 3) or a sequence of single ones. Images that are
                S×S are used as they are, others are resized as in training.

        Returns:
            For one image a Prediction of a scalar and an (S, S) map, for several of (B,) and (B, S, S).

        Raises:
            FileNotFoundError: a path that is not there.
            ValueError: an empty sequence, a file that is no image, an array of another shape or type, or values that
                are not finite or not in [0, 1].
        """
        arrays, single = self.prepare(images)
        scores, maps = [], []
        for start in range(0, len(arrays), self.batch_size):
            batch = arrays[start : start + self.batch_size]
            score, anomaly_map = _predict(
                self.model, self._trainable, self._frozen, _padded(batch, self.batch_size, single), self.zero_shot
            )
            scores.append(np.asarray(score)[: len(batch)])
            maps.append(np.asarray(anomaly_map)[: len(batch)])
        score, anomaly_map = np.concatenate(scores), np.concatenate(maps)
        return Prediction(score[0], anomaly_map[0]) if single else Prediction(score, anomaly_map)

    @property
    def weights(self) -> dict[str, Params]:
        """The parameter trees: `frozen`, which is CLIP, and `trainable`, the adapter."""
        return {"frozen": self._frozen, "trainable": self._trainable}

    def outputs(self, images: Images) -> dict[str, jax.Array]:
        """Every intermediate for one batch of images (as in a call; a single image is a batch of one), by name.

        `image_features` (B, D), `patch_tokens` (K, B, L, W), `class_tokens` (B, P, D), `query_tokens` (B, 2, D),
        `text_embeddings` (B, 2, D), `dense_features` (K, B, L, D), `query_features` (K, B, 2, D), `maps_query` and
        `maps_text` (K, B, 2, S, S), normal channel first, `scores_query` and `scores_text` (K, B), `segmentation`
        (B, S, S), `score_zero`, `score_few`, `score_mean`, `score_max` and `score_top` (B).
        """
        return _outputs(self.model, self._trainable, self._frozen, self.prepare(images)[0])

    def prepare(self, images: Images) -> tuple[Float[np.ndarray, "batch side side 3"], bool]:
        """Images as one float array at S×S, as a call takes them, and whether a single one was given.

        Raises as a call does.
        """
        single = (
            isinstance(images, str | Path) or not hasattr(images, "__len__") or getattr(images, "ndim", 4) in (0, 2, 3)
        )
        several: Any = [images] if single else images
        if len(several) == 0:
            raise ValueError("no images were given")
        size = self.model.config.image_size
        return np.stack([_as_array(image, size, i) for i, image in enumerate(several)]), single


def load(
    run_dir: str | Path | None = None,
    *,
    clip: str | Path | None = None,
    adapter: str | Path | None = None,
    zero_shot: bool | None = None,
    **settings: Any,
) -> Detector:
    """A Detector from a run directory, or from weights.

    Args:
        run_dir: directory of a finished run of train.py or evaluate.py; nothing else is needed then.
        clip: CLIP's weights in any form that `--model.clip` takes.
        adapter: a trained adapter, official .pth or our .safetensors.
        zero_shot: with `clip` and `adapter`, whether scores are the zero-shot ones; by default the few-shot ones.
        settings: with `clip` and `adapter`, further fields of `ModelConfig`, such as `image_size`, `levels` and
            `iqm_heads`, where they differ from the published ones. All other sizes are read from the weights.

    Raises:
        FileNotFoundError, ValueError: weights that are not there, cannot be read or do not go together, or a setting
            that cannot work.
        TypeError: neither a run directory nor both weights, something beside a run directory, or an unknown setting.
    """
    if run_dir is not None:
        if clip or adapter or settings or zero_shot is not None:
            raise TypeError("load takes a run directory, which has all settings, or clip= and adapter=, not both")
        return _load_run(Path(run_dir))
    if clip is None or adapter is None:
        raise TypeError("load needs a run directory, or both clip= and adapter=")
    # Our files tell their heads, official ones do not.
    heads = None if Path(adapter).suffix == ".safetensors" else ModelConfig.iqm_heads
    weights = read_adapter(adapter, settings.get("iqm_heads", heads))
    settings = {**adapter_settings(weights), **settings}
    if "levels" in settings:
        settings["levels"] = tuple(settings["levels"])
    config = ModelConfig(clip=str(clip), adapter=str(adapter), **settings)
    check(Config(model=config))
    model, frozen = load_model(config)
    return Detector(model, frozen, jax.device_put(fit_adapter(model, weights, adapter)), zero_shot=bool(zero_shot))


def _load_run(directory: Path) -> Detector:
    path = directory / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{directory} is no run directory: it has no config.json. train.py writes one")
    config = read(path)
    source = adapter_file(directory)
    if source.parent == directory and not source.exists():
        raise FileNotFoundError(f"{directory} has no trained adapter yet: run train.py with its settings to the end")
    model, frozen = load_model(config.model)
    return Detector(model, frozen, jax.device_put(load_adapter(model, source)), zero_shot=config.zero_shot)


@partial(jax.jit, static_argnames=("model", "zero_shot"), compiler_options=TOWER_OPTIONS)
def _predict(model: IqeClip, trainable: Params, frozen: Params, images: jax.Array, zero_shot: bool):
    outputs = model.predict(model.head(trainable, frozen, model.features(frozen, images)))
    return model.image_score(outputs, zero_shot=zero_shot), outputs["segmentation"]


@partial(jax.jit, static_argnames="model", compiler_options=TOWER_OPTIONS)
def _outputs(model: IqeClip, trainable: Params, frozen: Params, images: jax.Array) -> dict[str, jax.Array]:
    features = model.features(frozen, images)
    outputs = model.head(trainable, frozen, features)
    outputs |= model.predict(outputs)
    for branch in ("query", "text"):
        del outputs[f"logits_{branch}"]
        anomalous = outputs[f"maps_{branch}"]
        outputs[f"maps_{branch}"] = jnp.stack([1 - anomalous, anomalous], 2)
    return {**outputs, "patch_tokens": features.patch_tokens, "image_features": features.image_features}


def _padded(batch: np.ndarray, size: int, single: bool) -> np.ndarray:
    """The batch filled up to `size`, so that any number of images runs the same program; one image runs alone."""
    if single:
        return batch
    return np.concatenate([batch, np.zeros((size - len(batch), *batch.shape[1:]), batch.dtype)])


def _as_array(image: Any, size: int, index: int) -> Float[np.ndarray, "side side 3"]:
    """One image of any accepted kind as float32 in [0, 1] at S×S."""
    if isinstance(image, str | Path):
        return load_image(Path(image), size)
    if not isinstance(image, np.ndarray | jax.Array):
        if not isinstance(image, PIL.Image.Image):
            raise ValueError(f"image {index} is a {type(image).__name__}; expected an array, a PIL image or a path")
        with reading(f"number {index}"):
            image = decoded(image)
        return image_array(image, f"number {index}", size)
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[-1] != 3 or 0 in array.shape:
        raise ValueError(f"image {index} has shape {array.shape}; expected (height, width, 3)")
    if array.dtype == np.uint8:
        array = array.astype(np.float32) / 255
    elif not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"image {index} has type {array.dtype}; expected uint8, or floats in [0, 1]")
    array = array.astype(np.float32)
    if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
        raise ValueError(
            f"image {index} has values from {array.min()} to {array.max()}; expected finite ones in [0, 1]"
        )
    if array.shape[:2] == (size, size):
        return array
    pixels = np.round(array * 255).astype(np.uint8)
    return image_array(PIL.Image.fromarray(pixels), f"number {index}", size)

"""Scenes to arrays for training the tiny CLIP: its vocabulary, and batches of pixels, token ids and captioned patches.

No JAX here, so that a worker process can draw the next batch while the towers run in `train_clip.py`.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image

from . import scenes

CAPTION_TOKENS = 40
PHRASE_TOKENS = 16
PHRASES = 112
"""At most this many different region phrases per batch."""
PER_REGION = 4
"""At most this many patches per captioned region."""
CONTEXT = 77
PROMPTS = ("a photo of a normal <|class|>.", "a photo of a abnormal <|class|>.")

_TRAIN, _HELD_OUT, _VOCABULARY = 0xC11B, 0xC11C, 0xC11D
"""First entries of the seed sequences, which no phantom set shares."""


@dataclass
class Batch:
    """Pictures with captions, and for some patches of each the phrase that describes what is there.

    `caption_groups` and `patch_phrases` are indices, so that equal texts count as matches of each other.
    """

    images: UInt8[np.ndarray, "batch side side 3"]
    captions: Int[np.ndarray, "batch caption"]
    caption_ends: Int[np.ndarray, " batch"]
    caption_groups: Int[np.ndarray, " batch"]
    phrases: Int[np.ndarray, "phrase tokens"]
    phrase_ends: Int[np.ndarray, " phrase"]
    phrase_used: Bool[np.ndarray, " phrase"]
    patches: Int[np.ndarray, "batch region"]
    patch_phrases: Int[np.ndarray, "batch region"]
    patch_used: Bool[np.ndarray, "batch region"]


def build_tokenizer(out: Path, seed: int, captions: int = 800) -> int:
    """Learn a byte-level BPE vocabulary from drawn captions, in CLIP's own form, write it, and return its size."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    texts = list(PROMPTS) * 20
    for index in range(captions):
        scene = scenes.draw(np.random.default_rng([_VOCABULARY, seed, index]))
        texts += [scene.caption, *(phrase for phrase, _ in scene.regions)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
    )
    learner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=1200, min_frequency=3, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
        ),
    )
    merges: Any = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    # Every byte alone and at a word's end comes first, so that no text has an unknown token.
    tokens = alphabet + [f"{letter}</w>" for letter in alphabet]
    tokens += [joined for joined in dict.fromkeys(a + b for a, b in merges) if joined not in set(tokens)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=CONTEXT
    )
    tokenizer.save_pretrained(out)
    return len(tokens)


def draw_batch(folder: str, seed: int, step: int, size: int, side: int, held_out: bool = False) -> Batch:
    """The batch of one step: the same for the same arguments. `side` is the pictures' side, a multiple of 8."""
    rng = np.random.default_rng([_HELD_OUT if held_out else _TRAIN, seed, step])
    drawn = [scenes.draw(np.random.default_rng(child)) for child in rng.bit_generator.seed_seq.spawn(size)]  # pyright: ignore
    grid = side // 8
    captions = np.zeros((size, CAPTION_TOKENS), np.int32)
    ends, groups = np.zeros(size, np.int32), np.zeros(size, np.int32)
    phrases, phrase_ends = np.zeros((PHRASES, PHRASE_TOKENS), np.int32), np.zeros(PHRASES, np.int32)
    regions = (size, scenes.REGIONS * PER_REGION)
    patches, patch_phrases, used = np.zeros(regions, np.int32), np.zeros(regions, np.int32), np.zeros(regions, bool)
    images = np.zeros((size, side, side, 3), np.uint8)
    known: dict[str, int] = {}
    seen: dict[str, int] = {}
    for i, scene in enumerate(drawn):
        picture = Image.fromarray((scene.image * 255 + 0.5).astype(np.uint8))
        images[i] = np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC))
        groups[i] = seen.setdefault(scene.caption, len(seen))
        ends[i] = _put(folder, scene.caption, captions[i])
        for j, (phrase, cover) in enumerate(scene.regions):
            chosen = _pick(rng, cover, grid)
            if not chosen or (phrase not in known and len(known) == PHRASES):
                continue
            if phrase not in known:
                known[phrase] = len(known)
                phrase_ends[known[phrase]] = _put(folder, phrase, phrases[known[phrase]])
            row = slice(j * PER_REGION, j * PER_REGION + len(chosen))
            patches[i, row], patch_phrases[i, row], used[i, row] = chosen, known[phrase], True
    filled = np.arange(PHRASES) < len(known)
    return Batch(images, captions, ends, groups, phrases, phrase_ends, filled, patches, patch_phrases, used)


def _pick(rng: np.random.Generator, cover: scenes.Plane, grid: int) -> list[int]:
    """Up to PER_REGION patches of a grid × grid cut that show the covered part, the better the likelier."""
    share = cover.reshape(grid, scenes.SIDE // grid, grid, scenes.SIDE // grid).mean((1, 3)).ravel()
    if share.max() < 0.08:
        return []
    weight = np.where(share >= 0.5 * share.max(), share, 0.0).astype(np.float64)
    count = min(PER_REGION, int((weight > 0).sum()))
    return rng.choice(len(weight), count, replace=False, p=weight / weight.sum()).tolist()


@cache
def _tokenizer(folder: str):
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


@cache
def _ids(folder: str, text: str) -> tuple[int, ...]:
    return tuple(_tokenizer(folder)(text)["input_ids"])


def _put(folder: str, text: str, row: Int[np.ndarray, " tokens"]) -> int:
    """Write a text's ids into a row, cut to its length but keeping the end token; return the end token's place."""
    ids = _ids(folder, text)
    ids = ids if len(ids) <= len(row) else (*ids[: len(row) - 1], ids[-1])
    row[: len(ids)] = ids
    return len(ids) - 1

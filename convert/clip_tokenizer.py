"""Text to CLIP's token ids: through the checkpoint's own tokenizer where it has one, by heart for the default prompts.

The `tokenizers` library reads a tokenizer.json of CLIP's; transformers, which takes long to import, all other
forms. Which folder a checkpoint's tokenizer is in is for clip.py to say.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert.files import fetch, is_hub_id, read_json

TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
]
CLIP_VOCABULARY = 49408
# OpenAI's checkpoints carry no tokenizer, and the default prompts must not need one. `<|class|>` is ordinary text.
KNOWN_IDS = {
    "a photo of a normal <|class|>.": (49406, 320, 1125, 539, 320, 5967, 27, 347, 1874, 91, 29, 269, 49407),
    "a photo of a abnormal <|class|>.": (49406, 320, 1125, 539, 320, 40934, 27, 347, 1874, 91, 29, 269, 49407),
}


@dataclass
class ClipTokenizer:
    """Callable, text → token ids with start and end tokens; `source` is a folder, a hub id, or None for none.

    Calling raises ValueError for a text the tokenizer cannot be used on: none given, ids outside the checkpoint's
    vocabulary, no start and end tokens around it, or longer than the text tower's context.
    """

    source: str | Path | None
    vocab_size: int
    context_length: int
    _loaded: Any = field(default=None, repr=False, compare=False)

    def __call__(self, text: str) -> list[int]:
        """Token ids of one text."""
        if self.source is None:
            if self.vocab_size == CLIP_VOCABULARY and text in KNOWN_IDS:
                return list(KNOWN_IDS[text])
            raise ValueError(
                f"the text {text!r} needs a tokenizer and this checkpoint has none: name a folder or hub id that has "
                "one, with --tokenizer or --model.tokenizer (openai/clip-vit-large-patch14 for OpenAI's vocabulary)"
            )
        ids = list(self._tokenizer(text)["input_ids"])
        start, end = self.ends()
        if len(ids) < 2 or ids[0] != start or ids[-1] != end:
            raise ValueError(
                f"the tokenizer in {self.source} gives {ids} for {text!r}, expected ids that begin with its start "
                f"token {start} and end with its end token {end}"
            )
        if max(ids) >= self.vocab_size:
            raise ValueError(
                f"the tokenizer in {self.source} gives id {max(ids)} for {text!r}, but the checkpoint has only "
                f"{self.vocab_size} tokens; name the tokenizer that belongs to it"
            )
        if len(ids) > self.context_length:
            raise ValueError(f"{text!r} is {len(ids)} tokens long, the text tower takes {self.context_length}")
        return ids

    def ends(self) -> tuple[int, int]:
        """Start and end token; without a tokenizer the last two of the vocabulary, as in every CLIP."""
        if self.source is None:
            return self.vocab_size - 2, self.vocab_size - 1
        start, end = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        if start is None or end is None:
            raise ValueError(f"the tokenizer in {self.source} names no start and end token (bos_token, eos_token)")
        return start, end

    def folder(self) -> Path | None:
        """The local folder of the tokenizer's files, downloaded first where `source` is a hub id; None for none."""
        if self.source is None or Path(self.source).is_dir():
            return None if self.source is None else Path(self.source)
        if Path(self.source).exists() or not is_hub_id(self.source):
            raise FileNotFoundError(f"tokenizer {self.source}: expected a folder with tokenizer files or a hub id")
        return fetch(str(self.source), TOKENIZER_FILES, "its tokenizer")

    @property
    def _tokenizer(self) -> Any:
        if self._loaded is None:
            folder = self.folder()
            assert folder is not None
            if not has_tokenizer(folder):
                raise FileNotFoundError(
                    f"{folder} has no tokenizer files (tokenizer.json, or vocab.json and merges.txt)"
                )
            self._loaded = _load(folder)
        return self._loaded


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds what a tokenizer can be made from."""
    return (folder / "tokenizer.json").is_file() or all((folder / f).is_file() for f in ("vocab.json", "merges.txt"))


def _load(folder: Path) -> Any:
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    of_clip = settings.get("tokenizer_class") in (None, "CLIPTokenizer", "CLIPTokenizerFast")
    try:
        if of_clip and (folder / "tokenizer.json").is_file():
            return _FromJson(folder / "tokenizer.json", settings)
        # Without PyTorch, which tokenizing does not need, transformers advises on its first import to install it.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        if of_clip:
            from transformers import CLIPTokenizer as Loader  # imports in a third of the time, and without torch
        else:
            from transformers import AutoTokenizer as Loader
        return Loader.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # bad files surface as anything from KeyError to the Rust library's own
        raise ValueError(f"the tokenizer in {folder} cannot be loaded ({type(error).__name__}: {error})") from error


class _FromJson:
    """What ClipTokenizer needs of transformers' CLIPTokenizer, without the second that its import takes."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(path))
        self.bos_token_id = self._id(settings.get("bos_token") or "<|startoftext|>")
        self.eos_token_id = self._id(settings.get("eos_token") or "<|endoftext|>")

    def _id(self, token: Any) -> int | None:
        return self._tokenizer.token_to_id(token["content"] if isinstance(token, dict) else token)

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self._tokenizer.encode(text).ids}

"""Reading tensors out of checkpoint files, fetching them from the Hugging Face hub, and writing files atomically.

Nothing here knows what the tensors mean. No file is ever unpickled freely: safetensors, PyTorch's `weights_only`
reader and TorchScript's own are the only ways in. PyTorch is imported when a PyTorch file is opened or written.
"""

import json
import re
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, which safetensors needs)
import numpy as np

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
NESTED = ("state_dict", "model_state_dict")  # keys under which training scripts put their weights
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of one `.safetensors`, sharded `.index.json` or PyTorch file, by name, half precision upcast.

    Raises FileNotFoundError for a missing file and ValueError for one that cannot be read or is not of these forms.
    """
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    state = read_torch(path)
    for key in NESTED:
        if isinstance(state.get(key), Mapping):
            state = state[key]
    if state and all(str(name).startswith("module.") for name in state):  # DataParallel's wrapper
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return to_numpy(state, path)


def read_torch(path: Path) -> dict[str, Any]:
    """The dict in a PyTorch file, on the CPU: a TorchScript archive's state dict, or what `torch.save` was given."""
    _check_file(path)
    if path.suffix not in TORCH_SUFFIXES:
        known = ", ".join((".safetensors", *TORCH_SUFFIXES))
        raise ValueError(f"{path} is of no known form: expected a file ending in {known}")
    torch = import_torch(path)
    try:
        if _is_torchscript(path):
            with warnings.catch_warnings():
                # Deprecated in favour of formats that OpenAI's published archives will never be in.
                warnings.simplefilter("ignore", DeprecationWarning)
                return dict(torch.jit.load(path, map_location="cpu").state_dict())
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has no one class of error for a bad file
        raise ValueError(
            f"{path} cannot be read as a PyTorch file of plain tensors; it may be cut short, or hold more than weights "
            f"({_first_line(error)})"
        ) from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__}, expected a dict of tensors")
    return dict(state)


def to_numpy(state: Mapping[str, Any], path: Path) -> dict[str, np.ndarray]:
    """Torch tensors to NumPy arrays, floating point as float32. One ValueError names all that are no tensors."""
    torch = import_torch(path)
    others = [f"{name} ({type(t).__name__})" for name, t in state.items() if not isinstance(t, torch.Tensor)]
    if others:
        more = f" and {len(others) - 10} more" if len(others) > 10 else ""
        raise ValueError(f"{path} holds entries that are not tensors: {', '.join(others[:10])}{more}")
    try:
        return {
            str(name): (t.detach().float() if t.is_floating_point() else t.detach()).cpu().numpy()
            for name, t in state.items()
        }
    except Exception as error:  # sparse, quantised and storage-less tensors
        raise ValueError(f"{path} holds tensors that are not plain arrays ({_first_line(error)})") from error


def import_torch(path: Path) -> Any:
    """PyTorch, or an ImportError that says what it is needed for."""
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"{path} is a PyTorch file; install PyTorch with pip install '.[convert]'") from error
    return torch


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    _check_file(path)
    try:
        with safe_open(path, "numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as a safetensors file; fetch it again ({error})") from error
    return {k: v.astype(np.float32) if v.dtype.name in ("bfloat16", "float16") else v for k, v in tensors.items()}


def read_metadata(path: Path) -> dict[str, str]:
    """The text entries in a safetensors file's header."""
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        return file.metadata() or {}


def _read_shards(index: Path) -> dict[str, np.ndarray]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(s, str) and Path(s).name == s for s in shards.values()):
        raise ValueError(f"{index} has no usable weight_map, expected tensor names with files in the same folder")
    files = sorted(set(shards.values()))
    if absent := [name for name in files if not (index.parent / name).is_file()]:
        raise FileNotFoundError(f"{index} names shards that are not beside it: {', '.join(absent)}")
    tensors: dict[str, np.ndarray] = {}
    for name in files:
        tensors |= read_tensors(index.parent / name)
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError for anything else."""
    _check_file(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


def _check_file(path: Path) -> None:
    """Tell apart early what would otherwise give a reader's obscure message."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    with path.open("rb") as file:
        start = file.read(32)
    if not start:
        raise ValueError(f"{path} is empty; fetch it again")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the weights; run git lfs pull in its folder")


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"[:200]


def is_hub_id(source: str | Path) -> bool:
    """Whether `source`, which is no path that exists, could be an `owner/name` on the Hugging Face hub."""
    known = (".safetensors", ".json", *TORCH_SUFFIXES)
    return _HUB_ID.fullmatch(str(source)) is not None and not str(source).endswith(known)


def fetch(repo: str, patterns: list[str], what: str) -> Path:
    """Download the files of a hub repository that match `patterns`; returns the local folder, cached between calls.

    Raises FileNotFoundError with what to get and where to put it, where that is not possible.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except Exception as error:  # the hub's client has changed its HTTP library, and with it the errors, twice
        raise FileNotFoundError(
            f"{repo} is no file or folder here, and {what} could not be fetched from the Hugging Face hub "
            f"({_first_line(error)}). Check the name and the network, or run, where there is a network, "
            f"`hf download {repo} --local-dir DIR`, copy DIR here and give its path instead of {repo}."
        ) from error


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Have `write` make a file at a temporary path in the same folder, then move it to `path` in one step.

    Raises OSError where it cannot be written.
    """
    from safetensors import SafetensorError

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        try:
            write(Path(folder) / path.name)
        except SafetensorError as error:  # what it makes of a full disk
            raise OSError(f"{path} cannot be written: {error}") from error
        (Path(folder) / path.name).replace(path)

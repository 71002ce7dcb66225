"""Where the time of a call goes on a GPU, kernel by kernel, from JAX's own profiler."""

import gzip
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

CALLS = 3
# What a kernel's name says of its work, in the order in which they are tried.
KINDS = {
    "attention of the image tower": "cudnn|attention_to_all",
    "attention of the query module, one pass": "fused_attention",
    "gradient of the dense features, one pass": "tokens_gradient",
    "products, Triton": "gemm_fusion",
    "products, cuBLAS": "nvjet|cutlass|gemm|gemv|cublas",
    "sums, maxima and norms": "reduce|^fusion|softmax",
    "copies, transpositions, types": "transpose|concatenate|slice|copy|memcpy|memset|convert$|pad",
    "element by element": "loop|wrapped",
}


def seconds(call: Callable[[], Any]) -> dict[str, float]:
    """Seconds of one call by kind of kernel, the longest first, and all of them as `all`; empty without a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            for _ in range(CALLS - 1):
                call()
            jax.block_until_ready(call())
        (path,) = Path(folder).rglob("perfetto_trace.json.gz")
        events = json.loads(gzip.decompress(path.read_bytes()))
    return by_kind(events["traceEvents"] if isinstance(events, dict) else events)


def by_kind(events: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Seconds of one of `CALLS` calls by kind, from the events of a trace."""
    named: dict[str, dict[Any, str]] = {"process_name": {}, "thread_name": {}}
    for event in events:
        if event.get("ph") == "M" and event.get("name") in named:
            named[event["name"]][event["pid"], event.get("tid")] = event["args"]["name"]
    gpus = {pid for (pid, _), name in named["process_name"].items() if "GPU" in name}
    streams = {key for key, name in named["thread_name"].items() if key[0] in gpus and "Stream" in name}
    total: Counter[str] = Counter()
    for event in events:
        if event.get("ph") == "X" and (event["pid"], event["tid"]) in streams:
            total[kind(event["name"])] += event["dur"] / 1e6 / CALLS
    return {**dict(total.most_common()), "all": sum(total.values())} if total else {}


def kind(kernel: str) -> str:
    """The kind of work that a kernel's name stands for."""
    name = re.sub(r"[._]\d+", "", kernel)
    return next((known for known, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")

"""What Google Cloud's documentation says of its TPUs, and what it says an exchange between them takes at best."""

from dataclasses import dataclass

from iqe_jax.footprint import Collective

_DOCS = "https://docs.cloud.google.com/tpu/docs/"


@dataclass(frozen=True)
class Chip:
    """One TPU chip: peak bfloat16 FLOP/s, bytes of memory and bytes/s of it, bytes/s it sends to its neighbours.

    `links` is half of the documented bidirectional bandwidth, over all links at once.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    links: float
    source: str


CHIPS = {
    chip.name: chip
    for chip in (
        # Its page gives no links, but the all-reduce bandwidth of a pod: 1.1 PB/s over 4096 chips.
        Chip("v4", 275e12, 32e9, 1200e9, 1.1e15 / 4096, f"{_DOCS}v4"),
        Chip("v5e", 197e12, 16e9, 819e9, 200e9, f"{_DOCS}v5e"),
        Chip("v5p", 459e12, 95e9, 2765e9, 600e9, f"{_DOCS}v5p"),
        Chip("v6e", 918e12, 32e9, 1638e9, 400e9, f"{_DOCS}v6e"),
        Chip("tpu7x", 2307e12, 192e9, 7380e9, 600e9, f"{_DOCS}tpu7x"),
    )
}

# A product in full float32 is six products in bfloat16, the only ones that the matrix units make.
PASSES = {"float32": 6, "bfloat16": 1}


def seconds_to_exchange(collective: Collective, links: float) -> float:
    """The time of one collective round a ring at `links` bytes/s, without latency."""
    n = collective.group
    times = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(collective.kind, (n - 1) / n)
    return times * collective.bytes / links

"""What has to be known of this machine's CPU to choose the quick form of a product."""

from functools import cache
from pathlib import Path


@cache
def on_amd() -> bool:
    """Whether the CPU is AMD's, by Linux's word; False where nothing says so."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False

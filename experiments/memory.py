"""The memory of this process: what it takes, and giving back what is free."""

import ctypes
import sys
from pathlib import Path

from experiments.errors import InputError


def memory(name: str) -> int:
    """Bytes of this process as Linux counts them: VmRSS, VmHWM (its peak) or VmData."""
    status = Path("/proc/self/status")
    if not status.exists():
        raise InputError("this benchmark reads /proc/self/status; run it on Linux")
    return next(
        1024 * int(line.split()[1])
        for line in status.read_text().splitlines()
        if line.startswith(f"{name}:")
    )


def hand_back() -> None:
    """Has glibc's allocator return to the system what is free (some 20 ms); elsewhere nothing.

    XLA on a CPU allocates what a step needs anew, on whichever thread comes. The allocator keeps an
    arena for each thread and scatters that over all of them, so that memory grows for hours.
    """
    if sys.platform == "linux":
        malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if malloc_trim:
            malloc_trim(0)

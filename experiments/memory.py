"""The memory of this process: what it takes, and how its allocator shares it out."""

import ctypes
import sys
from pathlib import Path

from experiments.errors import InputError

M_ARENA_MAX = -8  # of <malloc.h>


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


def one_arena() -> None:
    """Has glibc's allocator serve all threads from one arena; elsewhere nothing.

    XLA on a CPU allocates what a step needs anew, on whichever thread comes. Left with an arena for
    each, the allocator scatters that over all of them and memory grows for hours. Arenas that are
    there already stay, so call this before the threads are started.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt:
            mallopt(M_ARENA_MAX, 1)

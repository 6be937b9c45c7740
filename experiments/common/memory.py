"""The memory of this process: what it takes, what of that is in use, and giving back the rest."""

import ctypes
import os
import sys
from pathlib import Path

from experiments.common.errors import InputError


class _Mallinfo2(ctypes.Structure):
    """Of glibc's <malloc.h>, from 2.33 on: sums over all arenas, in bytes."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks")),
        ("keepcost", ctypes.c_size_t),
    ]


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


def in_use() -> int:
    """Bytes that were allocated and not freed; the process may have more from the system."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        raise InputError("this benchmark asks the allocator of glibc 2.33 or newer; run it there")
    mallinfo2.restype = _Mallinfo2
    found = mallinfo2()
    return found.uordblks + found.hblkhd


def release_memory() -> None:
    """Has glibc's allocator return to the system what is free (some 20 ms); elsewhere nothing.

    XLA on a CPU allocates what a step needs anew, on whichever thread comes. The allocator keeps an
    arena for each thread and scatters that over all of them, so that memory grows for hours.
    """
    if sys.platform == "linux":
        malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if malloc_trim:
            malloc_trim(0)


def total_memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

"""What a process takes, as Linux counts it."""

from pathlib import Path

from experiments.errors import InputError


def memory(name: str) -> int:
    """Bytes of this process: VmRSS, VmHWM (its peak) or VmData."""
    status = Path("/proc/self/status")
    if not status.exists():
        raise InputError("this benchmark reads /proc/self/status; run it on Linux")
    return next(
        1024 * int(line.split()[1])
        for line in status.read_text().splitlines()
        if line.startswith(f"{name}:")
    )

"""Memory in use, resident, and handed back."""

import platform

import numpy as np
import pytest

from experiments.common.memory import in_use, memory, release_memory

MB = 10**6
pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="reads what Linux and glibc count"
)


def test_what_is_allocated_is_in_use_and_what_is_written_resident():
    used, resident = in_use(), memory("VmRSS")
    large, small = np.ones(50 * MB, np.uint8), [bytearray(1000) for _ in range(50_000)]
    assert in_use() - used == pytest.approx(100 * MB, abs=10 * MB)
    assert memory("VmRSS") - resident > 40 * MB  # small ones may lie where memory was free
    kept = small[-1]  # nothing below it can be cut off
    del large, small
    assert in_use() - used == pytest.approx(0, abs=10 * MB)
    before = memory("VmRSS")
    release_memory()
    assert before - memory("VmRSS") > 30 * MB and len(kept) == 1000

"""What a process says of its memory."""

from __future__ import annotations

import mmap
import sys

import pytest

from samba_lm.memory import peak_memory, resident_memory


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is resident now")
def test_resident_memory_rises_and_falls_and_the_peak_stays() -> None:
    before = resident_memory()
    size = 64 << 20
    with mmap.mmap(-1, size) as block:
        block.write(b"x" * size)
        held = resident_memory()
        assert held > before + size // 2
    assert resident_memory() < held - size // 2
    assert peak_memory() >= held - (1 << 20)  # the system counts pages in batches

"""What a process says of its memory."""

from __future__ import annotations

import mmap
import os
import sys

import pytest
import torch

from samba_lm.memory import free_memory, peak_memory, ran_out, resident_memory


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


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is free")
def test_what_is_free_is_some_of_what_there_is() -> None:
    free = free_memory()
    assert free is not None
    assert 0 < free < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_what_ran_out() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert ran_out(caught.value)
    for error in (MemoryError(), torch.OutOfMemoryError("no more"), RuntimeError("CUDA error: out of memory")):
        assert ran_out(error)
    for error in (RuntimeError("shapes differ"), ValueError("out of memory"), OSError(28, "no space")):
        assert not ran_out(error)

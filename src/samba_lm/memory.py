"""How much memory this process has taken, may still take, and whether it was too little."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path


def peak_memory() -> int:
    """Bytes of this process's largest resident memory so far."""
    if sys.platform == "linux":
        # Not ru_maxrss: a new program inherits that from the process that started it, which may be larger.
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        peak = next(line for line in lines if line.startswith("VmHWM:"))
        return 1024 * int(peak.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes on macOS, KiB elsewhere
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def resident_memory() -> int:
    """Bytes of this process that are in memory now; where the system does not tell, the most that were."""
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
        return pages * resource.getpagesize()
    return peak_memory()


def free_memory() -> int | None:
    """Bytes that this process may still take without the machine's or its container's limit; None where unknown."""
    if sys.platform != "linux":
        return None
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    free = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    with contextlib.suppress(OSError, ValueError, StopIteration):  # no container, or one without a limit ("max")
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="utf-8"))
        held = int((group / "memory.current").read_text(encoding="utf-8"))
        stat = (group / "memory.stat").read_text(encoding="utf-8").splitlines()
        files = next(int(line.split()[1]) for line in stat if line.startswith("inactive_file "))  # given back if needed
        free.append(limit - held + files)
    return max(0, min(free)) if free else None


# Torch has no class of its own for the CPU's allocator, nor for what CUDA's libraries and Triton say.
_SAID = (
    "DefaultCPUAllocator: ",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
)


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there was not enough memory, of the machine or of a GPU."""
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")  # not imported: then it was not torch that ran out
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SAID)

"""Timing on a GPU by CUDA events, and going on when one measurement fails."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from samba_lm.bench.parity import ParityError
from samba_lm.errors import UserError, one_line
from samba_lm.ops.backend import INTERPRETED

T = TypeVar("T")
WARM_UP = 3


class NotMeasured(RuntimeError):  # noqa: N818 - it is an outcome to show, not a defect
    """There is no figure, and this says why in a few words."""


def require_gpu(command: str) -> torch.device:
    """The GPU to measure on. Raises UserError where there is none, or where kernels would be interpreted."""
    if not torch.cuda.is_available():
        raise UserError(
            f"`{command}` needs a CUDA GPU, and torch sees none here; `samba-lm bench` alone measures the CPU."
        )
    if INTERPRETED:
        raise UserError(f"`{command}`: TRITON_INTERPRET=1 keeps the kernels off the GPU: unset it.")
    return torch.device("cuda", torch.cuda.current_device())


def attempt(measure: Callable[[], T]) -> T:
    """What ``measure`` gives; anything that goes wrong in it, in whosever code, becomes NotMeasured."""
    try:
        return measure()
    except Exception as error:
        raise NotMeasured(_reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, NotMeasured):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, ModuleNotFoundError):
        return f"not installed ({error.name})"
    text = one_line(str(error))[:200]
    return f"parity: {text}" if isinstance(error, ParityError) else f"{type(error).__name__}: {text}"


def release(device: torch.device) -> None:
    """Give back the memory of what nobody holds any more."""
    if device.type == "cuda":
        gc.collect()
        # After a fault every call fails; the one that was at fault has told it.
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Timing:
    """Times of one call in ms."""

    times: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    def facts(self) -> dict[str, object]:
        """How many times, the fastest and the slowest."""
        return {"repeats": len(self.times), "min": min(self.times), "max": max(self.times)}


def wall_clock(call: Callable[[], object], repeats: int, device: torch.device) -> Timing:
    """Times of ``repeats`` calls from Python, until the device is done: for work so long that all of it counts."""

    def waited() -> None:
        call()
        synchronize(device)

    synchronize(device)
    return Timing(tuple(_wall(waited) for _ in range(repeats)))


class Clock:
    """Times calls on a device: by CUDA events around each, with nothing of its inputs in the L2 cache.

    Before each timed call a buffer far larger than the cache is read. That leaves the cache with none of the inputs
    and with nothing to write back, and keeps the GPU busy until Python has queued the call, so that the events measure
    kernels and not Python. On the CPU (for tests) it is the wall clock.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cold: torch.Tensor | None = None
        if device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
            self.cold = torch.zeros(min(1 << 31, total // 16) // 4, device=device)

    def close(self) -> None:
        """Give the buffer back; what is timed afterwards may find the cache warm."""
        self.cold = None
        release(self.device)

    def time(self, call: Callable[[], object], repeats: int) -> Timing:
        """Times of ``repeats`` calls, after some to warm up."""
        for _ in range(WARM_UP):
            call()
        if self.device.type != "cuda":
            return Timing(tuple(_wall(call) for _ in range(repeats)))
        torch.cuda.synchronize(self.device)
        events = [(_event(), _event()) for _ in range(repeats)]
        for start, end in events:
            if self.cold is not None:
                self.cold.sum()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(self.device)
        return Timing(tuple(start.elapsed_time(end) for start, end in events))


class Laps:
    """Times from one mark to the next, without waiting for the device in between."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.events: list[torch.cuda.Event] = []
        self.walls: list[float] = []

    def mark(self) -> None:
        """End a lap and begin the next."""
        if self.device.type == "cuda":
            event = _event()
            event.record()
            self.events.append(event)
        else:
            self.walls.append(time.perf_counter())

    def timing(self) -> Timing:
        """The laps."""
        if self.device.type != "cuda":
            return Timing(tuple(1e3 * (b - a) for a, b in zip(self.walls, self.walls[1:], strict=False)))
        torch.cuda.synchronize(self.device)
        return Timing(tuple(a.elapsed_time(b) for a, b in zip(self.events, self.events[1:], strict=False)))


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def _wall(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


class Memory:
    """The most memory that tensors take on a GPU from here on; nothing on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def peak(self) -> tuple[float, float] | None:
        """(allocated, reserved) in GiB."""
        if self.device.type != "cuda":
            return None
        allocated, reserved = torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)
        return allocated / 2**30, reserved / 2**30

"""Peak memory of reading a very long prompt, each length in a process of its own."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from pathlib import Path

from samba_lm.bench.timing import Figure

SHORT, LONG = 10_000, 1_000_000


def run_memory(name: str = "samba-tiny", short: int = SHORT, long: int = LONG) -> list[Figure]:
    """Read ``short`` and ``long`` random tokens with a model of the zoo; the peaks may differ by 50 MB."""
    (low, _), (high, seconds) = (_in_process(name, tokens) for tokens in (short, long))
    return [
        Figure(f"{name} peak memory reading {short:,} tokens", low, "MB"),
        Figure(f"{name} peak memory reading {long:,} tokens", high, "MB"),
        Figure("growth", high - low, "MB", 50.0),
        Figure(f"{name} reading {long:,} tokens", long / seconds, "tokens/s"),
    ]


def _in_process(name: str, tokens: int) -> tuple[float, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(read, (name, tokens))


def read(name: str, tokens: int) -> tuple[float, float]:
    """Peak resident memory of this process in MB after reading ``tokens`` tokens, and the seconds that took."""
    import torch

    from samba_lm import checkpoint
    from samba_lm.generation.prefill import DEFAULT_CHUNK

    model = checkpoint.create(name).eval()
    generator = torch.Generator().manual_seed(0)
    state = model.init_state(1)
    began = time.perf_counter()
    with torch.inference_mode():
        for start in range(0, tokens, DEFAULT_CHUNK):
            size = min(DEFAULT_CHUNK, tokens - start)
            ids = torch.randint(0, model.config.vocab_size, (1, size), generator=generator)
            hidden, state = model.features(ids, state)
        model.head(hidden[:, -1])
    seconds = time.perf_counter() - began
    return peak_memory() / 1e6, seconds


def peak_memory() -> int:
    """Bytes of this process's largest resident memory so far."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: a new process inherits that from the one that started it.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes on macOS, KiB elsewhere
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

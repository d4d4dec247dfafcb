"""The GPUs that are estimated for."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """What matters of a GPU: its memory as the driver tells it, bytes, and its dense bf16 peak, FLOP/s."""

    title: str
    memory: int
    peak: float

    @property
    def usable(self) -> int:
        """Bytes that tensors may take: the rest is what the allocator cannot use (up to 7.5% in `bench train`), CUDA's
        own and NCCL's buffers."""
        return round(0.92 * self.memory) - GIB


# Peaks are the data sheets', as in train/metrics.py.
GPUS = {
    "h100": Gpu("H100 80GB", 85_017_493_504, 989e12),
    "h200": Gpu("H200 141GB", 150_110_011_392, 989e12),
    "a100": Gpu("A100 80GB", 84_986_691_584, 312e12),
    "4090": Gpu("RTX 4090 24GB", 25_386_352_640, 165.2e12),
}
"""By the names that `samba-lm estimate --gpu` takes."""

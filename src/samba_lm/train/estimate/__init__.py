"""What a training run will take: memory of each GPU, time, and what to set so that it fits. Imports no torch."""

from samba_lm.train.estimate.gpus import GIB, GPUS, Gpu
from samba_lm.train.estimate.layout import Layout, arrange
from samba_lm.train.estimate.memory import Memory, memory
from samba_lm.train.estimate.plan import Choice, Estimate, estimate
from samba_lm.train.estimate.speed import MEASURED, Speed, speed

__all__ = [
    "GIB",
    "GPUS",
    "MEASURED",
    "Choice",
    "Estimate",
    "Gpu",
    "Layout",
    "Memory",
    "Speed",
    "arrange",
    "estimate",
    "memory",
    "speed",
]

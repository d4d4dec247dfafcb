"""The machine and the software a GPU benchmark ran on."""

from __future__ import annotations

import importlib.metadata
import subprocess

import torch

# Distributions whose speed or whose kernels may show in a table.
PACKAGES = (
    "triton",
    "mamba-ssm",
    "causal-conv1d",
    "flash-linear-attention",
    "fla-core",
    "flash-attn",
    "liger-kernel",
    "transformers",
)
ASKED = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem")


def version(distribution: str) -> str | None:
    """The installed version of a package by the name pip knows; None when it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(device: torch.device) -> dict[str, object]:
    """The GPU, its driver and limits, CUDA's version and the versions of the packages that matter (None: absent)."""
    facts: dict[str, object] = {"device": str(device), "cuda": torch.version.cuda}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device": properties.name,
            "gpu_memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            **_nvidia_smi(),
        }
    return {**facts, "packages": {name: version(name) for name in PACKAGES}}


def _nvidia_smi() -> dict[str, object]:
    """What only the driver's tool tells of the first GPU; empty where there is no such tool."""
    query = ["nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return (
        {}
        if not told.strip()
        else dict(zip(("driver", *ASKED[1:]), (part.strip() for part in told.splitlines()[0].split(",")), strict=False))
    )

"""Counts matrix products, those inside operators of our own too."""

from __future__ import annotations

from collections.abc import Callable

import torch


def products(run: Callable[[], object]) -> int:
    """How many matrix products ``run`` computes, once it is compiled: it is run twice."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return sum(event.name in ("aten::mm", "aten::addmm", "aten::addmm_") for event in profile.events())

"""Drawing a token from logits: temperature, top-k, top-p, min-p, and a number that a seed and a position give."""

from __future__ import annotations

import torch
from torch import Tensor

from samba_lm.ops.backend import Backend, choose
from samba_lm.ops.draw.cpu import furthest_cpu
from samba_lm.ops.draw.reference import (
    GREEDY_BELOW,
    Rules,
    furthest_reference,
    masses,
    pick,
    uniform,
    weigh,
)
from samba_lm.ops.shapes import require, require_rank, require_type

__all__ = ["GREEDY_BELOW", "NOT_FINITE", "Rules", "candidates", "draw", "uniform"]

BACKENDS = ("reference", "cpu", "triton")
NOT_FINITE = -1
"""What :func:`draw` gives instead of a token where the logits are no numbers."""


def draw(
    logits: Tensor,
    best: Tensor,
    likeliest: Tensor,
    rules: Rules,
    seed: Tensor,
    position: Tensor,
    *,
    cut: bool = True,
    backend: Backend = "auto",
) -> Tensor:
    """The next token of each row, as ``reference.py`` defines it.

    Args:
        logits: fp32 [B, V]; -inf rules a token out.
        best: fp32 [B], the largest logit of each row, NaN where one of them is. likeliest: int64 [B], whose it is.
        rules: what each row asks for.
        seed, position: int64 [B], what the uniform number of each row follows from.
        cut: False: no row asks for top-k, top-p or min-p.
        backend: see ``samba_lm.ops.backend``.

    Returns int64 [B]: ``likeliest`` where the temperature is below GREEDY_BELOW, and NOT_FINITE where ``best`` is no
    finite number. A row's result depends on nothing but the row; on a GPU nothing is waited for. Backends differ by the
    rounding of exp alone, a few parts in 2^22 of a mass.
    """
    _check(logits, best, rules)
    rows = best.shape
    require("draw", logits.device, likeliest=(likeliest, rows), seed=(seed, rows), position=(position, rows))
    for name, tensor in (("likeliest", likeliest), ("seed", seed), ("position", position)):
        require_type("draw", name, tensor, torch.int64)
    if (chosen := choose(backend, BACKENDS, "draw", logits, rows=len(logits))) == "triton":
        from samba_lm.ops.draw.triton import draw_triton

        return draw_triton(logits, best, likeliest, *rules, seed, position, cut)
    mass = candidates(logits, best, rules, cut=cut, backend="cpu" if chosen == "cpu" else "reference")
    drawn = torch.where(rules.temperature < GREEDY_BELOW, likeliest, pick(mass, seed, position))
    return torch.where(torch.isfinite(best), drawn, NOT_FINITE)


def candidates(logits: Tensor, best: Tensor, rules: Rules, *, cut: bool = True, backend: Backend = "cpu") -> Tensor:
    """The masses int64 [B, V] of the tokens that may be drawn, 0 for the others; arguments as :func:`draw`'s.

    ``backend``: reference or cpu.
    """
    _check(logits, best, rules)
    distance, weight = weigh(logits, best, rules.temperature)
    if cut:
        furthest = (furthest_reference if backend == "reference" else furthest_cpu)(distance, weight, rules)
        weight = weight * ((distance <= furthest[:, None]) & (weight >= rules.min_p[:, None]))
    return masses(weight)


def _check(logits: Tensor, best: Tensor, rules: Rules) -> None:
    require_rank("draw", "logits", logits, "B, V")
    require_type("draw", "logits", logits, torch.float32)
    rows = {name: (tensor, logits.shape[:1]) for name, tensor in (("best", best), *rules._asdict().items())}
    require("draw", logits.device, **rows)
    for name, (tensor, _) in rows.items():
        require_type("draw", name, tensor, torch.int64 if name == "top_k" else torch.float32)

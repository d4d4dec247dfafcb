"""The furthest distance without sorting all: its bits are found some at a time, from histograms of the distances."""

from __future__ import annotations

import torch
from torch import Tensor

from samba_lm.ops.draw.reference import Rules, among, needed

BITS = 11
"""Bits of a distance that one histogram tells. A distance has 31: that of a number that is not negative orders as a
whole number does."""
SHIFTS = (22, 11, 0)
FEW = 256
"""How many of the nearest are looked at first: 40 times cheaper than 50,000."""


def furthest_cpu(distance: Tensor, mass: Tensor, rules: Rules) -> Tensor:
    """As ``furthest_reference``. On a CPU a few of the nearest are tried first, and top-k is left out where no row asks
    for it; on a GPU asking would mean waiting."""
    ask = distance.device.type == "cpu"
    if ask:
        near, order = distance.topk(min(FEW, distance.shape[1]), dim=-1, largest=False)
        furthest, enough = among(near, mass.gather(1, order), mass, rules)
        if bool(enough.all()):
            return furthest
    key, V = distance.view(torch.int32), distance.shape[1]
    by_k = key.amax(dim=-1, keepdim=True)
    if not ask or bool((rules.top_k < V).any()):
        by_k = _reach(key, torch.ones_like(mass), rules.top_k.clamp(max=V)[:, None])
        mass = mass * (key <= by_k)  # where() is six times slower on a CPU, which guesses at each number
    by_p = _reach(key, mass, needed(rules.top_p, mass.sum(dim=-1))[:, None])
    furthest = torch.where(rules.top_p[:, None] < 1, by_p, by_k).view(torch.float32)
    return furthest[:, 0]


def _reach(key: Tensor, amount: Tensor, need: Tensor) -> Tensor:
    """The least key int32 [B, 1] up to which the amounts come to ``need``, int64 [B, 1], as they do in all.

    key: int32, amount: int64, both [B, V].
    """
    found = torch.zeros_like(key[:, :1])
    for shift in SHIFTS:
        # What is nearer than the bits found so far falls into the first bin, what is further into the last.
        bin = ((key >> shift) - (found << BITS)).clamp_(-1, 1 << BITS) + 1
        bins = amount.new_zeros(len(key), 2 + (1 << BITS)).scatter_add_(1, bin.long(), amount)
        digit = (bins.cumsum(dim=-1) < need).sum(dim=-1, keepdim=True) - 1
        found = (found << BITS) + digit.clamp(0, (1 << BITS) - 1).int()
    return found

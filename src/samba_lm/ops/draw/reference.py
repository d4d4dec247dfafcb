"""The definition: what a token weighs, which tokens stay candidates, and which one a uniform number picks.

A token at distance d = (largest logit) - (its logit), an fp32 number, has the weight exp(-d / temperature), at most 1,
and the mass floor(2^40 weight), a whole number. Sums of masses are exact, so that they depend neither on an order nor
on how a row is cut into pieces.

Candidates are the tokens up to a furthest distance, equals included:

- top-k: the distance of the k-th nearest;
- top-p: the least at which the masses of those that top-k leaves come to top_p of all their mass.

Of them those with a weight of at least min_p stay. The token at which the running sum of the candidates' masses first
exceeds u times their total is drawn.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

UNIT = 2.0**40
"""The mass of the likeliest token: a vocabulary of 4 million tokens still has its total in 63 bits."""
LOG2_E = math.log2(math.e)
HOTTEST = 1e30
"""Hotter is taken for this: beyond fp32, a token that is ruled out would weigh infinity / infinity."""
GREEDY_BELOW = 1e-30
"""Colder than this no two fp32 logits are close enough for the second to be drawn, and 1 / temperature overflows."""


class Rules(NamedTuple):
    """What B rows ask for, each [B]."""

    temperature: Tensor
    """fp32."""
    top_k: Tensor
    """int64, from 1; the vocabulary's size or more: all."""
    top_p: Tensor
    """fp32; 1: all."""
    min_p: Tensor
    """fp32; 0: all."""


def weigh(logits: Tensor, best: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Distances and weights, both fp32 [B, V], of logits fp32 [B, V] whose largest are ``best`` [B]."""
    distance = best[:, None] - logits
    rate = LOG2_E / torch.where(temperature < GREEDY_BELOW, 1.0, temperature.clamp(max=HOTTEST))
    return distance, torch.exp2(distance * -rate[:, None])


def masses(weight: Tensor) -> Tensor:
    """int64, of weights."""
    return (weight * UNIT).long()


def needed(top_p: Tensor, total: Tensor) -> Tensor:
    """The mass int64 [B] that a nucleus must come to, of totals int64 [B]."""
    return torch.minimum((top_p.double() * total.double()).ceil().long().clamp(min=1), total)


def furthest_reference(distance: Tensor, weight: Tensor, rules: Rules) -> Tensor:
    """The distance fp32 [B] up to which top-k and top-p leave tokens, of distances and weights [B, V]: by sorting."""
    near, order = distance.sort(dim=-1)
    mass = masses(weight)
    return among(near, mass.gather(1, order), mass.sum(dim=-1), rules, distance.shape[1])[0]


def among(near: Tensor, held: Tensor, total: Tensor, rules: Rules, V: int) -> tuple[Tensor, Tensor]:
    """The same, given the n nearest of V tokens alone.

    Args:
        near: fp32 [B, n], their distances in rising order. held: int64 [B, n], their masses.
        total: int64 [B], the mass of all V; not looked at where a row asks for top-k or for no top-p.

    Returns the furthest distances, fp32 [B], and whether n tokens were enough to know it, bool [B].
    """
    n = near.shape[1]
    limited = (rules.top_k < V)[:, None]
    by_k = torch.where(limited, near.gather(1, rules.top_k.clamp(max=n)[:, None] - 1), torch.inf)
    sums = (held * (near <= by_k)).cumsum(dim=-1)
    need = needed(rules.top_p, torch.where(limited[:, 0], sums[:, -1], total))[:, None]
    inside = (sums < need).sum(dim=-1, keepdim=True)
    nucleus = rules.top_p[:, None] < 1
    by_p = torch.where(nucleus, near.gather(1, inside.clamp(max=n - 1)), torch.inf)
    # One further away than the k-th shows that none as near as that is missing.
    enough = (~limited | (near[:, -1:] > by_k)) & (~nucleus | (inside < n)) if n < V else torch.ones_like(limited)
    return torch.minimum(by_k, by_p)[:, 0], enough[:, 0]


def pick(mass: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """The token int64 [B] that u(seed, position), both int64 [B], draws from candidates' masses int64 [B, V].

    Rows without any mass give some token.
    """
    sums = mass.cumsum(dim=-1)
    total = sums[:, -1]
    target = torch.minimum((uniform(seed, position) * total.double()).long(), total - 1)
    return torch.searchsorted(sums, target[:, None], right=True)[:, 0].clamp(max=mass.shape[1] - 1)


GOLDEN = 0x9E3779B97F4A7C15
MIX = (30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)


def uniform(seed: Tensor, position: Tensor) -> Tensor:
    """The numbers in [0, 1), fp64, that belong to these seeds and positions, int64 of any one shape.

    Number ``position`` of the sequence SplitMix64 (Steele, Lea, Flood 2014) that begins at the mixed seed; a multiple
    of 2^-53.
    """
    return _shift(mix(mix(seed + signed(GOLDEN)) + (position + 1) * signed(GOLDEN)), 11).double() * 2.0**-53


def mix(x: Tensor) -> Tensor:
    """SplitMix64's output for the state ``x``, int64 of any shape."""
    for shift, factor in MIX:
        x = (x ^ _shift(x, shift)) * signed(factor)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """To the right, zeros in front."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def signed(x: int) -> int:
    """The number with the same 64 bits, as int64 reads them."""
    return x - (x >> 63 << 64)

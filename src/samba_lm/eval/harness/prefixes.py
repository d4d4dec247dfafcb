"""Token sequences that begin alike: grouped, so that what they share is read once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LEAST_SHARED = 128
"""Tokens that a group shares at least: reading less again costs less than keeping it."""
LEAST_MEMBERS = 4
"""Sequences in a group at least: what is shared is read alone, which a batch does faster."""


@dataclass(frozen=True)
class Family:
    """Sequences, by their numbers, whose first ``shared`` tokens are the same."""

    shared: int
    members: tuple[int, ...]


def families(sequences: Sequence[list[int]], limits: Sequence[int] | None = None) -> list[Family]:
    """Group sequences that begin alike, such as prompts with the same worked examples before their questions.

    Every sequence is in one family; all that share too little are in one of ``shared = 0``. ``limits``: of each
    sequence, the most tokens that may count as shared; by default all but the last.
    """
    most = [len(sequence) - 1 for sequence in sequences] if limits is None else list(limits)
    order = sorted(range(len(sequences)), key=lambda i: sequences[i])
    found: list[Family] = []
    alone: list[int] = []
    at = 0
    while at < len(order):
        first = order[at]
        shared, end = most[first], at + 1
        while end < len(order):
            here = min(_common(sequences[first], sequences[order[end]], shared), most[order[end]])
            if here < max(LEAST_SHARED, shared / 2):
                break
            shared, end = here, end + 1
        if end - at >= LEAST_MEMBERS and shared >= LEAST_SHARED:
            found.append(Family(shared, tuple(order[at:end])))
            at = end
        else:
            alone.append(first)
            at += 1
    return [*found, Family(0, tuple(sorted(alone)))] if alone else found


def _common(a: list[int], b: list[int], most: int) -> int:
    """How many of the first ``most`` tokens are the same."""
    most = min(most, len(a), len(b))
    if a[:most] == b[:most]:
        return most
    low, high = 0, most  # the first ``low`` are the same, the first ``high`` are not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle)
    return low

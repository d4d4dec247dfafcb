"""Which tokens count in a loss: losses are (sum, count), so that any split of a batch adds up to that of the whole."""

from __future__ import annotations

from torch import Tensor

IGNORE_INDEX = -100
"""Target of a token that counts neither in the sum nor in the count."""


def valid_tokens(targets: Tensor) -> Tensor:
    """How many of ``targets`` (int64, any shape) count: int64 scalar, on their device."""
    return (targets != IGNORE_INDEX).sum()

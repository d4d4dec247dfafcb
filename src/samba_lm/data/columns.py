"""Rows cut among the processes that share them: each reads a part of the columns, and where that part begins."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from samba_lm.data.loader import Batch
from samba_lm.errors import UserError


def part_length(length: int, count: int) -> int:
    """Tokens in each of ``count`` parts of a row of ``length``. Raises UserError if they cannot be equally long."""
    if length % count or length // count < 2:
        raise UserError(
            f"Rows of {length} tokens do not divide among {count} processes into equal parts of 2 tokens at least: "
            f"make the length a multiple of {count}, or parallel.context a divisor of it."
        )
    return length // count


def part_of(batch: Batch, index: int, count: int) -> Batch:
    """The columns of process ``index`` of ``count``, with ``before`` telling what stands left of them.

    Targets were shifted before, so each is still that of its token. Padding (segment -1) is first moved to the right
    end of its row: then what follows padding is padding, in every part.

    Raises:
        UserError: the rows do not divide into equal parts.
    """
    rows, length = batch.input_ids.shape
    size = part_length(length, count)
    begin = index * size
    columns = slice(begin, begin + size)
    if batch.segments is None:
        # One document, whose number is 0 for a model that has read nothing.
        document, position = (torch.full((rows,), number, dtype=torch.int64) for number in (0, begin))
        return replace(batch.tokenwise(lambda t: t[:, columns]), before=(document, position))
    packed = _packed(batch, batch.segments)
    assert packed.segments is not None
    return replace(packed.tokenwise(lambda t: t[:, columns]), before=_before(packed.segments[:, :begin]))


def _packed(batch: Batch, segments: Tensor) -> Batch:
    padding = segments < 0
    if not bool((padding[:, :-1] & ~padding[:, 1:]).any()):
        return batch
    order = padding.to(torch.int8).argsort(dim=1, stable=True)
    packed = batch.tokenwise(lambda t: t.gather(1, order))
    return packed if packed.apart is None else replace(packed, apart=packed.apart.cummax(1).values)


def _before(left: Tensor) -> tuple[Tensor, Tensor]:
    """The document that ``left``, int64 [B, n] from the rows' beginning, ends in, and how many of its tokens it has."""
    rows, begin = left.shape
    if begin == 0:  # a model that has read nothing stands at the beginning of document 0
        return torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
    document = left[:, -1]
    # Tokens of the last document stand together, at the end.
    return document, (left == document[:, None]).sum(1)

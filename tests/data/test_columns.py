"""Rows cut into the parts that processes read."""

from __future__ import annotations

import pytest
import torch

from samba_lm.data.columns import part_length, part_of
from samba_lm.data.loader import Batch
from samba_lm.errors import UserError
from samba_lm.span import Cursor, Span


def rows(segments: list[list[int]] | None, length: int = 12) -> Batch:
    ids = torch.arange(2 * length).view(2, length)
    return Batch(ids, ids + 100, None if segments is None else torch.tensor(segments), stretch=ids.float())


def test_one_document() -> None:
    batch = rows(None)
    parts = [part_of(batch, i, 3) for i in range(3)]
    assert torch.equal(torch.cat([part.input_ids for part in parts], 1), batch.input_ids)
    assert torch.equal(torch.cat([part.targets for part in parts], 1), batch.targets)
    for i, part in enumerate(parts):
        assert part.segments is None
        assert part.before is not None
        assert [t.tolist() for t in part.before] == [[0, 0], [4 * i, 4 * i]]
        assert part.stretch is not None
        assert torch.equal(part.stretch, part.input_ids.float())


def test_tokens_stand_where_they_stand_in_the_whole_row() -> None:
    """Documents that begin at a cut, before and after it, that span all parts, and padding at the end."""
    segments = [[3, 3, 3, 4, 5, 5, 5, 5, 6, -1, -1, -1], [0] * 12]
    whole = Span.of(2, 12, torch.device("cpu"), None, torch.tensor(segments))
    for i in range(3):
        part = part_of(rows(segments), i, 3)
        assert part.before is not None
        span = Span.of(2, 4, torch.device("cpu"), Cursor(*part.before), part.segments)
        columns = slice(4 * i, 4 * i + 4)
        tokens = torch.tensor(segments)[:, columns] >= 0
        assert torch.equal(span.positions[tokens], whole.positions[:, columns][tokens])
        resets, expected = span.resets, whole.resets
        assert resets is not None
        assert expected is not None
        assert torch.equal(resets & tokens, expected[:, columns] & tokens)


def test_padding_is_moved_to_the_right_with_its_targets() -> None:
    segments = [[-1, -1, 0, 0, -1, 1, 1, 1, 1, 1, 1, 1], [0] * 12]
    first, second = (part_of(rows(segments), i, 2) for i in range(2))
    assert first.input_ids[0].tolist() == [2, 3, 5, 6, 7, 8]
    assert first.stretch is not None
    assert first.stretch[0].tolist() == [2, 3, 5, 6, 7, 8]
    assert first.targets[0].tolist() == [102, 103, 105, 106, 107, 108]
    assert second.segments is not None
    assert second.before is not None
    assert second.segments[0].tolist() == [1, 1, 1, -1, -1, -1]
    assert (second.before[0][0], second.before[1][0]) == (1, 4)


@pytest.mark.parametrize(("length", "count"), [(12, 5), (4, 4)])
def test_rows_that_do_not_divide(length: int, count: int) -> None:
    with pytest.raises(UserError, match=f"Rows of {length} tokens do not divide among {count} processes"):
        part_length(length, count)
    with pytest.raises(UserError, match=f"Rows of {length} tokens"):
        part_of(rows(None, length), 0, count)

"""Batches of conversations: packed uncut, kept apart, the same on any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from samba_lm import checkpoint
from samba_lm.data.conversation_loader import ConversationLoader, ConversationRows, ConversationValidation
from samba_lm.data.conversation_set import ConversationSet
from samba_lm.data.packing import pack
from samba_lm.errors import UserError
from samba_lm.loss import IGNORE_INDEX
from samba_lm.ops.linear_cross_entropy import linear_cross_entropy
from samba_lm.tokenizer import ByteTokenizer


def conversations(folder: Path, *sizes: tuple[int, int]) -> ConversationSet:
    """A set of bytes: questions and answers of these sizes; with their words each has 18 tokens more and one to end."""
    records = [{"prompt": chr(97 + i % 26) * q, "completion": chr(65 + i % 26) * a} for i, (q, a) in enumerate(sizes)]
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return ConversationSet.of_files([str(folder / "a.jsonl")], ByteTokenizer())


def test_rows_are_full_and_nothing_is_cut() -> None:
    random = np.random.RandomState(0)
    lengths = random.randint(1, 90, size=3000).astype(np.int64)
    packed = pack(lengths, 100)
    assert sorted(packed.texts.tolist()) == list(range(3000))
    rooms = np.array([lengths[packed.row(i)].sum() for i in range(packed.rows)])
    assert rooms.max() <= 100
    assert packed.rows <= np.ceil(lengths.sum() / 100) * 1.01 + 1
    assert pack(lengths, 100).texts.tolist() == packed.texts.tolist()
    assert pack(np.array([300, 5, 100]), 100).rows == 3  # what is longer has a row to itself


def test_every_answer_is_learnt_once_an_epoch_beside_nothing_else(tmp_path: Path) -> None:
    sizes = [(3 + i % 7, 2 + i % 5) for i in range(60)]
    found = conversations(tmp_path, *sizes)
    loader = ConversationLoader(found, batch_size=2, length=100, seed=5)
    assert loader.packed.note() is None
    batches = [loader.batch(step) for step in range(loader.rows)]  # two epochs
    epochs = [
        torch.cat([each.targets for each in half])
        for half in (batches[: loader.rows // 2], batches[loader.rows // 2 :])
    ]
    for targets in epochs if loader.rows % 2 == 0 else [torch.cat(epochs)[: loader.rows]]:
        assert (targets != IGNORE_INDEX).sum() == sum(a + 1 for _, a in sizes)
    assert not torch.equal(epochs[0], epochs[1])
    for batch in batches[:3]:
        assert batch.segments is not None
        for ids, targets, segments in zip(batch.input_ids, batch.targets, batch.segments, strict=True):
            assert (segments[1:] >= segments[:-1]).all()
            for number in segments.unique().tolist():
                text, told = ids[segments == number].tolist(), targets[segments == number]
                learnt = told[told != IGNORE_INDEX].tolist()
                if not learnt:  # what is left of the row
                    assert set(text) == {256}
                    continue
                words = bytes(text).decode()
                assert words.startswith("User:\n")
                assert words.count("User:") == 1
                assert bytes(learnt[:-1]).decode() == words.partition("Assistant:\n")[2]
                assert learnt[-1] == 256
                assert told[: -len(learnt)].eq(IGNORE_INDEX).all()


def test_a_batch_depends_on_the_step_alone_and_divides_among_ranks(tmp_path: Path) -> None:
    found = conversations(tmp_path, *[(i % 40 + 1, i % 11 + 1) for i in range(80)])
    one, two = (ConversationLoader(found, 4, 128, seed=1) for _ in range(2))
    two.batch(0)
    for step in (9, 2):
        whole = one.batch(step)
        parts = [two.batch(step, rank, 2) for rank in range(2)]
        for name in ("input_ids", "targets", "segments"):
            assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))
    assert not torch.equal(one.batch(0).input_ids, ConversationLoader(found, 4, 128, seed=2).batch(0).input_ids)
    with pytest.raises(UserError, match="does not divide among 3"):
        one.batch(0, 0, 3)
    with pytest.raises(UserError, match="batch_size is 0"):
        ConversationLoader(found, 0, 128, 1)
    shares = [list(ConversationValidation(found, 5, 2, 128, rank, 2)) for rank in range(2)]
    assert [batch.input_ids.shape for batch in shares[0]] == [batch.input_ids.shape for batch in shares[1]]
    alone = list(ConversationValidation(found, 5, 2, 128))
    counted = [
        sum(int((batch.targets != IGNORE_INDEX).sum()) for batch in some) for some in (alone, shares[0] + shares[1])
    ]
    assert counted[0] == counted[1]


def test_what_is_longer_than_a_row_is_cut_or_left_out_and_told(tmp_path: Path) -> None:
    found = conversations(tmp_path, (5, 5), (5, 200), (200, 5))
    rows = ConversationRows(found, 64)
    assert (rows.cut, rows.dropped, rows.rows) == (1, 1, 2)
    note = rows.note()
    assert note is not None
    assert "of 3 conversations 1 are cut at the row's 64 tokens and 1 left out" in note
    assert "train.length = 223" in note
    assert ConversationRows(found, 223).note() is None
    assert int((rows.read(range(2)).targets != IGNORE_INDEX).sum()) == 6 + 64 - 22
    with pytest.raises(UserError, match=r"raise train\.length"):
        ConversationRows(found, 4)


def test_the_loss_is_that_of_each_conversation_alone(tmp_path: Path) -> None:
    found = conversations(tmp_path, *[(i % 9 + 1, i % 6 + 1) for i in range(12)])
    model = checkpoint.create("samba-micro", dtype=torch.float64).eval()
    rows = ConversationRows(found, 100)
    batch = rows.read(range(rows.rows))
    with torch.no_grad():
        hidden = model.hidden_states(batch.input_ids, batch.segments)
        packed = linear_cross_entropy(hidden, model.head_weight, batch.targets, ignore_index=IGNORE_INDEX)
        apart = torch.zeros((), dtype=torch.float64)
        for i in range(len(found)):
            ids, answers = (torch.from_numpy(each) for each in found.read(i, 1000))
            logits, _ = model(ids[None, :-1])
            losses = torch.nn.functional.cross_entropy(logits[0], ids[1:], reduction="none")
            apart += losses[answers[1:]].sum()
    assert packed.item() == pytest.approx(apart.item(), rel=1e-6 if packed.dtype == torch.float32 else 1e-12)

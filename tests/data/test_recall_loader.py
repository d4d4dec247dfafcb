"""Training batches of recall: what counts, which lengths, and that a batch is a function of the seed and the step."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from samba_lm.data.names import Names
from samba_lm.data.passkey import Passkey
from samba_lm.data.phonebook import Phonebook
from samba_lm.data.recall_loader import Curriculum, RecallLoader
from samba_lm.errors import UserError
from samba_lm.loss import IGNORE_INDEX
from samba_lm.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
MAKER = Passkey(TOKENIZER)
NAMES = Names((("Ann", "Bob", "Cy", "Dora"), tuple(f"Name{chr(65 + i)}" for i in range(26))), "lists")
PHONEBOOK = Phonebook(TOKENIZER, NAMES, questions=4)


def loader(**options: object) -> RecallLoader:
    return RecallLoader(MAKER, TOKENIZER, **{"batch_size": 4, "length": 640, "seed": 7, **options})


def test_only_the_answers_count() -> None:
    batch = loader().batch(0)
    assert batch.input_ids.shape == batch.targets.shape == (4, 640)
    assert batch.segments is None
    for ids, targets in zip(batch.input_ids.numpy(), batch.targets.numpy(), strict=True):
        places = np.flatnonzero(targets != IGNORE_INDEX)
        answer = TOKENIZER.decode(targets[places])
        text = TOKENIZER.decode(ids)
        assert answer[0] == " "
        assert answer[-1] == "\n"
        assert f"The pass key is{answer[:-1]}. Remember it." in text
        assert text[: places[0] + 1].endswith("? The pass key is")
        assert np.array_equal(targets[places[:-1]], ids[places[:-1] + 1])
        assert set(ids[places[-1] + 2 :]) <= {TOKENIZER.eos_id}


def test_other_tokens_count_as_often_as_asked() -> None:
    plain, more = loader(batch_size=64).batch(0), loader(batch_size=64, lm_weight=0.5).batch(0)
    assert torch.equal(plain.input_ids, more.input_ids)
    answers, others = (plain.targets != IGNORE_INDEX), (more.targets != IGNORE_INDEX) & (plain.targets == IGNORE_INDEX)
    assert int(answers.sum()) == 64 * 7
    assert int(others.sum()) == pytest.approx(0.5 * 64 * 7, rel=0.1)
    following = torch.cat((more.input_ids[:, 1:], more.targets[:, -1:]), dim=1)
    assert torch.equal(more.targets[others], following[others])


def test_batches_are_functions_of_seed_and_step_on_any_number_of_ranks() -> None:
    whole = loader().batch(3)
    again = loader().batch(3)
    assert torch.equal(whole.input_ids, again.input_ids)
    parts = [loader().batch(3, rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat([part.input_ids for part in parts]), whole.input_ids)
    assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)
    for other in (loader().batch(4), loader(seed=8).batch(3)):
        assert not torch.equal(other.input_ids, whole.input_ids)
    with pytest.raises(UserError, match="does not divide among 3"):
        loader().batch(0, 0, 3)


def test_a_curriculum_keeps_the_tokens_of_a_step() -> None:
    each = loader(curriculum=Curriculum((320, 640), (1, 3), 8))
    assert [each.curriculum.length(step) for step in range(10)] == [320] * 2 + [640] * 8
    assert each.batch(1).input_ids.shape == (8, 320)
    assert each.batch(2).input_ids.shape == (4, 640)


def test_a_review_reads_the_lengths_before_each_as_often() -> None:
    lengths = (64, 128, 256, 512)
    each = Curriculum(lengths, (1, 1, 1, 3), 6000, review=0.5)
    read = [each.length(step) for step in range(6000)]
    assert set(read[:1000]) == {64}  # nothing comes before the first
    parts = [Counter(read[begin:end]) for begin, end in ((1000, 2000), (2000, 3000), (3000, 6000))]
    for part, expected in zip(parts, ((500, 500), (250, 250, 500), (500, 500, 500, 1500)), strict=True):
        assert sum(part.values()) == sum(expected)
        assert all(abs(part[length] - many) < 4 * many**0.5 for length, many in zip(lengths, expected, strict=False))
    assert {each.length(step) for step in range(6000, 6050)} == set(lengths)  # after the end as in the last part
    assert [each.length(step) for step in (5999, 4000, 17)] == [read[step] for step in (5999, 4000, 17)]


@pytest.mark.parametrize("every", [2, 5, 8, 10, 20, 21, 89])
def test_what_is_logged_every_so_many_steps_meets_all_lengths(every: int) -> None:
    each = Curriculum((64, 128, 256, 512), (1, 1, 1, 3), 20_000, review=0.5)
    met = Counter(each.length(step - 1) for step in range(10_000 + every, 20_001, every))
    many = met.total()
    assert abs(met[512] - many / 2) < 4 * (many / 4) ** 0.5
    assert all(abs(met[length] - many / 6) < 4 * (many * 5 / 36) ** 0.5 for length in (64, 128, 256))


def test_a_review_may_be_most_of_the_steps_and_makes_rows_of_its_length() -> None:
    mostly = [Curriculum((64, 128), (1, 3), 400, review=0.75).length(step) for step in range(100, 400)]
    assert 200 <= mostly.count(64) <= 250
    curriculum = Curriculum((320, 640), (1, 3), 16, review=0.5)
    batches = loader(curriculum=curriculum)
    made = [batches.batch(step).input_ids.shape[1] for step in range(16)]
    assert made == [curriculum.length(step) for step in range(16)]
    assert set(made[4:]) == {320, 640}


def test_the_fingerprint_is_of_the_data() -> None:
    other = RecallLoader(Passkey(TOKENIZER, "Some other text."), TOKENIZER, 4, 640, 7)
    assert loader().fingerprint() == loader(seed=1).fingerprint() != other.fingerprint()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"lm_weight": 2.0}, "lm_weight is 2.0"),
        ({"length": 128}, "length 128 is too short"),
        ({"curriculum": Curriculum((300,), (1,), 5)}, "300 does not divide train.length = 640"),
    ],
)
def test_mistakes(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        loader(**options)


def test_curricula_that_are_none() -> None:
    with pytest.raises(UserError, match="2 lengths but 1 shares"):
        Curriculum((1, 2), (1,), 5)
    with pytest.raises(UserError, match="must all be more than 0"):
        Curriculum((1, 2), (1, 0), 5)
    with pytest.raises(UserError, match="must all be more than 0"):
        Curriculum((1, 2), (1e308, 1e308), 5)
    with pytest.raises(UserError, match=r"review is 1\.0: it must be at least 0 and less than 1"):
        Curriculum((1, 2), (1, 1), 5, review=1.0)


def test_rows_in_two_parts_are_the_same_rows_and_part_before_the_first_answer() -> None:
    whole, plain = loader(apart=0.5, batch_size=32).batch(3), loader(batch_size=32).batch(3)
    assert plain.apart is None
    assert whole.apart is not None
    assert torch.equal(whole.input_ids, plain.input_ids)
    halves = [loader(apart=0.5, batch_size=32).batch(3, rank, 2).apart for rank in (0, 1)]
    assert torch.equal(torch.cat([half for half in halves if half is not None]), whole.apart)
    parted = whole.apart.max(1).values == 1
    assert 6 <= int(parted.sum()) <= 26
    begins = set()
    for apart, targets in zip(whole.apart[parted], whole.targets[parted], strict=True):
        (first,) = (targets != IGNORE_INDEX).nonzero()[:1, 0].tolist()
        begins.add(640 - int(apart.sum()))
        assert apart.diff().min() >= 0
        assert apart[first] == 1  # the token that tells the answer's first
    assert len(begins) > 4
    book = RecallLoader(PHONEBOOK, TOKENIZER, 1600, 640, 7, apart=1.0).batch(0)
    assert book.apart is not None
    for apart, targets in zip(book.apart, book.targets, strict=True):
        (first,) = (targets != IGNORE_INDEX).nonzero()[:1, 0].tolist()
        assert 0 < 640 - int(apart.sum()) <= first
    with pytest.raises(UserError, match="apart is 2"):
        loader(apart=2)

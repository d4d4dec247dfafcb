"""Likelihoods: equal to those of one plain reading of each text, however much is shared, batched or cut."""

from __future__ import annotations

import random

import pytest
import torch

from samba_lm.checkpoint import create
from samba_lm.config import Attention, Mamba, ModelConfig, SwiGLU
from samba_lm.errors import UserError
from samba_lm.eval.harness.prefixes import families
from samba_lm.eval.harness.scoring import Question, Scorer
from samba_lm.model import SambaLM

V = 40


def make(window: int | None = 8, width: int = 16) -> SambaLM:
    layers = (Mamba(state=4), SwiGLU(width=16), Attention(heads=2, window=window), SwiGLU(width=16))
    config = ModelConfig(name="tiny", d_model=width, vocab_size=V, layers=layers, max_context=400)
    model = create(config, seed=1).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # so that tokens are told apart
    return model


def plainly(model: SambaLM, question: Question) -> tuple[float, bool]:
    before, after = list(question.context), list(question.continuation)
    with torch.no_grad():
        logits, _ = model(torch.tensor([before + after]))
    logprobs = logits[0, len(before) - 1 : -1].log_softmax(-1)
    own = logprobs.gather(1, torch.tensor(after)[:, None])
    return float(own.sum()), bool((logprobs.argmax(-1) == torch.tensor(after)).all())


def many(seed: int = 0) -> list[Question]:
    """Of all kinds: examples before every question, four continuations of each, single ones, one token, many."""
    draw = random.Random(seed)

    def text(size: int) -> list[int]:
        return [draw.randrange(V) for _ in range(size)]

    examples = text(200)
    found = []
    for _ in range(5):
        context = examples + text(draw.randrange(60, 100))
        found += [Question(context, text(draw.randrange(1, 9))) for _ in range(4)]
        found += [Question(context, [letter]) for letter in range(4)]
    for _ in range(6):
        context = text(draw.randrange(30, 80))
        found += [Question(context, text(draw.randrange(1, 9))) for _ in range(4)]
    found += [Question(text(draw.randrange(1, 5)), text(draw.randrange(1, 30))) for _ in range(9)]
    found.append(found[0])
    draw.shuffle(found)
    return found


@pytest.mark.parametrize("window", [8, None])
@pytest.mark.parametrize(("batch", "chunk"), [(None, 4096), (3, 4096), (1, 7), (64, 50)])
def test_likelihoods_are_those_of_a_plain_reading(window: int | None, batch: int | None, chunk: int) -> None:
    model, questions = make(window), many()
    shares: list[float] = []
    found = Scorer(model, batch=batch, chunk=chunk).ask(questions, shares.append)
    for question, answer in zip(questions, found, strict=True):
        logprob, greedy = plainly(model, question)
        assert answer.logprob == pytest.approx(logprob, abs=1e-8)
        assert answer.greedy == greedy
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)


def test_greedy_is_told_apart() -> None:
    model = make()
    context, written = [3, 1, 4], []
    for _ in range(4):
        with torch.no_grad():
            logits, _ = model(torch.tensor([context + written]))
        written.append(int(logits[0, -1].argmax()))
    wrong = [*written[:3], (written[3] + 1) % V]
    answers = Scorer(model).ask([Question(context, written), Question(context, wrong), Question(context, written[:1])])
    assert [answer.greedy for answer in answers] == [True, False, True]


def test_what_is_shared_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = make(), 0
    for name in ("features", "hidden_states"):
        own = getattr(model, name)

        def counted(ids: torch.Tensor, *more: object, own=own) -> object:  # type: ignore[no-untyped-def]
            nonlocal read
            read += ids.numel()
            return own(ids, *more)

        monkeypatch.setattr(model, name, counted)
    examples = list(range(V)) * 5
    questions = [Question([*examples, *([topic] * 100)], [answer] * 5) for topic in range(6) for answer in range(6)]
    Scorer(model).ask(questions)
    assert read <= len(examples) + 6 * 100 + 36 * 6, "36 readings of 300 tokens would be 10,980"


def test_a_long_text_is_read_on_with_its_state() -> None:
    model = make()
    draw = random.Random(1)
    question = Question([0], [draw.randrange(V) for _ in range(999)])
    (cut,), (whole,) = Scorer(model, chunk=64).ask([question]), Scorer(model).ask([question])
    assert cut.logprob == pytest.approx(whole.logprob, abs=1e-8)
    assert whole.logprob == pytest.approx(plainly(model, question)[0], abs=1e-8)


def test_out_of_memory_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, questions = make(), many()
    expected = Scorer(model).ask(questions)
    scorer, sizes = Scorer(model), []
    own = scorer._read

    def small(pieces: list, states: object) -> None:
        sizes.append(len(pieces))
        if len(pieces) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        own(pieces, states)  # type: ignore[arg-type]

    monkeypatch.setattr(scorer, "_read", small)
    found = scorer.ask(questions)
    assert max(sizes) > 2
    assert [answer.logprob for answer in found] == pytest.approx([answer.logprob for answer in expected])


def test_mistakes_are_told() -> None:
    model = make()
    with pytest.raises(UserError, match="outside the model's vocabulary"):
        Scorer(model).ask([Question([1], [V])])
    with pytest.raises(UserError, match="no context"):
        Scorer(model).ask([Question([], [1])])
    with pytest.raises(UserError, match="batch is 0"):
        Scorer(model, batch=0)
    with torch.no_grad():
        model.embedding.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        Scorer(model).ask([Question([1], [2])])
    assert Scorer(model).ask([]) == []


def test_families_share_what_they_say() -> None:
    draw = random.Random(2)
    for _ in range(30):
        heads = [[draw.randrange(5) for _ in range(draw.randrange(0, 300))] for _ in range(3)]
        texts = [draw.choice(heads) + [draw.randrange(5) for _ in range(draw.randrange(1, 40))] for _ in range(25)]
        found = families(texts)
        assert sorted(i for family in found for i in family.members) == list(range(25))
        for family in found:
            assert len({tuple(texts[i][: family.shared]) for i in family.members}) == 1
            assert all(family.shared < len(texts[i]) for i in family.members)
    alike = families([[*range(300), i] for i in range(10)] + [[1, 2], [1, 2]])
    assert [(family.shared, len(family.members)) for family in alike] == [(300, 10), (0, 2)]


@pytest.mark.gpu
def test_a_gpu_finds_the_same() -> None:
    model, questions = make(width=64).float(), many()
    expected = Scorer(model).ask(questions)
    found = Scorer(model.cuda()).ask(questions)
    assert [answer.logprob for answer in found] == pytest.approx([answer.logprob for answer in expected], rel=2e-3)
    assert [answer.greedy for answer in found] == [answer.greedy for answer in expected]

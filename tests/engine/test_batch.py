"""Steps that are started before the one before was looked at change no answer, no figure and no state."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

import samba_lm
from samba_lm.config import Attention, Mamba, ModelConfig, SwiGLU
from samba_lm.engine.decoder import Decoder
from samba_lm.engine.engine import Engine
from samba_lm.engine.request import End, Event, Piece, Ready, Request, Token
from samba_lm.generation.params import SamplingParams
from samba_lm.generation.prefill import Reader
from samba_lm.model import SambaLM
from samba_lm.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FREE = SamplingParams(max_tokens=30, stop_at_eos=False)
Result = tuple[str, tuple[Token, ...], End, list[Ready]]


def make(window: int | None = 24) -> SambaLM:
    layers = (Mamba(), SwiGLU(width=48), Attention(heads=2, window=window), SwiGLU(width=48))
    config = ModelConfig(name="tiny", d_model=32, vocab_size=260, layers=layers, max_context=100)
    return samba_lm.create(config, device=DEVICE)


@pytest.fixture(scope="module")
def model() -> SambaLM:
    return make()


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps that decoders make: told by the host, or again."""
    made: list[str] = []

    def watch(name: str) -> None:
        method = getattr(Decoder, name)

        def noted(self: Decoder, *args: object) -> object:
            made.append(name)
            return method(self, *args)

        monkeypatch.setattr(Decoder, name, noted)

    watch("step")
    watch("again")
    return made


def ask(prompt: str, params: SamplingParams = FREE, **options: object) -> Request:
    return Request([TOKENIZER.encode(prompt)], params, **options)  # type: ignore[arg-type]


def answers(model: SambaLM, requests: list[Request], **settings: object) -> list[Result]:
    """What the engine makes of requests that all come at once."""
    events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
    texts, tokens, ready = ([[] for _ in requests] for _ in range(3))  # type: ignore[var-annotated]
    ends: dict[int, End] = {}
    with Engine(model, TOKENIZER, **settings) as engine:  # type: ignore[arg-type]
        for i, request in enumerate(requests):
            engine.submit(request, lambda event, i=i: events.put((i, event)))
        while len(ends) < len(requests):
            i, event = events.get(timeout=60)
            if isinstance(event, Piece):
                texts[i].append(event.text)
                tokens[i] += event.tokens
            elif isinstance(event, Ready):
                ready[i].append(event)
            elif isinstance(event, End):
                ends[i] = event
    return [("".join(texts[i]), tuple(tokens[i]), ends[i], ready[i]) for i in range(len(requests))]


def same(a: list[Result], b: list[Result]) -> None:
    assert [(text, tokens) for text, tokens, *_ in a] == [(text, tokens) for text, tokens, *_ in b]
    for (_, _, one, _), (_, _, other, _) in zip(a, b, strict=True):
        assert (one.finish, one.new_tokens, one.last, str(one.error)) == (
            (other.finish, other.new_tokens, other.last, str(other.error))
        )


def mixed() -> list[Request]:
    """Of different lengths and ends, with every kind of option."""
    params = [
        FREE.replace(temperature=0),
        FREE.replace(seed=1, top_p=0.8, max_tokens=1),
        FREE.replace(seed=2, max_tokens=45, repetition_penalty=1.3),
        FREE.replace(seed=3, frequency_penalty=0.5, presence_penalty=0.2, max_tokens=20),
        FREE.replace(seed=4, logit_bias=((65, 5.0), (66, 5.0)), max_tokens=25),
        FREE.replace(seed=5, stop=("A", "b"), logit_bias=((65, 2.0),)),
        FREE.replace(seed=6, top_k=3, stop_ids=tuple(range(60, 90)), max_tokens=50),
        FREE.replace(seed=7, max_tokens=0),
    ]
    return [ask("the sea is"[: i + 1], p, logprobs=(None, 2, 0)[i % 3]) for i, p in enumerate(params)]


@pytest.mark.parametrize("slots", [1, 3, 8])
@pytest.mark.parametrize("invariant", [False, True])
def test_the_answers_are_the_same(model: SambaLM, steps: list[str], slots: int, invariant: bool) -> None:
    settings = {"slots": slots, "batch_invariant": invariant}
    requests = mixed() + mixed()[::-1]
    plain = answers(model, requests, ahead=False, **settings)
    assert "again" not in steps
    ahead = answers(model, requests, ahead=True, **settings)
    assert "again" in steps
    assert {end.finish for _, _, end, _ in plain} == {"length", "stop"}
    if invariant or slots == 1:
        same(plain, ahead)
    else:
        assert [text for text, *_ in plain] == [text for text, *_ in ahead]


def test_growing_states_end_where_they_must(steps: list[str]) -> None:
    requests = [ask("a" * n, FREE.replace(seed=n, max_tokens=200)) for n in (1, 40, 97, 99)]
    plain = answers(make(None), requests, ahead=False, slots=4)
    steps.clear()
    ahead = answers(make(None), requests, ahead=True, slots=4)
    assert steps.count("again") > 80
    assert [end.new_tokens for _, _, end, _ in plain] == [100, 61, 4, 2]
    same(plain, ahead)


def test_alone_a_text_needs_the_host_only_at_its_ends(model: SambaLM, steps: list[str]) -> None:
    answers(model, [ask("abc", FREE.replace(max_tokens=20))], ahead=True, slots=1)
    assert steps == ["step"] + ["again"] * 18  # the first token comes from the prompt, the last is known to be it


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_what_is_kept_has_read_what_was_given_out(
    model: SambaLM, steps: list[str], invariant: bool, penalty: float
) -> None:
    """Texts that end unforeseen, two of them at once, so that others are moved; and some that are cut off."""
    stopping = FREE.replace(stop_ids=tuple(range(60, 90)), repetition_penalty=penalty)
    params = [FREE.replace(seed=9), stopping.replace(seed=1), stopping.replace(seed=2), stopping.replace(seed=2), FREE]
    requests = [ask("the sea"[: 1 + i // 2], p, keep=True, keep_prompt=True) for i, p in enumerate(params)]
    plain = answers(model, requests, ahead=False, slots=6, batch_invariant=invariant)
    ahead = answers(model, requests, ahead=True, slots=6, batch_invariant=invariant)
    assert "again" in steps or penalty != 1
    same(plain, ahead)
    assert [end.finish for _, _, end, _ in plain] == ["length", "stop", "stop", "stop", "length"]
    for (_, _, one, (begun,)), (_, _, other, (again,)) in zip(plain, ahead, strict=True):
        same_standing(begun.reader, again.reader)
        assert one.reader is not None
        assert other.reader is not None
        same_standing(one.reader, other.reader)
        assert one.reader.lengths[0] == one.prompt_tokens + one.new_tokens - (one.finish == "length")
    after = [
        [Request([np.array([ord("x")])], FREE.replace(temperature=0), end.reader) for _, _, end, _ in results]
        for results in (plain, ahead)
    ]
    same(*(answers(model, requests, ahead=False, slots=1) for requests in after))


def same_standing(a: Reader, b: Reader, exact: bool = True) -> None:
    """The same state, but for the slots of rings that the next token is written to."""
    assert a.lengths == b.lengths == a.state.position.tolist() == b.state.position.tolist()
    for mine, theirs in zip(a.state.layers, b.state.layers, strict=True):
        for name in mine:
            x, y = mine[name], theirs[name]
            if name in ("k", "v"):
                slot = a.lengths[0] % x.shape[1]
                x, y = (torch.cat((t[:, :slot], t[:, slot + 1 :]), dim=1) for t in (x, y))
            assert torch.equal(x, y) if exact else torch.allclose(x, y, atol=1e-4)
    assert (a.history is None) == (b.history is None)
    if a.history is not None and b.history is not None:
        assert torch.equal(a.history.seen, b.history.seen)
        assert torch.equal(a.history.counts, b.history.counts)


def test_cancelling_and_coming_later(model: SambaLM) -> None:
    """Texts come and go while steps are under way; those that stay do not notice."""
    expected = answers(model, [ask("the sea", FREE.replace(max_tokens=300))], ahead=False, slots=1)[0][0]
    with Engine(model, TOKENIZER, slots=3, ahead=True) as engine:
        stays, text = engine.stream(ask("the sea", FREE.replace(max_tokens=300))), ""
        endless = FREE.replace(max_tokens=None)
        for n in range(12):
            others = [engine.stream(ask("b" * (n + 1), endless.replace(seed=n + i))) for i in range(2)]
            for other in others:
                next(event for event in other if isinstance(event, Piece))
            text += "".join(event.text for event in (next(stays) for _ in range(9)) if isinstance(event, Piece))
            for other in others:
                other.close()  # type: ignore[attr-defined]
        text += "".join(event.text for event in stays if isinstance(event, Piece))
        assert engine.counts() == {"waiting": 0, "reading": 0, "running": 0}
    assert text == expected


@pytest.mark.parametrize("invariant", [False, True])
def test_a_text_that_has_moved_and_is_cancelled_at_once_is_kept_as_it_was(model: SambaLM, invariant: bool) -> None:
    """One ends unforeseen, the last takes its row, and all others are cancelled before the next step."""
    stopping = FREE.replace(max_tokens=200, stop_ids=tuple(range(60, 90)), seed=5)
    params = [stopping, FREE.replace(max_tokens=300, seed=2), FREE.replace(max_tokens=300, seed=3)]
    events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
    cancels = []
    ready = threading.Event()
    made: list[list[int]] = [[], [], []]
    ends: dict[int, End] = {}

    def take(event: Event, i: int) -> None:  # on the engine's thread
        if i == 0 and isinstance(event, End):
            cancels[1]()
            cancels[2]()
        events.put((i, event))

    def late() -> Iterator[np.ndarray]:  # so that all of them begin together
        assert ready.wait(60)
        yield TOKENIZER.encode("a")

    with Engine(model, TOKENIZER, slots=4, ahead=True, batch_invariant=invariant) as engine:
        engine.submit(Request(late(), FREE.replace(max_tokens=1)), lambda event: None)
        for i, one in enumerate(params):
            cancels.append(engine.submit(ask("the sea", one, keep=True), lambda event, i=i: take(event, i)))
        ready.set()
        while len(ends) < len(params):
            i, event = events.get(timeout=60)
            if isinstance(event, Piece):
                made[i] += [token.id for token in event.tokens]
            if isinstance(event, End):
                ends[i] = event
        assert engine.failure is None
        assert [ends[i].finish for i in range(3)] == ["stop", "cancelled", "cancelled"]
        for i in (1, 2):
            assert len(made[i]) > 1
            assert ends[i].last == made[i][-1]
            read = [TOKENIZER.encode("the sea"), np.array(made[i][:-1], dtype=np.int64)]
            again = engine.stream(Request(read, FREE.replace(max_tokens=0), keep=True))
            alone, kept = next(event.reader for event in again if isinstance(event, End)), ends[i].reader
            assert alone is not None
            assert kept is not None
            same_standing(kept, alone, exact=invariant)


def test_a_prompt_that_is_read_token_by_token_ends_where_it_ends(model: SambaLM) -> None:
    request = ask("the sea", keep_prompt=True)
    for ahead in (False, True):
        ((_, _, _, (ready,)),) = answers(model, [request], ahead=ahead, slots=1, batch_invariant=True)
        assert ready.reader.lengths == ready.reader.state.position.tolist() == [7]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_damaged_model_ends_its_texts_and_no_others(ahead: bool) -> None:
    """Token 70 has no embedding; nobody but one text ever reads it."""
    layers = (Mamba(), SwiGLU(width=48), Attention(heads=2, window=24))
    config = ModelConfig(name="tiny", d_model=32, vocab_size=260, layers=layers, tie_embeddings=False)
    broken = samba_lm.create(config, device=DEVICE)
    with torch.no_grad():
        broken.embedding[70] = float("nan")
    never, soon = FREE.replace(logit_bias=((70, -1e4),)), FREE.replace(logit_bias=((70, 5.0),), seed=3)
    bad, good = answers(broken, [ask("a", soon), ask("b", never)], ahead=ahead, slots=2)
    assert "not finite" in str(bad[2].error)
    assert bad[1][-1].id == 70
    assert len(bad[1]) > 1
    assert (good[2].finish, len(good[1])) == ("length", 30)

"""Steps that are started before the one before was looked at change no answer, no figure and no state."""

from __future__ import annotations

import queue

import pytest
import torch

import samba_lm
from samba_lm.config import Attention, Mamba, ModelConfig, SwiGLU
from samba_lm.engine.decoder import Decoder
from samba_lm.engine.engine import Engine
from samba_lm.engine.request import End, Event, Piece, Ready, Request, Token
from samba_lm.generation.params import SamplingParams
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
    requests = mixed() * 2
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


def test_what_is_kept_has_read_what_was_given_out(model: SambaLM) -> None:
    requests = [ask("the sea", FREE.replace(seed=1, stop=("e",)), keep=True, keep_prompt=True), ask("a")]
    for settings in ({}, {"batch_invariant": True}):
        plain = answers(model, requests, ahead=False, slots=2, **settings)
        ahead = answers(model, requests, ahead=True, slots=2, **settings)
        for (_, _, one, (begun,)), (_, _, other, (again,)) in zip(plain[:1], ahead[:1], strict=True):
            for a, b in ((one.reader, other.reader), (begun.reader, again.reader)):
                assert a is not None
                assert b is not None
                assert a.lengths == b.lengths == a.state.position.tolist()
                for x, y in zip(a.state.tensors(), b.state.tensors(), strict=True):
                    torch.testing.assert_close(x, y)


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


def test_a_damaged_model_ends_every_text() -> None:
    broken = make()
    with torch.no_grad():
        broken.norm.weight[0] = float("nan")
    results = answers(broken, [ask("a"), ask("b")], ahead=True, slots=2)
    assert all("not finite" in str(end.error) for _, _, end, _ in results)

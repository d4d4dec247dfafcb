"""Many requests at once give what each gives alone, and none of them can spoil another."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

import samba_lm
from samba_lm.config import Attention, Mamba, ModelConfig, SwiGLU
from samba_lm.engine.engine import Engine, QueueFullError
from samba_lm.engine.prefiller import Prefiller
from samba_lm.engine.request import End, Event, Piece, Progress, Request
from samba_lm.errors import UserError
from samba_lm.generation.params import SamplingParams
from samba_lm.generation.prefill import Reader
from samba_lm.mixers.attention import AttentionMixer
from samba_lm.model import SambaLM
from samba_lm.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
PROMPTS = ["", "a", "the sea is salt ", "as the tears are " * 9, "and the sand " * 30, "x" * 200]
PARAMS = [
    params.replace(stop_at_eos=False)
    for params in (
        SamplingParams(max_tokens=31, temperature=0),
        SamplingParams(max_tokens=17, seed=1, top_p=0.8),
        SamplingParams(max_tokens=40, seed=2, top_k=20, repetition_penalty=1.2),
        SamplingParams(max_tokens=1, seed=3),
        SamplingParams(max_tokens=25, seed=4, min_p=0.05, presence_penalty=0.4, frequency_penalty=0.1),
        SamplingParams(max_tokens=0),
    )
]


def make(window: int | None = 24) -> SambaLM:
    layers = (Mamba(), SwiGLU(width=48), Attention(heads=2, window=window), SwiGLU(width=48))
    return samba_lm.create(ModelConfig(name="tiny", d_model=32, vocab_size=260, layers=layers, max_context=4096))


@pytest.fixture(scope="module")
def model() -> SambaLM:
    return make()


def ids(text: str) -> list[np.ndarray]:
    return [TOKENIZER.encode(text)]


def collect(engine: Engine, request: Request) -> tuple[str, End]:
    events = list(engine.stream(request))
    assert isinstance(events[-1], End)
    return "".join(event.text for event in events if isinstance(event, Piece)), events[-1]


@pytest.mark.parametrize("window", [24, None])
@pytest.mark.parametrize("settings", [{}, {"chunk": 7}, {"slots": 1}, {"batch_invariant": True}], ids=str)
def test_together_as_alone(window: int | None, settings: dict[str, int]) -> None:
    model = make(window)
    alone = [samba_lm.generate(model, TOKENIZER, p, q) for p, q in zip(PROMPTS * 3, PARAMS * 3, strict=True)]
    with Engine(model, TOKENIZER, **({"slots": 4} | settings)) as engine:  # type: ignore[arg-type]
        together = engine.generate(PROMPTS * 3, PARAMS * 3)
    assert [completion.text for completion in together] == alone
    assert [completion.end.new_tokens for completion in together] == [p.max_tokens for p in PARAMS] * 3
    assert [len(completion.tokens) for completion in together] == [p.max_tokens for p in PARAMS] * 3


def test_what_was_cancelled_while_it_was_read_keeps_a_state_of_its_own(model: SambaLM) -> None:
    """On a GPU prompts are read in memory that they share."""
    cancels = []
    events: list[End] = []
    first = threading.Event()

    def sink(event: Event) -> None:
        if isinstance(event, Progress) and event.read == 20:
            cancels[0]()
        if isinstance(event, End):
            events.append(event)
            first.set()

    with Engine(model, TOKENIZER, slots=2, chunk=10) as engine:
        engine._prefiller = Prefiller(model, 10, graphs=True)
        _, end = collect(engine, Request([np.full(20, 97)], SamplingParams(max_tokens=0), keep=True))
        began = threading.Event()

        def late() -> Iterator[np.ndarray]:
            began.wait(30)
            yield np.full(100, 97)

        cancels.append(engine.submit(Request(late(), keep=True), sink))
        began.set()
        assert first.wait(30)
        collect(engine, Request(ids("x" * 50), SamplingParams(max_tokens=1)))
    kept = events[0].reader
    assert kept is not None
    assert end.reader is not None
    assert (events[0].finish, kept.lengths) == ("cancelled", [20])
    for mine, alone in zip(kept.state.tensors(), end.reader.state.tensors(), strict=True):
        assert torch.equal(mine, alone)


@pytest.mark.parametrize("invariant", [False, True])
def test_a_damaged_model_finds_no_prompt_likely(invariant: bool) -> None:
    broken = make()
    with torch.no_grad():
        broken.embedding[70] = float("nan")
    with Engine(broken, TOKENIZER, slots=2, batch_invariant=invariant) as engine:
        asked = Request(ids("aFb"), SamplingParams(max_tokens=0), logprobs=1, prompt_logprobs=True)
        with pytest.raises(UserError, match="not finite"):
            collect(engine, asked)
        assert engine.failure is None
        assert engine.counts() == {"waiting": 0, "reading": 0, "running": 0}


def test_a_long_prompt_does_not_stop_others(model: SambaLM) -> None:
    """While 100 chunks are read, a text that runs gets a token after each."""
    order: list[str] = []
    with Engine(model, TOKENIZER, slots=2, chunk=10) as engine:
        done = threading.Event()

        def short(event: Event) -> None:
            if isinstance(event, Piece):
                order.append("token")

        def long(event: Event) -> None:
            order.append("read" if isinstance(event, Progress) else "end")
            if isinstance(event, End):
                done.set()

        cancel = engine.submit(Request(ids("a"), SamplingParams(max_tokens=None, stop_at_eos=False)), short)
        engine.submit(Request([np.zeros(1000, np.int64)], SamplingParams(max_tokens=1)), long)
        assert done.wait(30)
        cancel()
    first = order.index("read")
    during = order[first : order.index("end")]
    assert 100 <= during.count("read") <= 101  # the first chunk may have had to share
    assert during.count("token") >= 99
    assert "read, read" not in ", ".join(during)


def test_stop_strings_and_tokens(model: SambaLM) -> None:
    params = SamplingParams(max_tokens=60, temperature=0.5, top_k=3, seed=5, stop_at_eos=False)
    free = [t.id for t in next(iter(Engine(model, TOKENIZER).generate(["abc"], params))).tokens]
    for options in ({"stop": TOKENIZER.decode(free[20:22])}, {"stop_ids": (free[20],)}):
        alone = samba_lm.generate(model, TOKENIZER, "abc", params, **options)
        with Engine(model, TOKENIZER) as engine:
            text, end = collect(engine, Request(ids("abc"), params.replace(**options)))
        assert (text, end.finish) == (alone, "stop")
        assert end.new_tokens <= 22


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_logprobs_are_the_models(model: SambaLM, batch_invariant: bool) -> None:
    prompt = TOKENIZER.encode("the sea is salt")
    request = Request([prompt[:4], prompt[4:]], SamplingParams(max_tokens=6, temperature=0), None, 3, True)
    with Engine(model, TOKENIZER, chunk=6, batch_invariant=batch_invariant) as engine:
        events = list(engine.stream(request))
    end = events[-1]
    assert isinstance(end, End)
    made = [token for event in events if isinstance(event, Piece) for token in event.tokens]
    whole = torch.tensor([*prompt.tolist(), *(token.id for token in made)])[None]
    expected = model(whole)[0][0, :, : TOKENIZER.vocab_size].detach().log_softmax(-1)
    tokens = [*end.prompt, *made]
    assert tokens[0].logprob is None
    for place, token in enumerate(tokens[1:]):
        assert token.logprob == pytest.approx(float(expected[place, token.id]), abs=1e-4)
        top = expected[place].topk(3)
        assert [i for i, _ in token.top] == top.indices.tolist()
        assert [p for _, p in token.top] == pytest.approx(top.values.tolist(), abs=1e-4)
    assert all(token.top[0][0] == token.id for token in made)


def test_a_context_is_continued_and_stays(model: SambaLM) -> None:
    params = SamplingParams(max_tokens=20, temperature=0)
    whole = samba_lm.generate(model, TOKENIZER, "the sea is salt and deep", params)
    for settings in ({}, {"batch_invariant": True}):
        with Engine(model, TOKENIZER, **settings) as engine:  # type: ignore[arg-type]
            _, end = collect(engine, Request(ids("the sea is salt"), SamplingParams(max_tokens=0), keep=True))
            context = end.reader
            assert isinstance(context, Reader)
            assert context.lengths == [15]
            for _ in range(2):
                text, end = collect(engine, Request(ids(" and deep"), params, context))
                assert text == whole
                assert end.prompt_tokens == 9
            assert int(context.state.position) == 15


def test_a_kept_state_goes_on(model: SambaLM) -> None:
    params = SamplingParams(max_tokens=10, temperature=0)
    long = samba_lm.generate(model, TOKENIZER, "abcdef", params.replace(max_tokens=20))
    with Engine(model, TOKENIZER) as engine:
        first, end = collect(engine, Request(ids("abcdef"), params, keep=True))
        assert end.last is not None
        assert end.reader is not None
        assert end.reader.lengths == [6 + 10 - 1]
        second, _ = collect(engine, Request([np.array([end.last])], params, end.reader))
    assert first + second == long


def test_batch_invariant_answers_are_the_same_to_the_last_bit(model: SambaLM) -> None:
    """Alone, among others, cut differently, and from a copy of a context: the log-probabilities are equal, not near."""
    params, text = SamplingParams(max_tokens=24, temperature=0), "the sand is as deep as the sea "

    def made(engine: Engine, request: Request) -> list[float | None]:
        events = engine.stream(request)
        return [t.logprob for event in events if isinstance(event, Piece) for t in event.tokens]

    runs = []
    with Engine(model, TOKENIZER, slots=4, batch_invariant=True) as engine:
        alone = Request(ids(text), params, logprobs=0)
        runs.append(made(engine, alone))
        cancels = [engine.submit(Request(ids("b" * n), SamplingParams(seed=n)), lambda _: None) for n in (3, 50)]
        runs.append(made(engine, alone))
        runs.append(made(engine, Request(np.split(TOKENIZER.encode(text), [3, 4, 20]), params, logprobs=0)))
        _, end = collect(engine, Request(ids(text[:9]), SamplingParams(max_tokens=0), keep=True))
        for _ in range(2):
            runs.append(made(engine, Request(ids(text[9:]), params, end.reader, logprobs=0)))
        for cancel in cancels:
            cancel()
    assert len(runs[0]) == 24
    assert all(run == runs[0] for run in runs[1:])


def test_greedy_differs_only_where_two_are_as_good(model: SambaLM) -> None:
    """Without batch_invariant too, the logits agree to rounding."""
    request = Request(ids("the sea"), SamplingParams(max_tokens=24, temperature=0), logprobs=2)
    with Engine(model, TOKENIZER, slots=8) as engine:
        alone = [e for e in engine.stream(request) if isinstance(e, Piece)]
        for n in range(6):
            engine.submit(Request(ids("b" * (9 * n + 1)), SamplingParams(seed=n)), lambda _: None)
        among = [e for e in engine.stream(request) if isinstance(e, Piece)]
    for a, b in zip(alone, among, strict=True):
        if a.tokens[0].id != b.tokens[0].id:
            (_, first), (_, second) = a.tokens[0].top
            assert first - second < 1e-4
            break
        assert a.tokens[0].logprob == pytest.approx(b.tokens[0].logprob, abs=1e-4)


def test_leaving_early_frees_the_slot(model: SambaLM) -> None:
    endless = SamplingParams(max_tokens=None, stop_at_eos=False)
    with Engine(model, TOKENIZER, slots=1) as engine:
        events = engine.stream(Request(ids("a"), endless))
        next(event for event in events if isinstance(event, Piece))
        assert engine.counts()["running"] == 1
        events.close()  # type: ignore[attr-defined]
        began = time.monotonic()
        text, _ = collect(engine, Request(ids("b"), SamplingParams(max_tokens=3)))
        assert time.monotonic() - began < 10
        assert len(text) <= 3


def test_cancelling_what_waits_or_reads(model: SambaLM) -> None:
    ends: list[End] = []

    def sink(event: Event) -> None:
        if isinstance(event, End):
            ends.append(event)

    def endless() -> Iterator[np.ndarray]:
        while True:
            yield np.zeros(4, np.int64)

    with Engine(model, TOKENIZER, slots=1, chunk=4) as engine:
        cancels = [engine.submit(Request(endless()), sink), engine.submit(Request(ids("a")), sink)]
        for cancel in reversed(cancels):
            cancel()
        collect(engine, Request(ids("b"), SamplingParams(max_tokens=1)))
    assert [end.finish for end in ends] == ["cancelled", "cancelled"]


def test_a_full_queue_is_told_at_once(model: SambaLM) -> None:
    endless = Request(ids("a"), SamplingParams(max_tokens=None, stop_at_eos=False))
    with Engine(model, TOKENIZER, slots=1, queue_limit=2) as engine:
        for _ in range(3):
            engine.submit(endless, lambda _: None)
        with pytest.raises(QueueFullError, match="requests are waiting, the limit is 2"):
            engine.submit(endless, lambda _: None)


def bad_prompt() -> Iterator[np.ndarray]:
    yield np.zeros(4, np.int64)
    raise UserError("the file ended in the middle of a character")


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([np.array([300])], "Token id 300"),
        ([], "The prompt is empty"),
        (bad_prompt(), "in the middle"),
    ],
)
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_bad_prompt_ends_itself_alone(model: SambaLM, tokens: object, message: str, batch_invariant: bool) -> None:
    if tokens is not None and not isinstance(tokens, list):
        tokens = bad_prompt()
    with Engine(model, TOKENIZER, slots=2, batch_invariant=batch_invariant) as engine:
        good = engine.stream(Request(ids("a"), SamplingParams(max_tokens=50, stop_at_eos=False)))
        next(good)
        with pytest.raises(UserError, match=message):
            list(engine.stream(Request(tokens)))  # type: ignore[arg-type]
        assert sum(len(e.tokens) for e in good if isinstance(e, Piece)) >= 49
        assert engine.failure is None


def test_logits_that_are_no_numbers_end_their_own_request() -> None:
    damaged = make()
    damaged.embedding.data[7] = torch.nan
    with Engine(damaged, TOKENIZER, slots=2) as engine:
        with pytest.raises(UserError, match="not finite"):
            list(engine.stream(Request([np.array([7])])))
        assert engine.failure is None


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_more_than_full_attention_can_hold_is_told(batch_invariant: bool) -> None:
    full = make(None)
    full.config = full.config.with_overrides(max_context=600)
    for layer in full.layers:
        if isinstance(layer.mixer, AttentionMixer):  # type: ignore[union-attr]
            layer.mixer.max_context = 600  # type: ignore[union-attr]
    with Engine(full, TOKENIZER, slots=2, batch_invariant=batch_invariant) as engine:
        good = engine.stream(Request(ids("a"), SamplingParams(max_tokens=9)))
        with pytest.raises(UserError, match="max_context"):
            list(engine.stream(Request([np.zeros(700, np.int64)])))
        with pytest.raises(UserError, match="unlimited"):
            engine.submit(Request(ids("a"), SamplingParams(max_tokens=None)), lambda _: None)
        long = SamplingParams(max_tokens=500, stop_at_eos=False)
        _, end = collect(engine, Request([np.zeros(300, np.int64)], long))
        assert (end.finish, end.new_tokens) == ("length", 301)  # the last one needs no room
        assert isinstance(list(good)[-1], End)
        assert engine.failure is None


def test_async(model: SambaLM) -> None:
    async def one(engine: Engine, n: int) -> str:
        request = Request(ids("a" * n), SamplingParams(max_tokens=9, seed=n))
        return "".join([event.text async for event in engine.astream(request) if isinstance(event, Piece)])

    async def all_at_once(engine: Engine) -> list[str]:
        return await asyncio.gather(*(one(engine, n) for n in range(1, 9)))

    with Engine(model, TOKENIZER, slots=3) as engine:
        texts = asyncio.run(all_at_once(engine))
    assert texts == [samba_lm.generate(model, TOKENIZER, "a" * n, max_tokens=9, seed=n) for n in range(1, 9)]


def test_closing_ends_everything_and_refuses_more(model: SambaLM) -> None:
    ends: list[Event] = []
    engine = Engine(model, TOKENIZER, slots=1)
    endless = Request(ids("a"), SamplingParams(max_tokens=None, stop_at_eos=False))
    for _ in range(3):
        engine.submit(endless, lambda event: ends.append(event) if isinstance(event, End) else None)
    engine.close()
    assert [end.finish for end in ends if isinstance(end, End)] == ["cancelled"] * 3
    with pytest.raises(UserError, match="has stopped"):
        engine.submit(endless, lambda _: None)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: Engine(m, TOKENIZER, slots=0), "slots=0"),
        (lambda m: Engine(m, TOKENIZER, chunk=0), "chunk=0"),
        (lambda m: Engine(m, TOKENIZER).generate("text"), "takes a list"),
        (lambda m: Engine(m, TOKENIZER).generate(["a"], [SamplingParams()] * 2), "1 prompts but 2 params"),
    ],
)
def test_wrong_calls(model: SambaLM, call: Callable[[SambaLM], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(model)

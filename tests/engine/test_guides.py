"""Biases and guides steer one text and leave its neighbours alone; a prompt's state is there for others."""

from __future__ import annotations

import numpy as np
import pytest

import samba_lm
from samba_lm.config import Attention, Mamba, ModelConfig, SwiGLU
from samba_lm.engine.engine import Engine
from samba_lm.engine.request import End, Piece, Ready, Request
from samba_lm.errors import UserError
from samba_lm.generation.params import SamplingParams
from samba_lm.model import SambaLM
from samba_lm.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
FREE = SamplingParams(max_tokens=12, seed=3, stop_at_eos=False)


@pytest.fixture(scope="module")
def model() -> SambaLM:
    layers = (Mamba(), SwiGLU(width=48), Attention(heads=2, window=24), SwiGLU(width=48))
    return samba_lm.create(ModelConfig(name="tiny", d_model=32, vocab_size=260, layers=layers))


def text(engine: Engine, request: Request) -> str:
    return "".join(event.text for event in engine.stream(request) if isinstance(event, Piece))


def ask(prompt: str, params: SamplingParams = FREE, **options: object) -> Request:
    return Request([TOKENIZER.encode(prompt)], params, **options)  # type: ignore[arg-type]


class Word:
    """Spells one word, then allows only the end."""

    def __init__(self, word: str) -> None:
        self.left = [*TOKENIZER.encode(word).tolist(), TOKENIZER.eos_id]

    def allowed(self) -> np.ndarray:
        allowed = np.zeros(TOKENIZER.vocab_size, dtype=bool)
        allowed[self.left[:1]] = True
        return allowed

    def take(self, token_id: int) -> None:
        assert token_id == self.left.pop(0)


@pytest.mark.parametrize("settings", [{}, {"batch_invariant": True}], ids=str)
def test_a_guide_decides_and_neighbours_do_not_notice(model: SambaLM, settings: dict[str, bool]) -> None:
    params = FREE.replace(stop_at_eos=True)
    alone = samba_lm.generate(model, TOKENIZER, "abc", FREE)
    with Engine(model, TOKENIZER, slots=4, **settings) as engine:  # type: ignore[arg-type]
        guided = engine.stream(ask("abc", params, guide=lambda: Word("héllo")))
        beside = engine.stream(ask("abc"))
        pieces = [event for event in beside if isinstance(event, Piece)]
        events = list(guided)
    assert "".join(piece.text for piece in pieces) == alone
    assert "".join(event.text for event in events if isinstance(event, Piece)) == "héllo"
    assert isinstance(events[-1], End)
    assert events[-1].finish == "eos"


def test_a_guide_that_allows_nothing_ends_its_text_alone(model: SambaLM) -> None:
    class Stuck(Word):
        def take(self, token_id: int) -> None:
            self.left = []

    with Engine(model, TOKENIZER) as engine:
        with pytest.raises(UserError, match="allows no token"):
            list(engine.stream(ask("a", guide=lambda: Stuck("xy"))))
        assert engine.failure is None


def test_logit_bias(model: SambaLM) -> None:
    forced = FREE.replace(logit_bias=((120, 1000.0),))
    banned = FREE.replace(logit_bias=tuple((i, -1e4) for i in range(257) if i not in (65, 66)))
    with Engine(model, TOKENIZER) as engine:
        completions = engine.generate(["abc"] * 3, [forced, FREE, banned])
        with pytest.raises(UserError, match="token 257"):
            engine.generate(["abc"], FREE.replace(logit_bias=((257, 1.0),)))
    assert completions[0].text == "x" * 12
    assert completions[1].text == samba_lm.generate(model, TOKENIZER, "abc", FREE)
    assert set(completions[2].text) == {"A", "B"}
    assert completions[2].text == samba_lm.generate(model, TOKENIZER, "abc", banned)


@pytest.mark.parametrize(
    ("bias", "message"),
    [(((1,),), "pairs"), (((1, float("nan")),), "-1e4"), (((-1, 0.0),), "token id"), ((3,), "pairs")],
)
def test_wrong_biases(bias: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingParams(logit_bias=bias)  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{}, {"batch_invariant": True}], ids=str)
@pytest.mark.parametrize("max_tokens", [0, 12])
def test_others_begin_where_a_prompt_ends(model: SambaLM, settings: dict[str, bool], max_tokens: int) -> None:
    alone = samba_lm.generate(model, TOKENIZER, "the sea", FREE)
    with Engine(model, TOKENIZER, slots=2, **settings) as engine:  # type: ignore[arg-type]
        events = list(engine.stream(ask("the sea", FREE.replace(max_tokens=max_tokens), keep=True, keep_prompt=True)))
        readers = [event.reader for event in events if isinstance(event, Ready)]
        assert len(readers) == 1
        assert readers[0].lengths == [7]
        assert [text(engine, Request((), FREE, readers[0])) for _ in range(2)] == [alone] * 2
        end = events[-1]
        assert isinstance(end, End)
        if max_tokens == 0:
            assert text(engine, Request((), FREE, end.reader)) == alone

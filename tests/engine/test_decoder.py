"""Recorded steps give what steps give one by one; and which batch sizes are recorded."""

from __future__ import annotations

import pytest
import torch

import samba_lm
from samba_lm.config import Attention, Mamba, ModelConfig, SwiGLU
from samba_lm.engine.decoder import Decoder, sizes
from samba_lm.engine.engine import Engine
from samba_lm.engine.slots import Slots
from samba_lm.generation.params import SamplingParams
from samba_lm.model import SambaLM
from samba_lm.tokenizer import ByteTokenizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(window: int | None) -> SambaLM:
    layers = (Mamba(), SwiGLU(width=48), Attention(heads=2, window=window), SwiGLU(width=48))
    config = ModelConfig(name="tiny", d_model=32, vocab_size=260, layers=layers, max_context=4096)
    return samba_lm.create(config, device=DEVICE).eval()


def test_sizes() -> None:
    assert sizes(1) == [1]
    assert sizes(3) == [1, 2, 3]
    assert sizes(16) == [1, 2, 4, 8, 16]
    assert sizes(20) == [1, 2, 4, 8, 16, 20]


@pytest.mark.parametrize("window", [20, None])
@torch.inference_mode()
def test_steps_of_a_changing_batch(window: int | None) -> None:
    """Sequences come and go; each has the logits that it has alone, and greedy tokens follow from them."""
    model = make(window)
    slots = Slots(model, 5)
    decoder = Decoder(slots, 257, torch.device(DEVICE))
    alone: list[samba_lm.State] = []
    lengths: list[int] = []

    def add(length: int) -> None:
        _, state = model(torch.randint(0, 257, (1, length), device=DEVICE))
        alone.append(state.fork())
        lengths.append(length)
        slots.put(state, length)
        decoder.set_options([SamplingParams(temperature=0)] * slots.used)

    for length in (3, 30, 1):
        add(length)
    for step in range(40):
        if step in (5, 11):
            add(40 + step)
        if step == 20:
            moved = slots.drop(1)
            alone[1], lengths[1] = alone[moved], lengths[moved]
            alone.pop(), lengths.pop()
        ids = torch.randint(0, 257, (slots.used,)).tolist()
        lengths[:] = [n + 1 for n in lengths]
        drawn, logits = decoder.step(ids, lengths, None)
        for row, state in enumerate(alone):
            expected = model.step(torch.tensor([ids[row]], device=DEVICE), state)[0]
            torch.testing.assert_close(logits[row], expected, atol=2e-5, rtol=1e-4)
        assert torch.equal(drawn, logits[:, :257].argmax(-1))


@pytest.mark.gpu
def test_graphs_are_made_once_for_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = make(24), ByteTokenizer()
    prompts = ["the sea", "is", "salt " * 20]
    with Engine(model, tokenizer, slots=4) as engine:
        first = engine.generate(prompts, SamplingParams(max_tokens=40, seed=1, top_p=0.9))
        made = dict(engine._batch._decoder._graphs)
        again = engine.generate(prompts, SamplingParams(max_tokens=40, seed=1, top_p=0.9))
        assert engine._batch._decoder._graphs == made
        engine.generate(prompts, SamplingParams(max_tokens=40, temperature=0))
    assert [a.text for a in first] == [b.text for b in again]
    assert {mode for _, mode, *_ in made} == {"cut"}

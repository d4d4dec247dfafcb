"""Pieces of fixed lengths, filled up, give what the prompt gives when it is read as it is."""

from __future__ import annotations

import pytest
import torch

import samba_lm
from samba_lm.config import Attention, Mamba, ModelConfig, SwiGLU
from samba_lm.engine import prefiller as module
from samba_lm.engine.prefiller import Prefiller
from samba_lm.errors import UserError
from samba_lm.generation.params import SamplingParams
from samba_lm.generation.prefill import Reader, prefill

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STACKS = {
    "samba": (Mamba(), SwiGLU(width=48), Attention(heads=2, window=24), SwiGLU(width=48)),
    "short": (Attention(heads=2, window=70, short_conv=4), SwiGLU(width=48)),
}


@pytest.mark.parametrize("stack", STACKS)
@torch.inference_mode()
def test_as_read_at_once(stack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LENGTHS", (4, 16))
    config = ModelConfig(name="tiny", d_model=32, vocab_size=260, layers=STACKS[stack])
    model = samba_lm.create(config, device=DEVICE).eval()
    reading = Prefiller(model, 40, graphs=True)
    params = SamplingParams(repetition_penalty=1.1)
    for pieces in ((3,), (16, 1, 2), (40, 40, 7, 30), (4, 4)):
        tokens = torch.randint(0, 260, (sum(pieces),))
        plain, filled = Reader.create(model, params, 1), Reader.create(model, params, 1)
        prefill(model, [[tokens.numpy()]], plain)
        for piece in tokens.split(list(pieces)):
            reading.read(filled, piece.numpy())
        assert filled.lengths == plain.lengths
        assert torch.equal(filled.state.position, plain.state.position)
        assert torch.equal(filled.history.seen, plain.history.seen)  # type: ignore[union-attr]
        torch.testing.assert_close(filled.logits, plain.logits, atol=2e-5, rtol=1e-4)
        for a, b in zip(filled.state.layers, plain.state.layers, strict=True):
            for name in a:
                torch.testing.assert_close(a[name], b[name], atol=2e-5, rtol=1e-4)


@torch.inference_mode()
def test_a_bad_token_is_told_and_changes_nothing() -> None:
    config = ModelConfig(name="tiny", d_model=32, vocab_size=260, layers=STACKS["samba"])
    model = samba_lm.create(config, device=DEVICE).eval()
    reading, reader = Prefiller(model, 16, graphs=True), Reader.create(model, SamplingParams(), 1)
    reading.read(reader, torch.arange(5).numpy())
    with pytest.raises(UserError, match="Token id 300 at position 6"):
        reading.read(reader, torch.tensor([1, 300]).numpy())
    assert reader.lengths == [5]
    assert int(reader.state.position) == 5

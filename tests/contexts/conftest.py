"""A tiny Samba whose texts differ by what was read."""

from __future__ import annotations

import pytest
import torch

import samba_lm
from samba_lm.config import Attention, Mamba, ModelConfig, SwiGLU
from samba_lm.model import SambaLM


def make(window: int | None = 64, seed: int = 1, width: int = 48) -> SambaLM:
    layers = (Mamba(), SwiGLU(width=width), Attention(heads=2, window=window), SwiGLU(width=width))
    config = ModelConfig(name="tiny", d_model=32, vocab_size=260, layers=layers, max_context=4096, tie_embeddings=False)
    model = samba_lm.create(config, seed=seed)
    assert model.unembedding is not None
    with torch.no_grad():
        model.unembedding.mul_(20)
    return model


@pytest.fixture
def make_model():
    return make


@pytest.fixture(scope="session")
def model() -> SambaLM:
    return make()

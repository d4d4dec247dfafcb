"""A tiny Samba with random weights that remembers which tokens its state holds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from samba_lm.config import Attention, Mamba, ModelConfig, SwiGLU
from samba_lm.model import SambaLM
from samba_lm.state import State
from samba_lm.tokenizer import ByteTokenizer, Tokenizer, train_bpe

TEXT = "User: is the sea salt?\nAssistant: the sea is salt, as the tears are.\nUser: and the sand?\n" * 4


class RecordingLM(SambaLM):
    """SambaLM that can be kept to some tokens, and that notes each token it reads under its position."""

    allowed: Tensor | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.read: dict[int, int] = {}

    def features(
        self, input_ids: Tensor, state: State | None = None, segments: Tensor | None = None
    ) -> tuple[Tensor, State]:
        self._note(input_ids, state)
        return super().features(input_ids, state, segments)

    def step(self, token_ids: Tensor, state: State) -> Tensor:
        self._note(token_ids[:, None], state)
        return super().step(token_ids, state)

    def head(self, hidden: Tensor) -> Tensor:
        logits = super().head(hidden)
        return logits if self.allowed is None else logits.masked_fill(~self.allowed, -torch.inf)

    def allow(self, token_ids: list[int]) -> None:
        self.allowed = torch.zeros(self.config.vocab_size, dtype=torch.bool)
        self.allowed[token_ids] = True

    def tokens(self, length: int) -> list[int]:
        """The tokens that a state of this length holds: a token read again after a step back replaces the first."""
        return [self.read[position] for position in range(length)]

    def _note(self, input_ids: Tensor, state: State | None) -> None:
        start = 0 if state is None else int(state.position[0])
        self.read.update(enumerate(input_ids[0].tolist(), start))


@pytest.fixture
def make_model() -> Callable[[int], RecordingLM]:
    def make(vocab_size: int) -> RecordingLM:
        layers = (Mamba(), SwiGLU(width=48), Attention(heads=2, window=24), SwiGLU(width=48))
        config = ModelConfig(name="tiny", d_model=32, vocab_size=vocab_size, layers=layers, tie_embeddings=False)
        model = RecordingLM(config)
        model.reset_parameters(seed=1)
        assert model.unembedding is not None
        with torch.no_grad():
            model.unembedding.mul_(20)  # far from uniform, so that texts differ by what was read
        return model

    return make


@pytest.fixture
def model(make_model: Callable[[int], RecordingLM]) -> RecordingLM:
    """More columns than the byte tokenizer has tokens, as padded vocabularies have."""
    return make_model(320)


@pytest.fixture
def tokenizer() -> Tokenizer:
    return ByteTokenizer()


@pytest.fixture(scope="session")
def bpe() -> Tokenizer:
    return train_bpe([TEXT], 320)

"""Every mixer: full = chunked = one by one; packed documents = apart; constant state. Outputs, states, gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from contract import all_slots, check_chunks, check_documents

from samba_lm.config import (
    SPECS,
    Attention,
    GatedLinearAttention,
    GatedParallel,
    LayerSpec,
    Mamba,
    MegaS6,
    ModelConfig,
    Parallel,
    Retention,
    SelfExtend,
    SwiGLU,
)
from samba_lm.errors import UserError
from samba_lm.mixers.base import Mixer
from samba_lm.mixers.registry import MIXERS
from samba_lm.model import SambaLM

D = 24
CASES: dict[str, LayerSpec] = {
    "swiglu": SwiGLU(width=16),
    "mamba": Mamba(),
    "mamba-small-state": Mamba(state=3, conv=2, expand=1, dt_rank=5),
    "swa": Attention(heads=4, window=7),
    "swa-gqa": Attention(heads=4, kv_heads=2, window=5),
    "swa-mqa": Attention(heads=2, kv_heads=1, window=64),
    "swa-nope": Attention(heads=3, window=6, rope=False),
    "swa-one": Attention(heads=2, window=1),
    "swa-sc": Attention(heads=4, kv_heads=2, window=6, short_conv=4),
    "full": Attention(heads=4, kv_heads=2),
    "full-sc": Attention(heads=2, short_conv=3),
    "self-extend": SelfExtend(heads=4, kv_heads=2, group=3, neighbor_window=8),
    "gla": GatedLinearAttention(heads=2),
    "retention": Retention(heads=2),
    "parallel": Parallel(attention=Attention(heads=4, window=7)),
    "parallel-sc": Parallel(
        mamba=Mamba(state=3, conv=2), attention=Attention(heads=4, kv_heads=2, window=6, short_conv=4)
    ),
    "parallel-full": Parallel(attention=Attention(heads=4, kv_heads=1)),
    "gated": GatedParallel(attention=Attention(heads=4, kv_heads=2, window=7)),
    "gated-wide": GatedParallel(
        mamba=Mamba(expand=1), attention=Attention(heads=2, window=5, rope=False), gate_rank=24
    ),
    "mega": MegaS6(z_dim=8, chunk=6, state=4),
    "mega-long-chunk": MegaS6(z_dim=8, chunk=64, state=4),
}
GROWING = {"full", "full-sc", "self-extend", "parallel-full"}
WAYS = {"chunks": [3, 4, 17, 30], "one by one": list(range(1, 37))}
# Ids as a packed row has them; padding at the right, at the left, in the middle of a document, and a row of one token.
ROWS = [
    [0] * 9 + [1] * 2 + [2] * 13 + [5] * 13,
    [-1] * 4 + [0] * 3 + [-1] * 2 + [0] * 8 + [3] * 12 + [-1] * 8,
    [2] * 36 + [-1],
    [-1] * 20 + [4] * 1 + [-1] * 16,
    [0] * 35 + [1] * 2,
]


def slots_in_use(spec: LayerSpec) -> Callable[[int], int]:
    """Mega's ring holds the chunk being read, not the last ``chunk`` tokens."""
    return (lambda n: (n - 1) % spec.chunk + 1) if isinstance(spec, MegaS6) else all_slots


def make(spec: LayerSpec, dtype: torch.dtype) -> Mixer:
    """One initialised mixer, its gates and biases moved off their special values so that everything shows."""
    config = ModelConfig(name="test", d_model=D, vocab_size=8, layers=(spec,))
    model = SambaLM(config)
    model.reset_parameters(seed=1)
    generator = torch.Generator().manual_seed(2)
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=generator)
    mixer = model.layers[0].mixer
    return mixer.double() if dtype == torch.float64 else mixer


def test_every_spec_is_covered() -> None:
    ours = {spec for spec in SPECS.values() if spec.__module__ == "samba_lm.config"}
    assert {type(spec) for spec in CASES.values()} == ours
    assert ours <= MIXERS.keys()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_full_is_chunked_is_stepwise(name: str, dtype: torch.dtype) -> None:
    batch = 1 if dtype == torch.float32 else 3
    check_chunks(lambda: make(CASES[name], dtype), D, batch, 37, dtype, WAYS, slots_in_use(CASES[name]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_packed_documents_are_apart(name: str, dtype: torch.dtype) -> None:
    check_documents(lambda: make(CASES[name], dtype), D, ROWS, dtype, {"full": [], **WAYS}, slots_in_use(CASES[name]))


@pytest.mark.parametrize("name", sorted(CASES.keys() - GROWING))
def test_state_size_is_constant(name: str) -> None:
    mixer = make(CASES[name], torch.float32)
    empty = mixer.init_state(2)
    _, state = mixer(torch.randn(2, 100, D))
    assert {n: (t.shape, t.dtype) for n, t in state.items()} == {n: (t.shape, t.dtype) for n, t in empty.items()}


@pytest.mark.parametrize("name", CASES)
def test_causal_and_batch_rows_independent(name: str) -> None:
    mixer = make(CASES[name], torch.float64)
    x = torch.randn(2, 20, D, dtype=torch.float64)
    y, _ = mixer(x)
    changed = x.clone()
    changed[1, 11:] += 1.0
    z, _ = mixer(changed)
    assert torch.equal(y[0], z[0])
    torch.testing.assert_close(y[1, :11], z[1, :11], rtol=0, atol=1e-12)
    assert (y[1, 11:] - z[1, 11:]).abs().max() > 1e-6


def test_a_first_id_equal_to_the_last_continues() -> None:
    mixer = make(CASES["mamba"], torch.float64)
    x = torch.randn(1, 10, D, dtype=torch.float64)
    y, _ = mixer(x)
    _, state = mixer(x[:, :4], None, torch.full((1, 4), 7))
    rest, _ = mixer(x[:, 4:], state, torch.full((1, 6), 7))
    torch.testing.assert_close(rest, y[:, 4:], rtol=0, atol=1e-12)
    other, _ = mixer(x[:, 4:], state, torch.full((1, 6), 8))
    torch.testing.assert_close(other, mixer(x[:, 4:])[0], rtol=0, atol=1e-12)


def test_bad_segments_are_named() -> None:
    mixer = make(CASES["mamba"], torch.float32)
    x = torch.randn(1, 4, D)
    with pytest.raises(UserError, match="must not decrease"):
        mixer(x, None, torch.tensor([[0, 1, 0, 1]]))
    with pytest.raises(UserError, match=r"int64 of shape \[1, 4\]"):
        mixer(x, None, torch.zeros(1, 3, dtype=torch.int64))


def test_full_attention_stops_at_max_context() -> None:
    config = ModelConfig(name="t", d_model=D, vocab_size=8, layers=(Attention(heads=2),), max_context=10)
    model = SambaLM(config)
    model.reset_parameters(0)
    model(torch.zeros(1, 10, dtype=torch.int64))
    with pytest.raises(UserError, match="11 positions, but max_context is 10"):
        model(torch.zeros(1, 11, dtype=torch.int64))

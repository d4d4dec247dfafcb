"""SelfExtend against its definition, written out pair by pair, and against the attention it must equal up close."""

from __future__ import annotations

import math

import torch
from tolerances import assert_close

from samba_lm.config import Attention, ModelConfig, SelfExtend
from samba_lm.model import SambaLM
from samba_lm.ops.rope import rope_angles, rotate
from samba_lm.ops.self_extend import self_extend_attention


def rotated_score(q: torch.Tensor, k: torch.Tensor, distance: int) -> torch.Tensor:
    """q . k with q turned ``distance`` positions ahead of k: all that RoPE lets a score depend on."""
    return rotate(q, *rope_angles(torch.tensor(distance), q.shape[0], 10_000.0)) @ k


def test_against_the_definition() -> None:
    length, dim, group, near = 23, 8, 3, 7
    q, k, v = (torch.randn(1, length, 1, dim, dtype=torch.float64) for _ in range(3))
    expected = torch.zeros(length, dim, dtype=torch.float64)
    for i in range(length):
        scores = []
        for j in range(i + 1):
            grouped = i // group - j // group + near - near // group
            scores.append(rotated_score(q[0, i, 0], k[0, j, 0], i - j if i - j < near else grouped))
        weights = (torch.stack(scores) / math.sqrt(dim)).softmax(0)
        expected[i] = weights @ v[0, : i + 1, 0]
    positions = torch.arange(length)[None]
    allowed = torch.ones(1, length, length, dtype=torch.bool).tril()
    actual = self_extend_attention(
        q, k, v, positions, positions, allowed, group=group, neighbor_window=near, base=10_000.0
    )
    assert_close(actual[0, :, 0], expected, "attention")


def test_equals_full_attention_within_the_neighbor_window() -> None:
    models = []
    for spec in (Attention(heads=4, kv_heads=2), SelfExtend(heads=4, kv_heads=2, group=4, neighbor_window=32)):
        model = SambaLM(ModelConfig(name="t", d_model=32, vocab_size=50, layers=(spec,)))
        model.reset_parameters(seed=0)
        models.append(model.double())
    ids = torch.randint(0, 50, (2, 60))
    plain, extended = (model(ids)[0].detach() for model in models)
    assert_close(extended[:, :32], plain[:, :32], "inside")
    assert (extended[:, 40:] - plain[:, 40:]).abs().max() > 1e-4, "beyond it the far keys are seen elsewhere"

"""SelfExtend against its definition, written out pair by pair, and against the attention it must equal up close."""

from __future__ import annotations

import math

import pytest
import torch
from tolerances import assert_close

from samba_lm.config import Attention, ModelConfig, SelfExtend
from samba_lm.model import SambaLM
from samba_lm.ops.rope import rope_angles, rotate
from samba_lm.ops.self_extend import grouped_positions, self_extend_attention
from samba_lm.ops.self_extend.reference import self_extend_reference


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
    actual = self_extend_reference(
        q, k, v, positions, positions, allowed, group=group, neighbor_window=near, base=10_000.0
    )
    assert_close(actual[0, :, 0], expected, "attention")


def turned(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    cos, sin = rope_angles(positions, x.shape[-1], 10_000.0)
    return rotate(x, cos[:, :, None], sin[:, :, None])


@pytest.mark.parametrize("near", [1, 5, 40, 100])
@pytest.mark.parametrize("past", [0, 3, 30])
@pytest.mark.parametrize("documents", [False, True])
def test_two_merged_attentions_are_the_one(past: int, near: int, documents: bool) -> None:
    """Outputs and gradients, whether or not keys are far, with documents that begin anywhere and rows of less past."""
    batch, length, group = 2, 45, 3
    keys = past + length
    q, k, v = (torch.randn(batch, n, h, 8, dtype=torch.float64) for n, h in ((length, 4), (keys, 2), (keys, 2)))
    ids = (torch.rand(batch, keys) < 0.05).long().cumsum(1) if documents else torch.zeros(batch, keys).long()
    if documents:
        ids[1, : past // 2] = -1
    same = ids[:, :, None] == ids[:, None, :]
    positions = same.tril().sum(2) - 1
    inputs = [t.requires_grad_() for t in (q, k, v)]
    dout = torch.randn(q.shape, dtype=torch.float64)

    def of(y: torch.Tensor) -> list[torch.Tensor]:
        return [y, *torch.autograd.grad(y, inputs, dout)]

    allowed = (same & torch.ones(keys, keys, dtype=torch.bool).tril())[:, past:]
    options = {"group": group, "neighbor_window": near}
    expected = of(self_extend_reference(q, k, v, positions[:, past:], positions, allowed, **options, base=10_000.0))
    far_queries, far_keys = grouped_positions(positions, group, near)
    kept = max(0, past - (near - 1))
    actual = self_extend_attention(
        (turned(q, positions[:, past:]), turned(k, positions)[:, kept:], v[:, kept:]),
        (turned(q, far_queries[:, past:]), turned(k, far_keys), v),
        neighbor_window=near,
        positions=positions[:, past:],
        documents=ids if documents else None,
    )
    for name, a, e in zip(("out", "dq", "dk", "dv"), of(actual), expected, strict=True):
        assert_close(a, e, name)


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

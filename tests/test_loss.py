from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from samba_lm.loss import IGNORE_INDEX, chunk_tokens, token_loss_sum


def setup(dtype: torch.dtype) -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]:
    head = torch.nn.Linear(8, 37, bias=False, dtype=dtype)
    hidden = torch.randn(3, 11, 8, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, 37, (3, 11))
    targets[0, :4] = IGNORE_INDEX
    targets[2] = IGNORE_INDEX
    return head, hidden, targets


@pytest.mark.parametrize("chunk", [1, 5, 33, 1000])
def test_equals_the_plain_definition_with_all_gradients(chunk: int) -> None:
    head, hidden, targets = setup(torch.float64)
    total, count = token_loss_sum(head, hidden, targets, chunk)
    got = torch.autograd.grad(total, [hidden, head.weight])

    valid = targets != IGNORE_INDEX
    logp = head(hidden).log_softmax(-1)
    plain = -logp[valid].gather(-1, targets[valid][:, None]).sum()
    want = torch.autograd.grad(plain, [hidden, head.weight])
    assert int(count) == int(valid.sum()) == 18
    torch.testing.assert_close(total.double(), plain, rtol=1e-6, atol=0)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)


def test_bf16_logits_are_summed_in_fp32() -> None:
    head, hidden, targets = setup(torch.bfloat16)
    total, _ = token_loss_sum(head, hidden, targets, 5)
    assert total.dtype == torch.float32
    want = F.cross_entropy(head(hidden).float().flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(total, want)


def test_never_holds_all_logits() -> None:
    seen: list[int] = []
    weight = torch.randn(37, 8, requires_grad=True)

    def head(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden.shape[0])
        return hidden @ weight.T

    _, hidden, targets = setup(torch.float32)
    total, _ = token_loss_sum(head, hidden, targets, 10)
    total.backward()
    assert max(seen) == 10
    assert len(seen) == 8, "four chunks, each computed again in backward"


def test_nothing_valid_is_zero() -> None:
    head, hidden, targets = setup(torch.float32)
    total, count = token_loss_sum(head, hidden, torch.full_like(targets, IGNORE_INDEX), 10)
    assert (total.item(), count.item()) == (0.0, 0)


def test_chunk_tokens() -> None:
    assert chunk_tokens(32_000) == 2097
    assert chunk_tokens(1 << 40) == 1

"""Cross-entropy of a linear head without ever holding all of its logits."""

from __future__ import annotations

import torch

from samba_lm.errors import UserError
from samba_lm.ops.backend import Backend, choose
from samba_lm.ops.linear_cross_entropy.cpu import chunked_loss_sum
from samba_lm.ops.linear_cross_entropy.reference import loss_sum
from samba_lm.ops.shapes import require, require_type

BACKENDS = ("reference", "cpu", "triton")


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int = -100,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Sum of the token losses -log softmax(hidden W^T)[target], in nats.

    Args:
        hidden: [..., D]. weight: [V, D], of any dtype: it is cast to hidden's where it is used, and its gradient comes
            back in its own.
        targets: int64 [...], 0 .. V - 1. ``ignore_index``: a token that adds nothing to the loss nor the gradients.
        backend: see ``samba_lm.ops.backend``.

    Returns:
        A scalar: fp32, or fp64 for fp64 hidden. Differentiable once in hidden and weight. The logits, the softmax and
        all sums are fp32 at least. On a GPU a target outside the vocabulary makes the loss NaN.

    Raises:
        UserError: shapes, devices or dtypes that do not fit together.
    """
    if targets.shape != hidden.shape[:-1] or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise UserError(
            f"linear_cross_entropy: hidden {list(hidden.shape)} needs targets {list(hidden.shape[:-1])} and a weight "
            f"[V, {hidden.shape[-1]}], not {list(targets.shape)} and {list(weight.shape)}"
        )
    device = hidden.device
    require("linear_cross_entropy", device, weight=(weight, weight.shape), targets=(targets, targets.shape))
    require_type("linear_cross_entropy", "targets", targets, torch.int64)
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    chosen = choose(backend, BACKENDS, "linear_cross_entropy", hidden)
    if chosen == "triton":
        from samba_lm.ops.linear_cross_entropy import triton

        return triton.linear_cross_entropy(hidden, weight, targets, ignore_index)
    run = {"reference": loss_sum, "cpu": chunked_loss_sum}[chosen]
    return run(hidden, weight, targets, ignore_index)

"""Numerical truth: logits, loss and every gradient of the paper's reference code, for 16 architectures."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_files import ARCHS, GOLDEN, MANIFEST, read, renamed

from samba_lm.checkpoint import build


def compare(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Run our model on the reference's weights; the largest differences of logits, loss and each gradient."""
    config, tensors, weights = read(name)
    expected_grads = renamed(tensors, "grad.", config)
    model = build(config, weights).to(dtype).requires_grad_()
    ids = tensors["input_ids"]
    logits, _ = model(ids)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert gradients.keys() == expected_grads.keys(), "every gradient is compared, and none is left over"
    differences = {}
    for key, expected in expected_grads.items():
        actual = gradients[key]
        assert actual is not None, f"{key} has no gradient"
        assert actual.shape == expected.shape
        assert torch.isfinite(actual).all(), f"{key} is not finite"
        largest = expected.abs().max().item()
        assert largest > 0, f"the reference's {key} is all zero: comparing it would prove nothing"
        differences[key] = (actual.double() - expected.double()).abs().max().item() / largest
    return {
        "config": config,
        "parameters": sum(p.numel() for p in model.parameters()),
        "logits": (logits.double() - tensors["logits"].double()).abs().max().item(),
        "loss": abs(loss.item() - tensors["loss"].item()),
        "gradients": differences,
    }


def test_all_sixteen_are_here_and_unchanged() -> None:
    assert len(ARCHS) == 16
    for name, arch in ARCHS.items():
        assert hashlib.sha256((GOLDEN / f"{name}.safetensors").read_bytes()).hexdigest() == arch["sha256"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ARCHS)
def test_logits_loss_and_every_gradient(name: str, dtype: torch.dtype) -> None:
    found = compare(name, dtype)
    tolerances = MANIFEST["tolerances"]
    # In fp64 only the oracle's own fp32 noise is left; the manifest says what that should reach.
    logits_bound = tolerances["logits_atol"] if dtype == torch.float32 else 1e-5
    grad_bound = tolerances["grad_rel_maxnorm"] if dtype == torch.float32 else 3e-5
    assert found["parameters"] == found["config"].parameters() == ARCHS[name]["n_parameters_unique"]
    # `not (a <= b)` would also be true for NaN; these comparisons are false for it, so NaN fails.
    assert found["logits"] <= logits_bound
    assert found["loss"] <= tolerances["loss_atol"]
    worst = max(found["gradients"], key=lambda key: found["gradients"][key])
    assert all(value <= grad_bound for value in found["gradients"].values()), (worst, found["gradients"][worst])


def test_the_check_can_fail() -> None:
    """One head's rows swapped, as a wrong unpacking of the fused projection would: far outside every tolerance."""
    config, tensors, weights = read("samba_gqa")
    key = "layers.2.mixer.qkv.weight"
    weights[key] = weights[key].roll(8, dims=0)
    logits, _ = build(config, weights)(tensors["input_ids"])
    assert (logits - tensors["logits"]).abs().max() > 100 * MANIFEST["tolerances"]["logits_atol"]

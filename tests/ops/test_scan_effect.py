"""What reading tokens does to a state, against the scan that starts from that state."""

from __future__ import annotations

import pytest
import torch
from kernels import DEVICE, needs_triton
from tolerances import assert_close

from samba_lm.ops.backend import Backend
from samba_lm.ops.selective_scan import effect, scan_effect, selective_scan


@pytest.mark.parametrize("bias", [True, False])
def test_final_and_kept_are_the_scans(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effect, "CHUNK_ELEMENTS", 40)  # several chunks
    torch.manual_seed(0)
    batch, length, E, N = 2, 11, 5, 4
    u, delta = torch.randn(2, batch, length, E, dtype=torch.float64)
    A, B = -torch.rand(E, N, dtype=torch.float64), torch.randn(batch, length, N, dtype=torch.float64)
    delta_bias = torch.randn(E, dtype=torch.float64) if bias else None
    state, weights = torch.randn(2, batch, E, N, dtype=torch.float64)
    given = [t for t in (u, delta, A, B, delta_bias) if t is not None]
    for t in given:
        t.requires_grad_()
    final, kept = scan_effect(u, delta, A, B, delta_bias)
    found = kept * state + final
    wanted = selective_scan(u, delta, A, B, B, delta_bias=delta_bias, state=state, backend="reference")[1]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(found, given, weights), torch.autograd.grad(wanted, given, weights), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


@needs_triton
@pytest.mark.parametrize("backend", ["triton", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_kernels_agree(backend: Backend) -> None:
    """They are asked for no outputs, skip or gate, and B is given twice; documents and padding as ever."""
    torch.manual_seed(0)
    batch, length, E, N = 2, 37, 6, 16
    u, delta = torch.randn(2, batch, length, E, device=DEVICE)
    A, B = -torch.rand(E, N, device=DEVICE), torch.randn(batch, length, N, device=DEVICE)
    bias = torch.randn(E, device=DEVICE)
    resets = torch.zeros(batch, length, dtype=torch.bool, device=DEVICE)
    resets[0, 12] = True
    lengths = torch.tensor([length, 20], device=DEVICE)
    results = []
    for chosen in ("reference", backend):
        given = [t.clone().requires_grad_() for t in (u, delta, A, B, bias)]
        final, kept = scan_effect(*given, resets=resets, lengths=lengths, backend=chosen)
        ((final + 0.3).square().sum() + (kept + 0.3).square().sum()).backward()
        results.append([final, kept, *(t.grad for t in given)])
    for i, (expected, actual) in enumerate(zip(*results, strict=True)):
        assert_close(actual, expected, f"result {i}")

"""One token of the selective scan, fused: equal to the step in PyTorch, which test_backends.py holds to the scan."""

from __future__ import annotations

import pytest
import torch
from kernels import DEVICE, needs_triton
from tolerances import assert_close

from samba_lm.ops.causal_conv1d import causal_conv1d_step
from samba_lm.ops.selective_scan import selective_scan_step

pytestmark = needs_triton
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Inputs = dict[str, torch.Tensor | None]


def inputs(B: int, E: int, N: int, dtype: torch.dtype) -> Inputs:
    """B, C and z are slices of wider rows, as in the model; the recurrence's own parameters and the state fp32."""
    r = torch.randn
    _, into, out = r(B, 3 + 2 * N).to(DEVICE, dtype).split((3, N, N), dim=-1)
    u, z = r(B, 2 * E).to(DEVICE, dtype).chunk(2, dim=-1)
    given = {"u": u, "delta": 4 * r(B, E).to(DEVICE, dtype), "A": -4 * torch.rand(E, N), "B": into, "C": out}
    given |= {"D": r(E), "z": z, "delta_bias": r(E) - 4, "state": r(B, E, N)}
    return {name: t.to(DEVICE) for name, t in given.items()}


def compare(given: Inputs, dtype: torch.dtype) -> None:
    before = given["state"].clone()
    y, state = selective_scan_step(**given, backend="triton")
    wide = {name: None if t is None else t.double() for name, t in given.items()}
    expected, after = selective_scan_step(**wide, backend="cpu")
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    assert_close(y, expected, "y", torch.float32 if dtype == torch.float32 else torch.bfloat16)
    assert_close(state, after, "state", torch.float32)
    assert torch.equal(given["state"], before)
    held = before.clone()
    again, moved = selective_scan_step(**{**given, "state": held}, in_place=True, backend="triton")
    assert moved is held
    assert torch.equal(moved, state)
    assert torch.equal(again, y)
    held = wide["state"].clone()
    again, moved = selective_scan_step(**{**wide, "state": held}, in_place=True, backend="cpu")
    assert moved is held
    assert torch.equal(moved, after)
    assert torch.equal(again, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "E", "N"), [(1, 1, 1), (2, 150, 16), (3, 70, 8), (1, 40, 32), (2, 20, 64), (1, 33, 12)])
def test_step(B: int, E: int, N: int, dtype: torch.dtype) -> None:
    compare(inputs(B, E, N, dtype), dtype)


def test_without_gate() -> None:
    compare({**inputs(2, 9, 4, torch.float32), "z": None}, torch.float32)


def test_steps_far_out() -> None:
    """softplus at both ends: steps of 1e-12 keep their relative accuracy, large ones neither overflow nor drift."""
    given = inputs(1, 64, 4, torch.float32)
    given["delta"] = torch.linspace(-27.0, 90.0, 64, device=DEVICE)[None]
    given["delta_bias"] = torch.zeros(64, device=DEVICE)
    given["A"] = torch.full((64, 4), -1e-3, device=DEVICE)
    given["u"] = torch.ones(1, 64, device=DEVICE)
    given["B"] = torch.ones(1, 4, device=DEVICE)
    given["state"] = torch.zeros(1, 64, 4, device=DEVICE)
    _, state = selective_scan_step(**given, backend="triton")
    expected = torch.nn.functional.softplus(given["delta"][0].double())[:, None].expand(64, 4)
    assert_close(state[0] / expected, torch.ones_like(expected), "relative", torch.float32)


def test_the_operators_keep_torchs_rules() -> None:
    import samba_lm.ops.causal_conv1d.triton_step
    import samba_lm.ops.selective_scan.triton_step  # noqa: F401 - both register operators

    given = inputs(2, 6, 4, torch.float32)
    order = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "state")
    torch.library.opcheck(torch.ops.samba_lm.selective_scan_step.default, tuple(given[name] for name in order))
    x, weight, bias, state = (torch.randn(s, device=DEVICE) for s in ((2, 5), (5, 4), (5,), (2, 3, 5)))
    torch.library.opcheck(torch.ops.samba_lm.causal_conv1d_step.default, (x, weight, bias, state))


@pytest.mark.gpu
def test_both_steps_in_a_cuda_graph() -> None:
    given = inputs(4, 512, 16, torch.bfloat16)
    weight, bias, conv = (torch.randn(s, device=DEVICE) for s in ((512, 4), (512,), (4, 3, 512)))
    conv = conv.to(torch.bfloat16)

    def token() -> list[torch.Tensor]:
        u, after = causal_conv1d_step(given["u"], weight, bias, conv, backend="triton")
        return [u, after, *selective_scan_step(**{**given, "u": u}, backend="triton")]

    token()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = token()
    given["u"].copy_(torch.randn(4, 512))
    graph.replay()
    for replayed, direct in zip(captured, token(), strict=True):
        assert torch.equal(replayed, direct)

"""The short convolution's kernels equal its definition: outputs, states, gradients, documents, padding, decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels import DEVICE, needs_triton
from tolerances import assert_close

from samba_lm.ops.causal_conv1d import causal_conv1d, causal_conv1d_step

pytestmark = needs_triton
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Inputs = dict[str, torch.Tensor]


def inputs(B: int, L: int, E: int, k: int) -> Inputs:
    r = torch.randn
    return {"x": r(B, L, 2 * E), "weight": r(E, k), "bias": r(E), "state": r(B, k - 1, E)}


def positions(B: int, L: int, start: int) -> torch.Tensor:
    """Documents of random lengths; the first goes on from the state, at position ``start``."""
    steps = torch.arange(L).expand(B, L)
    first = torch.where(torch.rand(B, L) < 0.15, steps, -1).cummax(1).values
    return torch.where(first >= 0, steps - first, steps + start)


def run(given: Inputs, backend: str, dtype: torch.dtype, fixed: Inputs) -> list[torch.Tensor]:
    """y, final state and all gradients, in ``dtype``; x is the first half of wider rows, as in the model."""
    leaves = {name: t.to(DEVICE, dtype).requires_grad_() for name, t in given.items()}
    half = leaves["x"].chunk(2, dim=-1)[0]
    there = {name: t.to(DEVICE) for name, t in fixed.items()}
    outs = causal_conv1d(**{**leaves, "x": half}, **there, backend=backend)
    generator = torch.Generator().manual_seed(3)
    total = 0.0
    for out in outs:
        total = total + (out * torch.randn(out.shape, generator=generator).to(DEVICE, out.dtype)).double().sum()
    return [*outs, *torch.autograd.grad(total, list(leaves.values()))]


def compare(given: Inputs, dtype: torch.dtype, fixed: Inputs | None = None) -> None:
    rounded = {name: t.to(dtype).float() for name, t in given.items()}
    expected = run(rounded, "reference", torch.float64, fixed or {})
    actual = run(rounded, "triton", dtype, fixed or {})
    tolerance = torch.float32 if dtype == torch.float32 else torch.bfloat16
    for name, a, e in zip(["y", "final", *given], actual, expected, strict=True):
        assert_close(a, e, name, tolerance, scale=5.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("B", "L", "E", "k"), [(2, 11, 5, 4), (1, 1, 33, 4), (2, 50, 40, 3), (1, 6, 8, 1), (2, 2, 7, 8), (1, 9, 130, 2)]
)
def test_every_gradient(B: int, L: int, E: int, k: int, dtype: torch.dtype) -> None:
    compare(inputs(B, L, E, k), dtype)


@pytest.mark.parametrize(("k", "start"), [(4, 0), (4, 2), (3, 900), (8, 5), (1, 3)])
def test_documents_and_padding(k: int, start: int) -> None:
    """Also rows whose padding begins in the state, inside a document and nowhere."""
    given, where = inputs(4, 19, 6, k), positions(4, 19, start)
    lengths = torch.tensor([0, 1, 10, 19])
    compare(given, torch.float32, {"positions": where})
    compare(given, torch.float32, {"positions": where, "lengths": lengths})


def test_padding() -> None:
    for dtype in DTYPES:
        compare(inputs(4, 6, 6, 4), dtype, {"lengths": torch.tensor([0, 1, 2, 6])})


def test_one_row_of_positions_serves_the_batch() -> None:
    compare(inputs(3, 20, 6, 4), torch.float32, {"positions": positions(1, 20, 1)})
    compare(inputs(3, 20, 6, 4), torch.float32, {"positions": positions(1, 20, 1), "lengths": torch.tensor([3, 0, 20])})


def test_without_bias_and_state() -> None:
    given = inputs(2, 9, 5, 4)
    compare({"x": given["x"], "weight": given["weight"]}, torch.float32)


def test_pieces_are_the_whole() -> None:
    """State in and out, across the seam of a segment; the gradient too flows through the state."""
    x = torch.randn(1, 50, 5, device=DEVICE, requires_grad=True)
    weight = torch.randn(5, 4, device=DEVICE)
    whole, end = causal_conv1d(x, weight, backend="reference")
    state, parts = None, []
    for piece in x.split((20, 1, 2, 27), dim=1):
        y, state = causal_conv1d(piece, weight, state=state, backend="triton")
        parts.append(y)
    assert_close(torch.cat(parts, 1), whole, "y")
    assert_close(state, end, "state")
    weights = torch.randn_like(whole)
    expected = torch.autograd.grad((whole * weights).sum(), x)[0]
    actual = torch.autograd.grad((torch.cat(parts, 1) * weights).sum(), x)[0]
    assert_close(actual, expected, "gradient", scale=5.0)


def test_no_tokens() -> None:
    state = torch.randn(2, 3, 5, device=DEVICE, requires_grad=True)
    x, weight = torch.randn(2, 0, 5, device=DEVICE, requires_grad=True), torch.randn(5, 4, device=DEVICE)
    y, final = causal_conv1d(x, weight, state=state, backend="triton")
    assert y.shape == x.shape
    assert torch.equal(final, state)
    final.sum().backward()
    assert torch.equal(state.grad, torch.ones_like(state))


def test_the_operators_keep_torchs_rules() -> None:
    """Schema, fake tensors, autograd registration, ahead-of-time tracing with shapes left open."""
    import samba_lm.ops.causal_conv1d.triton  # noqa: F401 - registers the operators

    i = {name: t.to(DEVICE).requires_grad_() for name, t in inputs(2, 7, 5, 4).items()}
    half = i["x"].detach().chunk(2, dim=-1)[0].requires_grad_()
    lengths = torch.tensor([3, 7], device=DEVICE)
    where = positions(2, 7, 1).to(DEVICE)
    operator = torch.ops.samba_lm.causal_conv1d.default
    torch.library.opcheck(operator, (half, i["weight"], i["bias"], i["state"], where, lengths))
    torch.library.opcheck(operator, (half, i["weight"], None, None, None, None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_step(k: int, dtype: torch.dtype) -> None:
    """One token out of wider rows; the given state stays."""
    i = {name: t.to(DEVICE, dtype) for name, t in inputs(3, 1, 150, k).items()}
    x, before = i["x"][:, 0].chunk(2, dim=-1)[0], i["state"].clone()
    fixed = (i["weight"], i["bias"], i["state"])
    y, state = causal_conv1d_step(x, *fixed, backend="triton")
    expected, after = causal_conv1d_step(x.double(), *(t.double() for t in fixed), backend="cpu")
    assert_close(y, expected, "y", torch.float32 if dtype == torch.float32 else torch.bfloat16)
    assert torch.equal(state, after.to(dtype))
    assert torch.equal(i["state"], before)
    for backend in ("triton", "cpu"):
        given = before.clone()
        again, held = causal_conv1d_step(x, *fixed[:2], given, in_place=True, backend=backend)
        assert held is given
        assert torch.equal(held, state)
        assert_close(again, y.double(), f"y in place, {backend}", torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "L", "E"), [(2, 4096, 3072), (1, 5000, 1000), (3, 777, 257)])
def test_large(B: int, L: int, E: int, dtype: torch.dtype) -> None:
    compare(inputs(B, L, E, 4), dtype, {"positions": positions(B, L, 2), "lengths": torch.randint(0, L, (B,))})


@pytest.mark.gpu
def test_past_two_to_the_31_elements() -> None:
    """The last rows of 524,288 x 4104 in one sequence: read, written and differentiated at the right place."""
    x = torch.randn(1, 524288, 4104, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(4104, 4, device=DEVICE)
    y, state = causal_conv1d(x, weight, backend="triton")
    last, after = causal_conv1d(x[:, -9:].detach(), weight, backend="cpu")
    assert torch.equal(state, after)
    assert_close(y[:, -6:], last[:, -6:], "y", torch.bfloat16)
    (y[:, -1].sum() * 2).backward()
    assert x.grad is not None
    assert (x.grad[:, -4:] != 0).float().mean() > 0.9
    assert not x.grad[:, :-4].any()


@pytest.mark.gpu
def test_the_same_call_gives_the_same_bits() -> None:
    given = inputs(4, 2000, 1024, 4)
    first, second = (run(given, "triton", torch.bfloat16, {}) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_compiled_whole() -> None:
    """fullgraph, and no new compilation for another length once lengths are dynamic."""

    def f(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, state: torch.Tensor) -> Any:
        return causal_conv1d(x.chunk(2, dim=-1)[0], weight, bias, state=state)

    compiled = torch.compile(f, fullgraph=True, dynamic=True)
    for L in (64, 100, 333):
        given = {name: t.to(DEVICE).requires_grad_() for name, t in inputs(2, L, 64, 4).items()}
        results = []
        for call in (f, compiled):
            y, state = call(**given)
            results.append([y, state, *torch.autograd.grad((y * y).sum() + state.sum(), list(given.values()))])
        for a, e in zip(results[1], results[0], strict=True):
            assert_close(a, e, f"L={L}")

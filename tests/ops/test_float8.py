"""Float8 products: the casts' kernels against their definition in PyTorch, and the maps against fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernels import DEVICE, needs_triton
from torch._dynamo.testing import CompileCounterWithBackend

from samba_lm.errors import UserError
from samba_lm.ops.backend import Backend
from samba_lm.ops.linear import float8 as L
from samba_lm.ops.linear.float8 import float8_linear, float8_linear_halves, float8_weight
from samba_lm.ops.swiglu import float8 as S
from samba_lm.ops.swiglu.float8 import float8_swiglu_mlp

COMPILER = "inductor" if DEVICE == "cuda" else "aot_eager"
WEIGHT_STEP, GRADIENT_STEP = 2.0**-3, 2.0**-2
"""Between neighbours of e4m3 and e5m2, relative to the smaller of them."""


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, spread: float = 1.0) -> torch.Tensor:
    """Rows of different sizes, as of gradients and activations."""
    rows = (spread * torch.randn(*shape[:-1], 1, device=DEVICE)).exp()
    return (torch.randn(shape, device=DEVICE) * rows).to(dtype)


def off(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over the norm of what is expected."""
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_neighbours(actual: torch.Tensor, expected: torch.Tensor, step: float) -> None:
    """Float8 numbers that are equal but for few that another rounding of the scale has moved by one step."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    a, b = actual.float(), expected.float()
    if DEVICE == "cpu":  # Triton's interpreter loses some of the numbers below the normal ones
        least = torch.finfo(actual.dtype).smallest_normal
        a, b = (torch.where((a.abs() < least) | (b.abs() < least), 0.0, t) for t in (a, b))
    assert ((a - b).abs() <= step * torch.minimum(a.abs(), b.abs())).all()
    assert (a != b).float().mean() < 0.02


ROWS = [1, 37, 64]


@needs_triton
@pytest.mark.parametrize("rows", ROWS)
def test_cast_of_rows(rows: int) -> None:
    x = random(rows, 160)
    x[rows // 2] = 0
    for given in (x, torch.cat((x, x), dim=1)[:, :160], x.t().contiguous().t()):
        (q, qt, scale), expected = L.cast_rows(given, True), L.cast_rows(x, False)
        assert_neighbours(q, expected[0], WEIGHT_STEP)
        assert_neighbours(qt, expected[1], WEIGHT_STEP)
        torch.testing.assert_close(scale, expected[2], rtol=1e-6, atol=0)
        assert torch.equal(qt[:, :rows].view(torch.uint8), q.view(torch.uint8).t())
        assert not qt[:, rows:].float().any()
        assert qt.shape[1] % 16 == 0


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cast_of_a_weight(dtype: torch.dtype) -> None:
    weight = random(48, 272, dtype=dtype)
    (q, qt, scale), expected = float8_weight(weight, backend="triton"), float8_weight(weight, backend="reference")
    assert_neighbours(q, expected.q, WEIGHT_STEP)
    assert torch.equal(qt.view(torch.uint8), q.view(torch.uint8).t())
    torch.testing.assert_close(scale, expected.scale, rtol=1e-6, atol=0)
    assert q.float().abs().max() == 448


@needs_triton
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("widths", [(48,), (272, 272), (1200,)], ids=str)
def test_cast_of_gradients(rows: int, widths: tuple[int, ...]) -> None:
    parts, weight = [random(rows, n, spread=2.0) for n in widths], random(rows, 1).abs().float().flatten()
    given = [torch.cat((part, part), dim=1)[:, : part.shape[1]] for part in parts]
    (q, qt, scale), expected = L.cast_gradient(given, weight, True), L.cast_gradient(parts, weight, False)
    assert_neighbours(q, expected[0], GRADIENT_STEP)
    assert_neighbours(qt, expected[1], GRADIENT_STEP)
    torch.testing.assert_close(scale, expected[2], rtol=1e-6, atol=0)


@needs_triton
@pytest.mark.parametrize("rows", ROWS)
def test_casts_of_swiglu(rows: int) -> None:
    both, dact = random(rows, 2 * 176).clamp(-30, 30), random(rows, 176)
    weight = random(rows, 1).abs().float().flatten()
    (act, act_scale), (plain, plain_scale) = S.cast_activations(both, True), S.cast_activations(both, False)
    assert_neighbours(act, plain, WEIGHT_STEP)
    torch.testing.assert_close(act_scale, plain_scale, rtol=1e-5, atol=0)
    actual, expected = (S.cast_gradients(both, dact, weight, act_scale, kernels) for kernels in (True, False))
    for a, b, step in zip(actual[:2], expected[:2], (GRADIENT_STEP, GRADIENT_STEP), strict=True):
        assert_neighbours(a, b, step)
    torch.testing.assert_close(actual[2], expected[2], rtol=1e-5, atol=0)
    assert_neighbours(actual[3], expected[3], WEIGHT_STEP)


def mlp(x: torch.Tensor, w12: torch.Tensor, w3: torch.Tensor) -> torch.Tensor:
    gate, up = F.linear(x, w12).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, w3)


def halves(x: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
    first, second = float8_linear_halves(x, weight, **options)
    return torch.cat((first, -second), dim=-1)


def exact_halves(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    first, second = F.linear(x, weight).chunk(2, dim=-1)
    return torch.cat((first, -second), dim=-1)


CASES: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor], list[tuple[int, int]]]] = {
    "linear": (float8_linear, F.linear, [(96, 160)]),
    "halves": (halves, exact_halves, [(96, 160)]),
    "mlp": (float8_swiglu_mlp, mlp, [(352, 160), (96, 176)]),
}
BACKENDS = ["reference", pytest.param("triton", marks=needs_triton)]


def compare(name: str, rows: tuple[int, ...], sizes: list[tuple[int, int]], backend: str, dtype: torch.dtype) -> None:
    """Value and gradients against fp64: off by no more than what rounding to three and two bits explains."""
    op, exact, _ = CASES[name]
    x = random(*rows, sizes[0][1]).to(dtype)
    weights = [torch.randn(size, device=DEVICE) / size[1] ** 0.5 for size in sizes]
    results, pull = [], None
    for wide in (True, False):
        given = [(t.double() if wide else t).clone().requires_grad_() for t in (x, *weights)]
        y = exact(*given) if wide else op(*given, backend=backend)
        if pull is None:
            pull = random(*y.shape).to(dtype)
        results.append([y, *torch.autograd.grad(y, given, pull.to(y.dtype))])
    for what, a, b, t in zip(("y", "dx", "dW", "dW3"), results[1], results[0], (x, x, *weights), strict=False):
        assert a.dtype == t.dtype
        found = off(a, b)
        assert 0.005 < found < (0.05 if what == "y" and name != "mlp" else 0.11), f"{what}: {found:.3f}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rows", [(2, 19), (64,)], ids=str)
def test_against_fp64(name: str, rows: tuple[int, ...], backend: str) -> None:
    compare(name, rows, CASES[name][2], backend, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rows", [(2, 1024), (3, 517)], ids=str)
def test_large(name: str, rows: tuple[int, ...]) -> None:
    sizes = {"linear": [(1536, 3072)], "halves": [(6144, 1536)], "mlp": [(8192, 1536), (1536, 4096)]}[name]
    compare(name, rows, sizes, "triton", torch.bfloat16)


def test_rows_of_zeros_and_one_large_row() -> None:
    x = torch.zeros(32, 64, device=DEVICE, dtype=torch.bfloat16)
    x[3] = 1e4 * torch.randn(64)
    x[5] = 1e-4 * torch.randn(64)
    weight = torch.eye(64, device=DEVICE)
    y = float8_linear(x, weight)
    assert off(y[3], x[3]) < 0.04
    assert off(y[5], x[5]) < 0.04
    assert not y[0].any()


def test_one_large_gradient_is_cut_off_and_spoils_no_other() -> None:
    x, weight = random(64, 1024).requires_grad_(), torch.eye(1024, device=DEVICE)
    pull = torch.ones_like(x)
    pull[1, 900] = 1e6  # in no piece that is looked at
    (dx,) = torch.autograd.grad(float8_linear(x, weight), x, pull)
    assert torch.isfinite(dx).all()
    assert (dx[2:] == 1).all()
    assert dx[1, 900] >= 100


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    x, weight = random(16, 64).requires_grad_(), torch.randn(32, 64, device=DEVICE, requires_grad=True)
    spoiled = x.detach().clone()
    spoiled[3, 5] = bad
    backend: Backend = "auto" if DEVICE == "cuda" else "reference"
    assert not float8_linear(spoiled, weight, backend=backend)[3].isfinite().all()
    y = float8_linear(x, weight, backend=backend)
    pull = torch.ones_like(y)
    pull[3, 5] = bad
    for gradient in torch.autograd.grad(y, (x, weight), pull):
        assert not gradient.isfinite().all()


def test_only_float8_numbers_and_scales_are_kept() -> None:
    x, weight = random(32, 64).requires_grad_(), torch.randn(48, 64, device=DEVICE, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        float8_linear(x, weight)
    assert sum(t.nbytes for t in saved) == 32 * 64 + 32 * 4 + 48 * 64 + 48 * 4


def test_a_known_cast_changes_nothing() -> None:
    x, weight = random(32, 64), torch.randn(48, 64, device=DEVICE)
    assert torch.equal(float8_linear(x, weight), float8_linear(x, weight, float8_weight(weight)))


def test_sizes_that_no_product_takes() -> None:
    with pytest.raises(UserError, match="multiples of 16, and these are \\[40, 64\\]"):
        float8_linear(random(4, 64), torch.randn(40, 64, device=DEVICE))
    with pytest.raises(UserError, match="each half of \\[48, 64\\]"):
        float8_linear_halves(random(4, 64), torch.randn(48, 64, device=DEVICE))
    assert L.pays(1536, 1536)
    assert not L.pays(3072, 128)
    assert not L.pays(2000, 2040)


@needs_triton
def test_operators_keep_their_registrations() -> None:
    x, weight = random(20, 64), torch.randn(64, 64, device=DEVICE)
    cast = float8_weight(weight)
    tests = ("test_faketensor", "test_autograd_registration")  # float8 tensors cannot be compared by test_schema
    for kernels in (False, True):
        torch.library.opcheck(L._cast_weight, (weight, kernels), test_utils=tests)
        for half in (False, True):
            torch.library.opcheck(L._linear, (x.requires_grad_(), weight, *cast, half, kernels), test_utils=tests)
        _, _, qt, scale = L._linear(x.detach(), weight, *cast, False, kernels)
        given = (random(20, 64), random(20, 0), qt, scale, cast.qt, cast.scale, True, kernels)
        torch.library.opcheck(L._linear_backward, given, test_utils=tests)
        w12, w3 = torch.randn(96, 64, device=DEVICE) / 64, torch.randn(32, 48, device=DEVICE)
        casts = (*float8_weight(w12), *float8_weight(w3))
        torch.library.opcheck(S._mlp, (x, w12, w3, *casts, kernels), test_utils=tests)
        _, *kept = S._mlp(x.detach(), w12, w3, *casts, kernels)
        given = (random(20, 32), *kept, casts[1], casts[2], casts[4], casts[5], True, False, kernels)
        torch.library.opcheck(S._mlp_backward, given, test_utils=tests)


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_one_graph_for_all_lengths(name: str) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend(COMPILER)
    op, _, sizes = CASES[name]
    weights = [torch.randn(size, device=DEVICE, requires_grad=True) for size in sizes]

    def block(x: torch.Tensor) -> torch.Tensor:
        return op(x, *weights, backend="triton" if DEVICE == "cuda" else "reference") + 1

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    for length in (64, 77, 200):
        x = random(2, length, sizes[0][1]).requires_grad_()
        y, expected = compiled(x), block(x)
        assert torch.equal(y, expected)
        given = (x, *weights)
        for a, b in zip(torch.autograd.grad(y.sum(), given), torch.autograd.grad(expected.sum(), given), strict=True):
            assert off(a, b) < 1e-3
    assert counter.frame_count == 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_the_same_call_gives_the_same_bits(name: str) -> None:
    op, _, sizes = CASES[name]
    given = [random(2, 700, sizes[0][1]), *(torch.randn(size, device=DEVICE) for size in sizes)]
    given = [t.requires_grad_() for t in given]
    runs = []
    for _ in range(3):
        y = op(*given)
        runs.append([y, *torch.autograd.grad(y.float().square().sum(), given)])
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, runs[0], strict=True))

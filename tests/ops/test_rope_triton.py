"""The kernel that splits and rotates q, k and v, and its transpose, against the definition in fp64."""

from __future__ import annotations

import pytest
import torch
from kernels import DEVICE, needs_triton
from tolerances import assert_close
from torch._dynamo.testing import CompileCounterWithBackend

from samba_lm.ops.rope import rope_angles, rotate_split

pytestmark = needs_triton
COMPILER = "inductor" if DEVICE == "cuda" else "aot_eager"
LOW = [torch.bfloat16, torch.float16, torch.float32]
NAMES = ["q", "k", "v", "gradient of qkv"]


def angles(batch: int, length: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    positions = torch.arange(length, device=DEVICE) + 1000 * torch.arange(batch, device=DEVICE)[:, None]
    cos, sin = rope_angles(positions, width, 10_000.0)
    return cos[:, :, None], sin[:, :, None]


def compare(
    batch: int, length: int, heads: int, groups: int, width: int, dtype: torch.dtype, rotated: bool, rows: int
) -> None:
    """``rows``: of the angles, 1 where all of the batch share them."""
    qkv = torch.randn(batch, length, (heads + 2 * groups) * width, device=DEVICE).to(dtype)
    cos, sin = angles(rows, length, width) if rotated else (None, None)
    pull = [torch.randn(batch, length, n, width, device=DEVICE).to(dtype) for n in (heads, groups, groups)]
    results = []
    for backend, wide in (("reference", torch.float64), ("triton", dtype)):
        given = qkv.to(wide).requires_grad_()
        outs = rotate_split(given, cos, sin, heads, groups, backend=backend)
        results.append([*outs, *torch.autograd.grad(outs, given, [p.to(wide) for p in pull])])
    for name, actual, expected in zip(NAMES, results[1], results[0], strict=True):
        assert actual.dtype == dtype
        assert actual.is_contiguous()
        assert_close(actual, expected, name, dtype)
        if not rotated:
            assert torch.equal(actual.double(), expected)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize(
    ("batch", "length", "heads", "groups", "width", "rows"),
    [(1, 1, 1, 1, 2, 1), (2, 7, 3, 1, 16, 2), (2, 5, 4, 2, 24, 1), (1, 19, 2, 2, 96, 1), (1, 3, 5, 5, 256, 1)],
)
def test_rotate_split(
    batch: int, length: int, heads: int, groups: int, width: int, rows: int, rotated: bool, dtype: torch.dtype
) -> None:
    compare(batch, length, heads, groups, width, dtype, rotated, rows)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize(
    ("batch", "length", "heads", "groups", "width", "rows"),
    [(2, 1031, 12, 12, 128, 2), (3, 517, 32, 4, 64, 1), (1, 4099, 10, 5, 80, 1), (2, 300, 7, 1, 192, 2)],
)
def test_large(
    batch: int, length: int, heads: int, groups: int, width: int, rows: int, rotated: bool, dtype: torch.dtype
) -> None:
    compare(batch, length, heads, groups, width, dtype, rotated, rows)


def test_angles_in_fp32_are_the_same_angles() -> None:
    qkv, (cos, sin) = torch.randn(2, 9, 64, device=DEVICE), angles(1, 9, 16)
    wide = rotate_split(qkv, cos, sin, 2, 1, backend="triton")
    narrow = rotate_split(qkv, cos.float(), sin.float(), 2, 1, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(wide, narrow, strict=True))


def test_strided_inputs_and_gradients() -> None:
    cos, sin = angles(1, 3, 8)
    base = torch.randn(2, 6, 50, device=DEVICE, requires_grad=True)
    for view in (base[:, :3, 5:37], base[:, ::2, 5:37], base[:, :3, :32].flip(-1)[..., ::1]):
        results = []
        for backend in ("reference", "triton"):
            q, k, v = rotate_split(view, cos, sin, 2, 1, backend=backend)
            loss = (q.transpose(1, 2) * 2).sin().sum() + (k * v).sum()
            results.append([q, k, v, *torch.autograd.grad(loss, base, retain_graph=True)])
        for name, actual, expected in zip(NAMES, results[1], results[0], strict=True):
            assert_close(actual, expected, name, torch.float32)


def test_operators_keep_their_registrations() -> None:
    from samba_lm.ops.rope import triton

    qkv, (cos, sin) = torch.randn(2, 5, 64, device=DEVICE, requires_grad=True), angles(1, 5, 16)
    torch.library.opcheck(triton._rotate_split, (qkv, cos, sin, 2, 1))
    torch.library.opcheck(triton._rotate_split, (qkv, None, None, 2, 1))


def test_one_graph_for_all_lengths() -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend(COMPILER)

    def block(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        q, k, v = rotate_split(qkv + 1, cos, sin, 4, 2, backend="triton")
        return q + (k + v).repeat_interleave(2, dim=2)

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    for length in (64, 77, 200):
        qkv = torch.randn(2, length, 512, device=DEVICE, requires_grad=True)
        cos, sin = angles(2, length, 64)
        y, expected = compiled(qkv, cos, sin), block(qkv, cos, sin)
        assert_close(y.detach(), expected.detach(), "y")
        pull = torch.randn_like(y)
        (actual,), (plain,) = torch.autograd.grad(y, qkv, pull), torch.autograd.grad(expected, qkv, pull)
        assert_close(actual, plain, "gradient")
    assert counter.frame_count == 1

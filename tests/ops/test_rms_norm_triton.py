"""The fused addition and RMSNorm against its definition in fp64: outputs, every gradient, and what is kept."""

from __future__ import annotations

import pytest
import torch
from kernels import DEVICE, needs_triton
from tolerances import TOLERANCE, assert_close
from torch._dynamo.testing import CompileCounterWithBackend

from samba_lm.errors import UserError
from samba_lm.ops.rms_norm import add_rms_norm, rms_norm

pytestmark = needs_triton
COMPILER = "inductor" if DEVICE == "cuda" else "aot_eager"
LOW = [torch.bfloat16, torch.float16, torch.float32]
NAMES = ["total", "normed", "gradient of x", "gradient of weight", "gradient of branch"]


def compare(
    shape: tuple[int, ...], dtype: torch.dtype, *, x_dtype: torch.dtype = torch.float32, branch: bool = True
) -> None:
    """``add_rms_norm`` by kernel against its definition on the same rounded numbers in fp64."""
    x, weight = (3 * torch.randn(shape, device=DEVICE)).to(x_dtype), torch.randn(shape[-1], device=DEVICE)
    inputs = [x, weight, torch.randn(shape, device=DEVICE).to(dtype)][: 3 if branch else 2]
    pull = [torch.randn(shape, device=DEVICE), torch.randn(shape, device=DEVICE).to(dtype)]
    results = []
    for backend in ("reference", "triton"):
        given = [(t.double() if backend == "reference" else t.clone()).requires_grad_() for t in inputs]
        x, weight = given[:2]
        out_dtype = torch.float64 if backend == "reference" else dtype
        outs = add_rms_norm(x, given[2] if branch else None, weight, 1e-5, out_dtype, backend=backend)
        loss = sum((o.double() * p.double()).sum() for o, p in zip(outs, pull, strict=True))
        results.append([*outs, *torch.autograd.grad(loss, given)])
    for name, actual, expected in zip(NAMES, results[1], results[0], strict=False):
        coarsest = x_dtype if name == "total" else max(dtype, x_dtype, key=lambda d: TOLERANCE[d])
        assert_close(actual, expected, name, coarsest, scale=3.0 if "gradient" in name else 1.0)
    assert [t.dtype for t in results[1]] == [x_dtype, dtype, x_dtype, torch.float32, dtype][: len(results[1])]


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 24), (7, 96), (3, 3, 1536), (300, 8)])
def test_add_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    compare(shape, dtype)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_a_branch(x_dtype: torch.dtype, dtype: torch.dtype) -> None:
    compare((2, 9, 40), dtype, x_dtype=x_dtype, branch=False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("shape", [(4099, 1536), (2, 1031, 2304), (517, 8192), (3, 4096), (70_001, 64)])
def test_large(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    compare(shape, dtype)


@pytest.mark.gpu
def test_more_elements_than_32_bits_count() -> None:
    x = torch.randn(1_100_000, 2048, device=DEVICE, dtype=torch.bfloat16)
    y = rms_norm(x, torch.ones(2048, device=DEVICE), 1e-5, backend="triton")
    expected = rms_norm(x[-3:], torch.ones(2048, device=DEVICE), 1e-5, backend="reference")
    assert_close(y[-3:], expected, "the last rows")


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_rms_norm_keeps_its_inputs_dtype(dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 5, 32, device=DEVICE).to(dtype), torch.randn(32, device=DEVICE)
    y = rms_norm(x, weight, 1e-5, backend="triton")
    assert y.dtype == dtype
    assert_close(y, rms_norm(x.double(), weight, 1e-5), "y", dtype)


@pytest.mark.parametrize("used", [0, 1])
def test_either_output_alone_has_gradients(used: int) -> None:
    grads = []
    for backend in ("reference", "triton"):
        torch.manual_seed(1)
        given = [torch.randn(s, device=DEVICE, requires_grad=True) for s in ((2, 3, 16), (2, 3, 16), (16,))]
        out = add_rms_norm(*given, 1e-5, torch.float32, backend=backend)[used]
        grads.append(torch.autograd.grad((out * out.detach().cos()).sum(), given, allow_unused=True))
    for actual, expected in zip(grads[1], grads[0], strict=True):
        assert (actual is None) == (expected is None)
        if expected is not None and actual is not None:
            assert_close(actual, expected, "gradient", torch.float32, scale=3.0)


def test_strided_inputs() -> None:
    x, branch = torch.randn(4, 6, 40, device=DEVICE)[:, ::2, 3:27], torch.randn(4, 3, 48, device=DEVICE)[..., 24:]
    weight = torch.randn(24, device=DEVICE)
    for mine, plain in zip(
        add_rms_norm(x, branch, weight, 1e-5, torch.float32, backend="triton"),
        add_rms_norm(x, branch, weight, 1e-5, torch.float32, backend="reference"),
        strict=True,
    ):
        assert_close(mine, plain, "strided", torch.float32)


def test_what_is_kept_for_backward() -> None:
    """In bf16 training total / rms in 16 bits, not the fp32 total; without gradients nothing."""
    saved: list[torch.Tensor] = []
    x, branch = torch.randn(2, 3, 64, device=DEVICE), torch.randn(2, 3, 64, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.ones(64, device=DEVICE, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        add_rms_norm(x, branch, weight, 1e-5, torch.bfloat16, backend="triton")
        assert {t.dtype for t in saved if t.numel() == x.numel()} == {torch.bfloat16}
        saved.clear()
        with torch.no_grad():
            normed = add_rms_norm(x, branch, weight, 1e-5, torch.bfloat16, backend="triton")[1]
    assert not saved
    assert not normed.requires_grad


def test_auto_leaves_fp64_to_pytorch_and_triton_refuses_it() -> None:
    x, weight = torch.randn(2, 8, device=DEVICE, dtype=torch.float64), torch.ones(8, device=DEVICE)
    assert rms_norm(x, weight).dtype == torch.float64
    with pytest.raises(UserError, match="fp32"):
        rms_norm(x, weight, backend="triton")


def test_operators_keep_their_registrations() -> None:
    from samba_lm.ops.rms_norm import triton

    x, branch = torch.randn(2, 3, 24, device=DEVICE), torch.randn(2, 3, 24, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(24, device=DEVICE, requires_grad=True)
    torch.library.opcheck(triton._rms_norm, (x, weight, 1e-5, torch.bfloat16, True))
    torch.library.opcheck(triton._add_rms_norm, (x, branch, weight, 1e-5, torch.bfloat16, True))
    torch.library.opcheck(triton._add_rms_norm, (x, branch, weight.detach(), 1e-5, torch.float32, False))


@pytest.mark.gpu
def test_same_bits_every_time() -> None:
    given = [torch.randn(s, device=DEVICE, requires_grad=True) for s in ((5000, 1536), (5000, 1536), (1536,))]

    def run() -> list[torch.Tensor]:
        outs = add_rms_norm(*given, 1e-5, torch.bfloat16)
        return [*outs, *torch.autograd.grad(sum(o.double().sum() for o in outs), given)]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


def test_one_graph_for_all_lengths() -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend(COMPILER)
    weight = torch.randn(256, device=DEVICE, requires_grad=True)

    def block(x: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        total, normed = add_rms_norm(x, branch, weight, 1e-5, torch.bfloat16, backend="triton")
        return total + normed

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    for length in (64, 77, 200):
        x = torch.randn(2, length, 256, device=DEVICE, requires_grad=True)
        branch = torch.randn(2, length, 256, device=DEVICE).bfloat16()
        y = compiled(x, branch)
        assert_close(y.detach(), block(x, branch).detach(), "y", torch.bfloat16)
        y.sum().backward()
    assert counter.frame_count == 1

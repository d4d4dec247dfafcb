"""Quantised weights: how near they are to what they stand for, and every kernel against the definition in fp64."""

from __future__ import annotations

import pytest
import torch
from kernels import DEVICE, needs_triton

from samba_lm.errors import UserError
from samba_lm.ops.quantized_linear import dequantize, pack_for_cpu, quantize, quantized_linear
from samba_lm.ops.quantized_linear.reference import GROUP, Kind, unpack

KINDS: list[Kind] = ["int8", "int4"]
LOW = [torch.bfloat16, torch.float32]
SHAPES = [(48, 128), (33, 200), (16, 368), (20, 24), (336, 64)]
"""N, K; the CPU's int4 kernel wants N in sixteens, int4 fills K up to 128."""


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def weight(N: int, K: int) -> torch.Tensor:
    """Rows of very different sizes, as trained weights have them."""
    return torch.randn(N, K, device=DEVICE) * torch.logspace(-3, 1, N, device=DEVICE)[:, None]


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_off_by_half_a_step_at_most(shape: tuple[int, int]) -> None:
    w = weight(*shape)
    numbers, scale = quantize(w, "int8")
    off = (dequantize(numbers, scale, shape[1], torch.float64) - w.double()).abs().amax(1)
    assert (off <= 0.505 * w.abs().amax(1) / 127 * (1 + 2**-7) + w.abs().amax(1) * 2**-8).all()
    assert error(dequantize(numbers, scale, shape[1], torch.float32), w) < 0.01


@pytest.mark.parametrize("shape", SHAPES)
def test_int4_numbers_stand_where_they_belong(shape: tuple[int, int]) -> None:
    """Every input has its own number, and groups their own scales: a permuted weight would be far off."""
    w = weight(*shape) * torch.logspace(-1, 0, shape[1], device=DEVICE)
    numbers, scale = quantize(w, "int4")
    made = dequantize(numbers, scale, shape[1], torch.float64)
    assert numbers.shape == (shape[0], scale.shape[1] * GROUP // 2)
    assert error(made, w) < 0.16
    group = torch.nn.functional.pad(w.double() - made, (0, -shape[1] % GROUP)).view(shape[0], -1, GROUP)
    whole = torch.nn.functional.pad(w.double(), (0, -shape[1] % GROUP)).view(shape[0], -1, GROUP)
    assert (group.norm(dim=-1) < 0.25 * whole.norm(dim=-1)).all()


def test_int4_takes_a_better_scale_than_the_largest_number_asks_for() -> None:
    w = torch.randn(256, 128, device=DEVICE)
    plain = w.view(256, 2, GROUP).abs().amax(-1, keepdim=True) / 7.5
    naive = ((w.view(256, 2, GROUP) / plain).round().clamp(-8, 7) * plain).view(256, 128)
    numbers, scale = quantize(w, "int4")
    assert error(dequantize(numbers, scale, 128, torch.float32), w) < error(naive, w) - 0.002


@pytest.mark.parametrize("kind", KINDS)
def test_scales_are_numbers_of_bf16_and_zeros_stay_zeros(kind: Kind) -> None:
    w = weight(16, 128)
    w[3] = 0
    numbers, scale = quantize(w, kind)
    assert scale.dtype == torch.float32
    assert torch.equal(scale.bfloat16().float(), scale)
    assert (dequantize(numbers, scale, 128, torch.float32)[3] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_is_not_finite_is_not_made_finite(kind: Kind) -> None:
    w = weight(16, 128)
    w[2, 5], w[9, 100] = float("nan"), float("inf")
    made = dequantize(*quantize(w, kind), 128, torch.float32)
    assert made[2].isnan().any()
    assert not made[9].isfinite().all()


def test_unpack_undoes_the_packing() -> None:
    w = torch.randint(-8, 8, (16, 256)).float()
    w[:, ::GROUP] = -8  # so that the scale of every group is one that these numbers are multiples of
    numbers, scale = quantize(w, "int4")
    made = unpack(numbers).view(16, -1, GROUP) * scale[..., None]
    assert error(made.view(16, 256), w) < 0.08


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 16, 33])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=needs_triton)])
def test_every_kernel_computes_what_the_definition_does(
    backend: str, kind: Kind, shape: tuple[int, int], rows: int, dtype: torch.dtype
) -> None:
    N, K = shape
    numbers, scale = quantize(weight(N, K), kind)
    x = torch.randn(rows, K, device=DEVICE).to(dtype)
    expected = quantized_linear(x.double(), numbers, scale, backend="reference")
    actual = quantized_linear(x, numbers, scale, pack_for_cpu(numbers, scale), backend=backend)  # type: ignore[arg-type]
    assert actual.dtype == dtype
    assert error(actual, expected) < 6e-3
    without = quantized_linear(x, numbers, scale, backend=backend)  # type: ignore[arg-type]
    assert error(without, expected) < 6e-3


@needs_triton
@pytest.mark.parametrize("rows", [64, 65])
@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_on_triton(kind: Kind, rows: int) -> None:
    numbers, scale = quantize(weight(40, 136), kind)
    x = torch.randn(rows, 136, device=DEVICE)
    expected = quantized_linear(x.double(), numbers, scale, backend="reference")
    bound = 6e-3 if rows == 64 else 1e-5 if DEVICE == "cpu" else 2e-3
    assert error(quantized_linear(x, numbers, scale, backend="triton"), expected) < bound


@needs_triton
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_shared_among_programs(kind: Kind) -> None:
    """The last share is shorter than the others; the sum of two rows is that of each alone, to the last bit."""
    from samba_lm.ops.quantized_linear.triton import TILE, shares

    numbers, scale = quantize(weight(40, 1100), kind)
    parts, share = shares(40, 1100, *TILE[numbers.dtype])
    assert parts > 2
    assert 1100 % share
    x = torch.randn(2, 1100, device=DEVICE)
    y = quantized_linear(x, numbers, scale, backend="triton")
    assert error(y, quantized_linear(x.double(), numbers, scale, backend="reference")) < 6e-3
    assert torch.equal(y[1:], quantized_linear(x[1:], numbers, scale, backend="triton"))


@pytest.mark.parametrize("kind", KINDS)
def test_leading_dimensions_and_fp64(kind: Kind) -> None:
    numbers, scale = quantize(weight(16, 128), kind)
    x = torch.randn(2, 3, 128, device=DEVICE, dtype=torch.float64)
    y = quantized_linear(x, numbers, scale)
    assert y.shape == (2, 3, 16)
    assert y.dtype == torch.float64
    assert error(y[1, 2], quantized_linear(x[1, 2:3], numbers, scale, backend="reference")[0]) < 1e-12


def test_what_does_not_fit_is_refused() -> None:
    numbers, scale = quantize(weight(16, 128), "int4")
    x = torch.randn(2, 128, device=DEVICE)
    with pytest.raises(UserError, match="cannot be trained"):
        quantized_linear(x.requires_grad_(), numbers, scale)
    x = x.detach()
    with pytest.raises(UserError, match="scale"):
        quantized_linear(x, numbers, scale[:, :1])
    with pytest.raises(UserError, match="weight"):
        quantized_linear(x, numbers[:, :32], scale)
    with pytest.raises(UserError, match=r"float32"):
        quantized_linear(x, numbers.float(), scale)

"""The scan's Triton kernels against the definition in fp64: outputs, states and every gradient, at odd sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels import DEVICE, needs_triton
from tolerances import assert_close

from samba_lm.errors import UserError
from samba_lm.ops.selective_scan import selective_scan

pytestmark = needs_triton

Inputs = dict[str, torch.Tensor]


def scan_inputs(B: int, L: int, E: int, N: int) -> Inputs:
    r = torch.randn
    return {
        "u": r(B, L, E),
        "delta": r(B, L, E) * 2 - 2,
        "A": -torch.rand(E, N) * 4,
        "B": r(B, L, N),
        "C": r(B, L, N),
        "D": r(E),
        "z": r(B, L, E),
        "delta_bias": r(E),
        "state": r(B, E, N),
    }


PARAMETERS = ("A", "D", "delta_bias", "state")


def run(inputs: Inputs, backend: Any, dtype: torch.dtype, **fixed: Any) -> dict[str, torch.Tensor]:
    """Outputs and gradients; parameters stay fp32 (fp64 for the reference) beside activations in ``dtype``."""
    wide = torch.float64 if backend == "reference" else torch.float32
    given = {}
    for name, t in inputs.items():
        rounded = t if name in PARAMETERS else t.to(dtype)
        own = wide if name in PARAMETERS or backend == "reference" else dtype
        given[name] = rounded.to(DEVICE, own).requires_grad_()
    fixed = {k: v.to(DEVICE) for k, v in fixed.items()}
    y, state = selective_scan(**given, **fixed, backend=backend)
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(o.shape, generator=generator).to(dtype).to(DEVICE, o.dtype) for o in (y, state)]
    grads = torch.autograd.grad((y * weights[0]).sum() + (state * weights[1]).sum(), list(given.values()))
    return {"y": y, "state": state} | {f"gradient of {k}": g for k, g in zip(given, grads, strict=True)}


def compare(inputs: Inputs, dtype: torch.dtype, **fixed: Any) -> None:
    expected = run(inputs, "reference", dtype, **fixed)
    for name, actual in run(inputs, "triton", dtype, **fixed).items():
        assert_close(actual, expected[name], name, dtype, scale=5.0 if "gradient" in name else 1.0)


@pytest.mark.parametrize(
    ("B", "L", "E", "N"), [(1, 1, 5, 16), (2, 37, 72, 16), (1, 21, 130, 8), (1, 19, 33, 32), (2, 9, 17, 64)]
)
def test_odd_sizes(B: int, L: int, E: int, N: int) -> None:
    compare(scan_inputs(B, L, E, N), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves(dtype: torch.dtype) -> None:
    compare(scan_inputs(2, 21, 24, 16), dtype)


def test_resets_and_padding() -> None:
    resets = torch.rand(3, 40) < 0.15
    resets[1, -1] = True
    compare(scan_inputs(3, 40, 20, 16), torch.float32, resets=resets, lengths=torch.tensor([40, 0, 23]))


@pytest.mark.parametrize("missing", ["D", "z", "delta_bias"])
def test_without(missing: str) -> None:
    inputs = scan_inputs(1, 10, 20, 16)
    del inputs[missing]
    compare(inputs, torch.float32)


def test_resets_and_lengths_may_be_views() -> None:
    inputs = {k: t.to(DEVICE) for k, t in scan_inputs(3, 20, 16, 16).items()}
    resets = (torch.rand(3, 40, device=DEVICE) < 0.3)[:, 5:25]
    lengths = torch.tensor([20, 0, 7], device=DEVICE)
    spread = lengths.repeat_interleave(2)[::2]
    assert not resets.is_contiguous()
    assert not spread.is_contiguous()
    expected = selective_scan(**inputs, resets=resets.clone(), lengths=lengths, backend="triton")
    actual = selective_scan(**inputs, resets=resets, lengths=spread, backend="triton")
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize(("B", "L"), [(0, 3), (2, 0)])
def test_nothing_to_read(B: int, L: int) -> None:
    inputs = {k: t.to(DEVICE) for k, t in scan_inputs(B, L, 16, 16).items()}
    y, state = selective_scan(**inputs, backend="triton")
    assert y.shape == (B, L, 16)
    assert torch.equal(state, inputs["state"])


def test_segments_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long row is cut: resets inside, at and beside the cuts, and padding that leaves whole segments empty."""
    from samba_lm.ops.selective_scan import triton

    monkeypatch.setattr(triton, "segments_of", lambda batch, length, channels: (32, -(-length // 32)))
    resets = torch.zeros(2, 70, dtype=torch.bool)
    resets[0, 32] = resets[0, 63] = resets[1, 5] = True
    compare(scan_inputs(2, 70, 20, 16), torch.float32)
    compare(scan_inputs(2, 70, 20, 16), torch.float32, resets=resets, lengths=torch.tensor([70, 20]))


def test_the_number_of_segments() -> None:
    from samba_lm.ops.selective_scan.triton import TILE, segments_of

    for batch, length, channels in [(8, 4096, 3072), (1, 131072, 4096), (1, 4096, 4096), (1, 1, 64), (1, 17, 8)]:
        span, number = segments_of(batch, length, channels)
        assert span % TILE == 0
        assert (number - 1) * span < length <= number * span
    assert segments_of(8, 4096, 3072)[1] == 1
    assert segments_of(1, 131072, 4096)[1] == 6


def test_strided_inputs() -> None:
    """Halves and slices of wider projections, as the model gives them."""
    inputs = scan_inputs(2, 12, 24, 16)
    wide = torch.cat((inputs["u"], inputs["z"]), dim=-1)
    low = torch.cat((torch.randn(2, 12, 3), inputs["B"], inputs["C"]), dim=-1)
    views = dict(zip("uz", wide.to(DEVICE).chunk(2, dim=-1), strict=True))
    views |= dict(zip("BC", low.to(DEVICE)[..., 3:].chunk(2, dim=-1), strict=True))
    given = {k: t.to(DEVICE) for k, t in inputs.items()}
    expected, _ = selective_scan(**given, backend="triton")
    actual, _ = selective_scan(**{**given, **views}, backend="triton")
    assert torch.equal(actual, expected)


def test_no_gradients_keep_nothing() -> None:
    inputs = {k: t.to(DEVICE) for k, t in scan_inputs(1, 33, 16, 16).items()}
    y, state = selective_scan(**inputs, backend="triton")
    assert y.grad_fn is None
    assert state.grad_fn is None


def test_small_steps_keep_their_digits() -> None:
    """delta of -12 gives steps of 6e-6: their relative error must be fp32's."""
    inputs = scan_inputs(1, 40, 16, 16)
    inputs["delta"] = torch.full_like(inputs["delta"], -12.0)
    inputs["delta_bias"].zero_()
    inputs["state"].zero_()
    expected = run(inputs, "reference", torch.float32)["state"]
    actual = run(inputs, "triton", torch.float32)["state"]
    assert_close(actual, expected, "state", torch.float32, scale=0.2)


def test_fp64_in_part_is_not_rounded() -> None:
    inputs = {k: t.to(DEVICE) for k, t in scan_inputs(1, 5, 16, 16).items()}
    inputs["A"] = inputs["A"].double()
    assert selective_scan(**inputs)[1].dtype == torch.float64
    with pytest.raises(UserError, match="computes in fp32, and an input is fp64"):
        selective_scan(**inputs, backend="triton")

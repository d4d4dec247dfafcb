"""How close is equal: the one place, by dtype. `assert_close` counts NaN and a wrong shape as failures."""

from __future__ import annotations

import torch

# (relative to the largest magnitude of the expected tensor, floor)
TOLERANCE = {
    torch.float64: (1e-10, 1e-12),
    torch.float32: (2e-5, 2e-6),
    torch.float16: (4e-3, 2e-4),
    torch.bfloat16: (3e-2, 1e-3),
}


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, what: str, dtype: torch.dtype | None = None, scale: float = 1.0
) -> None:
    """max |actual - expected| <= relative * max |expected| + floor, at the tolerance of ``dtype``."""
    relative, floor = TOLERANCE[dtype or expected.dtype]
    assert actual.shape == expected.shape, f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    if expected.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    worst = (actual.double() - expected.double()).abs().max().item()
    bound = scale * (relative * expected.double().abs().max().item() + floor)
    assert worst <= bound, f"{what}: off by {worst:.3g}, allowed {bound:.3g}"

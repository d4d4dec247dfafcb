"""Parity: two ways that must agree are compared before either is timed."""

from __future__ import annotations

from collections.abc import Mapping

import torch

BOUNDS = {torch.float32: 2e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Largest difference from fp64 that rounding explains, relative to the tensor's largest magnitude, by input dtype."""


class ParityError(RuntimeError):
    """Two ways that must agree do not: a speed would mean nothing."""


def largest_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference relative to the largest magnitude; NaN if anything is."""
    if actual.shape != expected.shape:
        raise ParityError(f"shape {list(actual.shape)}, expected {list(expected.shape)}")
    expected = expected.double()
    off = (actual.double() - expected).abs().max()
    return (off / expected.abs().max().clamp(min=torch.finfo(torch.float64).tiny)).item()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference relative to the norm of what is expected; NaN if anything is."""
    expected = expected.double()
    norm = expected.norm().clamp(min=torch.finfo(torch.float64).tiny)
    return ((actual.double() - expected).norm() / norm).item()


def require_close(actual: torch.Tensor, expected: torch.Tensor, bound: float, what: str) -> float:
    """The largest difference relative to the largest magnitude. Raises ParityError above ``bound`` or for NaN."""
    off = largest_difference(actual, expected)
    if not off <= bound:
        raise ParityError(f"{what}: off by {off:.2e} of the largest magnitude, allowed {bound:.0e}")
    return off


def require_noise(
    actual: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    plain: Mapping[str, torch.Tensor],
    factor: float = 3.0,
    floor: float = 1e-2,
) -> dict[str, tuple[float, float]]:
    """Relative errors by name of ``actual`` and of ``plain``, which is the same computed plainly in the same dtype.

    ``plain`` shows what rounding alone does. Raises ParityError where ``actual`` errs more than ``factor`` times as
    much and more than ``floor``.
    """
    if actual.keys() != expected.keys():
        raise ParityError(f"only one of the two has {', '.join(sorted(actual.keys() ^ expected.keys()))}")
    errors = {}
    for name, reference in expected.items():
        ours, noise = (relative_error(side[name].to(reference.device), reference) for side in (actual, plain))
        if not ours <= max(factor * noise, floor):
            raise ParityError(f"{name}: relative error {ours:.2e}, where rounding alone makes {noise:.2e}")
        errors[name] = ours, noise
    return errors

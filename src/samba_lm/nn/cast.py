"""Parameters in the dtype that the layers compute in, cast where they are used or once for several micro-batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

T = TypeVar("T")
_open: dict[tuple[int, object], Any] | None = None


def cast(parameter: nn.Parameter, dtype: torch.dtype) -> torch.Tensor:
    """``parameter`` in ``dtype``; gradients go to the parameter, in its own dtype."""
    if parameter.dtype == dtype or not torch.is_grad_enabled():
        return parameter.to(dtype)
    return _once(parameter, dtype, lambda: parameter.to(dtype))


def made_once(parameter: nn.Parameter, make: Callable[[nn.Parameter], T]) -> T:
    """``make(parameter)``, some form of it that gets no gradient, at most once while :func:`cast_once` is open."""
    return _once(parameter, make, lambda: make(parameter))


def _once(parameter: nn.Parameter, form: object, make: Callable[[], T]) -> T:
    if _open is None or torch.compiler.is_compiling():
        return make()
    key = id(parameter), form
    if key not in _open:
        _open[key] = make()
    return _open[key]


@contextlib.contextmanager
def cast_once() -> Iterator[None]:
    """While this is open every parameter is cast at most once; nothing may change one meanwhile.

    For the micro-batches of a step: a cast reads and writes 6 bytes a parameter.
    """
    global _open
    before, _open = _open, {}
    try:
        yield
    finally:
        _open = before

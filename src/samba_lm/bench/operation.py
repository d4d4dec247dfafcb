"""What an operation's benchmark is made of, and the two things done with it: comparing it with fp64, calling it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samba_lm.bench.parity import BOUNDS, ParityError, largest_difference, relative_error

Inputs = dict[str, Any]
"""By the public function's argument names: tensors, and None or numbers for its options."""
Outputs = dict[str, Tensor]
Run = Callable[[Inputs], Outputs]


@dataclass(frozen=True)
class Work:
    """What a call must do at least: bytes of its inputs read and outputs written once, and its arithmetic."""

    moved: int
    flops: int


@dataclass(frozen=True)
class Case:
    """A shape to time. ``work`` by direction: "forward" (with the graph for backward, where that is timed too),
    "inference" (without), "backward" (alone), "both" (forward and backward, where they cannot be told apart)."""

    shape: str
    make: Callable[[torch.device], Inputs]
    work: Mapping[str, Work]


@dataclass(frozen=True)
class Operation:
    """An operation of ``samba_lm.ops``: how it is called, what defines it, and its shapes."""

    name: str
    run: Run
    reference: Run
    """The definition; it is given fp64."""
    gradients: tuple[str, ...]
    """Inputs whose gradients are compared and timed."""
    driven: tuple[str, ...]
    """Outputs that a gradient arrives at in training; parity drives all."""
    small: Callable[[torch.device, torch.dtype], dict[str, Inputs]]
    """Odd small inputs by what they exercise; "plain" is what peers can do as well."""
    cases: tuple[Case, ...]
    matmul: bool = False
    """Whether its FLOPs are those of matrix products."""
    worth: Callable[[], bool] = lambda: True
    """Whether this machine can run anything worth timing."""
    unworthy: str = ""
    """Why not."""


@dataclass(frozen=True)
class Implementation:
    """One way to do an operation: ours or a peer's."""

    run: Run
    """From inputs in its own layout to the outputs it has."""
    channels_first: frozenset[str] = frozenset()
    """Inputs and outputs that it holds as [B, C, L], contiguous, where ours are [B, L, C]."""

    def prepare(self, inputs: Inputs) -> Inputs:
        """The inputs in its layout."""
        return {
            name: value.transpose(1, 2).contiguous() if name in self.channels_first else value
            for name, value in inputs.items()
        }

    def restore(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of its own in our layout."""
        return tensor.transpose(1, 2) if name in self.channels_first else tensor


def compare(operation: Operation, by: Implementation, inputs: Inputs) -> dict[str, tuple[float, float]]:
    """Errors against fp64: (largest, relative to the largest magnitude; relative in norm) by tensor.

    Outputs, states and gradients, whatever ``by`` gives of them; every output gets a random gradient. Raises
    ParityError where it gives something of another shape, or nothing to compare.
    """
    leaves = _leaves(by.prepare(inputs), operation.gradients)
    made = {name: by.restore(name, tensor) for name, tensor in by.run(leaves).items()}
    wide = _leaves({name: _wide(value) for name, value in inputs.items()}, operation.gradients)
    expected = operation.reference(wide)
    arriving = {name: torch.randn_like(made[name]) for name in expected if name in made}
    if not arriving:
        raise ParityError("nothing to compare")
    theirs = {
        name: None if gradient is None else by.restore(name, gradient)
        for name, gradient in _gradients(made, leaves, operation.gradients, arriving).items()
    }
    right = _gradients(expected, wide, operation.gradients, arriving)
    errors = {name: _errors(name, made[name], expected[name]) for name in arriving}
    for name, gradient in right.items():
        found = theirs[name]
        if gradient is not None:
            if found is None:
                raise ParityError(f"no gradient of {name}")
            errors[f"gradient of {name}"] = _errors(f"gradient of {name}", found, gradient)
    return errors


def bound(dtype: torch.dtype) -> float:
    """The largest difference allowed for inputs of that dtype."""
    return BOUNDS[dtype]


def caller(operation: Operation, run: Run, inputs: Inputs, direction: str) -> Callable[[], object]:
    """A call to time. For "backward" the graph is made here and kept; the call is autograd.grad alone."""
    if direction == "inference":
        return torch.no_grad()(lambda: run(inputs))
    leaves = _leaves(inputs, operation.gradients)
    if direction == "forward":
        return lambda: run(leaves)
    wanted = [leaves[name] for name in operation.gradients if isinstance(leaves.get(name), Tensor)]

    def graph() -> list[Tensor]:
        outputs = run(leaves)
        return [outputs[name] for name in operation.driven if name in outputs]

    if direction == "backward":
        return _backward(graph(), wanted)
    with torch.no_grad():
        arriving = [torch.randn_like(output) for output in graph()]
    return lambda: torch.autograd.grad(graph(), wanted, arriving, allow_unused=True)


def _backward(outputs: list[Tensor], wanted: list[Tensor]) -> Callable[[], object]:
    arriving = [torch.randn_like(output) for output in outputs]
    return lambda: torch.autograd.grad(outputs, wanted, arriving, retain_graph=True, allow_unused=True)


def _errors(name: str, actual: Tensor, expected: Tensor) -> tuple[float, float]:
    try:
        return largest_difference(actual, expected), relative_error(actual, expected)
    except ParityError as error:
        raise ParityError(f"{name}: {error}") from None


def _wide(value: object) -> object:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _leaves(inputs: Inputs, gradients: tuple[str, ...]) -> Inputs:
    return {
        name: value.detach().requires_grad_() if name in gradients and isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }


def _gradients(
    outputs: Outputs, leaves: Inputs, names: tuple[str, ...], cotangents: Outputs
) -> dict[str, Tensor | None]:
    names = tuple(name for name in names if isinstance(leaves.get(name), Tensor))
    driven = [name for name in cotangents if outputs[name].requires_grad]
    given = torch.autograd.grad(
        [outputs[name] for name in driven],
        [leaves[name] for name in names],
        [cotangents[name].to(outputs[name].dtype) for name in driven],
        allow_unused=True,
    )
    return dict(zip(names, given, strict=True))

"""Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685): a linear map W is kept and W + (alpha / r) B A is trained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from samba_lm.errors import UserError
from samba_lm.nn.cast import cast
from samba_lm.nn.linear import Linear
from samba_lm.ops.linear import linear
from samba_lm.ops.swiglu import swiglu_linear

NEVER = ("dt_proj",)
"""Not adapted: Mamba's step, whose time scales follow from it (and which backward may make again from its weight)."""
LEFT = ("x_proj", "gate_down")
"""Adapted only where they are named: thin maps, most of whose numbers an adapter would have too."""


@dataclass(frozen=True)
class LoraSettings:
    """What is adapted, and how strongly.

    Attributes:
        rank: r, rows of A and columns of B.
        alpha: what the adapter is added with: alpha / r, or with ``rslora`` alpha / sqrt(r) (arXiv 2312.03732).
        targets: last names of the linear maps; none: all large ones.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ()
    rslora: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoraLinear(Linear):
    """A linear map whose weight (and bias) is frozen, with an adapter beside it: y = x W^T + b + s (x A^T) B^T.

    The names of the map's own tensors stay. ``lora_A`` [r, n_in], ``lora_B`` [n_out, r], of the weight's dtype.
    """

    def __init__(self, base: Linear, settings: LoraSettings) -> None:
        """Of a linear map, whose tensors it takes over; the adapter is uninitialised."""
        nn.Module.__init__(self)
        n_out, n_in = base.weight.shape
        self.settings = settings
        self.weight, self.bias = base.weight, base.bias
        self.lora_A = nn.Parameter(base.weight.new_empty(settings.rank, n_in))
        self.lora_B = nn.Parameter(base.weight.new_empty(n_out, settings.rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + linear(self._low(x), cast(self.lora_B, x.dtype))

    def halves(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = super().halves(x)
        low, B = self._low(x), cast(self.lora_B, x.dtype)
        upper, lower = B.chunk(2)
        return first + linear(low, upper), second + linear(low, lower)

    def of_swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        # As the map itself does: on a GPU what lies between is made again in backward and not kept for A either.
        low = self.settings.scale * swiglu_linear(gate_up, cast(self.lora_A, gate_up.dtype))
        return super().of_swiglu(gate_up) + linear(low, cast(self.lora_B, gate_up.dtype))

    def _low(self, x: torch.Tensor) -> torch.Tensor:
        return self.settings.scale * linear(x, cast(self.lora_A, x.dtype))

    @torch.no_grad()
    def reset_adapter(self, generator: torch.Generator) -> None:
        """A uniform in +-1/sqrt(n_in), as a linear map of these inputs begins; B zero: at first nothing changes."""
        drawn = torch.empty(self.lora_A.shape).uniform_(-1, 1, generator=generator)
        self.lora_A.copy_(drawn * self.lora_A.shape[1] ** -0.5)
        self.lora_B.zero_()

    @torch.no_grad()
    def folded(self) -> Linear:
        """The map that computes the same, without an adapter."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        change = self.lora_B.to(wide) @ self.lora_A.to(wide)
        weight = (self.weight.to(wide) + self.settings.scale * change).to(self.weight.dtype)
        plain = Linear.__new__(Linear)
        nn.Module.__init__(plain)
        plain.weight, plain.bias = nn.Parameter(weight), self.bias
        return plain


def attach(model: nn.Module, settings: LoraSettings) -> None:
    """Put adapters, uninitialised, on the linear maps that ``settings`` names, and freeze all else. In place.

    Raises UserError for a name that no linear map of the model has, or that is never adapted.
    """
    found: dict[str, list[tuple[nn.Module, str, Linear]]] = {}
    for parent in model.modules():
        for name, module in parent.named_children():
            if isinstance(module, Linear):
                found.setdefault(name, []).append((parent, name, module))
    known = sorted(found.keys() - set(NEVER))
    for name in settings.targets:
        if name not in known:
            why = "is never adapted" if name in NEVER else "is no linear map of this model"
            raise UserError(f"lora.targets: {name!r} {why}: it has {', '.join(known)}.")
    targets = settings.targets or [name for name in known if name not in LEFT]
    model.requires_grad_(False)
    for name in targets:
        for parent, own, module in found[name]:
            setattr(parent, own, LoraLinear(module, settings))


def reset_adapters(model: nn.Module, seed: int) -> None:
    """Initialise all adapters; the same seed gives the same ones."""
    generator = torch.Generator().manual_seed(seed)
    for _, module in adapters(model):
        module.reset_adapter(generator)


def adapters(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """The adapted maps of a model, by name."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def settings_of(model: nn.Module) -> LoraSettings | None:
    """What a model's adapters were made with; None: it has none."""
    return next((module.settings for _, module in adapters(model)), None)


def fold(model: nn.Module) -> None:
    """Add the adapters to the weights, in place; all parameters can be trained again."""
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, LoraLinear):
                setattr(parent, name, module.folded())
    model.requires_grad_(True)

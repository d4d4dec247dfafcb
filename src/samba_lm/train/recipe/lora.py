"""[lora]: training small adapters in place of all weights."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from samba_lm.train.recipe.section import Section


class LoraSection(Section):
    """Train low-rank adapters beside the linear maps of model.init_from, all of whose weights stay as they are."""

    rank: int = Field(default=0, ge=0)
    """Columns and rows of the adapters' two matrices, such as 16; 0: no adapters, all weights are trained."""
    alpha: float = Field(default=32.0, gt=0, allow_inf_nan=False)
    """Adapters are added times alpha / rank."""
    targets: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Which linear maps have one, by name (in_proj, out_proj, qkv, w12, w3, ...); none: all large ones."""
    rslora: bool = False
    """Add them times alpha / sqrt(rank) instead, which keeps large ranks as strong as small ones."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.rank and (self.targets or self.rslora):
            raise ValueError("targets and rslora are of adapters, and rank = 0 makes none: give a rank, such as 16")
        return self

"""[parallel]: how the processes of a run share its work."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from samba_lm.train.recipe.section import Section


class ParallelSection(Section):
    """How the processes that torchrun started share the work; one process has all of it.

    Their number is replicate x shard x context.
    """

    replicate: int = Field(default=1, ge=1)
    """Groups of processes that each hold the whole model and read other rows (HSDP)."""
    shard: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Processes that a model is shared out among, and that read other rows (FSDP2); auto: all that are left."""
    context: int = Field(default=1, ge=1)
    """Processes that each row is shared out among, for rows too long for one."""
    timeout: float = Field(default=600.0, gt=0, allow_inf_nan=False)
    """Seconds that processes wait for one that does not answer before the run ends."""

"""How GPUs share a run: the three sizes of a recipe's [parallel], with numbers for all of them."""

from __future__ import annotations

from dataclasses import dataclass

from samba_lm.errors import UserError
from samba_lm.train.recipe import ParallelSection, TrainSection

NODE = 8
"""GPUs of one machine."""


@dataclass(frozen=True)
class Layout:
    """replicate x shard x context GPUs."""

    replicate: int = 1
    shard: int = 1
    context: int = 1

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.replicate * self.shard * self.context

    @property
    def holders(self) -> int:
        """GPUs that one copy of the model is shared out among."""
        return self.shard * self.context

    @property
    def readers(self) -> int:
        """Parts that a batch's rows are read in."""
        return self.replicate * self.shard

    def options(self) -> str:
        """As options of `samba-lm train`; nothing where the defaults do it."""
        words = [f"--parallel.replicate {self.replicate}"] if self.replicate > 1 else []
        return " ".join(words + ([f"--parallel.context {self.context}"] if self.context > 1 else []))


def arrange(section: ParallelSection, gpus: int) -> Layout:
    """The layout of ``gpus`` processes as the recipe says it. Raises UserError where the sizes do not fit them."""
    others = section.replicate * section.context
    shard = max(1, gpus // others) if section.shard == "auto" else section.shard
    if others * shard != gpus:
        raise UserError(
            f"[parallel] replicate {section.replicate} x shard {section.shard} x context {section.context} does not "
            f"make {gpus} GPUs: change it, or --gpus."
        )
    return Layout(section.replicate, shard, section.context)


def check(train: TrainSection, layout: Layout) -> None:
    """Raise UserError where a batch's rows, or a row's tokens, are not divided by the GPUs that share them."""
    if train.batch_size % layout.readers:
        raise UserError(
            f"train.batch_size = {train.batch_size} is not a multiple of the {layout.readers} GPUs that read rows: "
            "change it, --gpus, or --parallel.context."
        )
    if train.length % layout.context:
        raise UserError(
            f"train.length = {train.length} is not a multiple of parallel.context = {layout.context}: change either."
        )


def suggested(gpus: int, context: int) -> tuple[Layout, ...]:
    """Layouts of ``gpus`` in the order to try them: sharded within a machine and replicated between them, which sends
    the least over the network; then sharded over all."""
    within = min(gpus, NODE)
    found = []
    if gpus % within == 0 and within % context == 0 and gpus > within:
        found.append(Layout(gpus // within, within // context, context))
    if gpus % context == 0:
        found.append(Layout(1, gpus // context, context))
    return tuple(found)

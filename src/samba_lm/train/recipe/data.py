"""[data]: what it is trained on."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from samba_lm.train.recipe.section import PathText, Section


class RecallSection(Section):
    """Rows that are made as they are needed, each with one thing to find again; only the answer counts."""

    lengths: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False)] = ()
    """Tokens of a row, one length after the other, each dividing train.length; none: train.length, always. Batches of
    shorter rows have more of them, and as many tokens."""
    shares: Annotated[tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], Field(strict=False)] = ()
    """Share of the steps for each of the lengths; none: equal ones."""
    lm_weight: float = Field(default=0.0, ge=0, le=1)
    """Weight of the other tokens' loss beside the answers': for each token of an answer so many others count too."""
    stretch: float = Field(default=1.0, ge=1, le=1e6)
    """Train for texts up to so many times as long as the rows: in each step Mamba's states forget faster by a factor
    drawn between 1 and this one."""
    share: float = Field(default=1.0, gt=0, le=1)
    """Share of the steps that such rows are made for; the others read data.train."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.shares and len(self.shares) != len(self.lengths):
            raise ValueError(f"there are {len(self.lengths)} lengths but {len(self.shares)} shares: give one for each")
        return self


class PasskeySection(RecallSection):
    """A five-digit key in much that does not matter."""

    filler: PathText | None = None
    """Text file whose sentences hide the key, which is harder; none: the few sentences of the well-known form."""


class PhonebookSection(RecallSection):
    """One number of a phonebook."""

    names: Annotated[tuple[PathText, ...], Field(strict=False)] = ()
    """Files with a name a line: one of whole names, or one of first and one of last names; none: faker's."""


class DataSection(Section):
    """What it is trained on."""

    train: PathText = "data/train"
    """Folder of token shards that `samba-lm data prepare` wrote; not read where all rows are made (passkey, ...)."""
    val: PathText | None = None
    """Folder of token shards to measure the validation loss on; none: no validation."""
    documents: bool = False
    """Reset attention and state at document boundaries instead of reading over them (the paper reads over them)."""
    tokenizer: PathText | None = None
    """Where rows are made: byte, or a tokenizer.json or its folder; none: that of data.train, if that is read too, or
    of model.init_from."""
    passkey: PasskeySection | None = None
    """Train on passkey texts instead of shards, or now and then."""
    phonebook: PhonebookSection | None = None
    """Train on phonebook texts instead of shards, or now and then."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.passkey is not None and self.phonebook is not None:
            raise ValueError("passkey and phonebook are both given: keep one")
        if not self.reads_shards and self.val is not None:
            raise ValueError(
                f"val = {self.val!r} is given, but made rows have no validation: leave it out, and measure with "
                "`samba-lm eval passkey` or `eval phonebook`"
            )
        return self

    @property
    def recall(self) -> PasskeySection | PhonebookSection | None:
        """What rows are made of; none: all are read from shards."""
        return self.passkey or self.phonebook

    @property
    def reads_shards(self) -> bool:
        """Whether data.train is read at all."""
        return self.recall is None or self.recall.share < 1

"""[model]: what is trained."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from samba_lm import zoo
from samba_lm.config import ModelConfig
from samba_lm.train.recipe.section import PathText, Section

VOCAB_MULTIPLE = 64
"""An "auto" vocabulary is rounded up to this: matrix units like it, and the unused rows cost next to nothing."""


class ModelSection(Section):
    """What is trained."""

    name: str = "samba-tiny"
    """Architecture from the zoo (`samba-lm models` lists them)."""
    vocab_size: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Rows of the embedding; auto: the data's vocabulary, rounded up to a multiple of 64."""
    overrides: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Other fields of the model config to replace, such as norm_eps or tie_embeddings."""
    slow_channels: float = Field(default=0.0, ge=0, le=1)
    """Share of a new model's Mamba channels whose step begins at 1e-6 to 1e-3 instead of 1e-3 to 1e-1: they hold what
    they have read for far longer than a training row."""
    init_from: PathText | None = None
    """Checkpoint folder to fine-tune: architecture and weights come from it, name and vocab_size are not used."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("slow_channels", "overrides"):
            if self.init_from is not None and getattr(self, name):
                raise ValueError(
                    f"{name} is of new models, and init_from = {self.init_from!r} brings one that is made: leave "
                    "either out"
                )
        return self

    def config(self, data_vocab: int) -> ModelConfig:
        """The config of a new model for data of ``data_vocab`` tokens. Raises UserError for unknown names."""
        if self.vocab_size == "auto":
            vocab = -(-data_vocab // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        else:
            vocab = self.vocab_size
        return zoo.get(self.name).with_overrides(**{"vocab_size": vocab, **self.overrides})

"""From a recipe's [lora] to a model that trains adapters alone."""

from __future__ import annotations

from pathlib import Path

from samba_lm.convert.peft import save_adapter
from samba_lm.model import SambaLM
from samba_lm.nn.lora import LoraSettings, attach, reset_adapters
from samba_lm.tokenizer import Tokenizer
from samba_lm.train.recipe import Recipe

FOLDER = "adapter"
"""In a run's folder: its adapters in peft's format, as the run ended."""


def adapt(model: SambaLM, recipe: Recipe) -> None:
    """Put the recipe's adapters, new ones, on the model, in place; nothing where it has none.

    Raises UserError for targets that the model does not have.
    """
    section = recipe.lora
    if section.rank:
        attach(model, LoraSettings(section.rank, section.alpha, section.targets, section.rslora))
        reset_adapters(model, recipe.train.seed)


def export_adapters(model: SambaLM, recipe: Recipe, tokenizer: Tokenizer) -> Path | None:
    """Write the adapters of a run that trained some beside its checkpoints; None for the others."""
    if not recipe.lora.rank:
        return None
    folder = Path(recipe.train.out) / FOLDER
    save_adapter(model, folder, recipe.model.init_from, tokenizer)
    return folder

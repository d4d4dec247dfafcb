"""What a run reads: its recipe's data, opened and checked."""

from __future__ import annotations

from dataclasses import dataclass

from samba_lm.data.interleaved import Interleaved
from samba_lm.data.loader import Batches, Loader
from samba_lm.data.shards import TokenDataset
from samba_lm.errors import UserError
from samba_lm.tokenizer import Tokenizer
from samba_lm.train.recall import recall_loader
from samba_lm.train.recipe import Recipe
from samba_lm.train.validation import ValidationWindows


@dataclass(frozen=True)
class Data:
    """What a run reads."""

    loader: Batches
    tokenizer: Tokenizer
    val: ValidationWindows | None
    fingerprint: str
    """sha256 of the training data's description."""


def open_data(recipe: Recipe) -> Data:
    """Open and check the recipe's data. Raises UserError when it is missing, damaged, too short or mixed up."""
    settings, section = recipe.train, recipe.data
    if not section.reads_shards:
        made = recall_loader(recipe)
        return Data(made, made.tokenizer, None, made.fingerprint())
    dataset = TokenDataset.open(section.train)
    loader: Batches = Loader(dataset, settings.batch_size, settings.length, settings.seed, section.documents)
    if section.recall is not None:
        loader = Interleaved(recall_loader(recipe, dataset.tokenizer), loader, section.recall.share)
    val = None
    if section.val is not None:
        held_out = TokenDataset.open(section.val)
        if held_out.meta.tokenizer != dataset.meta.tokenizer:
            raise UserError(
                f"data.val = {section.val!r} was made with another tokenizer than data.train = {section.train!r}: "
                "prepare both with one."
            )
        sequences = settings.eval_batches * settings.batch_size
        val = ValidationWindows(held_out, sequences, settings.micro_batch_size, settings.length, section.documents)
    return Data(loader, dataset.tokenizer, val, loader.fingerprint())

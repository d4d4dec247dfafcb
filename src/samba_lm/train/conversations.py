"""From a recipe to the rows of conversations that it fine-tunes on."""

from __future__ import annotations

from pathlib import Path

from samba_lm.data.conversation_loader import ConversationLoader, ConversationValidation
from samba_lm.data.conversation_set import ConversationSet, is_conversation_set
from samba_lm.errors import UserError
from samba_lm.tokenizer import BpeSpec, Tokenizer, load_tokenizer, parse_tokenizer
from samba_lm.train.recipe import Recipe
from samba_lm.train.source import source_folder


def open_conversations(
    recipe: Recipe, rank: int = 0, world: int = 1
) -> tuple[ConversationLoader, ConversationValidation | None]:
    """The batches of a recipe with data.chat, and those of its validation.

    Raises UserError for files that cannot be read, no tokenizer, or sets that were made with different ones.
    """
    settings, section = recipe.train, recipe.data.chat
    assert section is not None
    if not section.files:
        raise UserError("data.chat.files is empty: name files of JSON lines, or a folder of `samba-lm data chat`.")
    training = _open("data.chat.files", section.files, recipe)
    loader = ConversationLoader(training, settings.batch_size, settings.length, settings.seed)
    if not section.val:
        return loader, None
    held_out = _open("data.chat.val", section.val, recipe)
    ours, theirs = (each.tokenizer for each in (training, held_out))
    if (ours.fingerprint(), ours.chat_template) != (theirs.fingerprint(), theirs.chat_template):
        raise UserError(
            f"data.chat.val = {held_out.name!r} was made with another tokenizer or chat template than data.chat.files "
            f"= {training.name!r}: make both with one model."
        )
    sequences = settings.eval_batches * settings.batch_size
    rows, length = settings.micro_batch_size, settings.length
    return loader, ConversationValidation(held_out, sequences, rows, length, rank, world)


def _open(field: str, files: tuple[str, ...], recipe: Recipe) -> ConversationSet:
    for name in files:
        if is_conversation_set(Path(name) / "train"):
            raise UserError(
                f"{field}: {name!r} holds two sets: data.chat.files is {name}/train, data.chat.val {name}/val."
            )
    folders = [name for name in files if is_conversation_set(name)]
    if not folders:
        return ConversationSet.of_files(files, _tokenizer(recipe))
    if len(files) > 1:
        raise UserError(f"{field} has the prepared folder {folders[0]!r} and others: give one folder, or JSON lines.")
    return ConversationSet.open(folders[0])


def _tokenizer(recipe: Recipe) -> Tokenizer:
    named, source = recipe.data.tokenizer, recipe.model.init_from
    if named is not None:
        tokenizer = parse_tokenizer(named)
        if isinstance(tokenizer, BpeSpec):
            raise UserError(f"data.tokenizer = {named!r} would be trained on text, and there is none: give a folder.")
        return tokenizer
    if source is None:
        raise UserError(
            "Conversations are written out for a model: give model.init_from, such as samba-nano, or data.tokenizer."
        )
    return load_tokenizer(source_folder(source))

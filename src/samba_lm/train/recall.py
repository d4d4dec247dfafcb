"""From a recipe to the rows of a passkey's or a phonebook's training."""

from __future__ import annotations

from pathlib import Path

from samba_lm.data.names import Names
from samba_lm.data.passkey import Passkey
from samba_lm.data.phonebook import Phonebook
from samba_lm.data.recall import Maker, read_text
from samba_lm.data.recall_loader import Curriculum, RecallLoader
from samba_lm.errors import UserError
from samba_lm.tokenizer import BpeSpec, Tokenizer, load_tokenizer, parse_tokenizer
from samba_lm.train.recipe import PasskeySection, Recipe
from samba_lm.train.source import source_folder


def recall_loader(recipe: Recipe, of_text: Tokenizer | None = None) -> RecallLoader:
    """The batches of a recipe with data.passkey or data.phonebook.

    ``of_text``: the tokenizer of the text that is read besides. Raises UserError for files that cannot be read, lengths
    that do not fit, no tokenizer, or two.
    """
    settings, section = recipe.train, recipe.data.recall
    assert section is not None
    tokenizer = _tokenizer(recipe, of_text)
    maker: Maker
    if isinstance(section, PasskeySection):
        maker = Passkey(tokenizer, None if section.filler is None else read_text(Path(section.filler)))
    elif section.names:
        maker = Phonebook(tokenizer, Names.from_files([Path(name) for name in section.names]), section.questions)
    else:
        maker = Phonebook(tokenizer, Names.from_faker(), section.questions)
    lengths = section.lengths or (settings.length,)
    steps = int(section.share * settings.total_steps)
    if not steps:
        raise UserError(
            f"A share of {section.share:g} of {settings.total_steps} steps is none: raise data.{maker.facts()['kind']}"
            ".share, or train for longer."
        )
    return RecallLoader(
        maker,
        tokenizer,
        settings.batch_size,
        settings.length,
        settings.seed,
        curriculum=Curriculum(lengths, section.shares or (1.0,) * len(lengths), steps, section.review),
        lm_weight=section.lm_weight,
        apart=section.apart,
        stretch=section.stretch if isinstance(section, PasskeySection) else 1.0,
    )


def _tokenizer(recipe: Recipe, of_text: Tokenizer | None) -> Tokenizer:
    named, source = recipe.data.tokenizer, recipe.model.init_from
    if of_text is not None and named is None:
        return of_text
    if named is None and source is None:
        raise UserError(
            'Rows are made for a tokenizer: give data.tokenizer = "byte" or its folder, or model.init_from.'
        )
    if named is None:
        assert source is not None
        return load_tokenizer(source_folder(source))
    tokenizer = parse_tokenizer(named)
    if isinstance(tokenizer, BpeSpec):
        raise UserError(f"data.tokenizer = {named!r} would be trained on text, and there is none: give a folder.")
    if of_text is not None and tokenizer.fingerprint() != of_text.fingerprint():
        raise UserError(
            f"data.tokenizer = {named!r} is not what data.train = {recipe.data.train!r} was made with: leave it out."
        )
    return tokenizer

"""What a run reads: its recipe's data, opened and checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from samba_lm.data.cache import Cache, gigabytes
from samba_lm.data.interleaved import Interleaved
from samba_lm.data.loader import Batch, Batches, Loader
from samba_lm.data.mixture import SOURCE_TABLE, Mixture, Part, source_seed
from samba_lm.data.shards import TokenDataset
from samba_lm.errors import UserError
from samba_lm.tokenizer import Tokenizer
from samba_lm.train.conversations import open_conversations
from samba_lm.train.recall import recall_loader
from samba_lm.train.recipe import Recipe
from samba_lm.train.validation import ValidationWindows
from samba_lm.urls import is_url


@dataclass(frozen=True)
class Data:
    """What a run reads."""

    loader: Batches
    tokenizer: Tokenizer
    val: Mapping[str, Iterable[Batch]]
    """Held-out batches by name, the one that counts first; a single one has the name ""; none: no validation."""
    fingerprint: str
    """sha256 of the training data's description."""
    tokens_read: Callable[[int], dict[str, int]] | None = None
    """How many tokens the first so many steps read of each source of a mixture; None: there is but one."""
    notes: tuple[str, ...] = ()
    """What people should know of the data, in sentences."""


def open_data(recipe: Recipe, rank: int = 0, world: int = 1) -> Data:
    """Open and check the recipe's data, for the ``rank``-th of ``world`` processes that share rows out among them.

    Raises UserError when it is missing, damaged, too short or mixed up.
    """
    section = recipe.data
    if section.chat is not None:
        chat, held_out = open_conversations(recipe, rank, world)
        found = (note for note in (chat.packed.note(), held_out and held_out.packed.note()) if note)
        known = {} if held_out is None else {"": held_out}
        return Data(chat, chat.conversations.tokenizer, known, chat.fingerprint(), notes=tuple(found))
    if not section.reads_shards:
        made = recall_loader(recipe)
        return Data(made, made.tokenizer, {}, made.fingerprint())
    cache = Cache(None if section.cache is None else Path(section.cache), int(section.cache_gb * 1e9))
    loaders = {name: _loader(recipe, name, path, cache) for name, path in section.sources.items()}
    dataset = next(iter(loaders.values())).dataset
    val = {name: _validation(recipe, name, path, cache, rank, world) for name, path in section.validation.items()}
    for name, windows in val.items():
        if windows.dataset.meta.tokenizer != dataset.meta.tokenizer:
            first, path = next(iter(section.sources.items()))
            raise UserError(
                f"{_val_name(name)} = {section.validation[name]!r} was made with another tokenizer than "
                f"{first} = {path!r}: prepare both with one."
            )
    _check_room(section.sources, loaders, list(val.values()), cache)
    loader: Batches = next(iter(loaders.values()))
    tokens_read = None
    if section.mixture:
        mixture = _mixture(recipe, loaders)
        loader, tokens_read = mixture, mixture.tokens_read
    if section.recall is not None:
        turns = Interleaved(recall_loader(recipe, dataset.tokenizer), loader, section.recall.share)
        if section.mixture:
            tokens_read = lambda steps: mixture.tokens_read(steps - turns.before(steps))  # noqa: E731
        loader = turns
    return Data(loader, dataset.tokenizer, val, loader.fingerprint(), tokens_read)


def _loader(recipe: Recipe, name: str, path: str, cache: Cache) -> Loader:
    settings, section = recipe.train, recipe.data
    mixed = bool(section.mixture)
    try:
        return Loader(
            TokenDataset.open(path, cache),
            settings.batch_size,
            settings.length,
            source_seed(settings.seed, name) if mixed else settings.seed,
            section.documents,
            group=section.shuffle_shards,
            **({"table": SOURCE_TABLE} if mixed else {}),
        )
    except UserError as error:
        raise UserError(f"{name}: {error}" if mixed else str(error)) from None


def _mixture(recipe: Recipe, loaders: dict[str, Loader]) -> Mixture:
    settings, section = recipe.train, recipe.data
    parts = {
        name: Part(loaders[f"data.mixture.{name}"], source.weight, source.epochs)
        for name, source in section.mixture.items()
    }
    mixture = Mixture(parts, settings.seed)
    made = 0.0 if section.recall is None else section.recall.share
    steps = settings.total_steps - int(settings.total_steps * made)
    if mixture.rows is not None and steps * settings.batch_size > mixture.rows:
        raise UserError(
            f"All sources have been read as often as data.mixture.*.epochs allow after "
            f"{mixture.rows // settings.batch_size:,} steps, fewer than the {steps:,} that read them: train for fewer "
            "steps, or let a source be read more often."
        )
    return mixture


def _validation(recipe: Recipe, name: str, path: str, cache: Cache, rank: int, world: int) -> ValidationWindows:
    settings = recipe.train
    try:
        return ValidationWindows(
            TokenDataset.open(path, cache),
            settings.eval_batches * settings.batch_size,
            settings.micro_batch_size,
            settings.length,
            recipe.data.documents,
            rank=rank,
            world=world,
        )
    except UserError as error:
        raise UserError(f"{_val_name(name)}: {error}" if name else str(error)) from None


def _val_name(name: str) -> str:
    return f"data.val.{name}" if name else "data.val"


def _check_room(paths: dict[str, str], loaders: dict[str, Loader], val: list[ValidationWindows], cache: Cache) -> None:
    """Raise UserError unless what is read at once of remote data fits the cache."""
    needs = {name: loaders[name].bytes_at_once() for name, path in paths.items() if is_url(path)}
    held_out = sum(windows.bytes_read() for windows in val if is_url(str(windows.dataset.folder)))
    total = sum(needs.values()) + held_out
    if total <= cache.limit:
        return
    parts = ", ".join(f"{paths[name]} {gigabytes(size)}" for name, size in needs.items())
    parts += f", validation {gigabytes(held_out)}" if held_out else ""
    raise UserError(
        f"The shards that are read at once ({parts}) do not fit the cache {cache.folder} of {gigabytes(cache.limit)}: "
        "raise data.cache_gb, or set data.shuffle_shards to the number of shards that are shuffled among themselves "
        "(the next ones are fetched beside them, so twice as many must fit)."
    )

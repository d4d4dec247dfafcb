"""What a run starts with: a new model, or a checkpoint's, which must belong to the recipe and its data."""

from __future__ import annotations

import torch

from samba_lm import checkpoint
from samba_lm.config import ModelConfig
from samba_lm.errors import UserError
from samba_lm.model import SambaLM
from samba_lm.train.data import Data
from samba_lm.train.lora import adapt
from samba_lm.train.observer import Observer
from samba_lm.train.parallel import Parallel
from samba_lm.train.recipe import Recipe
from samba_lm.train.resume import Resume
from samba_lm.train.slow_channels import slow_channels
from samba_lm.train.source import source_folder

FIXED = (
    *("train.batch_size", "train.length", "train.seed"),
    *("data.documents", "data.passkey", "data.phonebook", "data.mixture", "data.shuffle_shards"),
    *("model.slow_channels", "train.optimizer", "lora"),
)
"""Fields, or sections, that decide which tokens step n reads (a run continued with others would skip or repeat data),
or how the run began."""

FREE = (
    *("train.out", "train.tensorboard", "train.wandb", "train.log_every", "train.save_every", "train.keep"),
    "train.keep_every",
    *("data.train", "data.val", "data.tokenizer", "data.chat.files", "data.chat.val"),
    *("data.cache", "data.cache_gb"),
)
"""Fields that may change without a word: the numbers do not depend on them, or are checked otherwise (data)."""


def starting_model(recipe: Recipe, data: Data, found: Resume | None, model: SambaLM | None) -> SambaLM:
    """The model that a run of ``recipe`` trains, on the CPU: with its first weights, or, going on from ``found``, with
    weights that are still to be read. ``model`` stands in for the one that the recipe would make.

    Raises UserError where checkpoint, recipe, model and data do not belong together.
    """
    # Before anything is made: a mixer of the user's own may draw from the default generator.
    torch.manual_seed(recipe.train.seed)
    if found is None:
        model = model or _new_model(recipe, data)
        _check_vocab(model.config, data)
    else:
        model = _saved_model(found, recipe, data, model)
    adapt(model, recipe)
    return model


def tell_resume(found: Resume, recipe: Recipe, parallel: Parallel, observer: Observer) -> None:
    """Say where the run goes on, and what is not as it was."""
    state = found.state
    observer.message(f"Continuing from {found.folder}, step {state.step} of {recipe.train.total_steps}.")
    for field, (now, before) in recipe.differences(state.recipe).items():
        if not _is_free(field):
            observer.message(f"Changed since the checkpoint: {field} = {now}, was {before}.")
    if state.world != parallel.world:
        observer.message(
            f"With {_processes(parallel.world)} instead of {_processes(state.world)} the last digits will differ."
        )
    if state.threads != torch.get_num_threads():
        observer.message(
            f"With {torch.get_num_threads()} CPU threads instead of {state.threads} the last digits will differ."
        )


def _new_model(recipe: Recipe, data: Data) -> SambaLM:
    source = recipe.model.init_from
    if source is None:
        model = checkpoint.create(_wanted_config(recipe, data), seed=recipe.train.seed)
        slow_channels(model, recipe.model.slow_channels, recipe.train.seed)
        return model
    model, tokenizer = checkpoint.load(source_folder(source), dtype=torch.float32)
    if tokenizer is not None and tokenizer.fingerprint() != data.tokenizer.fingerprint():
        raise UserError(
            f"model.init_from = {source!r} has another tokenizer than {_data_name(recipe)}: take "
            f"{source}/tokenizer.json (data prepare --tokenizer, or data.tokenizer)."
        )
    return model


def _wanted_config(recipe: Recipe, data: Data) -> ModelConfig:
    if recipe.model.init_from is not None:
        return _new_model(recipe, data).config
    return recipe.model.config(data.tokenizer.vocab_size)


def _saved_model(found: Resume, recipe: Recipe, data: Data, model: SambaLM | None) -> SambaLM:
    """A model to go on with, its weights still to be read, after checking that the checkpoint belongs to this recipe,
    model and data."""
    folder, state = found.folder, found.state
    remedy = "set train.out to another folder, or start over with --fresh"
    tune = f", or fine-tune it: --model.init-from {folder} without --resume"
    saved, _ = checkpoint.read_config(folder)
    changes = recipe.differences(state.recipe)
    if model is not None or any(field.startswith("model.") for field in changes):
        wanted = model.config if model is not None else _wanted_config(recipe, data)
        if wanted.fingerprint() != saved.fingerprint():
            raise UserError(f"{folder} holds another model: {_difference(saved, wanted)}; {remedy}.")
    if state.tokenizer != data.tokenizer.fingerprint():
        raise UserError(
            f"{folder} was trained with tokenizer {state.tokenizer[:12]}, but {_data_name(recipe)} "
            f"has {data.tokenizer.fingerprint()[:12]}; {remedy}."
        )
    for field, (now, before) in changes.items():
        if field.startswith(FIXED) and not _is_free(field):
            raise UserError(f"{folder} was trained with {field} = {before}, not {now}; {remedy}{tune}.")
    if state.data != data.fingerprint:
        read = state.recipe["data"]
        before = f"data.mixture ({', '.join(read['mixture'])})" if read.get("mixture") else repr(read.get("train"))
        if read.get("chat"):
            before = ", ".join(map(repr, read["chat"]["files"]))
        elif not recipe.data.reads_shards:  # made rows: what they are made of, as what is asked for is the same
            before = "other names" if recipe.data.phonebook is not None else "another filler"
        raise UserError(
            f"{folder} was trained on data {state.data[:12]} ({before}), but "
            f"{_data_name(recipe)} is {data.fingerprint[:12]}; {remedy}{tune}."
        )
    return model or checkpoint.build(saved)


def _is_free(field: str) -> bool:
    """Whether it may change without a word."""
    return field in FREE or (field.startswith("data.mixture.") and field.endswith(".path"))


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def _check_vocab(config: ModelConfig, data: Data) -> None:
    try:
        checkpoint.check_tokenizer(config, data.tokenizer)
    except UserError as error:
        raise UserError(f'{error}; in a recipe, model.vocab_size = "auto" fits.') from None


def _difference(saved: ModelConfig, wanted: ModelConfig) -> str:
    """The first field that two configs differ in, in words."""
    before, now = saved.to_dict(), wanted.to_dict()
    field = next(key for key in before if key not in ("name", "max_context") and before[key] != now[key])
    if field == "layers":
        return (
            f"{saved.name} ({len(saved.layers)} layers), but the recipe asks for {wanted.name} ({len(wanted.layers)})"
        )
    return f"{saved.name} with {field} = {before[field]}, but the recipe asks for {wanted.name} with {now[field]}"


def _data_name(recipe: Recipe) -> str:
    section = recipe.data
    if section.reads_shards:
        return f"data.mixture ({', '.join(section.mixture)})" if section.mixture else f"data.train = {section.train!r}"
    if section.chat is not None:
        return f"data.chat.files = {list(section.chat.files)}"
    return "data.passkey" if section.passkey is not None else "data.phonebook"

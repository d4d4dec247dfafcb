"""A training run as data: what a recipe's TOML file holds, checked. Imports no torch."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError, model_validator

from samba_lm.errors import UserError
from samba_lm.train.recipe.data import ChatSection, DataSection, PasskeySection, PhonebookSection
from samba_lm.train.recipe.lora import LoraSection
from samba_lm.train.recipe.model import ModelSection
from samba_lm.train.recipe.parallel import ParallelSection
from samba_lm.train.recipe.section import Section
from samba_lm.train.recipe.training import TrainSection
from samba_lm.validation import explain


class Recipe(Section):
    """A training run: model, data, and how to train."""

    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()
    parallel: ParallelSection = ParallelSection()
    lora: LoraSection = LoraSection()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.lora.rank and self.model.init_from is None:
            raise ValueError(f"lora.rank = {self.lora.rank} adapts a model that is made: give model.init_from")
        if self.lora.rank and self.train.float8:
            raise ValueError(f"lora.rank = {self.lora.rank} and train.float8 do not go together: leave one out")
        return self

    @classmethod
    def from_dict(cls, data: dict[str, Any], source: str = "Recipe") -> Recipe:
        """Check plain data. Raises UserError naming ``source``, the bad key and its value."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise UserError(f"{source}: {explain(error, cls)}") from None

    @classmethod
    def from_toml(cls, path: str | Path) -> Recipe:
        """Read a recipe file, and the one that its ``base`` names (a path seen from it, or one that comes along, such
        as paper/samba-1.3b), whose values stand where it says nothing.

        Raises UserError for a missing, unreadable or wrong one.
        """
        return cls.from_dict(_with_base(Path(path), ()), source=str(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return self.model_dump(mode="json")

    def differences(self, before: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """``{"train.lr": (mine, before's)}`` for every field whose value is not what ``to_dict`` once gave.

        Of two passkeys, or phonebooks, each field by itself: ``data.passkey.share``. A field that recipes did not have
        yet then had its default.
        """
        found: dict[str, tuple[Any, Any]] = {}
        for section, fields in self.to_dict().items():
            then = {**DEFAULTS[section], **before.get(section, {})}
            for key, value in fields.items():
                pairs = {f"{section}.{key}": (value, then[key])}
                if key in MADE and value is not None and isinstance(then[key], dict):
                    held = {**MADE[key], **then[key]}
                    pairs = {f"{section}.{key}.{name}": (each, held[name]) for name, each in value.items()}
                if key == "mixture" and value != then[key]:
                    pairs = _mixture_differences(value, then[key])
                found |= {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
        return found


def _mixture_differences(mine: dict[str, Any], before: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    if mine.keys() != before.keys():
        return {"data.mixture": (sorted(mine), sorted(before))}
    return {
        f"data.mixture.{source}.{name}": (value, before[source].get(name))
        for source, fields in mine.items()
        for name, value in fields.items()
    }


DEFAULTS = Recipe().to_dict()
MADE = {
    name: section.model_dump(mode="json")
    for name, section in (("passkey", PasskeySection()), ("phonebook", PhonebookSection()), ("chat", ChatSection()))
}
"""What is read instead of shards: the sections at their defaults."""


def read_toml(path: Path, kind: str = "recipe") -> dict[str, Any]:
    """What a TOML file holds. Raises UserError, which says that a ``kind`` was looked for, when it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"No {kind} at {path}: give the path of a TOML file.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: give the path of a {kind}'s TOML file.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}: a {kind} is a TOML text file.") from None
    except OSError as error:
        raise UserError(f"Cannot read the {kind} {path}: {error.strerror}.") from None
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise UserError(f"{path} is not a {kind}: it is nested too deeply.") from None
    except ValueError as error:  # TOMLDecodeError, and a number of thousands of digits
        raise UserError(f"{path} is not valid TOML: {error}") from None


COME_ALONG = Path(__file__).parents[2] / "cli" / "recipes"
"""Where the recipes that come with samba-lm lie, which a base may name as `samba-lm train` does."""
EITHER = {"train": ({"steps", "tokens"},), "data": ({"passkey", "phonebook", "chat"}, {"train", "mixture"})}
"""Keys of which a recipe has one: where it gives it, the base's other one is dropped."""


def _with_base(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """A recipe file's data over that of its base; ``above``: the recipes that led here."""
    if not above:
        data = read_toml(path)
    else:
        try:
            data = read_toml(path)
        except UserError as error:
            raise UserError(f"{above[-1]}: its base cannot be read. {error}") from None
    base = data.pop("base", None)
    if base is None:
        return data
    if not isinstance(base, str) or not base or "\0" in base:
        raise UserError(f"{path}: base = {base!r}: give the path of another recipe, relative to this one's folder.")
    below = path.parent / base
    if below.suffix != ".toml" and not below.exists():
        below = COME_ALONG / f"{base}.toml"
        if not below.is_file():
            raise UserError(
                f"{path}: base = {base!r} is no file, nor the name of a recipe that comes along, such as "
                "paper/samba-1.3b: give a path that ends in .toml, relative to this one's folder, or such a name."
            )
    for other in (*above, path):
        if os.path.realpath(below) == os.path.realpath(other):  # Path.resolve refuses links that go in a circle
            raise UserError(f"{path}: base = {base!r} leads back to {other}: a recipe cannot be its own base.")
    return _over(_with_base(below, (*above, path)), data)


def _over(base: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``data`` in their place, sections and their tables merged."""
    merged = dict(base)
    for key, value in data.items():
        below = merged.get(key)
        if not isinstance(value, dict) or not isinstance(below, dict):
            merged[key] = value
            continue
        # A table of the same name is merged with the base's; its neighbour of the group is dropped.
        dropped = {name for group in EITHER.get(key, ()) if group & value.keys() for name in group} - value.keys()
        kept = {name: each for name, each in below.items() if name not in dropped}
        merged[key] = _over(kept, value)
    return merged

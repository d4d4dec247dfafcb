"""Turning pydantic's errors into one line for people."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from samba_lm.errors import did_you_mean

Location = tuple[int | str, ...]

_TYPE = re.compile(r"(function-\w+|dict|list|tuple)\[.*\]")
"""How pydantic names a member of a union that is no class, in a location."""


def explain(error: ValidationError, model: type[BaseModel] | None = None, *, prefix: str = "") -> str:
    """Return pydantic's first complaint as one line, such as ``train.lr = 'abc': input should be a valid number``.

    With ``model``, the class that was being validated, an unknown key also names the nearest known one and union tags
    are left out of the path. ``prefix`` is the dotted path at which that class stands (``"train"``). Unknown keys come
    first: most often they are the misspelling that makes another key missing.
    """
    problems = error.errors(include_url=False)
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    line = _one_problem(first, model, prefix)
    others = len(problems) - 1
    return line if not others else f"{line.removesuffix('.')} (and {others} more)."


def _one_problem(problem: ErrorDetails, model: type[BaseModel] | None, prefix: str) -> str:
    location, known = _resolve(problem["loc"], model)
    path = _dotted((prefix, *location) if prefix else location)
    kind, value = problem["type"], _short(problem["input"])
    if kind == "missing":
        return f"{path} is missing: give it a value."
    if kind == "extra_forbidden":
        return f"{path} = {value}: unknown key." + (did_you_mean(str(location[-1]), known) if known else "")
    message = " ".join(problem["msg"].split())
    if kind in ("value_error", "assertion_error"):
        # A validator's own words: pydantic puts "Value error, " before them.
        message = message.partition(", ")[2]
    else:
        message = message[:1].lower() + message[1:]
    if not location:
        # A complaint about the whole object: showing the whole object would bury it.
        return f"{path}: {message}" if path else message
    return f"{path} = {value}: {message}"


def _resolve(location: Location, model: type[BaseModel] | None) -> tuple[Location, list[str]]:
    """Drop union tags from a location, and list the field names known where its last part stands."""
    location = tuple(part for part in location if not (isinstance(part, str) and _TYPE.fullmatch(part)))
    if model is None:
        return location, []
    cleaned: list[int | str] = []
    models = [model]
    known: list[str] = []
    for part in location:
        known = [name for each in models for name in _fields(each)]
        owners = [each for each in models if part in _fields(each)]
        tagged = [each for each in models if isinstance(part, str) and _is_tag(part, each)]
        if isinstance(part, str) and owners:
            models = [inner for each in owners for inner in _models_in(_fields(each)[part].annotation)]
        elif tagged:
            models = tagged
            continue
        cleaned.append(part)
    return tuple(cleaned), known


def _fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields by the names that stand in the input: an alias where a field has one."""
    named = ((field.validation_alias, name, field) for name, field in model.model_fields.items())
    return {alias if isinstance(alias, str) else name: field for alias, name, field in named}


def _is_tag(part: str, model: type[BaseModel]) -> bool:
    """Whether a union tells this member by ``part``: its class name, or the value of its Literal field."""
    annotations = [field.annotation for field in model.model_fields.values()]
    literals = [typing.get_args(each) for each in annotations if typing.get_origin(each) is typing.Literal]
    return part == model.__name__ or any(part in values for values in literals)


def _models_in(annotation: object) -> Iterator[type[BaseModel]]:
    """Every model class named anywhere in a type, such as ``tuple[A | B, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models_in(argument)


def _dotted(location: Location) -> str:
    """``("layers", 3, "heads")`` as ``layers[3].heads``."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            path += f".{part}" if path else part
    return path


def _short(value: object, limit: int = 60) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."

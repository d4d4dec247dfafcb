"""Models of a page: what tells one from another, and the name, colour and marker that each keeps in every part."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

Key = tuple[str, ...]

WHO = ("weights_sha256", "adapter_sha256", "config", "tokenizer", "dtype", "quantized")
"""The facts that tell one model from another."""
TOLD_WHOLE = ("quantized", "dtype")
"""Of these, what a name is told by first, and in full; the others are hashes."""


@dataclass(frozen=True)
class Model:
    """A model by its name on the page, its place in the palette, and its facts as the first file tells them."""

    label: str
    style: int
    facts: dict[str, Any]


def key(facts: dict[str, Any]) -> Key:
    """The same for the same model. Weights that came from no file (a random model's) are told apart by their name."""
    name = [] if facts.get("weights_sha256") else [facts.get("name")]
    return tuple(json.dumps(part) for part in [*(facts.get(who) for who in WHO), *name])


def name_models(entries: Sequence[dict[str, Any]]) -> dict[Key, Model]:
    """Name the models of all files, in the order in which they are met."""
    first: dict[Key, dict[str, Any]] = {}
    for facts in entries:
        known = first.setdefault(key(facts), {})
        known.update({name: value for name, value in facts.items() if known.get(name) is None})
    names = shortest([str(facts.get("name") or facts.get("checkpoint") or "?") for facts in first.values()])
    labels = _told_apart(names, list(first.values()))
    return {
        who: Model(printable(label), style, facts)
        for style, ((who, facts), label) in enumerate(zip(first.items(), labels, strict=True))
    }


def printable(label: str) -> str:
    """A name with a question mark for each character that no page can show."""
    return "".join(letter if letter.isprintable() else "?" for letter in label)


def shortest(paths: Sequence[str]) -> list[str]:
    """For each path, as many of its last parts as tell it from the other ones."""
    parts = {path: PurePath(path).parts or (path,) for path in paths}
    labels = {}
    for path, mine in parts.items():
        others = [theirs for other, theirs in parts.items() if other != path]
        most = next((n for n in range(1, len(mine) + 1) if all(mine[-n:] != theirs[-n:] for theirs in others)), None)
        labels[path] = path if most is None else str(PurePath(*mine[-most:]))
    return [labels[path] for path in paths]


def _told_apart(names: Sequence[str], all_facts: Sequence[dict[str, Any]]) -> list[str]:
    """Names, with what differs behind those that several have: 8 or 4 bits, the dtype, the weights' hash."""
    labels = []
    for name, facts in zip(names, all_facts, strict=True):
        same = [other for label, other in zip(names, all_facts, strict=True) if label == name]
        words = [name]
        for fact in (*TOLD_WHOLE, *(who for who in WHO if who not in TOLD_WHOLE)):
            values = {json.dumps(other.get(fact)) for other in same}
            if len(values) > 1 and facts.get(fact):
                words.append(str(facts[fact]) if fact in TOLD_WHOLE else str(facts[fact])[:8])
            if len(values) == len(same) > 1:
                break
        labels.append(" ".join(words))
    return labels

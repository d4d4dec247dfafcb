"""Conversations written out for a model: the plain template of base models, or the one beside a tokenizer."""

from __future__ import annotations

import abc
import hashlib
import json
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from samba_lm.errors import UserError
from samba_lm.files import read_json
from samba_lm.tokenizer import CONFIG_FILE, Tokenizer

TEMPLATE_FILE = "chat_template.jinja"
SYSTEM_ROLES = ("system", "developer")
_REFUSALS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError)
"""What a template raises that expects other messages, besides jinja2's own errors."""


class Said(NamedTuple):
    """A message: who says it (system, developer, user, assistant or another that the template knows), and what."""

    role: str
    text: str


class Part(NamedTuple):
    """A stretch of a conversation that was written out; the parts' texts put together are the whole.

    ``message``: the index of the message whose words these are; None: they are the template's.
    ``special``: the id, where the text is the name of a special token and means that token. No message's words do.
    """

    text: str
    message: int | None = None
    special: int | None = None


class Template(abc.ABC):
    """How conversations are written out. ``stop``: what ends an answer, besides the end-of-text token."""

    stop: tuple[str, ...] = ()

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @abc.abstractmethod
    def parts(self, messages: Sequence[Said], invite: bool = True) -> list[Part]:
        """A conversation written out; ``invite``: ready for the next answer. Raises UserError where the template
        refuses these messages."""

    def text(self, messages: Sequence[Said], invite: bool = True) -> str:
        """The same as one text."""
        return "".join(part.text for part in self.parts(messages, invite))

    def encode(self, messages: Sequence[Said], invite: bool = True) -> npt.NDArray[np.int64]:
        """The same as token ids, int64 [tokens]."""
        return self.encode_parts(self.parts(messages, invite))

    def encode_parts(self, parts: Iterable[Part]) -> npt.NDArray[np.int64]:
        """Token ids of some parts that follow each other: text between special tokens is encoded as one, whoever says
        it, int64 [tokens]."""
        found: list[npt.NDArray[np.int64]] = []
        waiting = ""
        for part in parts:
            if part.special is None:
                waiting += part.text
            else:
                found += [self._tokenizer.encode(waiting), np.array([part.special], dtype=np.int64)]
                waiting = ""
        return np.concatenate([*found, self._tokenizer.encode(waiting)])


@dataclass(frozen=True)
class PlainWords:
    """What the plain template writes around messages. ``{text}`` stands for what was said."""

    system: str = "{text}\n\n"
    user: str = "User: {text}\nAssistant:"
    """A message, and what invites the answer (without a final space: tokenizers join it to the word that follows)."""
    end: str = "\n"
    """What stands between an answer and the next message."""
    stop: tuple[str, ...] = ("\nUser:", "\nAssistant:")
    """What ends an answer, besides the end-of-text token: the start of somebody's next message."""

    def __post_init__(self) -> None:
        for name, pattern in (("system", self.system), ("user", self.user)):
            if "{text}" not in pattern:
                raise UserError(
                    f"The chat template's {name}={pattern!r} has no place for the text: write {{text}} in it."
                )


PLAIN_WORDS = PlainWords()


class PlainTemplate(Template):
    """``User:`` and ``Assistant:``, as the terminal's chat writes it."""

    def __init__(self, tokenizer: Tokenizer, words: PlainWords = PLAIN_WORDS) -> None:
        super().__init__(tokenizer)
        self._words = words
        self.stop = words.stop

    def parts(self, messages: Sequence[Said], invite: bool = True) -> list[Part]:
        words = self._words
        before_system, _, after_system = words.system.partition("{text}")
        before, _, after = words.user.partition("{text}")
        parts: list[Part] = []
        invited = False  # the text ends where an answer belongs
        end = ""  # what stands before the next message
        for i, (role, text) in enumerate(messages):
            if role in SYSTEM_ROLES:
                parts += [Part(end + before_system), Part(text, i), Part(after_system)]
                end, invited = "", False
                continue
            if role == "user":
                parts += [Part(end + before), Part(text, i), Part(after)]
            else:
                if not invited:
                    parts.append(Part(end + after.lstrip()))
                # An answer begins with the space that the model made; one that was written by hand gets it.
                parts.append(Part(text if text[:1].isspace() else " " + text, i))
            end, invited = words.end, role == "user"
        if invite and not invited:
            parts.append(Part(end + after.lstrip()))
        return [part for part in parts if part.text]


class FolderTemplate(Template):
    """A ``chat_template`` as transformers' tokenizers have it, in Jinja.

    What people say can hold the name of a special token, but never the token: their words are put in after the
    template was rendered, and only what the template itself writes may become a special token.

    Raises UserError for what is no template; ``name``: of its file.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, name: str = TEMPLATE_FILE) -> None:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        super().__init__(tokenizer)
        self.source = source
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise UserError(f"{name} holds a chat template that is not valid Jinja: {error}.") from None
        added = json.loads(tokenizer.to_json()).get("added_tokens") or []
        self._special = {one["content"]: int(one["id"]) for one in added if one.get("special")}
        names = sorted(map(re.escape, self._special), key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(names)})") if names else None

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()

    def parts(self, messages: Sequence[Said], invite: bool = True) -> list[Part]:
        mark = secrets.token_hex(16)
        shown = [
            {"role": "system" if role in SYSTEM_ROLES else role, "content": f"{mark}{i:08}"}
            for i, (role, _) in enumerate(messages)
        ]
        parts: list[Part] = []
        for i, piece in enumerate(re.split(f"{mark}([0-9]{{8}})", self._render(shown, invite))):
            parts += [Part(messages[int(piece)].text, int(piece))] if i % 2 else self._told_apart(piece)
        return [part for part in parts if part.text]

    def encode_text(self, text: str) -> npt.NDArray[np.int64]:
        """Token ids of what :meth:`text` gave, where every name of a special token means it: int64 [tokens]."""
        return self.encode_parts(self._told_apart(text))

    def _told_apart(self, text: str) -> list[Part]:
        """A text as what lies between the names of special tokens, and these."""
        pieces = self._split.split(text) if self._split else [text]
        return [Part(piece, special=self._special[piece] if i % 2 else None) for i, piece in enumerate(pieces)]

    def _render(self, messages: Sequence[dict[str, Any]], invite: bool) -> str:
        from jinja2 import TemplateError

        try:
            return self._template.render(
                messages=messages, add_generation_prompt=invite, bos_token="", eos_token=self._tokenizer.eos_token
            )
        except (TemplateError, *_REFUSALS) as error:
            raise UserError(f"The model's chat template refuses these messages: {error}.") from None


def folder_template(folder: Path, tokenizer: Tokenizer) -> FolderTemplate | None:
    """The chat template that lies beside a tokenizer, None without one. Raises UserError for one that is damaged."""
    file = folder / TEMPLATE_FILE
    if file.is_file():
        try:
            return FolderTemplate(file.read_text(encoding="utf-8"), tokenizer, str(file))
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 text: {error}. Save it as UTF-8.") from None
    file = folder / CONFIG_FILE
    config = read_json(file) if file.is_file() else {}
    source = config.get("chat_template") if isinstance(config, dict) else None
    return FolderTemplate(source, tokenizer, str(file)) if isinstance(source, str) else None


def find_template(folder: Path, tokenizer: Tokenizer) -> Template:
    """The chat template that lies beside a tokenizer, or the plain one. Raises UserError for one that is damaged."""
    return folder_template(folder, tokenizer) or PlainTemplate(tokenizer)


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(str(message))

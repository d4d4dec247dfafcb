"""Conversations as token ids, by the base model's plain template or the one of the tokenizer's folder."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from samba_lm.errors import UserError
from samba_lm.files import read_json
from samba_lm.generation.chat import DEFAULT_TEMPLATE, ChatTemplate
from samba_lm.generation.prompt import TokenIds
from samba_lm.serve.models import Message
from samba_lm.tokenizer import CONFIG_FILE, Tokenizer


def content(message: Message) -> str:
    """A message's text."""
    if isinstance(message.content, str):
        return message.content
    return "".join(part.text for part in message.content)


class PlainTemplate:
    """``User:`` and ``Assistant:``, as the terminal's chat writes it."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate = DEFAULT_TEMPLATE) -> None:
        self._tokenizer, self._template = tokenizer, template
        self.stop = template.stop

    def encode(self, messages: Sequence[Message]) -> TokenIds:
        """The token ids of a conversation, ready for the next answer."""
        return self._tokenizer.encode(self.text(messages))

    def text(self, messages: Sequence[Message]) -> str:
        """The conversation written out."""
        template = self._template
        before, _, after = template.user.partition("{text}")
        parts: list[str] = []
        invited = False  # the text ends where an answer belongs
        said = False
        for message in messages:
            text = content(message)
            if message.role in ("system", "developer"):
                parts.append((template.end if said else "") + template.system.replace("{text}", text))
                said = invited = False
            elif message.role == "user":
                parts.append((template.end if said else "") + before + text + after)
                said = invited = True
            else:
                if not invited:
                    parts.append((template.end if said else "") + after.lstrip())
                # An answer begins with the space that the model made; one that was written by hand gets it.
                parts.append(text if text[:1].isspace() else " " + text)
                said, invited = True, False
        if not invited:
            parts.append((template.end if said else "") + after.lstrip())
        return "".join(parts)


class FolderTemplate:
    """A ``chat_template`` as transformers' tokenizers have it, in Jinja.

    What people say can hold the name of a special token, but never the token: their words are put in after the
    template was rendered, and only what the template itself writes may become a special token.
    """

    stop: tuple[str, ...] = ()

    def __init__(self, source: str, tokenizer: Tokenizer, name: str) -> None:
        """Raises UserError for what is no template. ``name``: of the file."""
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise UserError(f"{name} holds a chat template that is not valid Jinja: {error}.") from None
        self._tokenizer = tokenizer
        added = json.loads(tokenizer.to_json()).get("added_tokens") or []
        self._special = {one["content"]: int(one["id"]) for one in added if one.get("special")}
        names = sorted(map(re.escape, self._special), key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(names)})") if names else None

    def encode(self, messages: Sequence[Message]) -> TokenIds:
        """The token ids of a conversation, ready for the next answer. Raises UserError where the template refuses."""
        mark = secrets.token_hex(16)
        said = [content(message) for message in messages]
        shown = [
            {"role": "system" if message.role == "developer" else message.role, "content": f"{mark}{i:08}"}
            for i, message in enumerate(messages)
        ]
        try:
            text = self._template.render(
                messages=shown, add_generation_prompt=True, bos_token="", eos_token=self._tokenizer.eos_token
            )
        except TemplateError as error:
            raise UserError(f"The model's chat template refuses these messages: {error}.") from None
        # Stretches of text between special tokens, each of the template's words and people's.
        stretches: list[list[str]] = [[]]
        specials: list[int] = []
        for i, part in enumerate(re.split(f"{mark}([0-9]{{8}})", text)):
            if i % 2:
                stretches[-1].append(said[int(part)])
                continue
            for j, piece in enumerate(self._split.split(part) if self._split else [part]):
                if j % 2:
                    specials.append(self._special[piece])
                    stretches.append([])
                else:
                    stretches[-1].append(piece)
        ids = [self._tokenizer.encode("".join(stretch)) for stretch in stretches]
        parts = [ids[0]]
        for special, stretch in zip(specials, ids[1:], strict=True):
            parts += [np.array([special], dtype=np.int64), stretch]
        return np.concatenate(parts)


Template = PlainTemplate | FolderTemplate


def find_template(folder: Path, tokenizer: Tokenizer) -> Template:
    """The chat template that lies beside a tokenizer, or the plain one. Raises UserError for one that is damaged."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return FolderTemplate(file.read_text(encoding="utf-8"), tokenizer, str(file))
    file = folder / CONFIG_FILE
    config = read_json(file) if file.is_file() else {}
    source = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(source, str):
        return FolderTemplate(source, tokenizer, str(file))
    return PlainTemplate(tokenizer)


def _refuse(message: str) -> None:
    raise TemplateError(str(message))

"""A checkpoint's chat template, as transformers' tokenizers have it: conversations as text, and that text as tokens."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samba_lm.errors import UserError
from samba_lm.files import read_json
from samba_lm.tokenizer import CONFIG_FILE, Tokenizer

TEMPLATE_FILE = "chat_template.jinja"


class ChatTemplate:
    """A Jinja template. Raises UserError for what is none."""

    def __init__(self, source: str, tokenizer: Tokenizer, name: str = TEMPLATE_FILE) -> None:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise UserError(f"{name} holds a chat template that is not valid Jinja: {error}.") from None
        self.source, self._tokenizer = source, tokenizer
        added = json.loads(tokenizer.to_json()).get("added_tokens") or []
        self._special = {one["content"]: int(one["id"]) for one in added if one.get("special")}
        names = sorted(map(re.escape, self._special), key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(names)})") if names else None

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()

    def text(self, messages: Sequence[Mapping[str, Any]], invite: bool) -> str:
        """A conversation written out; ``invite``: with what an answer begins after. Raises UserError where the template
        refuses it."""
        from jinja2 import TemplateError

        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=invite, bos_token="", eos_token=self._tokenizer.eos_token
            )
        except TemplateError as error:
            raise UserError(f"The model's chat template refuses these messages: {error}.") from None

    def encode(self, text: str) -> list[int]:
        """Token ids of what :meth:`text` gave, its special tokens being such."""
        ids: list[int] = []
        for i, piece in enumerate(self._split.split(text) if self._split else [text]):
            ids += [self._special[piece]] if i % 2 else self._tokenizer.encode(piece).tolist()
        return ids


def find_chat_template(folder: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template that lies beside a checkpoint's tokenizer. Raises UserError for one that is damaged."""
    file = folder / TEMPLATE_FILE
    if file.is_file():
        return ChatTemplate(file.read_text(encoding="utf-8"), tokenizer, str(file))
    file = folder / CONFIG_FILE
    config = read_json(file) if file.is_file() else {}
    source = config.get("chat_template") if isinstance(config, dict) else None
    return ChatTemplate(source, tokenizer, str(file)) if isinstance(source, str) else None


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(str(message))

"""Conversations as token ids, by the base model's plain template or the one of the tokenizer's folder."""

from __future__ import annotations

from collections.abc import Sequence

from samba_lm.generation.chat import DEFAULT_TEMPLATE, ChatTemplate
from samba_lm.generation.prompt import TokenIds
from samba_lm.serve.models import Message
from samba_lm.tokenizer import Tokenizer


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

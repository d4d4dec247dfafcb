"""Conversations from JSON lines: ``{"messages": [{"role": ..., "content": ...}, ...]}``, or ``{"prompt": ...,
"completion": ...}`` for a question and its answer. Which of the two is seen line by line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from samba_lm.data.sources import JSONL_SUFFIXES, PACKED_SUFFIXES, SourceFile, opened
from samba_lm.errors import UserError, did_you_mean
from samba_lm.templates import SYSTEM_ROLES, Said

ROLES = (*SYSTEM_ROLES, "user", "assistant")
FORMS = '{"messages": [{"role": ..., "content": ...}, ...]} or {"prompt": ..., "completion": ...}'
_SHAREGPT = {"human": "user", "gpt": "assistant"}


class Conversation(NamedTuple):
    """Messages, at least one of them an assistant's, and where they stand: ``FILE:LINE``."""

    messages: tuple[Said, ...]
    where: str
    position: int
    """Bytes of the file, as it is on the disk, that have been read."""


def read_conversations(file: SourceFile) -> Iterator[Conversation]:
    """Yield the conversations of one file, .jsonl or .ndjson, also packed. Empty lines are passed over.

    Raises UserError, naming the file, the line, the value and what to do, for whatever is no conversation.
    """
    suffixes = [suffix.lower() for suffix in file.path.suffixes if suffix.lower() not in PACKED_SUFFIXES]
    if suffixes[-1:] == [".json"]:
        raise UserError(f"{file.path} cannot be read: write one conversation a line into a .jsonl file.")
    if suffixes[-1:] and suffixes[-1] not in (*JSONL_SUFFIXES, ".txt"):
        raise UserError(f"{file.path} cannot be read: conversations are JSON lines, in a .jsonl file.")
    with opened(file.path) as (raw, stream):
        for number, line in enumerate(stream, start=1):
            where = f"{file.path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{where} is not UTF-8 (byte {error.start}): convert the file.") from error
            if text.strip():
                yield Conversation(parse_conversation(text, where), where, raw.tell())


def parse_conversation(line: str, where: str) -> tuple[Said, ...]:
    """The messages of one line. ``where``: what to call it in errors."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where} is not valid JSON ({error.msg} at column {error.colno}): write one conversation a line."
        ) from error
    except (RecursionError, ValueError) as error:  # brackets without end; a number of thousands of digits
        raise UserError(f"{where} is nested too deeply, or has a number that is too long: remove the line.") from error
    if not isinstance(record, dict):
        raise UserError(f"{where} is {_short(record)}, not a JSON object: write {FORMS}.")
    pair = [name for name in ("prompt", "completion") if name in record]
    if "messages" in record and pair:
        raise UserError(f"{where} has both 'messages' and {pair[0]!r}: keep one of the two forms.")
    if "messages" in record:
        said = _messages(record["messages"], where)
    elif len(pair) == 2:
        said = tuple(
            Said(role, _text(record[name], f"{where}: {name}"))
            for role, name in (("user", "prompt"), ("assistant", "completion"))
        )
    elif pair:
        raise UserError(f"{where} has {pair[0]!r} alone: prompt and completion go together.")
    else:
        near = did_you_mean(next(iter(record), ""), ("messages", "prompt", "completion"))
        raise UserError(
            f"{where} has the fields {_short(sorted(record))}, no conversation's: write {FORMS}."
            + (near if "mean" in near else "")
        )
    answers = [message.text for message in said if message.role == "assistant"]
    if not any(text.strip() for text in answers):
        why = "its answers are empty" if answers else "no message has the role assistant"
        raise UserError(f"{where} has nothing to learn from, {why}: add an answer, or remove the line.")
    return said


def _messages(messages: Any, where: str) -> tuple[Said, ...]:
    if not isinstance(messages, list) or not messages:
        raise UserError(f'{where}: messages is {_short(messages)}, not a list of {{"role": ..., "content": ...}}.')
    said = []
    for i, message in enumerate(messages):
        here = f"{where}: messages[{i}]"
        if not isinstance(message, dict):
            raise UserError(f'{here} is {_short(message)}: write {{"role": ..., "content": ...}}.')
        if "role" not in message and {"from", "value"} <= message.keys():
            raise UserError(
                f"{here} has 'from' and 'value': name them 'role' and 'content', and human and gpt user and assistant."
            )
        role = message.get("role")
        if role not in ROLES:
            instead = _SHAREGPT.get(role) if isinstance(role, str) else None
            hint = f"write {instead}" if instead else f"it must be one of {', '.join(ROLES)}"
            raise UserError(f"{here}: role is {_short(role)}: {hint}.")
        for name in ("tool_calls", "function_call"):
            if message.get(name):
                raise UserError(f"{here} has {name}, which is not learnt here: write it into the content, as text.")
        said.append(Said(role, _text(message.get("content"), f"{here}: content")))
    return tuple(said)


def _text(value: Any, here: str) -> str:
    """A message's text, given as one, or as parts of the kind ``{"type": "text", "text": ...}``."""
    if isinstance(value, list):
        for part in value:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise UserError(f"{here} has the part {_short(part)}: only text can be learnt.")
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise UserError(f"{here} is {_short(value)}, not a text.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{here} has the lone surrogate U+{ord(value[error.start]):04X}, which is not Unicode text: mend it."
        ) from error
    return value


def _short(value: object, limit: int = 60) -> str:
    text = json.dumps(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."

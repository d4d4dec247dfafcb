"""Conversations written out for a model: the plain template of base models, or the one beside a tokenizer."""

from __future__ import annotations

import abc
import functools
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
from samba_lm.tokenizer import CONFIG_FILE, TEMPLATE_FILE, Tokenizer

SYSTEM_ROLES = ("system", "developer")
_REFUSALS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError)
"""What a template raises that expects other messages, besides jinja2's own errors."""


class Said(NamedTuple):
    """A message: who says it (system, developer, user, assistant or another that the template knows), and what."""

    role: str
    text: str


PROBE = (Said("user", "question"), Said("assistant", "answer"))
"""A conversation that shows what a template writes."""


class Part(NamedTuple):
    """A stretch of a conversation that was written out; the parts' texts put together are the whole.

    ``message``: the index of the message whose words these are; None: they are the template's.
    ``special``: the id, where the text is the name of a special token and means that token. No message's words do.
    """

    text: str
    message: int | None = None
    special: int | None = None


class Segment(NamedTuple):
    """What is encoded by itself: text, or the name of a special token (``special``: its id).

    ``answer``: the model is to write it: an assistant's words, and what ends them.
    """

    text: str
    special: int | None = None
    answer: bool = False


class Template(abc.ABC):
    """How conversations are written out. ``stop``: text that ends an answer, besides the end-of-text token."""

    stop: tuple[str, ...] = ()

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Special tokens that end an answer."""
        return ()

    @abc.abstractmethod
    def parts(self, messages: Sequence[Said], invite: bool = True) -> list[Part]:
        """A conversation written out; ``invite``: ready for the next answer. Raises UserError where the template
        refuses these messages."""

    def text(self, messages: Sequence[Said], invite: bool = True) -> str:
        """The same as one text."""
        return "".join(part.text for part in self.parts(messages, invite))

    def encode(self, messages: Sequence[Said], invite: bool = True) -> npt.NDArray[np.int64]:
        """The same as token ids, int64 [tokens], cut as :meth:`segments` says."""
        return self.encode_segments(self.segments(messages, invite))

    def segments(self, messages: Sequence[Said], invite: bool = True) -> list[Segment]:
        """The same, cut where an answer begins and ends, and at special tokens.

        There the model that wrote an answer began and ended: so its tokens are read again as they were made, a
        conversation that goes on keeps the tokens that it had, and training sees what is asked later. An answer goes
        on until the special token that the template writes after it, if it does.
        """
        segments: list[Segment] = []
        waiting = ""
        ending = False  # an assistant's words were written, and perhaps the template ends them

        def cut(answer: bool = False) -> None:
            nonlocal waiting
            if waiting:
                segments.append(Segment(waiting, None, answer))
            waiting = ""

        for part in self.parts(messages, invite):
            if part.message is not None and messages[part.message].role == "assistant":
                # What the template writes between what invites an answer and the answer is the model's to write.
                at = waiting.rfind(self._invitation)
                begins = len(waiting) if at < 0 else at + len(self._invitation)
                lead, waiting = waiting[begins:], waiting[:begins]
                cut()
                waiting = lead + part.text
                cut(answer=True)
                ending = True
            elif part.special is not None:
                cut(answer=ending)
                segments.append(Segment(part.text, part.special, answer=ending))
                ending = False
            else:
                ending = ending and part.message is None
                waiting += part.text
        cut()
        return segments

    def encode_text(self, text: str) -> npt.NDArray[np.int64]:
        """Token ids of what :meth:`text` gave, int64 [tokens]."""
        return self._tokenizer.encode(text)

    def encode_segments(self, segments: Iterable[Segment]) -> npt.NDArray[np.int64]:
        """Token ids of segments, int64 [tokens]."""
        found = [
            self._tokenizer.encode(text) if special is None else np.array([special], dtype=np.int64)
            for text, special, _ in segments
        ]
        return np.concatenate([np.empty(0, dtype=np.int64), *found])

    @property
    def _invitation(self) -> str:
        """The text, after any special token, that an answer begins after; empty where the template tells none apart."""
        return ""

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
        self._special[tokenizer.eos_token] = tokenizer.eos_id
        names = sorted(map(re.escape, self._special), key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(names)})")

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        try:
            parts = self.parts(PROBE, invite=False)
        except UserError:  # the template wants other conversations than the usual ones
            return ()
        at = next((i for i, part in enumerate(parts) if part.message == 1), len(parts))
        return tuple(part.special for part in parts[at:] if part.special is not None)[:1]

    @functools.cached_property
    def _invitation(self) -> str:
        try:
            text, invited = (self.text(PROBE[:1], invite) for invite in (False, True))
        except UserError:
            return ""
        added = self._told_apart(invited.removeprefix(text)) if invited.startswith(text) else [Part("")]
        return added[-1].text if added[-1].special is None else ""

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

    def check_teachable(self) -> None:
        """Raise UserError unless a model can learn from conversations what it will be asked: each answer stands after
        what invites it, and a special token ends it."""
        said = PROBE * 2
        for k in (1, 3):
            asked, answered = self.segments(said[:k]), self.segments(said[: k + 1], invite=False)
            if answered[: len(asked)] != asked or not answered[len(asked)].answer:
                raise UserError(
                    "The model's chat template writes something else before an answer than where it asks for one "
                    f"({asked[-1].text[-40:]!r}): a model taught by it would not be asked as it was taught."
                )
        if not self.stop_ids:
            raise UserError(
                "The model's chat template writes no special token after an answer, so no model could learn where to "
                "stop: put {{ eos_token }} there."
            )

    def _told_apart(self, text: str) -> list[Part]:
        """A text as what lies between the names of special tokens, and these."""
        pieces = self._split.split(text)
        return [Part(piece, special=self._special[piece] if i % 2 else None) for i, piece in enumerate(pieces)]

    def _render(self, messages: Sequence[dict[str, Any]], invite: bool) -> str:
        from jinja2 import TemplateError

        try:
            return self._template.render(
                messages=messages, add_generation_prompt=invite, bos_token="", eos_token=self._tokenizer.eos_token
            )
        except (TemplateError, *_REFUSALS) as error:
            raise UserError(f"The model's chat template refuses these messages: {error}.") from None


TAUGHT = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'User:\\n' + message['content'] + '\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant:\\n' + message['content'] + eos_token + '\\n' }}"
    "{% else %}{{ message['content'] + '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)
"""The template of models that are fine-tuned here and had none: plain words, for it can add no tokens to a vocabulary,
and the end-of-text token after each answer."""


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
    """The chat template that lies beside a tokenizer, or the one that goes with it. Raises UserError for one that is
    damaged."""
    return folder_template(folder, tokenizer) or template_of(tokenizer)


def template_of(tokenizer: Tokenizer) -> Template:
    """The chat template that goes with a tokenizer, or the plain one. Raises UserError for one that is damaged."""
    source = tokenizer.chat_template
    return PlainTemplate(tokenizer) if source is None else FolderTemplate(source, tokenizer)


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(str(message))

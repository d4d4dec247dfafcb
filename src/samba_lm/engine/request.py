"""What is asked of the engine, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from samba_lm.generation.params import SamplingParams
from samba_lm.generation.prefill import Reader
from samba_lm.generation.prompt import TokenIds

Finish = Literal["length", "stop", "eos", "cancelled", "error"]


class Guide(Protocol):
    """Says which tokens may come next in one text; called on the engine's thread. May raise UserError."""

    def allowed(self) -> npt.NDArray[np.bool_]:
        """[the tokenizer's vocab_size], with at least one token: the end-of-text one where the text is complete."""

    def take(self, token_id: int) -> None:
        """The token that was drawn."""


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    ``tokens`` may be an iterator for what is too long to hold: it is drawn from as the prompt is read, on the engine's
    thread. ``context`` is where to begin instead of nothing: it is copied, never changed.
    """

    tokens: Iterable[TokenIds]
    params: SamplingParams = field(default_factory=SamplingParams)
    context: Reader | None = None
    logprobs: int | None = None
    """The log-probabilities of each token made and of so many of the likeliest; None: none."""
    prompt_logprobs: bool = False
    """Those of the prompt's tokens too."""
    guide: Callable[[], Guide] | None = None
    """Makes what limits the tokens of the answer; None: all are allowed."""
    keep: bool = False
    """Give the state at the end back, to go on from."""
    keep_prompt: bool = False
    """Give the state at the end of the prompt too, as soon as that was read."""


@dataclass(frozen=True)
class Token:
    """A token, and how likely the model found it: before penalties, temperature and candidates."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens at its place, the likeliest first."""


@dataclass(frozen=True)
class Piece:
    """What came of one step: new text (none while it may be part of a stop string or of a character) and tokens."""

    text: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Progress:
    """Prompt tokens read so far."""

    read: int


@dataclass(frozen=True)
class Ready:
    """The prompt is read: where the sequence stands, if that was asked for."""

    reader: Reader


@dataclass(frozen=True)
class End:
    """The last event of a request."""

    finish: Finish
    prompt_tokens: int
    new_tokens: int
    error: BaseException | None = None
    reader: Reader | None = None
    """Where the sequence stands, if that was asked for,"""
    last: int | None = None
    """and the token drawn last, which it has not read."""
    prompt: tuple[Token, ...] = ()
    """The prompt's tokens, if their log-probabilities were asked for."""
    waited: float = 0.0
    """Seconds from the request until its first token was read,"""
    read_seconds: float = 0.0
    """from there to the first token made,"""
    decode_seconds: float = 0.0
    """and from there to the end."""


Event = Piece | Progress | Ready | End
Sink = Callable[[Event], None]
"""Takes a request's events, on the engine's thread: it must return at once and raise nothing."""


@dataclass(frozen=True)
class Completion:
    """A whole answer."""

    text: str
    tokens: tuple[Token, ...]
    end: End

"""What is asked of a text that is to be generated. Imports no torch, so that the command line can show it at once."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from samba_lm.errors import UserError, did_you_mean

DEFAULT_CHUNK = 2048
"""Prompt tokens read at once, over all sequences of the batch."""


@dataclass(frozen=True)
class SamplingParams:
    """How a text is continued and when it ends. Raises UserError for a value out of range.

    With p the softmax of the penalised logits divided by the temperature, a token stays a candidate when it is among
    the `top_k` likeliest, and in the shortest list of likeliest tokens whose p, renormalised after top-k, sums to
    at least `top_p`, and has p of at least `min_p` times that of the likeliest.
    """

    temperature: float = 1.0
    """Divides the logits; 0 is greedy: always the likeliest token, the lowest id among equals."""
    top_k: int | None = None
    """Only the k likeliest tokens; None: all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together hold this probability, in (0, 1]; 1: all."""
    min_p: float = 0.0
    """Only tokens at least this fraction as likely as the likeliest, in [0, 1]; 0: all."""
    repetition_penalty: float = 1.0
    """Logits of every token in the prompt or the answer are divided by it if positive, else multiplied; 1: off."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token already generated (the prompt does not count)."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for every time it has been generated."""
    seed: int = 0
    """The same seed, prompt and model give the same text."""
    max_tokens: int | None = 256
    """Tokens to make at most; None: no limit, in constant memory."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these strings; a single string may be given as it is."""
    stop_ids: tuple[int, ...] = ()
    """The text ends before any of these tokens."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Pairs of a token id and a number that is added to its logit, after the penalties; -100 all but rules it out."""
    stop_at_eos: bool = True
    """End at the tokenizer's end-of-text token; False: go on with the next document."""

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else _tuple("stop", self.stop, "strings")
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_ids", _tuple("stop_ids", self.stop_ids, "token ids"))
        object.__setattr__(self, "logit_bias", _pairs(self.logit_bias))
        _check("temperature", self.temperature, float, lambda t: t >= 0, "0 (greedy) or more")
        _check("top_p", self.top_p, float, lambda p: 0 < p <= 1, "more than 0 and at most 1 (1 turns it off)")
        _check("min_p", self.min_p, float, lambda p: 0 <= p <= 1, "from 0 (off) to 1")
        _check(
            "repetition_penalty",
            self.repetition_penalty,
            float,
            lambda p: 1e-6 <= p <= 1e6,
            "from 1e-6 to 1e6 (1 turns it off)",
        )
        _check("presence_penalty", self.presence_penalty, float, _is_penalty, "from -1e6 to 1e6 (0 turns it off)")
        _check("frequency_penalty", self.frequency_penalty, float, _is_penalty, "from -1e6 to 1e6 (0 turns it off)")
        _check("seed", self.seed, int, lambda n: 0 <= n < 2**64, "a whole number from 0 to 2**64 - 1")
        if self.top_k is not None:
            _check("top_k", self.top_k, int, lambda k: k >= 1, "a whole number of at least 1, or None (all)")
        if self.max_tokens is not None:
            allowed = "a whole number from 0 on, or None (in a command: unlimited) for no limit"
            _check("max_tokens", self.max_tokens, int, lambda n: n >= 0, allowed)
        if not all(isinstance(text, str) and text for text in stop):
            raise UserError(f"stop={self.stop!r} must hold non-empty strings: leave the empty one out.")

    def replace(self, **changes: Any) -> SamplingParams:
        """Return a validated copy with some fields changed; UserError for an unknown field names the nearest."""
        names = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in names:
                raise UserError(f"{name!r} is not a sampling option.{did_you_mean(name, names)}")
        return dataclasses.replace(self, **changes)


def _is_penalty(value: float) -> bool:
    return abs(value) <= 1e6  # times a count, it stays well inside fp32


def _check(name: str, value: float, kind: type, ok: Callable[[Any], bool], allowed: str) -> None:
    # True and False are ints to Python; an int beyond the largest float is out of range wherever a float is wanted.
    right_kind = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not (right_kind and (kind is int or abs(value) <= sys.float_info.max) and ok(value)):
        shown = "a very large integer" if isinstance(value, int) and value.bit_length() > 1024 else repr(value)
        raise UserError(f"{name}={shown} is out of range: it must be {allowed}.")


def _pairs(values: Iterable[Any]) -> tuple[tuple[int, float], ...]:
    pairs = tuple(tuple(pair) if isinstance(pair, list | tuple) else (pair,) for pair in values)
    for pair in pairs:
        if len(pair) != 2:
            raise UserError(f"logit_bias={values!r} must hold pairs of a token id and a number.")
        _check("logit_bias", pair[0], int, lambda i: 0 <= i < 2**31, "pairs whose first is a token id")
        _check("logit_bias", pair[1], float, lambda b: abs(b) <= 1e4, "pairs whose second is from -1e4 to 1e4")
    return pairs


def _tuple(name: str, values: Iterable[Any], of: str) -> tuple[Any, ...]:
    if not isinstance(values, Iterable):
        raise UserError(f"{name}={values!r} is not a list: give a list of {of}, an empty one for none.")
    return tuple(values)

"""Answers that follow a JSON schema: llguidance says which tokens may come next."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits

from samba_lm.errors import UserError
from samba_lm.serve.errors import ApiError
from samba_lm.serve.models import JsonObjectFormat, JsonSchemaFormat, TextFormat
from samba_lm.serve.words import Words

MAX_SCHEMA = 1 << 16
"""Characters of a schema."""
STEP_FUEL, LEXER_FUEL, LEXER_STATES = 20_000, 100_000, 25_000
"""A tenth of what llguidance would spend on a token, and on a schema: it works between two steps of all texts."""
LIMITS = LLParserLimits(step_lexer_fuel=STEP_FUEL, initial_lexer_fuel=LEXER_FUEL, max_lexer_states=LEXER_STATES)


class Grammar:
    """A grammar that was checked; makes a guide for each answer.

    Raises ApiError for a schema that is none, or has what cannot be followed.
    """

    def __init__(self, words: Words, schema: dict[str, Any]) -> None:
        text = json.dumps(schema)
        if len(text) > MAX_SCHEMA:
            raise _refused(f"it has {len(text):,} characters, the limit is {MAX_SCHEMA:,}")
        self._size = words.table.vocab_size
        try:
            # No white space between its parts: a model that has not learned to stop would make nothing else.
            grammar = LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_flexible": False})
        except ValueError as error:
            raise _refused(str(error)) from None
        self._matcher = LLMatcher(words.table, grammar, log_level=0, limits=LIMITS)
        if self._matcher.is_error():
            raise _refused(self._matcher.get_error())

    def guide(self) -> Guide:
        """For one answer, from its beginning."""
        return Guide(self._matcher.deep_copy(), self._size)


class Guide:
    """See :class:`samba_lm.engine.request.Guide`."""

    def __init__(self, matcher: LLMatcher, size: int) -> None:
        self._matcher, self._size = matcher, size

    def allowed(self) -> npt.NDArray[np.bool_]:
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        return np.unpackbits(bits, count=self._size, bitorder="little").view(np.bool_)

    def take(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UserError(f"The answer's schema cannot be followed further: {self._matcher.get_error()[:200]}")


def grammar_of(words: Words, wanted: TextFormat | JsonObjectFormat | JsonSchemaFormat | None) -> Grammar | None:
    """The grammar of a ``response_format``; None: any text will do. May take some time: not on the event loop."""
    if wanted is None or isinstance(wanted, TextFormat):
        return None
    schema: dict[str, Any] = {"type": "object"} if isinstance(wanted, JsonObjectFormat) else wanted.json_schema.schema_
    return Grammar(words, schema)


def _refused(why: str) -> ApiError:
    return ApiError(400, f"This JSON schema cannot be followed: {why[:300]}", param="response_format")

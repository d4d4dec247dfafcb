"""Tokens as a client sees them: the bytes of each, and a text that stands for them."""

from __future__ import annotations

from functools import cached_property

from llguidance import LLTokenizer

from samba_lm.tokenizer import Tokenizer


class Words:
    """The vocabulary of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @cached_property
    def table(self) -> LLTokenizer:
        """For grammars too."""
        tokenizer = self._tokenizer
        return LLTokenizer(tokenizer.to_json(), n_vocab=tokenizer.vocab_size, eos_token=tokenizer.eos_id)

    def bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; the name of a special one; nothing for an id without a token."""
        if token_id >= self._tokenizer.vocab_size:
            return b""
        return bytes(self.table.decode_bytes([token_id]))

    def text(self, token_id: int) -> str:
        """A token as OpenAI shows it: its text, or ``bytes:\\xe2\\x80`` for a part of a character."""
        raw = self.bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

"""A hash over token ids that goes on where it stopped, from 32 bytes and less than a block of ids."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from samba_lm.generation.prompt import TokenIds

BLOCK = 16
"""Tokens hashed at once."""
_BLOCK_BYTES = 8 * BLOCK


@dataclass(frozen=True)
class TokenHash:
    """sha256 of sha256 ... of a sequence's token ids, however they came in pieces. Never changes: see :meth:`add`."""

    chain: bytes = bytes(32)
    """Of the whole blocks: the sha256 of the chain before a block and the block's ids, int64 little-endian."""
    tail: bytes = b""
    """The ids after them."""
    tokens: int = 0

    def add(self, token_ids: TokenIds) -> TokenHash:
        """The hash of the sequence with these ids [L] at its end."""
        data = self.tail + np.ascontiguousarray(token_ids, dtype="<i8").tobytes()
        chain, whole = self.chain, len(data) - len(data) % _BLOCK_BYTES
        for begin in range(0, whole, _BLOCK_BYTES):
            chain = hashlib.sha256(chain + data[begin : begin + _BLOCK_BYTES]).digest()
        return TokenHash(chain, data[whole:], self.tokens + len(token_ids))

    def hexdigest(self) -> str:
        """64 hexadecimal digits, equal for equal sequences."""
        return hashlib.sha256(self.chain + self.tail).hexdigest()

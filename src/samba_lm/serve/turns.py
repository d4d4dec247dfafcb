"""States of conversations, so that the next turn reads only what is new."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from samba_lm.generation.prefill import Reader
from samba_lm.generation.prompt import TokenIds


@dataclass(frozen=True)
class Turn:
    """Where a conversation stood after its first ``length`` tokens (those of a context before it not counted)."""

    length: int
    reader: Reader
    root: str


class Turns:
    """The states used last, by the tokens that led to them.

    Args:
        most: bytes that all of them may hold; what was used least recently goes first.

    A ``root`` keeps apart what must not meet: conversations of different clients, or after different contexts.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: OrderedDict[bytes, Turn] = OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._held)

    def find(self, root: str, tokens: TokenIds) -> Turn | None:
        """The longest beginning of these tokens, not all of them, whose state is here."""
        lengths = sorted(
            {turn.length for turn in self._held.values() if turn.root == root and turn.length < len(tokens)}
        )
        best = None
        for key in _keys(root, tokens, lengths):
            if key in self._held:
                best = key
        if best is None:
            return None
        self._held.move_to_end(best)
        return self._held[best]

    def put(self, root: str, tokens: TokenIds, reader: Reader) -> None:
        """Keep a state that has read all of these tokens; nobody may change it any more."""
        # What it would draw next is not kept: at an answer's end it is another token than the one it drew there.
        turn = Turn(len(tokens), Reader(reader.state, list(reader.lengths)), root)
        size = reader.state.nbytes()
        if size > self._most:
            return
        key = _keys(root, tokens, [len(tokens)])[0]
        replaced = self._held.pop(key, None)
        self._held[key] = turn
        self.nbytes += size - (0 if replaced is None else replaced.reader.state.nbytes())
        while self.nbytes > self._most:
            _, dropped = self._held.popitem(last=False)
            self.nbytes -= dropped.reader.state.nbytes()


def _keys(root: str, tokens: TokenIds, lengths: list[int]) -> list[bytes]:
    """Hashes of the first tokens, for rising lengths, in one pass."""
    data = np.ascontiguousarray(tokens, dtype="<i8")
    running, begin = hashlib.blake2b(root.encode(), digest_size=32), 0
    keys = []
    for length in lengths:
        running.update(data[begin:length].data)
        begin = length
        keys.append(running.digest() + length.to_bytes(8, "little"))
    return keys

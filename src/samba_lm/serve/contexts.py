"""Contexts: texts that were read once, to be gone on from by any number of requests."""

from __future__ import annotations

from dataclasses import dataclass

from samba_lm.generation.prefill import Reader


@dataclass(frozen=True)
class Context:
    """A text that was read. It never changes: going on from it works on a copy."""

    id: str
    title: str
    created: int
    reader: Reader

    @property
    def tokens(self) -> int:
        return self.reader.lengths[0]

"""Passkey recall: a five-digit key in a long text, asked for at its end."""

from __future__ import annotations

import re

from samba_lm.data.passkey import Passkey
from samba_lm.data.recall import Example
from samba_lm.eval.recall import Key, Plan, Task
from samba_lm.tokenizer import Tokenizer

LONG_ENOUGH = 1 << 16
"""Tokens that a text's lines always fit in."""


class PasskeyTask(Task):
    """Sizes are tokens of the whole text, answer and all; see :class:`samba_lm.data.passkey.Passkey`.

    ``filler``: text whose sentences hide the key; None: the few of the well-known form. Raises UserError for a text
    without words, or a length that the lines without filler do not fit in.
    """

    name = "passkey"
    unit = "tokens"

    def __init__(self, plan: Plan, tokenizer: Tokenizer, filler: str | None = None) -> None:
        self.plan = plan
        self._maker = Passkey(tokenizer, filler)
        self.facts = self._maker.facts()
        # Too short a length is told before anything is read; and too long a one is not made for that.
        self.example((min(*plan.sizes, LONG_ENOUGH), plan.depths[0]), 0)

    def example(self, cell: Key, trial: int) -> Example:
        length, depth = cell
        return self._maker.example(self.plan.random(cell, trial), length, depth)

    def tokens(self, cell: Key) -> int:
        return cell[0]

    def read_off(self, written: str) -> str:
        """The first run of digits; "" where there is none."""
        found = re.search(r"[0-9]+", written)
        return found.group() if found else ""

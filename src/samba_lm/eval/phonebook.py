"""Phonebook recall: one number of a book of names and numbers, asked for at its end."""

from __future__ import annotations

from samba_lm.data.names import Names
from samba_lm.data.phonebook import Phonebook
from samba_lm.data.recall import Example
from samba_lm.eval.recall import Key, Plan, Task
from samba_lm.tokenizer import Tokenizer


class PhonebookTask(Task):
    """Sizes are entries of the book; see :class:`samba_lm.data.phonebook.Phonebook`.

    Raises UserError for a size of fewer entries than three, or of more than there are names.
    """

    name = "phonebook"
    unit = "pairs"

    def __init__(self, plan: Plan, tokenizer: Tokenizer, names: Names) -> None:
        self.plan = plan
        self._maker = Phonebook(tokenizer, names)
        self.facts = self._maker.facts()
        small, large = (self.example((size, None), 0) for size in (min(plan.sizes), max(plan.sizes)))
        self._per_pair = max(len(small) / min(plan.sizes), len(large) / max(plan.sizes))

    def example(self, cell: Key, trial: int) -> Example:
        return self._maker.of_pairs(self.plan.random(cell, trial), cell[0])

    def tokens(self, cell: Key) -> int:
        return int(cell[0] * self._per_pair)

    def read_off(self, written: str) -> str:
        """All of it but white space around."""
        return written.strip()

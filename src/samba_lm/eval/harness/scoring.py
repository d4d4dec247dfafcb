"""How likely a model finds continuations of contexts: what several have in common is read once, its state forked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from samba_lm.errors import UserError
from samba_lm.eval.harness.prefixes import families
from samba_lm.generation.prefill import Reader, check_ids, prefill
from samba_lm.model import SambaLM, evaluating
from samba_lm.state import State

T = TypeVar("T")
OnProgress = Callable[[float], None]
"""Called with the share of the work that is done, 0 to 1."""
OnAnswer = Callable[[int, "Likelihood"], None]
"""Called with a question's number and its answer."""

LEAST_SAVED = 64
"""Tokens of reading that a fork must save."""
TOKENS_AT_ONCE = {"cpu": 1 << 12, "cuda": 1 << 16}
"""Tokens of a batch."""
STATES_AT_ONCE = {"cpu": 1 << 29, "cuda": 1 << 33}
"""Bytes of states that a batch holds."""
ROWS_AT_ONCE = 512
LOGITS_AT_ONCE = 1 << 25
"""Logits held at once (elements; 128 MiB in fp32)."""


@dataclass(frozen=True)
class Question:
    """How likely is ``continuation`` after ``context``? Token ids, at least one of each."""

    context: Sequence[int]
    continuation: Sequence[int]


@dataclass(frozen=True)
class Likelihood:
    """The sum of the tokens' log-probabilities in nats, and whether each of them was the likeliest."""

    logprob: float
    greedy: bool


@dataclass
class _Row:
    """Tokens to be read, and what is asked of it: (question, place of the first prediction, predicted tokens)."""

    ids: list[int]
    asked: list[tuple[int, int, Sequence[int]]] = field(default_factory=list)

    @property
    def free(self) -> int:
        """Leading tokens from which nothing is predicted that counts."""
        return min(first for _, first, _ in self.asked)


class _Piece(NamedTuple):
    """A row from its token ``begin`` on, which goes on after one of the sequences of a state."""

    row: _Row
    begin: int
    after: int = 0

    @property
    def tokens(self) -> int:
        return len(self.row.ids) - self.begin


class Scorer:
    """A model that is asked how likely texts are.

    Likelihoods are over the model's whole vocabulary, in fp32 at least, summed in fp64. Rows of a batch are padded with
    tokens that no layer sees, so a batch changes nothing but rounding.

    Args:
        batch: rows read at once; None: as many as fit :data:`TOKENS_AT_ONCE` and :data:`STATES_AT_ONCE`. Where a GPU
            runs out of memory, half as many are tried.
        chunk: tokens of a row read at once: rows of any length fit, but with full attention.
    """

    def __init__(self, model: SambaLM, *, batch: int | None = None, chunk: int = 4096) -> None:
        for name, value in (("batch", batch), ("chunk", chunk)):
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1.")
        self.model, self.chunk, self._batch = model, chunk, batch
        kind = "cpu" if model.device.type == "cpu" else "cuda"
        self._tokens, self._bytes = TOKENS_AT_ONCE[kind], STATES_AT_ONCE[kind]
        self._sums = torch.zeros(0, dtype=torch.float64)
        self._greedy = torch.zeros(0, dtype=torch.bool)
        self._tell: Callable[[int], None] = lambda tokens: None
        self._note: OnAnswer | None = None

    @torch.inference_mode()
    def ask(
        self, questions: Sequence[Question], progress: OnProgress | None = None, note: OnAnswer | None = None
    ) -> list[Likelihood]:
        """Answer all, in their order. Raises UserError for an id outside the vocabulary, numbers that are not finite,
        and more than full attention can hold.

        ``note``: told each answer as it comes, once, in no order; what is not finite it is not told.
        """
        self._sums = torch.zeros(len(questions), dtype=torch.float64)
        self._greedy = torch.ones(len(questions), dtype=torch.bool)
        rows = _rows(questions, self.model.config.vocab_size)
        done, whole = 0, sum(len(row.ids) for row in rows) or 1

        def tell(tokens: int) -> None:
            nonlocal done
            done += tokens
            if progress is not None:
                progress(done / whole)

        self._tell, self._note = tell, note
        with evaluating(self.model):
            contexts: dict[tuple[int, ...], list[_Row]] = {}
            for row in rows:
                contexts.setdefault(tuple(row.ids[: row.free]), []).append(row)
            each = list(contexts)
            for family in families([list(ids) for ids in each], [len(ids) for ids in each]):
                self._ask_family({each[i]: contexts[each[i]] for i in family.members}, family.shared)
        if not bool(self._sums.isfinite().all()):
            raise UserError(
                "The model's numbers are not finite: its weights are damaged, or the dtype is too narrow (try float32)."
            )
        return [self._answer(i) for i in range(len(questions))]

    def _answer(self, i: int) -> Likelihood:
        return Likelihood(float(self._sums[i]), bool(self._greedy[i]))

    def _ask_family(self, contexts: Mapping[tuple[int, ...], list[_Row]], shared: int) -> None:
        """Contexts whose first ``shared`` tokens are the same: these, then the rest of those of several rows, then what
        follows."""
        root = self._read_contexts([next(iter(contexts))[:shared]], None) if shared else None
        forked = [ids for ids, own in contexts.items() if (len(own) - 1) * (len(ids) - shared) >= LEAST_SAVED]
        rest = set(contexts) - set(forked)
        self._ask_pieces([_Piece(row, shared) for ids, own in contexts.items() if ids in rest for row in own], root)
        for some in self._in_batches(forked, lambda ids: len(ids) - shared, shared, stateful=True):
            states = self._read_contexts([ids[shared:] for ids in some], root)
            pieces = [_Piece(row, len(ids), i) for i, ids in enumerate(some) for row in contexts[ids]]
            self._ask_pieces(pieces, states)

    def _read_contexts(self, contexts: Sequence[Sequence[int]], root: State | None) -> State:
        """The states after these contexts, each read after the one sequence of ``root``."""
        count = len(contexts)
        state = self.model.init_state(count) if root is None else root.select([0] * count)
        reader = Reader(state, [0] * count)
        prefill(self.model, [[np.array(ids)] for ids in contexts], reader, self.chunk * count)
        return reader.state

    def _ask_pieces(self, pieces: Sequence[_Piece], states: State | None) -> None:
        held = 0 if not pieces else max(piece.begin for piece in pieces)
        for some in self._in_batches(pieces, lambda piece: piece.tokens, held, stateful=states is not None):
            self._ask_batch(some, states)
            self._tell(sum(len(piece.row.ids) for piece in some))

    def _ask_batch(self, pieces: Sequence[_Piece], states: State | None) -> None:
        try:
            self._read(pieces, states)
        except torch.OutOfMemoryError:
            if len(pieces) == 1:
                raise
            middle = len(pieces) // 2
            self._ask_batch(pieces[:middle], states)
            self._ask_batch(pieces[middle:], states)

    def _read(self, pieces: Sequence[_Piece], states: State | None) -> None:
        """Read pieces together, a chunk of each at a time, and note what is asked of them."""
        longest, device = max(piece.tokens for piece in pieces), self.model.device
        ids = torch.zeros(len(pieces), longest, dtype=torch.int64)
        segments = torch.full_like(ids, -1)
        wanted = []  # (row, place, target, question)
        for i, (row, begin, _) in enumerate(pieces):
            ids[i, : len(row.ids) - begin] = torch.tensor(row.ids[begin:])
            segments[i, : len(row.ids) - begin] = 0
            for question, first, targets in row.asked:
                wanted += [(i, first - begin + j, target, question) for j, target in enumerate(targets)]
        asked = torch.tensor(wanted)[torch.tensor([place for _, place, _, _ in wanted]).argsort(stable=True)]
        ragged = min(piece.tokens for piece in pieces) < longest
        ids, segments = ids.to(device), segments.to(device)
        state = None if states is None else states.select([piece.after for piece in pieces])
        sums, greedy = torch.zeros_like(self._sums, device=device), []
        for begin in range(0, longest, self.chunk):
            end = min(begin + self.chunk, longest)
            parts = segments[:, begin:end] if ragged else None
            if state is None and longest <= self.chunk:
                hidden = self.model.hidden_states(ids, parts)
            else:
                hidden, state = self.model.features(ids[:, begin:end], state, parts)
            here = asked[(asked[:, 1] >= begin) & (asked[:, 1] < end)]
            for some in here.split(max(1, LOGITS_AT_ONCE // self.model.config.vocab_size)):
                rows, places, targets, questions = some.to(device).unbind(1)
                logits = self.model.head(hidden[rows, places - begin])
                wide = logits if logits.dtype == torch.float64 else logits.float()
                chosen = wide.log_softmax(-1).gather(1, targets[:, None])[:, 0]
                sums.index_add_(0, questions, chosen.double())
                greedy.append(wide.argmax(-1) == targets)
        self._greedy[asked[:, 3][~torch.cat(greedy).cpu()]] = False
        answered = asked[:, 3].unique()
        self._sums[answered] = sums.cpu()[answered]  # set and not added: a batch may be read again in halves
        if self._note is not None:
            for i in answered[self._sums[answered].isfinite()].tolist():
                self._note(i, self._answer(i))

    def _in_batches(
        self, items: Sequence[T], size: Callable[[T], int], before: int, *, stateful: bool
    ) -> Iterator[list[T]]:
        """The items, longest first, as many at once as may be held; ``before``: tokens in the states before them."""
        batch: list[T] = []
        longest = 1
        for item in sorted(items, key=size, reverse=True):
            longest = max(longest, size(item))
            rows = len(batch) + 1
            held = self.model.config.state_bytes(before + longest, self.model.dtype.itemsize)
            full = (
                rows > self._batch
                if self._batch is not None
                else (
                    rows > ROWS_AT_ONCE
                    or rows * min(longest, self.chunk) > self._tokens
                    or ((stateful or longest > self.chunk) and rows * held > self._bytes)
                )
            )
            if batch and full:
                yield batch
                batch, longest = [], size(item)
            batch.append(item)
        if batch:
            yield batch


def windows(ids: list[int], prefix: int, limit: int | None) -> list[Question]:
    """A text as questions that predict each of its tokens once, from at most ``limit`` tokens, as the harness does."""
    if limit is None or len(ids) <= limit:
        return [Question([prefix], ids)] if ids else []
    first = Question([prefix], ids[:limit])
    rest = []
    for begin in range(limit, len(ids), limit):
        end = min(begin + limit, len(ids))
        # Read are the ``limit`` tokens before the window's last: those that are not predicted in it stand before.
        rest.append(Question(ids[end - limit - 1 : begin], ids[begin:end]))
    return [first, *rest]


def _rows(questions: Sequence[Question], vocab_size: int) -> list[_Row]:
    """What is to be read: once each, however many questions end in different last tokens."""
    found: dict[tuple[int, ...], _Row] = {}
    for i, (context, continuation) in enumerate((q.context, q.continuation) for q in questions):
        if not len(context) or not len(continuation):
            raise UserError(f"Question {i} has no context or no continuation: give at least one token of each.")
        ids = [*context, *continuation]
        check_ids(np.array(ids), vocab_size, 0)
        row = found.setdefault(tuple(ids[:-1]), _Row(ids[:-1]))
        row.asked.append((i, len(context) - 1, continuation))
    return list(found.values())

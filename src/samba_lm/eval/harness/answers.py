"""A model's answers to a task's requests, kept on disk as they come: a task that was broken off goes on from them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from samba_lm.eval.harness.scoring import Likelihood, Question, Scorer
from samba_lm.eval.harness.writing import Prompt, write
from samba_lm.files import disk_errors
from samba_lm.model import SambaLM
from samba_lm.tokenizer import Tokenizer

OnProgress = Callable[[float], None]
OnAnswer = Callable[[int, Any], None]


class Answers:
    """Answers in a file of JSON lines: first whose they are, then one a line, added as soon as it is there.

    A request is known by its token ids and by all that is asked of them, so that other worked examples, seeds or
    limits are other requests. Of a file that a killed process left, lines that are not whole are passed over; a file
    of somebody else's answers is begun anew. As a context it closes the file; :meth:`forget` removes it.

    Args:
        path: of the file, which one process at a time may have.
        who: all that decides an answer but the request. Plain data.

    Raises UserError where the file cannot be read or written.
    """

    def __init__(self, path: Path, who: Mapping[str, object]) -> None:
        self.path, self._head = path, json.dumps(who, sort_keys=True)
        self._file: IO[bytes] | None = None
        self._known: dict[str, Any] = {}
        self._ours = self._cut = False  # the file begins with our head, and ends within a line
        with disk_errors(path):
            if path.exists():
                self._read(path.read_bytes())

    @property
    def count(self) -> int:
        """How many answers there are."""
        return len(self._known)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        file, self._file = self._file, None
        if file is not None:
            with disk_errors(self.path):
                file.close()

    def forget(self) -> None:
        """Remove the file: the task has ended, and its results are elsewhere."""
        self.__exit__(None, None, None)
        self.path.unlink(missing_ok=True)
        self._known, self._ours = {}, False

    def likelihoods(
        self, scorer: Scorer, questions: Sequence[Question], progress: OnProgress | None = None
    ) -> list[Likelihood]:
        """As ``scorer.ask``, which is asked for what is not known. Raises what it raises."""

        def ask(left: list[int], note: OnAnswer, tell: OnProgress) -> None:
            def answered(i: int, answer: Likelihood) -> None:
                note(i, [answer.logprob, answer.greedy])

            scorer.ask([questions[i] for i in left], tell, answered)

        requests = [["likelihood", [*question.context], [*question.continuation]] for question in questions]
        return [Likelihood(*answer) for answer in self._all(requests, ask, progress)]

    def texts(
        self,
        model: SambaLM,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        *,
        slots: int | None = None,
        progress: OnProgress | None = None,
    ) -> list[str]:
        """As ``writing.write``, which continues the prompts whose texts are not known. Raises what it raises."""

        def ask(left: list[int], note: OnAnswer, tell: OnProgress) -> None:
            write(model, tokenizer, [prompts[i] for i in left], slots=slots, progress=tell, note=note)

        requests = [["text", prompt.ids, asdict(prompt.params)] for prompt in prompts]
        return self._all(requests, ask, progress)

    def _all(
        self,
        requests: Sequence[list[Any]],
        ask: Callable[[list[int], OnAnswer, OnProgress], None],
        progress: OnProgress | None,
    ) -> list[Any]:
        """The answers to all requests; ``ask`` is given the numbers of those that are not known, and tells theirs."""
        names = [hashlib.sha256(json.dumps(request).encode()).hexdigest()[:32] for request in requests]
        left = [i for i, name in enumerate(names) if name not in self._known]
        before = 1 - len(left) / max(1, len(names))

        def tell(share: float) -> None:
            if progress is not None:
                progress(before + (1 - before) * share)

        if left:
            ask(left, lambda i, answer: self._add(names[left[i]], answer), tell)
        return [self._known[name] for name in names]

    def _add(self, name: str, answer: Any) -> None:
        if name in self._known:  # the same request twice
            return
        self._known[name] = answer
        with disk_errors(self.path):
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("ab" if self._ours else "wb")
                self._file.write(b"" if self._ours else f"{self._head}\n".encode())
                self._file.write(b"\n" if self._ours and self._cut else b"")
                self._ours, self._cut = True, False
            self._file.write(json.dumps({"request": name, "answer": answer}).encode() + b"\n")
            self._file.flush()  # to the system, which outlives this process

    def _read(self, data: bytes) -> None:
        head, _, rest = data.partition(b"\n")
        self._ours, self._cut = head == self._head.encode(), not data.endswith(b"\n")
        for line in rest.split(b"\n") if self._ours else ():
            known = _parsed(line)
            if known is not None:
                self._known[known[0]] = known[1]


def _parsed(line: bytes) -> tuple[str, Any] | None:
    """A request's name and answer; None for a line that is not whole."""
    try:
        found = json.loads(line)
        name, answer = found["request"], found["answer"]
        if not isinstance(answer, str):
            logprob, greedy = answer
            answer = [float(logprob), bool(greedy)] if math.isfinite(logprob) else None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return None if answer is None else (str(name), answer)

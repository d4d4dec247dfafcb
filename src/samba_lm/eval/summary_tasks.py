"""Long texts with people's summaries of them: SQuALITY, QMSum and GovReport, as their authors' files have them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from samba_lm.data.sources import PACKED_SUFFIXES
from samba_lm.errors import UserError, did_you_mean
from samba_lm.eval.records import Record

Asked = tuple[str, str, tuple[str, ...]]
"""A text, a question about it (nothing where all of it is to be summarised) and people's summaries."""
QUESTION = "\n\nQuestion: {question}\nAnswer:"
NEXT_QUESTION = ("\nQuestion:",)
"""Where a model that only continues texts begins to ask instead of answering."""


@dataclass(frozen=True)
class Sample:
    """One summary to write.

    Attributes:
        number: of the sample, from 0. document: of the text it is about.
        text: what is read first. question: what comes after it, up to where the summary begins.
        references: people's summaries; a score is that against the nearest.
    """

    number: int
    document: int
    text: str
    question: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """A set of texts with people's summaries.

    Attributes:
        name: of the task, and of its folder.
        prompt: what comes after a text, with the question in it.
        splits: the parts it has, and the file of each, without endings; the first is the usual one.
        max_tokens: of a summary.
        stop: where a summary ends, besides the end-of-text token.
        source: where its files come from.
        read: makes of one row what is asked, question by question.
    """

    name: str
    prompt: str
    splits: dict[str, str]
    max_tokens: int
    stop: tuple[str, ...]
    source: str
    read: Callable[[Record], Iterator[Asked]]

    @property
    def usual(self) -> str:
        """The split that results are told of."""
        return next(iter(self.splits))

    def file(self, folder: Path, split: str | None) -> Path:
        """The split's file in a data folder. Raises UserError where there is no such split, or no file."""
        split = split or self.usual
        if split not in self.splits:
            raise UserError(f"{self.name} has no split {split!r}.{did_you_mean(split, self.splits)}")
        name = self.splits[split]
        for place in (folder / self.name, folder):
            for ending in ("", *PACKED_SUFFIXES):
                path = place / f"{name}.jsonl{ending}"
                if path.is_file():
                    return path
        raise UserError(
            f"The data of {self.name} is not in {folder}: put {self.source} there as {self.name}/{name}.jsonl (or "
            f"packed, {', '.join(PACKED_SUFFIXES)}), or name its folder with --data-dir."
        )

    def samples(self, rows: Sequence[Record], limit: int | None = None) -> list[Sample]:
        """The first ``limit`` samples of the rows; None: all. Raises UserError for a row that is not the task's."""
        found: list[Sample] = []
        for row in rows:
            for text, question, references in self.read(row):
                if len(found) == limit:
                    return found
                if not references or not text.strip():
                    raise UserError(f"{row.where} has a question without a text or a summary: leave it out.")
                after = self.prompt.format(question=question.strip())
                found.append(Sample(len(found), row.row, text.strip(), after, references))
        return found


def _squality(row: Record) -> Iterator[Asked]:
    for question in row.inner("questions"):
        references = tuple(response.text("response_text") for response in question.inner("responses"))
        yield row.text("document"), question.text("question_text"), references


def _qmsum(row: Record) -> Iterator[Asked]:
    turns = "\n".join(f"{turn.text('speaker')}: {turn.text('content')}" for turn in row.inner("meeting_transcripts"))
    for query in (*row.inner("general_query_list"), *row.inner("specific_query_list")):
        yield turns, query.text("query"), (query.text("answer"),)


def _govreport(row: Record) -> Iterator[Asked]:
    outputs = row.get("outputs", list)
    if not all(isinstance(output, str) for output in outputs):
        raise UserError(f"{row.where}: field 'outputs' is not a list of texts.")
    yield row.text("input"), "", tuple(outputs)


TASKS = {
    task.name: task
    for task in (
        Task(
            "squality",
            QUESTION,
            {"test": "test", "dev": "dev"},
            600,
            NEXT_QUESTION,
            "https://github.com/nyu-mll/SQuALITY, data/v1-3/txt/test.jsonl or dev.jsonl,",
            _squality,
        ),
        Task(
            "qmsum",
            QUESTION,
            {"test": "test", "val": "val"},
            450,  # not told by the paper
            NEXT_QUESTION,
            "https://github.com/Yale-LILY/QMSum, data/ALL/jsonl/test.jsonl or val.jsonl,",
            _qmsum,
        ),
        Task(
            "govreport",
            "\n\nSummary of the report:",
            {"test": "leval_gov_report_summ"},
            450,
            (),
            "https://github.com/OpenLMLab/LEval, LEval-data/Open-ended-tasks/gov_report_summ.jsonl,",
            _govreport,
        ),
    )
}

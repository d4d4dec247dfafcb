"""Summaries that a model writes of long texts, greedy, compared with people's by ROUGE.

Texts are read whole through the inference engine, once for all questions about them; nothing is cut off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from itertools import groupby
from typing import TYPE_CHECKING, Any

from samba_lm.engine.engine import Engine
from samba_lm.engine.request import End, Event, Piece, Progress, Request
from samba_lm.errors import UserError
from samba_lm.eval.intervals import Mean, grouped_interval
from samba_lm.eval.recall import GPU_CHUNK, SLOTS, TOKENS_AT_ONCE, OnProgress
from samba_lm.eval.summary_tasks import Sample
from samba_lm.generation.params import DEFAULT_CHUNK, SamplingParams
from samba_lm.memory import ran_out
from samba_lm.model import SambaLM
from samba_lm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from samba_lm.data.recall import Ids

METRICS = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class Summary:
    """What a model wrote for a sample, and how near it is to people's; or why there is nothing.

    Attributes:
        number: of the sample. document: of its text.
        prompt_tokens, new_tokens: read and written. finish: why it ended, as the engine says.
        written: the summary.
        rouge1, rouge2, rougeL: its F-measures, 0 to 1.
    """

    number: int
    document: int
    prompt_tokens: int = 0
    new_tokens: int = 0
    finish: str = ""
    written: str = ""
    rouge1: float = math.nan
    rouge2: float = math.nan
    rougeL: float = math.nan  # noqa: N815 - the score's name
    skipped: str = ""


def scorer() -> str:
    """The package that gives the scores, and how. Raises UserError where it is not there."""
    _rouge()
    return f"rouge-score {version('rouge-score')}: F-measures, Porter stemmer, best of the references for each score"


def score(written: str, references: Sequence[str]) -> dict[str, float]:
    """The F-measures of :data:`METRICS`, each against the reference that it is largest for."""
    found = _rouge().score_multi(list(references), written)
    return {metric: float(found[metric].fmeasure) for metric in METRICS}


def means(summaries: Sequence[Summary]) -> dict[str, Mean]:
    """Of each of :data:`METRICS` over the summaries that were not skipped, with 95% intervals in which questions about
    one text do not count as independent; none reaches beyond 0 and 1."""
    read = [summary for summary in summaries if not summary.skipped]
    documents = [summary.document for summary in read]
    found = {name: grouped_interval([getattr(summary, name) for summary in read], documents) for name in METRICS}
    return {name: replace(mean, low=max(mean.low, 0.0), high=min(mean.high, 1.0)) for name, mean in found.items()}


@cache
def _rouge() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise UserError('ROUGE needs the package rouge-score: pip install "samba-lm[summarize]".') from error
    return RougeScorer(list(METRICS), use_stemmer=True)


@dataclass(frozen=True)
class _Text:
    """A text's ids, and the samples about it with their questions' ids."""

    ids: Ids
    samples: list[tuple[Sample, Ids]]

    @property
    def longest(self) -> int:
        """Tokens of the text with its longest question."""
        return self.ids.size + max(question.size for _, question in self.samples)


def measure(
    model: SambaLM,
    tokenizer: Tokenizer,
    samples: Sequence[Sample],
    params: SamplingParams,
    found: Callable[[Summary], None],
    *,
    progress: OnProgress | None = None,
) -> None:
    """Write the summaries and tell each to ``found`` as soon as it is finished.

    Samples of one text must stand together. ``params`` have a limit of tokens. A text that full attention cannot hold,
    or that does not fit into memory, is skipped and says so. ``progress`` is told the share of the work that is done.
    """
    texts = []
    for _, some in groupby(samples, key=lambda sample: sample.document):
        each = list(some)
        questions = tokenizer.encode_batch([sample.question for sample in each])
        texts.append(_Text(tokenizer.encode(each[0].text), list(zip(each, questions, strict=True))))
    fit, done = [], 0
    for text in texts:
        if _holds(model, text, params):
            fit.append(text)
        else:
            reason = f"full attention would have to hold more tokens than max_context = {model.config.max_context:,}"
            done += _skip(text, reason, found)
    chunk = GPU_CHUNK if model.device.type == "cuda" else DEFAULT_CHUNK
    slots = _slots(model, fit, params)
    with Engine(model, tokenizer, slots=slots, chunk=chunk) as engine:
        for group in _groups(fit, slots):
            count = sum(len(text.samples) for text in group)

            def tell(share: float, done: int = done, count: int = count) -> None:
                if progress is not None:
                    progress((done + share * count) / len(samples))

            _write(engine, group, params, found, tell)
            tell(1.0)
            done += count


def _grows(model: SambaLM) -> bool:
    """Whether a sequence's state grows with it."""
    far = 1 << 30
    return model.config.state_bytes(far) != model.config.state_bytes(2 * far)


def _holds(model: SambaLM, text: _Text, params: SamplingParams) -> bool:
    return not _grows(model) or text.longest + (params.max_tokens or 0) <= model.config.max_context


def _slots(model: SambaLM, texts: Sequence[_Text], params: SamplingParams) -> int:
    """Summaries written at once."""
    longest = max((text.longest for text in texts), default=1) + (params.max_tokens or 0)
    return max(1, min(SLOTS, TOKENS_AT_ONCE // longest)) if _grows(model) else SLOTS


def _skip(text: _Text, reason: str, found: Callable[[Summary], None]) -> int:
    for sample, question in text.samples:
        found(Summary(sample.number, sample.document, text.ids.size + question.size, skipped=reason))
    return len(text.samples)


def _groups(texts: Sequence[_Text], most: int) -> Iterator[list[_Text]]:
    """Texts that go together: as many as have ``most`` samples, and one at least."""
    group: list[_Text] = []
    for text in texts:
        if group and sum(len(other.samples) for other in group) + len(text.samples) > most:
            yield group
            group = []
        group.append(text)
    if group:
        yield group


def _write(
    engine: Engine,
    group: Sequence[_Text],
    params: SamplingParams,
    found: Callable[[Summary], None],
    tell: OnProgress,
) -> None:
    """The summaries of some texts: half of the work is to read them, half to write."""
    told: set[int] = set()

    def note(summary: Summary) -> None:
        told.add(summary.number)
        found(summary)

    try:
        _read_and_answer(engine, group, params, note, tell)
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        for text in group:
            missing = [each for each in text.samples if each[0].number not in told]
            _skip(_Text(text.ids, missing), "out of memory", found)


def _read_and_answer(
    engine: Engine,
    group: Sequence[_Text],
    params: SamplingParams,
    found: Callable[[Summary], None],
    tell: OnProgress,
) -> None:
    read = [0] * len(group)

    def reading(i: int, event: Event) -> None:
        if isinstance(event, Progress):
            read[i] = event.read
            tell(sum(read) / sum(text.ids.size for text in group) / 2)

    nothing = SamplingParams(max_tokens=0, temperature=0.0)
    ends = engine.complete([Request([text.ids], nothing, keep=True) for text in group], reading)
    asked = [
        (sample, text.ids.size + question.size, Request([question], params, context=end.end.reader))
        for text, end in zip(group, ends, strict=True)
        for sample, question in text.samples
    ]
    written, tokens = [""] * len(asked), [0] * len(asked)

    def writing(i: int, event: Event) -> None:
        if isinstance(event, Piece):
            written[i] += event.text
            tokens[i] += len(event.tokens)
            tell(0.5 + sum(tokens) / (params.max_tokens or 1) / len(asked) / 2)
        elif isinstance(event, End) and event.error is None and event.finish != "cancelled":
            (sample, prompt, _), text = asked[i], written[i].strip()
            scores: dict[str, Any] = score(text, sample.references)
            facts = sample.number, sample.document, prompt, event.new_tokens, event.finish, text
            found(Summary(*facts, **scores))

    engine.complete([request for _, _, request in asked], writing)

"""HumanEval: programs completed by a model, judged by running their tests (Chen et al., 2021; arXiv 2107.03374)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from samba_lm.data.sources import PACKED_SUFFIXES
from samba_lm.errors import UserError
from samba_lm.eval.harness.answers import Answers
from samba_lm.eval.harness.run import Metric, Score
from samba_lm.eval.harness.sandbox import Outcome, run_programs
from samba_lm.eval.harness.writing import Prompt, write
from samba_lm.eval.intervals import mean_interval, wilson
from samba_lm.eval.records import read_records
from samba_lm.generation.params import SamplingParams
from samba_lm.model import SambaLM
from samba_lm.tokenizer import Tokenizer

OnProgress = Callable[[float], None]

FILE = Path("humaneval", "HumanEval.jsonl")
STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""What ends a completed function: the next thing at the margin."""
TEMPERATURE, TOP_P = 0.2, 0.95
"""Of the paper."""
MAX_TOKENS = 1024
KS = (1, 10, 100)


@dataclass(frozen=True)
class Problem:
    """A function's head, to be completed, and its tests."""

    name: str
    prompt: str
    entry_point: str
    test: str

    def program(self, completion: str) -> str:
        """What is run: it ends without an error where the completion is right."""
        return f"{self.prompt}{completion}\n{self.test}\ncheck({self.entry_point})\n"


@dataclass(frozen=True)
class Attempt:
    """A completion and what came of it."""

    problem: str
    completion: str
    passed: bool
    why: str


@dataclass(frozen=True)
class Problems:
    """The problems of a data folder, and the sha256 of their file."""

    each: tuple[Problem, ...]
    sha256: str

    @classmethod
    def of(cls, data: Path) -> Problems:
        """Raises UserError where the file is absent, saying where to put it, or holds something else."""
        stem = data / FILE
        path = next((path for end in ("", *PACKED_SUFFIXES) if (path := Path(f"{stem}{end}")).is_file()), None)
        if path is None:
            raise UserError(f"The data of humaneval is absent: put it at {stem} (JSON lines; packed if you like).")
        records = read_records(path)
        names = ("task_id", "prompt", "entry_point", "test")
        each = tuple(Problem(*(record.text(name) for name in names)) for record in records.rows)
        bad = next((one for one in each if not one.entry_point.isidentifier()), None)
        if bad is not None:
            raise UserError(f"{path}: entry_point of {bad.name} is no name of a function.")
        return cls(each, records.sha256)


def measure(
    model: SambaLM,
    tokenizer: Tokenizer,
    problems: Problems,
    *,
    samples: int = 10,
    limit: int | None = None,
    seed: int = 0,
    max_tokens: int = MAX_TOKENS,
    seconds: float = 10.0,
    progress: OnProgress | None = None,
    answers: Answers | None = None,
) -> tuple[Score, list[Attempt]]:
    """Complete each problem ``samples`` times, run the programs, and count.

    What the model wrote is run in a sandbox; see ``sandbox.py`` for what that keeps out.

    Args:
        limit: problems at most, the first ones.
        seconds: a program may take.
        progress: told the share that is done; writing is the most of it.
        answers: keeps what the model writes, and knows some already. The programs are run anew.
    """
    if samples < 1:
        raise UserError(f"samples is {samples}: it must be at least 1.")
    began = time.perf_counter()
    chosen = problems.each[:limit]
    prompts: list[Prompt] = []
    for problem in chosen:
        ids = tokenizer.encode(problem.prompt).tolist()
        for _ in range(samples):
            number = seed + len(prompts)
            params = SamplingParams(temperature=TEMPERATURE, top_p=TOP_P, max_tokens=max_tokens, stop=STOP, seed=number)
            prompts.append(Prompt(ids, params))
    tell = None if progress is None else lambda share: progress(0.95 * share)
    make = write if answers is None else answers.texts
    texts = make(model, tokenizer, prompts, progress=tell)
    tried = [(problem, texts[i * samples + j]) for i, problem in enumerate(chosen) for j in range(samples)]
    outcomes = run_programs([problem.program(text) for problem, text in tried], seconds=seconds)
    if progress is not None:
        progress(1.0)
    attempts = [
        Attempt(problem.name, text, outcome.passed, outcome.why)
        for (problem, text), outcome in zip(tried, outcomes, strict=True)
    ]
    right = [_passed(outcomes[i * samples : (i + 1) * samples]) for i in range(len(chosen))]
    metrics = tuple(_metric(right, samples, k) for k in KS if k <= samples)
    took = round(time.perf_counter() - began, 3)
    return Score("humaneval", len(chosen), 0, f"{samples} samples", metrics, {}, problems.sha256, took), attempts


def pass_at_k(total: int, right: int, k: int) -> float:
    """The probability that one of ``k`` of ``total`` samples, drawn without putting back, is among the ``right`` ones:
    the unbiased estimate of pass@k (equation 1 of arXiv 2107.03374)."""
    if not 0 <= right <= total or not 1 <= k <= total:
        raise ValueError(f"{right} right of {total}, {k} drawn")
    return 1.0 - math.comb(total - right, k) / math.comb(total, k)


def _passed(outcomes: Sequence[Outcome]) -> int:
    return sum(outcome.passed for outcome in outcomes)


def _metric(right: Sequence[int], samples: int, k: int) -> Metric:
    """The mean over problems. Its interval is Student's over problems; Wilson's, where these do not differ."""
    values = [pass_at_k(samples, count, k) for count in right]
    mean = mean_interval(values)
    low, high = max(0.0, mean.low), min(1.0, mean.high)
    if samples == 1 or not high > low:
        low, high = wilson(round(mean.mean * len(values)), len(values))
    stderr = None
    if len(values) > 1:
        spread = math.fsum((value - mean.mean) ** 2 for value in values) / (len(values) - 1)
        stderr = math.sqrt(spread / len(values))
    return Metric(f"pass@{k}", "none", mean.mean, stderr, low, high)

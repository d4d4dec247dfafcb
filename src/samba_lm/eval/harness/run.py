"""One task of the harness on one model, and its scores with their 95% intervals."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from samba_lm.errors import UserError, did_you_mean, one_line
from samba_lm.eval.harness.tasks import TASKS, Written
from samba_lm.eval.intervals import mean_interval, student, wilson

if TYPE_CHECKING:
    from samba_lm.eval.harness.model import HarnessLM

SHARES = ("acc", "acc_norm", "exact_match")
"""Metrics that are shares of documents that were right."""
SEED = 1234
RESAMPLES = 1000
"""Draws for the standard errors of what has no formula for it."""


@dataclass(frozen=True)
class Metric:
    """A figure of a task: the harness's name and filter of it, and the ends of its 95% interval (None: not known).

    Of a share the interval is Wilson's, which does not shrink to a point where nothing was right; of a perplexity that
    of the mean loss; of other figures it is the harness's standard error times Student's t.
    """

    name: str
    filter: str
    value: float
    stderr: float | None
    low: float | None
    high: float | None

    @property
    def is_share(self) -> bool:
        """Whether it is a share of documents."""
        return self.name in SHARES or self.name.startswith("pass@")


@dataclass(frozen=True)
class Score:
    """What came of a task.

    Attributes:
        documents: that were measured.
        fewshot: worked examples in each prompt.
        version: of the harness's task.
        metrics: the first is the one that the paper's tables tell.
        parts: of a group of tasks, each task's first figure.
        data_sha256: of the files it was made from; None: the harness's own data.
        seconds: it took, since it was last gone on with.
    """

    task: str
    documents: int
    fewshot: int
    version: str
    metrics: tuple[Metric, ...]
    parts: dict[str, float]
    data_sha256: str | None
    seconds: float

    def row(self) -> dict[str, object]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def of(cls, row: dict[str, Any]) -> Score:
        """What :meth:`row` gave."""
        return cls(**{**row, "metrics": tuple(Metric(**metric) for metric in row["metrics"])})


@dataclass(frozen=True)
class Options:
    """How tasks are measured; what is None is as the task says.

    Attributes:
        limit: documents of a task at most (of each of a group's), the first ones.
        num_fewshot: worked examples in each prompt.
        chat: write prompts out by the checkpoint's chat template.
        seed: of drawn answers and worked examples; by default the harness's.
    """

    limit: int | None = None
    num_fewshot: int | None = None
    chat: bool = False
    seed: int = SEED

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit is {self.limit}: it must be at least 1.")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise UserError(f"num_fewshot is {self.num_fewshot}: it must be 0 or more.")


class Harness:
    """The harness's tasks: those in a folder that ``write_task`` wrote, or (None) all of its own, with data from the
    hub. It takes a minute to find all of its own."""

    def __init__(self, folder: Path | None) -> None:
        with _quietly():
            from lm_eval.tasks import TaskManager

            self._manager = TaskManager(
                include_path=None if folder is None else str(folder), include_defaults=not folder
            )

    def check(self, name: str) -> None:
        """Raise UserError where there is no such task."""
        if name not in self._manager.all_tasks:
            raise UserError(f"lm-evaluation-harness has no task {name!r}.{did_you_mean(name, self._manager.all_tasks)}")

    def run(
        self, lm: HarnessLM, name: str, options: Options, written: Written | None = None, samples: bool = False
    ) -> tuple[Score, dict[str, Any]]:
        """Measure a task (or a group of them): the scores, and all that the harness tells, as plain data.

        ``samples``: with each document's. Raises UserError where the data cannot be had, or there are too few worked
        examples.
        """
        if written is not None and options.num_fewshot is not None:
            written.check_examples(options.num_fewshot)
        began = time.perf_counter()
        with _quietly():
            from lm_eval.evaluator import evaluate

            try:
                tasks = self._manager.load([name])
            except (OSError, ImportError) as error:
                raise UserError(
                    f"The harness cannot load {name} ({one_line(str(error))[:200]}): give its data with --data-dir, or "
                    "connect to the network."
                ) from error
            for task in tasks["tasks"].values():
                _set_examples(task, options)
            random.seed(0)
            np.random.seed(options.seed)
            torch.manual_seed(options.seed)
            found = evaluate(
                lm,
                tasks,
                limit=options.limit,
                bootstrap_iters=RESAMPLES,
                log_samples=True,
                apply_chat_template=options.chat,
                fewshot_as_multiturn=options.chat,
            )
        assert found is not None, "there is one process"
        told = plain({**found, "config": {**lm.get_model_info(), **asdict(options)}})
        score = _score(name, told, written, time.perf_counter() - began)
        if not samples:
            del told["samples"]
        return score, told


def _set_examples(task: Any, options: Options) -> None:
    """How many worked examples prompts have, and which; as the harness's own command sets them."""
    if options.num_fewshot is not None and task.get_config("num_fewshot") != 0:  # 0: the task never has any
        task.set_config(key="num_fewshot", value=options.num_fewshot)
    elif task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=options.seed)


def _score(name: str, found: dict[str, Any], written: Written | None, seconds: float) -> Score:
    figures = found["results"][name]
    leaves = found.get("group_subtasks", {}).get(name) or [name]
    leaves = [
        leaf for leaf in found["n-samples"] if leaf == name or _under(leaf, name, found.get("group_subtasks", {}))
    ]
    documents = sum(int(found["n-samples"][leaf]["effective"]) for leaf in leaves)
    metrics = []
    for key, value in figures.items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = figures.get(f"{metric}_stderr,{filtered}")
        samples = [one for leaf in leaves for one in found["samples"][leaf] if one["filter"] == filtered]
        metrics.append(_metric(metric, filtered, float(value), stderr, documents, samples))
    wanted = TASKS[name].metric if name in TASKS else metrics[0].name if metrics else ""
    metrics.sort(key=lambda metric: metric.name != wanted)  # stable: the harness's order otherwise
    parts = {}
    if metrics and leaves != [name]:
        key = f"{metrics[0].name},{metrics[0].filter}"
        parts = {leaf: float(found["results"][leaf][key]) for leaf in leaves if key in found["results"][leaf]}
    return Score(
        task=name,
        documents=documents,
        fewshot=int(found["n-shot"].get(leaves[0], 0)),
        version=str(found["versions"].get(name, "")),
        metrics=tuple(metrics),
        parts=parts,
        data_sha256=None if written is None else written.sha256,
        seconds=round(seconds, 3),
    )


def _under(task: str, group: str, children: dict[str, list[str]]) -> bool:
    return any(child == task or _under(task, child, children) for child in children.get(group, ()))


def _metric(name: str, filtered: str, value: float, stderr: Any, documents: int, samples: list[Any]) -> Metric:
    known = float(stderr) if isinstance(stderr, int | float) else None
    low = high = None
    if name in SHARES and documents and 0 <= value <= 1:
        low, high = wilson(round(value * documents), documents)
    elif name == "perplexity" and documents > 1:  # of documents' log-likelihoods, whose mean has an interval
        loss = mean_interval([-float(one[name]) for one in samples])
        low, high = _exp(loss.low), _exp(loss.high)
    elif known is not None and documents > 1:
        reach = student(documents - 1) * known
        low, high = value - reach, value + reach
    return Metric(name, filtered, value, known, low, high)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def plain(found: dict[str, Any]) -> dict[str, Any]:
    """The harness's results as JSON has them."""
    from lm_eval.utils import handle_non_serializable

    told: dict[str, Any] = json.loads(json.dumps(found, default=handle_non_serializable))
    return told


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep what the harness and its packages say from the terminal, but for errors: progress is told elsewhere."""
    names = ("lm_eval", "datasets", "evaluate", "fsspec", "httpx", "huggingface_hub", "urllib3")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)

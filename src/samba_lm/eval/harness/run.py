"""One task of the harness on one model, and its scores with their 95% intervals."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samba_lm.errors import UserError, did_you_mean, one_line
from samba_lm.eval.harness.tasks import TASKS, Written
from samba_lm.eval.intervals import student, wilson

if TYPE_CHECKING:
    from samba_lm.eval.harness.model import HarnessLM

SHARES = ("acc", "acc_norm", "exact_match")
"""Metrics that are shares of documents that were right."""
RESAMPLES = 1000
"""Draws for the standard errors of what has no formula for it."""


@dataclass(frozen=True)
class Metric:
    """A figure of a task: the harness's name and filter of it, and the ends of its 95% interval (None: not known).

    Of a share the interval is Wilson's, which does not shrink to a point where nothing was right; of other figures it
    is the harness's standard error times Student's t.
    """

    name: str
    filter: str
    value: float
    stderr: float | None
    low: float | None
    high: float | None


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
        seed: of drawn answers and worked examples.
    """

    limit: int | None = None
    num_fewshot: int | None = None
    chat: bool = False
    seed: int = 0

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
        if written is not None and (options.num_fewshot or 0) > written.examples:
            raise UserError(
                f"{name} has {written.examples} worked examples to show, not {options.num_fewshot}: ask for fewer with "
                "--num-fewshot, or put a train.jsonl into its folder."
            )
        began = time.perf_counter()
        with _quietly():
            from lm_eval import simple_evaluate

            try:
                found = simple_evaluate(
                    lm,
                    tasks=[name],
                    task_manager=self._manager,
                    limit=options.limit,
                    num_fewshot=options.num_fewshot,
                    apply_chat_template=options.chat,
                    bootstrap_iters=RESAMPLES,
                    log_samples=samples,
                    random_seed=options.seed,
                    numpy_random_seed=options.seed,
                    torch_random_seed=options.seed,
                    fewshot_random_seed=options.seed,
                )
            except (OSError, ImportError) as error:
                if isinstance(error, UserError):
                    raise
                raise UserError(
                    f"The harness cannot load {name} ({one_line(str(error))[:200]}): give its data with --data-dir, or "
                    "connect to the network."
                ) from error
        assert found is not None, "there is one process"
        return _score(name, found, written, time.perf_counter() - began), plain(found)


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
        metrics.append(_metric(metric, filtered, float(value), figures.get(f"{metric}_stderr,{filtered}"), documents))
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


def _metric(name: str, filtered: str, value: float, stderr: Any, documents: int) -> Metric:
    known = float(stderr) if isinstance(stderr, int | float) else None
    low = high = None
    if name in SHARES and 0 <= value <= 1:
        low, high = wilson(round(value * documents), documents)
    elif known is not None and documents > 1:
        reach = student(documents - 1) * known
        low, high = value - reach, value + reach
    return Metric(name, filtered, value, known, low, high)


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

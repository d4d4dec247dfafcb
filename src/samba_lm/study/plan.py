"""What a study still has to do: its trainings as a function of what is already measured. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

from samba_lm.config import ModelConfig
from samba_lm.data.shards import TokenDataset
from samba_lm.errors import UserError, did_you_mean
from samba_lm.study.record import Record, job_key
from samba_lm.study.study import Evaluation, Run, Study, StudyData
from samba_lm.train.recipe import Recipe

Stage = Literal["sweep", "final"]
STAGES: tuple[Stage, ...] = get_args(Stage)

FREE = (
    *("out", "log_every", "save_every", "keep", "tensorboard", "device", "eval_every"),
    *("micro_batch", "activation_checkpointing", "compile"),  # these change only rounding
)
"""Fields of [train] that may change without training again."""


PLACES = ("train", "val", "tokenizer", "cache", "cache_gb")
"""Fields of [data] that say where data are, not what they are."""


@dataclass(frozen=True)
class Job:
    """One training, and what is measured of it."""

    run: str
    stage: Stage
    lr: float
    seed: int
    recipe: Recipe
    config: ModelConfig
    fingerprint: str
    """sha256 of everything that decides the numbers."""
    evaluations: tuple[tuple[Evaluation, str], ...] = ()
    """Each with its fingerprint."""
    keep: bool = False

    @property
    def key(self) -> str:
        return job_key(self.run, self.stage, self.lr, self.seed)

    @property
    def steps(self) -> int:
        return self.recipe.train.total_steps

    @property
    def tokens(self) -> int:
        return self.steps * self.recipe.train.tokens_per_step

    @property
    def flops(self) -> float:
        """Of the training, forward passes only: for comparing jobs."""
        return self.config.flops_per_token(self.recipe.train.length) * self.tokens

    def trained(self, record: Record | None) -> bool:
        """Whether ``record`` is of this very training, and it came to its end."""
        return record is not None and record.fingerprint == self.fingerprint and record.steps == self.steps

    def missing(self, record: Record | None) -> list[tuple[Evaluation, str]]:
        """The evaluations that ``record`` does not hold."""
        held = {each.fingerprint for each in record.evaluations} if record is not None and self.trained(record) else ()
        return [(evaluation, mark) for evaluation, mark in self.evaluations if mark not in held]

    def settled(self, record: Record | None) -> bool:
        """Whether there is nothing left to do: all is measured, or it diverged, as it would again."""
        if record is None or record.fingerprint != self.fingerprint:
            return False
        return record.status == "diverged" or (record.status == "done" and not self.missing(record))

    def new_record(self, provenance: Mapping[str, object]) -> Record:
        """A record of nothing done yet."""
        return Record(
            run=self.run,
            stage=self.stage,
            lr=self.lr,
            seed=self.seed,
            fingerprint=self.fingerprint,
            status="failed",
            reason="not finished",
            recipe=self.recipe.to_dict(),
            config=self.config.to_dict(),
            parameters=self.config.parameters(),
            flops_per_token=self.config.flops_per_token(self.recipe.train.length),
            provenance=dict(provenance),
            started=now(),
        )


@dataclass(frozen=True)
class Waiting:
    """Whole trainings whose learning rate is not known yet."""

    run: str
    family: str
    """The run whose sweep is waited for."""
    jobs: tuple[Job, ...]
    """They, one for each seed, as they would be at the recipe's learning rate."""
    reason: str = ""
    """Why it will never be known."""


@dataclass(frozen=True)
class Plan:
    """The trainings known so far, done ones among them, and those that wait for a sweep."""

    jobs: tuple[Job, ...]
    waiting: tuple[Waiting, ...] = ()


@dataclass
class Planner:
    """Makes the plan of a study anew from the records there are; the same records give the same plan."""

    study: Study
    recipes: dict[str, Recipe]
    out: Path
    data: StudyData = field(default_factory=StudyData)
    stages: tuple[Stage, ...] = STAGES
    only: frozenset[str] = frozenset()
    """Runs to do, and the sweeps these need; empty: all."""

    def __post_init__(self) -> None:
        for name in self.only:
            self.study.run(name)
        self._jobs: dict[str, Job] = {}

    def runs(self) -> list[Run]:
        """The runs that are asked for."""
        return [run for run in self.study.runs if not self.only or run.name in self.only]

    def data_of(self) -> set[str]:
        """Names of the runs whose data is read."""
        return {name for run in self.runs() for name in (run.name, self.study.family(run).name)}

    def plan(self, records: Mapping[str, Record]) -> Plan:
        """All jobs that follow from ``records``."""
        jobs: dict[str, Job] = {}
        waiting = []
        for run in self.runs():
            family = self.study.family(run)
            lr, reason = self._decided(family)
            if lr is None:
                sweep = self._sweep(family, records)
                lr, reason = best_rate(sweep, records)
                if "sweep" in self.stages:
                    jobs |= {job.key: job for job in sweep}
                elif lr is None and not reason:
                    reason = f"{family.name}'s sweep is not done: add it with --stage sweep,final"
            if "final" not in self.stages:
                continue
            if lr is None:
                waiting.append(Waiting(run.name, family.name, self._finals(run, self._own_rate(run)), reason))
            else:
                jobs |= {job.key: job for job in self._finals(run, lr)}
        return Plan(tuple(jobs.values()), tuple(waiting))

    def _decided(self, family: Run) -> tuple[float | None, str]:
        if family.lr is not None:
            return family.lr, ""
        if self.study.sweep is None:
            return self._own_rate(family), ""
        return None, ""

    def _own_rate(self, run: Run) -> float:
        return self.recipes[run.name].train.lr

    def _sweep(self, family: Run, records: Mapping[str, Record]) -> list[Job]:
        """The sweep's jobs, with those beyond its grid that earlier ones ask for."""
        assert self.study.sweep is not None
        rates = sorted(self.study.sweep.lrs)
        factor = max(rates[-1] / rates[-2], 1.1), max(rates[1] / rates[0], 1.1)
        jobs = [self._short(family, lr) for lr in rates]
        for _ in range(self.study.sweep.extend):
            best, _ = best_rate(jobs, records)
            if best == jobs[-1].lr:
                jobs.append(self._short(family, round_rate(best * factor[0])))
            elif best == jobs[0].lr:
                jobs.insert(0, self._short(family, round_rate(best / factor[1])))
            else:
                break
        return jobs

    def _short(self, run: Run, lr: float) -> Job:
        sweep = self.study.sweep
        assert sweep is not None
        steps = max(1, round(sweep.budget * self.recipes[run.name].train.total_steps))
        return self._job(run, "sweep", lr, sweep.seed, steps)

    def _finals(self, run: Run, lr: float) -> tuple[Job, ...]:
        steps = self.recipes[run.name].train.total_steps
        return tuple(self._job(run, "final", lr, seed, steps) for seed in self.study.seeds_of(run))

    def _job(self, run: Run, stage: Stage, lr: float, seed: int, steps: int) -> Job:
        key = job_key(run.name, stage, lr, seed)
        if key not in self._jobs:
            data = self.recipes[run.name].to_dict()
            data["train"] |= {"steps": steps, "tokens": None, "lr": lr, "seed": seed, "out": str(self.out / key)}
            # Every step is kept for the loss curve; it is a line of text.
            data["train"] |= {"log_every": 1, "tensorboard": False, "keep": 1}
            recipe = Recipe.from_dict(data, source=f"Run {run.name}")
            config = recipe.model.config(self._vocab(recipe))
            keep = run.keep and stage == "final" and seed == self.study.seeds_of(run)[0]
            self._jobs[key] = Job(
                *(run.name, stage, lr, seed, recipe, config),
                fingerprint=self._fingerprint(recipe, config),
                evaluations=self._evaluations(config) if stage == "final" else (),
                keep=keep,
            )
        return self._jobs[key]

    def _vocab(self, recipe: Recipe) -> int:
        name, path = next(iter(recipe.data.sources.items()))
        return self.data.open(path, name).meta.vocab_size

    def _fingerprint(self, recipe: Recipe, config: ModelConfig) -> str:
        section = recipe.data
        # What stands at its default is left out, so that a setting that recipes learn later changes no earlier run's.
        told = recipe.model_dump(mode="json", exclude_defaults=True)
        train = {name: value for name, value in told["train"].items() if name not in FREE}
        begun = {name: value for name, value in told.get("model", {}).items() if name == "slow_channels"}
        begun |= {name: told[name] for name in ("lora",) if name in told}
        data = {name: value for name, value in told.get("data", {}).items() if name not in PLACES}
        for name, source in data.get("mixture", {}).items():
            source["path"] = described(self.data.open(section.mixture[name].path, f"data.mixture.{name}"))
        data["train"] = None if section.mixture else described(self.data.open(section.train, "data.train"))
        held_out = {name: described(self.data.open(path, "data.val")) for name, path in section.validation.items()}
        data["val"] = held_out.get("", held_out or None)
        return _sha256({"model": config.fingerprint(), **begun, "data": data, "train": train})

    def _evaluations(self, config: ModelConfig) -> tuple[tuple[Evaluation, str], ...]:
        found = []
        for evaluation in self.study.evaluations:
            lengths = evaluation.lengths_for(config.constant_state)
            if not lengths:
                continue
            settings = evaluation.model_dump(
                mode="json", exclude={"data", "title", "apart", "max_length_growing"}, exclude_defaults=True
            )
            settings["measured"] = lengths
            settings["data"] = described(self.data.open(evaluation.data, f"Evaluation {evaluation.name}", True))
            found.append((evaluation, _sha256(settings)))
        return tuple(found)


def best_rate(jobs: Sequence[Job], records: Mapping[str, Record]) -> tuple[float | None, str]:
    """The learning rate of the lowest validation loss once all ``jobs`` have ended, or None and why there is none."""
    ended = [(job, records.get(job.key)) for job in jobs]
    if not all(job.settled(record) for job, record in ended):
        failed = [job.key for job, record in ended if record is not None and record.status == "failed"]
        return None, f"{failed[0]} failed" if failed else ""
    losses = {job.lr: record.val_loss for job, record in ended if record is not None and record.status == "done"}
    finite = {lr: loss for lr, loss in losses.items() if loss is not None}
    if not finite:
        return None, "every learning rate of the sweep diverged: try lower ones"
    return min(finite, key=lambda lr: finite[lr]), ""


def round_rate(lr: float) -> float:
    """Six digits, so that a rate is what its file's name says."""
    return float(f"{lr:g}")


def described(dataset: TokenDataset) -> str:
    """sha256 of a data set's description, which holds the sha256 of every shard."""
    return hashlib.sha256(dataset.meta.model_dump_json().encode()).hexdigest()


def parse_stages(text: str) -> tuple[Stage, ...]:
    """``"sweep,final"``. Raises UserError."""
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word not in STAGES:
            raise UserError(f"Unknown stage {word!r}.{did_you_mean(word, STAGES)}")
    return tuple(stage for stage in STAGES if stage in words)


class Estimates:
    """How long a job takes, from those that are done."""

    def __init__(self, records: Mapping[str, Record]) -> None:
        self._steps: dict[str, list[float]] = {}
        self._beside: dict[str, list[float]] = {}
        self._evaluations: dict[str, list[float]] = {}
        for record in records.values():
            if record.status != "done" or not record.tokens:
                continue
            measuring = sum(each.seconds for each in record.evaluations)
            for name in (record.run, ""):
                work = record.flops_per_token * record.tokens
                self._steps.setdefault(name, []).append(record.train_seconds / work)
                self._beside.setdefault(name, []).append(max(0.0, record.seconds - record.train_seconds - measuring))
                if record.evaluations:
                    self._evaluations.setdefault(name, []).append(measuring)

    def seconds(self, job: Job) -> float | None:
        """Steps, what comes beside them and evaluations; None where nothing like it has been measured."""
        rate = _median(self._steps, job.run)
        if rate is None:
            return None
        measuring = _median(self._evaluations, job.run) if job.evaluations else None
        return rate * job.flops + (_median(self._beside, job.run) or 0.0) + (measuring or 0.0)

    def weight(self, job: Job) -> float:
        """For comparing jobs among each other: seconds, or what stands for them."""
        return self.seconds(job) or job.flops / 1e12


def _median(measured: Mapping[str, list[float]], run: str) -> float | None:
    values = measured.get(run) or measured.get("")
    return statistics.median(values) if values else None


def priority(job: Job, plan: Plan, estimates: Estimates) -> float:
    """How long the chain of jobs is that begins with it: a sweep's comes before the whole trainings it decides."""
    decided = [each for waiting in plan.waiting if waiting.family == job.run for each in waiting.jobs]
    after = max(map(estimates.weight, decided), default=0.0) if job.stage == "sweep" else 0.0
    return estimates.weight(job) + after


def now() -> str:
    """UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

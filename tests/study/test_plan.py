"""The plan as a function of what is measured, without any training."""

from __future__ import annotations

from pathlib import Path

import pytest

from samba_lm.errors import UserError
from samba_lm.study.plan import Estimates, Job, Planner, Stage, parse_stages, priority
from samba_lm.study.record import Measured, Record
from samba_lm.study.study import check_recipes, read_study


def planner(study: Path, stages: tuple[Stage, ...] = ("sweep", "final"), *only: str) -> Planner:
    read, recipes = read_study(study)
    check_recipes(read, recipes)
    return Planner(read, recipes, study / "out", stages=stages, only=frozenset(only))


def ended(job: Job, val_loss: float | None = 3.0, status: str = "done") -> Record:
    """The record of a job that went as it should."""
    record = job.new_record({})
    record.status = status  # type: ignore[assignment]
    record.val_loss, record.steps, record.tokens = val_loss, job.steps, job.tokens
    record.train_seconds, record.seconds = 10.0, 12.0
    record.evaluations = [
        Measured(name=evaluation.name, fingerprint=mark, seconds=1.0, results=[])
        for evaluation, mark in job.evaluations
    ]
    return record


def do(plans: Planner, records: dict[str, Record], **losses: float) -> None:
    """End every sweep of the plan: ``lr0.001=2.5`` names the validation losses, others have 3."""
    for job in plans.plan(records).jobs:
        if job.stage == "sweep" and job.key not in records:
            records[job.key] = ended(job, losses.get(f"lr{job.lr:g}".replace(".", "_"), 3.0))


def test_sweeps_come_first_and_decide_the_learning_rate(study: Path) -> None:
    plans = planner(study)
    before = plans.plan({})
    assert [job.key for job in before.jobs] == [
        "samba/sweep-lr0.001-seed0",
        "samba/sweep-lr0.004-seed0",
        "llama/final-lr0.004-seed0",
    ]
    assert [(each.run, [job.seed for job in each.jobs], each.family) for each in before.waiting] == [
        ("samba", [0, 1], "samba"),
        ("mamba", [0], "samba"),
    ]
    assert [job.steps for job in before.jobs] == [6, 6, 12]
    assert before.jobs[0].evaluations == ()
    records: dict[str, Record] = {}
    do(plans, records, lr0_001=2.5)
    after = plans.plan(records)
    assert {job.key for job in after.jobs if job.stage == "final"} == {
        "samba/final-lr0.001-seed0",
        "samba/final-lr0.001-seed1",
        "llama/final-lr0.004-seed0",
        "mamba/final-lr0.001-seed0",
    }
    assert after.waiting == ()
    assert [job.keep for job in after.jobs if job.run == "samba" and job.stage == "final"] == [True, False]
    assert all(job.recipe.train.out == str(study / "out" / job.key) for job in after.jobs)


def test_a_sweep_goes_on_while_the_best_is_at_its_end(study: Path) -> None:
    path = study / "study.toml"
    path.write_text(path.read_text().replace("budget = 0.5", "budget = 0.5\nextend = 2"))
    plans = planner(study)
    records: dict[str, Record] = {}
    do(plans, records, lr0_004=2.5)
    assert [job.lr for job in plans.plan(records).jobs if job.stage == "sweep"] == [1e-3, 4e-3, 1.6e-2]
    assert plans.plan(records).waiting
    do(plans, records, lr0_016=2.4)
    assert [job.lr for job in plans.plan(records).jobs if job.stage == "sweep"] == [1e-3, 4e-3, 1.6e-2, 6.4e-2]
    do(plans, records, lr0_064=2.9)
    assert {job.lr for job in plans.plan(records).jobs if job.stage == "final" and job.run == "samba"} == {1.6e-2}
    lower: dict[str, Record] = {}
    do(plans, lower, lr0_001=2.5)
    assert [job.lr for job in plans.plan(lower).jobs if job.stage == "sweep"] == [2.5e-4, 1e-3, 4e-3]


def test_what_diverged_is_not_the_best_and_what_failed_is_waited_for(study: Path) -> None:
    plans = planner(study)
    low, high, _ = plans.plan({}).jobs
    records = {low.key: ended(low, 3.0), high.key: ended(high, 1.0, status="diverged")}
    assert {job.lr for job in plans.plan(records).jobs if job.run == "mamba"} == {1e-3}
    records[low.key] = ended(low, None, status="diverged")
    assert "every learning rate of the sweep diverged" in plans.plan(records).waiting[0].reason
    records[low.key] = ended(low, None, status="failed")
    assert plans.plan(records).waiting[0].reason == f"{low.key} failed"


def test_only_and_stages(study: Path) -> None:
    assert {job.run for job in planner(study, ("sweep", "final"), "mamba").plan({}).jobs} == {"samba"}
    assert planner(study, ("sweep", "final"), "mamba").data_of() == {"samba", "mamba"}
    assert all(job.stage == "sweep" for job in planner(study, ("sweep",)).plan({}).jobs)
    final = planner(study, ("final",)).plan({})
    assert [job.run for job in final.jobs] == ["llama"]
    assert "--stage sweep,final" in final.waiting[0].reason
    with pytest.raises(UserError, match="Did you mean 'mamba'"):
        planner(study, ("sweep",), "mambo")
    assert parse_stages("final, sweep") == ("sweep", "final")
    with pytest.raises(UserError, match="Did you mean 'sweep'"):
        parse_stages("swepp")


def replaced(study: Path, file: str, old: str, new: str) -> None:
    path = study / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("file", "old", "new", "again"),
    [
        ("base.toml", "steps = 12", "steps = 14", True),
        ("base.toml", "[train]", "[train]\nclip = 0.5", True),
        ("base.toml", "d_model = 16", "d_model = 32", True),
        ("base.toml", "[train]", "[train]\nmicro_batch = 1", False),
        ("base.toml", "save_every = 0", "save_every = 2", False),
        ("study.toml", 'title = "Windows of held-out text"', "", False),
        ("study.toml", "max_length_growing = 64", "max_length_growing = 32", True),
    ],
)
def test_what_is_done_again(study: Path, file: str, old: str, new: str, again: bool) -> None:
    def llama() -> Job:
        return next(job for job in planner(study).plan({}).jobs if job.run == "llama")

    record = ended(llama())
    assert llama().settled(record)
    replaced(study, file, old, new)
    assert llama().settled(record) is not again


def test_a_new_evaluation_alone_is_missing(study: Path) -> None:
    before = next(job for job in planner(study).plan({}).jobs if job.run == "llama")
    record = ended(before)
    more = '[[evaluations]]\nname = "more"\ndata = "DATA"\nlengths = [16]\n\n[[runs]]\nname = "samba"'
    replaced(study, "study.toml", '[[runs]]\nname = "samba"', more.replace("DATA", before.evaluations[0][0].data))
    after = next(job for job in planner(study).plan({}).jobs if job.run == "llama")
    assert after.trained(record)
    assert not after.settled(record)
    assert [evaluation.name for evaluation, _ in after.missing(record)] == ["more"]


def test_estimates_and_priorities(study: Path) -> None:
    plans = planner(study)
    plan = plans.plan({})
    low, high, llama = plan.jobs
    assert Estimates({}).seconds(low) is None
    assert priority(low, plan, Estimates({})) > priority(llama, plan, Estimates({}))
    estimates = Estimates({low.key: ended(low)})
    assert estimates.seconds(high) == pytest.approx(12.0)
    assert estimates.seconds(llama) == pytest.approx(2.0 + 10.0 * llama.flops / low.flops)
    with_evaluation = Estimates({llama.key: ended(llama)})
    assert with_evaluation.seconds(llama) == pytest.approx(12.0)


def test_a_recipe_that_says_nothing_of_its_model_has_a_plan(study: Path) -> None:
    """It trains the default, and what stands at its default is left out of a fingerprint."""
    base = study / "base.toml"
    base.write_text(base.read_text().replace("overrides = {d_model = 16}", ""))
    (study / "samba.toml").write_text('base = "base.toml"\n')
    jobs = planner(study).plan({}).jobs
    assert jobs[0].config.name == "samba-tiny"
    assert len({job.fingerprint for job in jobs}) == len(jobs)

"""Jobs done in this process: what a record holds, and what is taken up again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest

from samba_lm import checkpoint
from samba_lm.errors import UserError
from samba_lm.eval.perplexity import perplexity
from samba_lm.study.plan import Job, Planner
from samba_lm.study.record import Record, read_record, read_records, record_path, tail_mean, thin
from samba_lm.study.study import read_study
from samba_lm.study.worker import Stopped, Work, open_data, same_text
from samba_lm.train.checkpoints import list_checkpoints


def jobs(study: Path) -> dict[str, Job]:
    read, recipes = read_study(study)
    plans = Planner(read, recipes, study / "out")
    return {job.key: job for job in plans.plan(read_records(study / "out")).jobs}


def quiet(event: Mapping[str, object]) -> None:
    pass


def do(job: Job, study: Path) -> Record:
    return Work(job, study / "out", {"torch": "x"}, quiet).run()


class After:
    """Says stop when it was asked so many times."""

    def __init__(self, times: int) -> None:
        self.times = times

    def __call__(self) -> bool:
        self.times -= 1
        return self.times < 0


def test_a_sweeps_record(study: Path) -> None:
    job = jobs(study)["samba/sweep-lr0.004-seed0"]
    record = do(job, study)
    assert record == read_record(study / "out" / "samba" / "sweep-lr0.004-seed0.json")
    assert (record.status, record.reason, record.steps, record.tokens) == ("done", "", 6, 6 * 64)
    assert record.parameters == job.config.parameters()
    assert record.recipe["train"]["lr"] == 4e-3
    assert [step for step, _ in record.curve] == [1, 2, 3, 4, 5, 6]
    assert record.val_curve == [(6, record.val_loss)]
    assert record.train_loss == record.curve[-1][1]
    assert record.val_loss is not None
    assert record.val_loss < math.log(320)
    assert record.tokens_per_s is not None
    assert 0 < record.train_seconds < record.seconds
    assert record.device == "cpu"
    assert record.provenance == {"torch": "x"}
    assert record.evaluations == []
    assert not Path(job.recipe.train.out).exists(), "weights of a sweep are not kept"


def test_what_is_measured_is_what_the_weights_give(study: Path) -> None:
    for name in ("samba/sweep-lr0.001-seed0", "samba/sweep-lr0.004-seed0"):
        do(jobs(study)[name], study)
    job = next(job for key, job in jobs(study).items() if key.startswith("samba/final") and job.keep)
    record = do(job, study)
    folder = Path(job.recipe.train.out)
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000012"]
    assert not list(folder.rglob("optimizer*")), "kept weights are there to be used, not to be trained on"
    model, _ = checkpoint.load(folder)
    wanted = perplexity(model, open_data(job.evaluations[0][0].data), [32, 64, 128])
    measured = record.evaluations[0].results
    assert [row["length"] for row in measured] == [32, 64, 128]
    assert [row["loss"] for row in measured] == pytest.approx([each.loss for each in wanted])
    assert sum(measured[0]["means"]) / len(measured[0]["means"]) == pytest.approx(measured[0]["loss"], abs=1e-5)


def test_an_interrupted_training_goes_on_and_ends_as_one_that_was_not(study: Path, tmp_path: Path) -> None:
    job = jobs(study)["llama/final-lr0.004-seed0"]
    with pytest.raises(Stopped):
        Work(job, study / "out", {}, quiet, stopping=After(5)).run()
    assert [path.name for path in list_checkpoints(Path(job.recipe.train.out))] == ["step-00000006"]
    assert not record_path(study / "out", job.key).exists()
    resumed = do(job, study)
    record_path(study / "out", job.key).unlink()
    whole = do(job, study)
    assert resumed.val_loss == whole.val_loss
    assert resumed.curve == whole.curve
    assert [row["loss"] for row in resumed.evaluations[0].results] == [
        row["loss"] for row in whole.evaluations[0].results
    ]


def test_an_interrupted_evaluation_does_not_train_again(study: Path) -> None:
    job = jobs(study)["llama/final-lr0.004-seed0"]
    with pytest.raises(Stopped):
        Work(job, study / "out", {}, quiet, stopping=After(job.steps)).run()
    before = read_record(record_path(study / "out", job.key))
    assert (before.status, before.evaluations) == ("trained", [])
    assert not job.settled(before)
    after = do(job, study)
    assert after.status == "done"
    assert (after.started, after.train_seconds) == (before.started, before.train_seconds)


def test_a_record_tells_how_the_training_shared_its_device(study: Path) -> None:
    """Also the part of it before a stop; what is measured later, in whatever company, changes nothing about it."""
    job = jobs(study)["llama/final-lr0.004-seed0"]
    with pytest.raises(Stopped):
        Work(job, study / "out", {}, quiet, stopping=After(5), shared=3).run()
    assert do(job, study).shared == 3
    record_path(study / "out", job.key).unlink()
    with pytest.raises(Stopped):
        Work(job, study / "out", {}, quiet, stopping=After(job.steps)).run()
    after = Work(job, study / "out", {}, quiet, shared=2).run()
    assert (after.status, after.shared) == ("done", 1)


def test_lengths_that_growing_models_skip(study: Path) -> None:
    record = do(jobs(study)["llama/final-lr0.004-seed0"], study)
    assert [row["length"] for row in record.evaluations[0].results] == [32, 64]


def test_a_loss_that_is_not_finite_diverges(study: Path) -> None:
    path = study / "study.toml"
    path.write_text(path.read_text().replace("lr = 4e-3", "lr = 1e30"))
    job = jobs(study)["llama/final-lr1e+30-seed0"]
    record = do(job, study)
    assert record.status == "diverged"
    assert "nan" in record.reason
    assert "checkpoint" not in record.reason
    assert job.settled(read_record(record_path(study / "out", job.key)))
    assert not Path(job.recipe.train.out).exists()


def test_what_the_user_can_mend_is_a_failure_told_in_a_line(study: Path) -> None:
    job = jobs(study)["llama/final-lr0.004-seed0"]
    out = Path(job.recipe.train.out)
    out.parent.mkdir(parents=True)
    out.with_name(out.name).mkdir()
    (out / "fingerprint").write_text(job.fingerprint)
    (out / "metrics.jsonl").mkdir()
    record = do(job, study)
    assert record.status == "failed"
    assert "metrics.jsonl is a folder" in record.reason
    (out / "metrics.jsonl").rmdir()
    assert do(job, study).status == "done"


def test_the_folder_of_another_recipe_is_not_continued(study: Path) -> None:
    job = jobs(study)["llama/final-lr0.004-seed0"]
    with pytest.raises(Stopped):
        Work(job, study / "out", {}, quiet, stopping=After(5)).run()
    base = study / "base.toml"
    base.write_text(base.read_text().replace("lr = 4e-3", "lr = 4e-3\nweight_decay = 0.0"))
    changed = jobs(study)["llama/final-lr0.004-seed0"]
    assert changed.fingerprint != job.fingerprint
    record = do(changed, study)
    assert (record.status, len(record.curve)) == ("done", 12)


def test_models_of_fewer_lengths_read_the_same_documents(study: Path) -> None:
    path = study / "study.toml"
    text = path.read_text()
    sizes = sorted(len(open_data(read_study(study)[0].evaluations[0].data).document(i)) for i in range(4))
    assert sizes[0] < sizes[-1]
    longest = sizes[-1]
    text = text.replace("lengths = [32, 64, 128]", f'protocol = "prefix"\nlengths = [32, 64, {longest}]')
    path.write_text(text)
    evaluation = read_study(study)[0].evaluations[0]
    documents, _ = same_text(evaluation, (32, 64))
    assert isinstance(documents, list)
    assert [len(document) for document in documents] == [size for size in sizes if size == longest]
    whole, _ = same_text(evaluation, (32, 64, longest))
    assert not isinstance(whole, list)
    # One that no document has is left out for all, and changes no other's documents.
    path.write_text(text.replace(f"64, {longest}]", f"64, {longest}, 999999]"))
    evaluation = read_study(study)[0].evaluations[0]
    again, _ = same_text(evaluation, (32, 64))
    assert [list(document) for document in again] == [list(document) for document in documents]
    whole, _ = same_text(evaluation, (32, 64, longest, 999999))
    assert not isinstance(whole, list)


@pytest.mark.parametrize(("key", "value"), [("length", "long"), ("means", [None]), ("loss", ""), ("positions", [])])
def test_a_record_whose_results_no_table_can_read_is_damaged(tmp_path: Path, key: str, value: object) -> None:
    row = {"length": 8, "positions": [1, 8], "windows": 1, "tokens": 7, "loss": None, "means": [], "note": "no room"}
    measured = {"name": "prefix", "fingerprint": "f", "seconds": 1.0, "results": [row]}
    record = {"run": "a", "stage": "final", "lr": 0.1, "seed": 0, "fingerprint": "f", "status": "done", "recipe": {}}
    record |= {"config": {}, "parameters": 1, "flops_per_token": 2.0, "started": "today", "evaluations": [measured]}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(record))
    assert read_record(path).evaluations[0].results == [row]
    row[key] = value
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"a\.json is no record of a study's run"):
        read_record(path)


def test_curves_are_thinned_by_means() -> None:
    assert thin([(1, 4.0), (2, 2.0), (3, 1.0), (4, 3.0)], 2) == [(2, 3.0), (4, 2.0)]
    assert thin([(1, 4.0)], 200) == [(1, 4.0)]
    assert thin([], 200) == []
    assert tail_mean([5.0] * 90 + [1.0] * 5) == 1.0
    assert tail_mean([3.0, 2.0]) == 2.0
    assert tail_mean([]) is None

"""``samba-lm study`` as people use it: real processes, several at once, really killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from samba_lm.cli.main import main
from samba_lm.errors import UserError
from samba_lm.files import TMP_MARK
from samba_lm.study.plan import Job, Planner
from samba_lm.study.process import Place
from samba_lm.study.record import read_records
from samba_lm.study.results import difference, read_results
from samba_lm.study.runner import Outcome, Runner, View, study_lock
from samba_lm.study.study import read_study
from samba_lm.study.tables import EMPTY, number

CPU = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def start(study: Path, *options: str) -> subprocess.Popen[str]:
    """The command as a process in its own session, as from another terminal."""
    return subprocess.Popen(
        [sys.executable, "-m", "samba_lm", "study", str(study), "--out", str(study / "out"), "--gpus", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **CPU, "COLUMNS": "200"},
        start_new_session=True,
    )


def saved_by(out: Path) -> int:
    """How many trainings have a checkpoint. (While one saves it has two, or a part of one.)"""
    return len({step.parent for step in out.glob("*/*/step-*") if TMP_MARK not in step.name})


def wait_for(what: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def long(study: Path) -> None:
    """Make trainings take longer than it takes to stop them."""
    base = study / "base.toml"
    base.write_text(
        base.read_text().replace("steps = 12", "steps = 100000").replace("save_every = 0", "save_every = 5")
    )


def test_a_whole_study_on_two_workers(study: Path, capfd: pytest.CaptureFixture[str], data: Path) -> None:
    text = (study / "study.toml").read_text()
    (study / "study.toml").write_text(text.replace("lrs = [1e-3, 4e-3]", "lrs = [1e-3, 4e-3, 1e30]"))
    command = ["study", str(study), "--out", str(study / "out"), "--gpus", "0", "--workers", "2"]
    with pytest.raises(SystemExit) as ended:
        main(command)
    said = capfd.readouterr().out
    assert ended.value.code == 1, said
    assert "diverged: samba/sweep-lr1e+30-seed0" in said
    records = read_records(study / "out")
    assert len(records) == 7, said
    assert [key for key, record in records.items() if record.status != "done"] == ["samba/sweep-lr1e+30-seed0"]
    assert {record.shared for record in records.values()} == {2}
    best = min((r for r in records.values() if r.stage == "sweep" and r.val_loss), key=lambda r: r.val_loss or 9.0)
    assert {r.lr for r in records.values() if r.stage == "final" and r.run != "llama"} == {best.lr}
    # Again: nothing is done a second time.
    before = {key: record.finished for key, record in records.items()}
    with pytest.raises(SystemExit):
        main(command)
    assert "begins" not in capfd.readouterr().out
    assert {key: record.finished for key, record in read_records(study / "out").items()} == before
    tables(study, capfd)


def tables(study: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What is made of the records."""
    out = study / "tables"
    main(["study", "table", str(study / "out"), "--out", str(out)])
    named = capfd.readouterr().out.split()
    assert sorted(path.name for path in out.iterdir()) == sorted(Path(name).name for name in named)
    text = (out / "tables.md").read_text(encoding="utf-8")
    results = read_results(study / "out")
    samba, llama, _ = results.found
    view = results.views[0]
    cell = samba.cells(view)[32]
    assert len(cell.losses) == 2
    low, high = cell.seeds or (0, 0)
    assert low < cell.perplexity < high
    assert number(cell.perplexity) in text
    costs = [line.split(" | ") for line in text.splitlines() if line.startswith("| Samba | ")]
    assert costs[0][7] == EMPTY, "the speed of a training that shared its device is nobody's"
    assert "| Samba | 421M | 10.06 |" in text
    assert "1e+30" in text
    assert "diverged" in text
    apart = difference(llama.cells(view)[32], cell)
    assert apart.mean == pytest.approx(llama.cells(view)[32].loss - cell.loss, abs=1e-4)
    assert apart.low < apart.mean < apart.high
    # A length that full attention is not asked for is a dash, and not a zero.
    row = next(line for line in text.splitlines() if line.startswith("| llama |") and "±" in line)
    assert row.endswith("| – |")  # noqa: RUF001 - a dash
    assert (out / "table-3-windows.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((out / "results.json").read_text())
    assert found["task"] == "study"
    assert len((out / "runs.csv").read_text().splitlines()) == 8
    assert len((out / "perplexity.csv").read_text().splitlines()) == 1 + 2 * 3 + 2 + 3
    # What people write into the README stays; what is between the marks is made anew.
    readme = out / "README.md"
    readme.write_text(readme.read_text().replace("To be written", "Nothing agrees").replace("all tables", "x"))
    main(["study", "table", str(study / "out"), "--out", str(out)])
    assert "Nothing agrees" in readme.read_text()
    assert "all tables" in readme.read_text()
    readme.write_text("mine")
    main(["study", "table", str(study / "out"), "--out", str(out)])
    assert readme.read_text() == "mine"


class Killing(View):
    """Kills its worker's process at the first step of the first job, as a machine without memory would."""

    def __init__(self, study: Path) -> None:
        self.study = study
        self.killed = ""

    def event(self, job: Job, event: Mapping[str, Any]) -> None:
        if event["event"] == "step" and not self.killed:
            self.killed = job.key
            os.kill(children(os.getpid())[0], signal.SIGKILL)


def children(parent: int) -> list[int]:
    """Processes that this one started and that are still there: the workers."""
    listed = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(parent)], capture_output=True, text=True)
    return [int(line.split()[0]) for line in listed.stdout.splitlines() if "samba_lm.study.worker" in line]


@pytest.mark.slow
def test_a_killed_worker_costs_its_job_alone_and_that_is_done_next_time(study: Path) -> None:
    (study / "base.toml").write_text((study / "base.toml").read_text().replace("steps = 12", "steps = 60"))

    def run(view: View) -> Outcome:
        read, recipes = read_study(study)
        return Runner(Planner(read, recipes, study / "out", stages=("sweep",)), [Place("here", CPU)], {}, view).run()

    view = Killing(study)
    outcome = run(view)
    assert [record.key for record in outcome.bad] == [view.killed]
    assert outcome.bad[0].status == "failed"
    assert "SIGKILL" in outcome.bad[0].reason
    done = [key for key, record in read_records(study / "out").items() if record.status == "done"]
    assert len(done) == 1, "the other rate of the sweep is done by a new process"
    again = run(View())
    assert not again.bad
    assert not again.left
    assert read_records(study / "out")[view.killed].status == "done"


@pytest.mark.slow
def test_a_killed_command_leaves_no_process_and_goes_on(study: Path) -> None:
    long(study)
    process = start(study, "--workers", "2", "--stage", "sweep")
    wait_for(lambda: saved_by(study / "out") == 2)
    workers = children(process.pid)
    assert len(workers) == 2
    process.kill()
    process.communicate()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 30)
    steps = {path.parent.name: path.name for path in (study / "out").glob("*/*/step-*")}
    again = start(study, "--workers", "2", "--stage", "sweep", "--seconds", "12")
    said, _ = again.communicate(timeout=120)
    assert again.returncode == 0, said
    assert "The time is over" in said
    after = {path.parent.name: path.name for path in (study / "out").glob("*/*/step-*")}
    assert after.keys() == steps.keys()
    assert all(after[name] > steps[name] for name in steps), (steps, after)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_with_a_checkpoint(study: Path, number: signal.Signals) -> None:
    long(study)
    process = start(study, "--workers", "2", "--stage", "sweep")
    wait_for(lambda: saved_by(study / "out") == 2)
    workers = children(process.pid)
    process.send_signal(number)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number, said
    assert "to do. To go on: samba-lm study" in said
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert len(list((study / "out").glob("*/*/step-*"))) == 2
    assert not read_records(study / "out"), "what was stopped has failed in nothing"


def test_a_folder_in_use_is_refused(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("samba_lm.study.runner.LOCK_PATIENCE", 0.1)
    with study_lock(study / "out", View()), pytest.raises(UserError, match="Another command works in"):  # noqa: SIM117
        with study_lock(study / "out", View()):
            pass


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--only", "mambo"], ["Did you mean 'mamba'"]),
        (["--stage", "swep"], ["Did you mean 'sweep'"]),
        (["--gpus", "99"], ["--gpus = 99", "0 for the CPU"]),
        (["--workers", "0"], ["--workers = 0"]),
        (["--seconds", "0"], ["--seconds = 0"]),
        (["--out", "."], ["something else than a study", "--out"]),
    ],
)
def test_mistakes_are_one_line(
    study: Path,
    options: list[str],
    words: list[str],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(study)
    assert main(["study", str(study), *options]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    for word in words:
        assert word in said


def test_a_study_that_is_not_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for argv in (["study", "tabel"], ["study", str(tmp_path)], ["study", "table", str(tmp_path)], ["study"]):
        assert main(argv) == 2
        assert capfd.readouterr().err.count("\n") == 1


def test_what_would_be_done(study: Path, capfd: pytest.CaptureFixture[str]) -> None:
    main(["study", str(study), "--out", str(study / "out"), "--dry-run"])
    said = capfd.readouterr().out
    assert said.count("to do") == 3
    assert said.count("waits for samba's sweep") == 3
    assert not (study / "out").exists()

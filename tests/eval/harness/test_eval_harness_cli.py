"""`samba-lm eval harness`: its tables and files, going on from them, and every mistake."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from samba_lm.checkpoint import create, save
from samba_lm.cli import eval_harness, results
from samba_lm.cli.main import main
from samba_lm.config import Attention, Mamba, ModelConfig
from samba_lm.tokenizer import ByteTokenizer

pytestmark = pytest.mark.filterwarnings("ignore")
PROBLEM = {
    "task_id": "T/0",
    "prompt": "def one():\n",
    "entry_point": "one",
    "test": "def check(candidate):\n    assert candidate() == 1\n",
}
DATA = ["--data-dir=data", "--device=cpu"]


@pytest.fixture
def folder(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None) -> Path:
    """The current folder, with the data, two checkpoints and a terminal of usual width."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)
    config = ModelConfig(
        name="tiny", d_model=16, vocab_size=257, layers=(Mamba(state=4), Attention(heads=2, window=16))
    )
    for seed, name in enumerate(("first", "second")):
        save(create(config, seed=seed), tmp_path / name, ByteTokenizer())
    (data / "humaneval").mkdir()
    (data / "humaneval" / "HumanEval.jsonl").write_text(json.dumps(PROBLEM) + "\n")
    return tmp_path


def _error(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    assert err.startswith("samba-lm: error: ")
    assert err.count("\n") == 1, err
    return err


def test_tasks_of_two_checkpoints(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval", reason="needs lm_eval (pip install 'samba-lm[harness]')")
    files = ["--json=a.json", "--csv=a.csv", "--figure=a.png", "--harness-output=theirs", "--task-files=kept"]
    words = ["eval", "harness", "first", "second", "--tasks=arc_easy,lambada,mmlu", *DATA, *files, "--log-samples"]
    assert main(words) == 0
    told = capsys.readouterr()
    assert told.err == ""
    assert "first: 3 tasks" in told.out
    assert "lambada_openai acc" in told.out
    record = json.loads(Path("a.json").read_text())
    assert record["task"] == "harness"
    assert record["settings"]["data"] == "folder"
    assert [model["name"] for model in record["models"]] == ["first", "second"]
    for model in record["models"]:
        tasks = {task["task"]: task for task in model["tasks"]}
        assert {name: task["documents"] for name, task in tasks.items()} == {
            "arc_easy": 6, "lambada_openai": 5, "mmlu": 6
        }  # fmt: skip
        assert {name: task["metrics"][0]["name"] for name, task in tasks.items()} == dict.fromkeys(tasks, "acc")
        for task in tasks.values():
            for metric in task["metrics"]:
                assert metric["low"] <= metric["value"] <= metric["high"]
        assert tasks["mmlu"]["parts"].keys() == {"mmlu_anatomy", "mmlu_philosophy"}
        assert tasks["mmlu"]["fewshot"] == 5
        mean = sum(tasks["mmlu"]["parts"].values()) / 2
        assert tasks["mmlu"]["metrics"][0]["value"] == pytest.approx(mean)
    rows = list(csv.DictReader(Path("a.csv").read_text().splitlines()))
    assert {(row["checkpoint"], row["task"], row["name"]) for row in rows} >= {
        ("first", "arc_easy", "acc_norm"), ("second", "lambada_openai", "perplexity")
    }  # fmt: skip
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")
    theirs = json.loads(Path("theirs/second/arc_easy.json").read_text())
    assert len(theirs["samples"]["arc_easy"]) == 6
    assert theirs["results"]["arc_easy"]["acc,none"] == tasks["arc_easy"]["metrics"][0]["value"]
    assert Path("kept/arc_easy.yaml").is_file()
    _goes_on(capsys)


def _goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    """What the file holds is not measured again, unless the data has changed; other settings are refused."""
    before = {task["task"]: task for task in json.loads(Path("a.json").read_text())["models"][0]["tasks"]}
    rows = Path("data/lambada/lambada_openai_test.jsonl").read_text().splitlines()
    Path("data/lambada/lambada_openai_test.jsonl").write_text("\n".join(rows[:4]) + "\n")
    more = ["eval", "harness", "first", "--tasks=arc_easy,lambada,piqa", *DATA, "--json=a.json"]
    assert main(more) == 0
    assert "1 of the tasks were measured before" in capsys.readouterr().out
    after = {task["task"]: task for task in json.loads(Path("a.json").read_text())["models"][0]["tasks"]}
    assert after["arc_easy"] == before["arc_easy"]
    assert after["lambada_openai"]["documents"] == 4
    assert after.keys() == {*before, "piqa"}
    assert main([*more, "--limit=2"]) == 2
    assert "limit = None, not 2" in _error(capsys)


def test_humaneval_asks_first(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It needs the harness for nothing."""
    monkeypatch.setattr(eval_harness, "find_spec", lambda name: None)
    words = ["eval", "harness", "first", "--tasks=humaneval", *DATA, "--code-samples=2", "--json=h.json"]
    assert main(words) == 2
    assert "add --run-code" in _error(capsys)
    monkeypatch.setattr("samba_lm.eval.harness.humaneval.MAX_TOKENS", 4)
    assert main([*words, "--run-code", "--harness-output=out", "--log-samples"]) == 0
    assert "pass@1" in capsys.readouterr().out
    (model,) = json.loads(Path("h.json").read_text())["models"]
    assert model["tasks"][0]["metrics"][0] | {"low": 0, "high": 0, "stderr": None} == {
        "name": "pass@1", "filter": "none", "value": 0.0, "stderr": None, "low": 0, "high": 0
    }  # fmt: skip
    samples = json.loads(Path("out/first/humaneval.json").read_text())["samples"]
    assert [sample["passed"] for sample in samples] == [False, False]


def test_an_interrupted_run_keeps_what_it_has(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="needs lm_eval (pip install 'samba-lm[harness]')")
    from samba_lm.eval.harness.run import Harness

    own = Harness.run

    def stop(self, lm, name, *more):  # type: ignore[no-untyped-def]
        if name == "piqa":
            raise KeyboardInterrupt
        return own(self, lm, name, *more)

    monkeypatch.setattr(Harness, "run", stop)
    words = ["eval", "harness", "first", "--tasks=winogrande,piqa", *DATA, "--json=a.json"]
    assert main(words) == 130
    assert results.STOPPED in capsys.readouterr().out
    assert [task["task"] for task in json.loads(Path("a.json").read_text())["models"][0]["tasks"]] == ["winogrande"]
    monkeypatch.setattr(Harness, "run", own)
    assert main(words) == 0
    assert "1 of the tasks were measured before" in capsys.readouterr().out


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """[how many answers were kept, after how many a run is interrupted]."""
    from samba_lm.eval.harness.answers import Answers

    own, counts = Answers._add, [0, 1 << 30]

    def add(self: Answers, name: str, answer: object) -> None:
        if counts[0] == counts[1]:
            raise KeyboardInterrupt
        own(self, name, answer)
        counts[0] += 1

    monkeypatch.setattr(Answers, "_add", add)
    return counts


@pytest.mark.parametrize(("task", "requests"), [("arc_easy", 12), ("gsm8k", 5), ("humaneval", 6)])
def test_a_task_goes_on_in_the_middle(
    task: str, requests: int, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    asked: list[int]
) -> None:  # fmt: skip
    """And its scores are those of a run that was left alone; a checkpoint, dtype or quantization keeps to its own."""
    if task != "humaneval":
        pytest.importorskip("lm_eval", reason="needs lm_eval (pip install 'samba-lm[harness]')")
    monkeypatch.setattr("samba_lm.eval.harness.humaneval.MAX_TOKENS", 8)
    rows = [json.loads(line) for line in Path("data/arc_easy/test.jsonl").read_text().splitlines()]
    other = [{**row, "question": f"Which of {i} is hot?"} for i, row in enumerate(rows)]
    Path("data/arc_easy/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    more = ["--run-code", "--code-samples=6", "--batch=1"]
    words = ["eval", "harness", "first", f"--tasks={task}", *DATA, *more]

    def score(file: str) -> dict:
        (found,) = [task for model in json.loads(Path(file).read_text())["models"] for task in model["tasks"]]
        return found | {"seconds": 0}

    assert main([*words, "--json=whole.json"]) == 0
    asked[:] = [0, requests - 1]
    assert main([*words, "--json=a.json"]) == 130
    assert results.STOPPED in capsys.readouterr().out
    (kept,) = folder.glob("a.json.*")
    assert kept.read_bytes().count(b"\n") == requests
    kept.write_bytes(kept.read_bytes()[:-3])  # as a kill leaves it
    asked[:] = [0, 1]
    for other in (["--dtype=bfloat16"], ["--quantize=int8"]):  # these have answers of their own
        asked[0] = 0
        assert main([*words, "--json=a.json", *other]) == 130
        assert "goes on after" not in capsys.readouterr().out
    asked[:] = [0, 1 << 30]
    assert main([*words, "--json=a.json"]) == 0
    assert f"goes on after {requests - 2} answers" in capsys.readouterr().out
    assert asked[0] == 2
    assert not kept.exists()
    assert len(list(folder.glob("a.json.*"))) == 2
    assert score("a.json") == score("whole.json")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks=arc_easi", *DATA], "Did you mean 'arc_easy'"),
        (["--tasks=,", *DATA], "--tasks is empty"),
        (["--tasks=arc_easy", "--data-dir=nowhere"], "no folder nowhere"),
        (["--tasks=arc_easy", "--data-dir=."], "put it at arc_easy/test.jsonl"),
        (["--tasks=humaneval", "--run-code"], "give --data-dir"),
        (["--tasks=arc_easy", *DATA, "--limit=0"], "limit is 0"),
        (["--tasks=arc_easy", *DATA, "--batch=0"], "--batch is 0"),
        (["--tasks=arc_easy", *DATA, "--num-fewshot=3"], "has 0 worked examples"),
        (["--tasks=arc_easy", *DATA, "--chat"], "has no chat template"),
        (["--tasks=arc_easy", *DATA, "--csv=data"], "is a folder"),
        ([], "Missing"),
    ],
)
def test_mistakes_are_one_line(words: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval", reason="needs lm_eval (pip install 'samba-lm[harness]')")
    assert main(["eval", "harness", "first", *words]) == 2
    assert said in _error(capsys)


def test_what_is_not_installed_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eval_harness, "find_spec", lambda name: None)
    assert main(["eval", "harness", "first", "--tasks=arc_easy", *DATA]) == 2
    assert "pip install 'samba-lm[harness]'" in _error(capsys)

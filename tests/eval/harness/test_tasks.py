"""Task files: the harness's own definitions over a data folder's rows, and every mistake in the data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from samba_lm.errors import UserError
from samba_lm.eval.harness.tasks import TASKS, check_data, find_task

ROWS = {
    "arc_easy": {"question": "Q?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
    "hellaswag": {"query": "A", "choices": ["b", "c", "d", "e"], "label": 1},
    "piqa": {"goal": "A", "sol1": "b", "sol2": "c", "label": 1},
    "mmlu": {"subject": "anatomy", "question": "Q?", "choices": ["a", "b", "c", "d"], "answer": 3},
}


def _record(name: str, **changes: object) -> object:
    from samba_lm.eval.records import Record

    return TASKS[name].row(Record(0, "f.jsonl line 1", {**ROWS[name], **changes}))  # type: ignore[arg-type]


def test_names_and_absent_data(data: Path, tmp_path: Path) -> None:
    assert find_task("lambada") is TASKS["lambada_openai"]
    with pytest.raises(UserError, match="Did you mean 'hellaswag'"):
        find_task("helaswag")
    for task in TASKS.values():
        check_data(task, data)
    with pytest.raises(UserError, match="There is no folder"):
        check_data(TASKS["piqa"], tmp_path / "nowhere")
    (data / "mmlu" / "dev.jsonl").unlink()
    with pytest.raises(UserError, match=r"mmlu is absent: put it at .*data/mmlu/dev.jsonl"):
        check_data(TASKS["mmlu"], data)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("arc_easy", {"answerKey": "C"}, "answerKey 'C' is not among"),
        ("arc_easy", {"choices": ["x"]}, "no field 'choices' with the lists"),
        ("hellaswag", {"label": "1"}, "field 'label' is \"1\", not a whole number"),
        ("hellaswag", {"choices": 3}, "field 'choices' is 3, not a list"),
        ("piqa", {"sol1": None}, "field 'sol1' is null, not a text"),
        ("mmlu", {"answer": 4}, "4 choices and an answer from 0 to 3"),
    ],
)
def test_rows_are_checked(name: str, changes: dict, said: str) -> None:
    assert _record(name)
    with pytest.raises(UserError, match=said) as error:
        _record(name, **changes)
    assert "f.jsonl line 1" in str(error.value)


@pytest.mark.filterwarnings("ignore")
def test_tasks_are_the_harness_s_own_over_these_rows(data: Path, tmp_path: Path, offline: None) -> None:
    """Prompts, choices and answers, as the shipped definition makes them."""
    pytest.importorskip("lm_eval", reason="needs lm_eval (pip install 'samba-lm[harness]')")
    from lm_eval.tasks import TaskManager

    from samba_lm.eval.harness.tasks import write_task

    folder = tmp_path / "tasks"
    written = {name: write_task(task, data, folder) for name, task in TASKS.items()}
    assert (written["arc_easy"].rows, written["mmlu"].rows, written["mmlu"].examples) == (6, 6, 5)
    assert (written["gsm8k"].examples, written["gsm8k_cot"].examples, written["piqa"].examples) == (7, 8, 0)
    with pytest.raises(UserError, match="piqa has 0 worked examples"):
        written["piqa"].check_examples(1)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    loaded = manager.load(list(TASKS))
    assert set(loaded["tasks"]) == {*TASKS, "mmlu_anatomy", "mmlu_philosophy"} - {"mmlu"}
    assert set(loaded["groups"]) == {"mmlu", "mmlu_stem", "mmlu_humanities"}

    def first(name: str) -> tuple:
        task = loaded["tasks"][name]
        task.set_fewshot_seed(1234)
        task.build_all_requests(limit=1)
        return [instance.args for instance in task.instances]

    assert first("arc_easy") == [
        ("Question: Which is hot?\nAnswer:", " ice"),
        ("Question: Which is hot?\nAnswer:", " fire"),
    ]
    assert [args[1] for args in first("hellaswag")] == [" salt.", " a car.", " the sky.", " nine."]
    assert first("winogrande") == [
        ("Ann thanked Sue because Ann", " helped 0."),
        ("Ann thanked Sue because Sue", " helped 0."),
    ]
    assert first("lambada_openai") == [("It was a dark and stormy night number", " 0")]
    (prompt, options), *_ = first("gsm8k")
    assert prompt.count("Question:") == 6
    assert "Question:" in options["until"]
    (prompt, _), *_ = first("gsm8k_cot")
    assert prompt.count("Q:") == 9
    anatomy = first("mmlu_anatomy")
    assert [args[1] for args in anatomy] == [" A", " B", " C", " D"]
    assert anatomy[0][0].startswith("The following are multiple choice questions (with answers) about anatomy.\n\n")
    assert anatomy[0][0].count("Answer:") == 6
    unknown = {**ROWS["mmlu"], "subject": "anatomi"}
    (data / "mmlu" / "test.jsonl").write_text(json.dumps(unknown))
    with pytest.raises(UserError, match=r"no subject 'anatomi'\. Did you mean 'anatomy'"):
        write_task(TASKS["mmlu"], data, tmp_path / "other")

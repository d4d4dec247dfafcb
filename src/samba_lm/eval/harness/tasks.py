"""The harness's tasks over a folder of files: its own task definitions, which this points to data on the disk.

The folder is laid out as ``TASK/SPLIT.jsonl``, each file plain or packed (.xz, .gz, .bz2, .zst); see :data:`TASKS`.
What is written is a folder of rows and YAML files for ``lm_eval --include_path``: prompts, answers and metrics stay the
harness's own, whose file each YAML file includes by its path.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samba_lm.data.sources import PACKED_SUFFIXES
from samba_lm.errors import UserError, did_you_mean
from samba_lm.eval.records import Record, read_records
from samba_lm.files import write_text

Row = dict[str, Any]
ENDINGS = ("", *PACKED_SUFFIXES)
"""What a file's name may end in after .jsonl."""


def _whole(record: Record, name: str) -> int:
    value = record.fields.get(name)
    if not isinstance(value, int):
        raise UserError(f"{record.where}: field {name!r} is {json.dumps(value)[:40]}, not a whole number.")
    return value


def _arc(record: Record) -> Row:
    choices = record.fields.get("choices")
    if not isinstance(choices, dict):
        raise UserError(f"{record.where} has no field 'choices' with the lists 'text' and 'label'.")
    labels, answer = choices.get("label"), record.text("answerKey")
    if not isinstance(labels, list) or not isinstance(choices.get("text"), list) or answer not in labels:
        raise UserError(f"{record.where}: answerKey {answer!r} is not among the labels of choices.")
    return {"id": str(record.fields.get("id", record.row)), "question": record.text("question"),
            "choices": {"text": choices["text"], "label": labels}, "answerKey": answer}  # fmt: skip


def _hellaswag(record: Record) -> Row:
    """Of the harness's processed form, or of the official one, which it processes."""
    if "ctx_a" in record.fields:
        return {name: record.fields[name] for name in ("ctx_a", "ctx_b", "activity_label", "endings", "label")}
    return {
        "query": record.text("query"), "choices": record.get("choices", list), "label": _whole(record, "label")
    }  # fmt: skip


def _texts(*names: str) -> Callable[[Record], Row]:
    return lambda record: {name: record.text(name) for name in names}


def _piqa(record: Record) -> Row:
    return {**_texts("goal", "sol1", "sol2")(record), "label": _whole(record, "label")}


def _mmlu(record: Record) -> Row:
    choices, answer = record.get("choices", list), _whole(record, "answer")
    if len(choices) != 4 or not 0 <= answer < 4:
        raise UserError(f"{record.where}: expected 4 choices and an answer from 0 to 3.")
    return {
        "subject": record.text("subject"),
        "question": record.text("question"),
        "choices": choices,
        "answer": answer,
    }


@dataclass(frozen=True)
class Split:
    """A file of rows: ``name`` of the file without its ending, ``split`` as the harness calls it."""

    name: str
    split: str
    needed: bool = True


@dataclass(frozen=True)
class OfflineTask:
    """A task that can be taken from files.

    Attributes:
        name: as the harness calls it.
        folder: in the data folder.
        shipped: the harness's own definition, in its folder of tasks.
        splits: the files, the first the one that is measured; those not ``needed`` give worked examples.
        row: a record as the harness wants it.
        metric: the one that the paper's tables tell.
        own_examples: worked examples that the harness's definition brings with it.
    """

    name: str
    folder: str
    shipped: str
    splits: tuple[Split, ...]
    row: Callable[[Record], Row]
    metric: str
    own_examples: int = 0

    def path(self, data: Path, split: Split) -> Path | None:
        """The file of a split, packed or not; None where there is none."""
        stem = data / self.folder / split.name
        return next((path for end in ENDINGS if (path := Path(f"{stem}{end}")).is_file()), None)


_TEST, _TRAIN = Split("test.jsonl", "test"), Split("train.jsonl", "train", needed=False)
_VALIDATION = Split("validation.jsonl", "validation")
SPLITS = {"training": "train", "validation": "validation", "test": "test"}
UNCHANGED = "process_docs: !function samba_lm.eval.harness.model.unchanged\n"
"""The rows are as the task wants them. Besides, whoever names such a file as a task has the model class registered."""
TASKS = {
    task.name: task
    for task in (
        OfflineTask("arc_easy", "arc_easy", "arc/arc_easy.yaml", (_TEST, _TRAIN), _arc, "acc"),
        OfflineTask("arc_challenge", "arc_challenge", "arc/arc_challenge.yaml", (_TEST, _TRAIN), _arc, "acc_norm"),
        OfflineTask(
            "hellaswag", "hellaswag", "hellaswag/hellaswag.yaml", (_VALIDATION, _TRAIN), _hellaswag, "acc_norm"
        ),
        OfflineTask(
            "winogrande", "winogrande", "winogrande/default.yaml", (_VALIDATION, _TRAIN),
            _texts("sentence", "option1", "option2", "answer"), "acc",
        ),
        OfflineTask("piqa", "piqa", "piqa/piqa.yaml", (_VALIDATION, _TRAIN), _piqa, "acc"),
        OfflineTask(
            "lambada_openai", "lambada", "lambada/lambada_openai.yaml", (Split("lambada_openai_test.jsonl", "test"),),
            _texts("text"), "acc",
        ),
        OfflineTask(
            "gsm8k", "gsm8k", "gsm8k/gsm8k.yaml", (_TEST, Split("train.jsonl", "train")), _texts("question", "answer"),
            "exact_match",
        ),
        OfflineTask(
            "gsm8k_cot", "gsm8k", "gsm8k/gsm8k-cot.yaml", (_TEST,), _texts("question", "answer"), "exact_match", 8
        ),
        OfflineTask("mmlu", "mmlu", "mmlu/default", (_TEST, Split("dev.jsonl", "dev")), _mmlu, "acc"),
    )
}  # fmt: skip
"""The tasks that a data folder can hold, but HumanEval (see ``humaneval.py``)."""
ALIASES = {"lambada": "lambada_openai", "arc_e": "arc_easy", "arc_c": "arc_challenge"}


@dataclass(frozen=True)
class Written:
    """A task whose files were written.

    Attributes:
        name: as the harness calls it; a group's, of MMLU.
        rows: that are measured.
        sha256: of the unpacked files it was made from.
        examples: worked examples there are for prompts (of each subject, of MMLU).
    """

    name: str
    rows: int
    sha256: str
    examples: int

    def check_examples(self, wanted: int) -> None:
        """Raise UserError where there are fewer worked examples than are wanted."""
        if wanted > self.examples:
            raise UserError(
                f"{self.name} has {self.examples} worked examples for its prompts, not {wanted}: ask for fewer with "
                "--num-fewshot, or put a train.jsonl into its folder."
            )


def find_task(name: str) -> OfflineTask:
    """A task by its name. Raises UserError for one that no data folder can hold."""
    name = ALIASES.get(name, name)
    if name not in TASKS:
        raise UserError(
            f"{name} cannot be taken from a data folder.{did_you_mean(name, [*TASKS, 'humaneval'])} "
            "Without --data-dir, any task of the harness can be named, whose data it downloads."
        )
    return TASKS[name]


def check_data(task: OfflineTask, data: Path) -> None:
    """Raise UserError, saying where to put it, where a task's data is absent."""
    if not data.is_dir():
        raise UserError(f"There is no folder {data}: give --data-dir the folder that holds the tasks' folders.")
    for split in task.splits:
        if split.needed and task.path(data, split) is None:
            raise UserError(
                f"The data of {task.name} is absent: put it at {data / task.folder / split.name} (JSON lines; packed "
                f"as {', '.join(PACKED_SUFFIXES)} if you like). docs/evaluation.md tells its fields."
            )


def write_task(task: OfflineTask, data: Path, folder: Path) -> Written:
    """Write a task's rows and YAML files into ``folder``.

    Raises UserError where the data is absent, or not what it should be; the line is named.
    """
    check_data(task, data)
    digest = hashlib.sha256()
    rows: dict[str, list[Row]] = {}
    for split in task.splits:
        path = task.path(data, split)
        if path is not None:
            records = read_records(path)
            digest.update(records.sha256.encode())
            rows[split.split] = [task.row(record) for record in records.rows]
    measured = task.splits[0].split
    if task.name == "mmlu":
        examples = _write_mmlu(rows, folder)
    else:
        examples = task.own_examples or len(rows.get("train", ()))
        options: dict[str, Any] = {"task": task.name}
        options |= {f"{name}_split": split if split in rows else None for name, split in SPLITS.items()}
        if task.name == "gsm8k":
            options["fewshot_split"] = "train"
        _write_yaml(folder / f"{task.name}.yaml", task.shipped, options, rows)
    return Written(task.name, len(rows[measured]), digest.hexdigest(), examples)


def _write_mmlu(rows: dict[str, list[Row]], folder: Path) -> int:
    """A task for each subject, and the harness's groups of them. How many worked examples every subject has."""
    shipped, groups = _shipped() / "mmlu" / "default", set()
    subjects = sorted({row["subject"] for row in rows["test"]})
    for subject in subjects:
        source = shipped / f"mmlu_{subject}.yaml"
        if not source.is_file():
            known = [path.stem.removeprefix("mmlu_") for path in shipped.glob("mmlu_*.yaml")]
            raise UserError(f"MMLU has no subject {subject!r}.{did_you_mean(subject, known)}")
        groups |= set(re.findall(r'"(mmlu_\w+)_tasks"', source.read_text(encoding="utf-8")))
        own = {split: [row for row in all_rows if row["subject"] == subject] for split, all_rows in rows.items()}
        options = {"task": source.stem, "num_fewshot": 5}
        _write_yaml(folder / "mmlu" / source.name, f"mmlu/default/{source.name}", options, own)
    for group in groups:
        write_text(folder / "mmlu" / f"_{group}.yaml", (shipped / f"_{group}.yaml").read_text(encoding="utf-8"))
    _write_lines(folder / "mmlu" / "_mmlu.yaml", {"include": str(shipped / "_mmlu.yaml"), "task": sorted(groups)})
    return min(sum(row["subject"] == subject for row in rows["dev"]) for subject in subjects)


def _write_yaml(path: Path, shipped: str, options: dict[str, Any], rows: dict[str, list[Row]]) -> None:
    """A task file that includes the harness's, and its rows beside it."""
    files = {}
    for split, own in rows.items():
        file = path.with_name(f"{path.stem}.{split}.jsonl").absolute()
        write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in own))
        files[split] = str(file)
    cache = str((path.parent / ".cache").absolute())
    source = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files, "cache_dir": cache}}
    lines = {"include": str(_shipped() / shipped), **options, **source}
    _write_lines(path, lines, "" if "ctx_a" in next(iter(rows.values()))[0] else UNCHANGED)


def _write_lines(path: Path, lines: dict[str, Any], more: str = "") -> None:
    """A YAML file: JSON's values are YAML's."""
    write_text(
        path, "".join(f"{name}: {json.dumps(value, ensure_ascii=False)}\n" for name, value in lines.items()) + more
    )


def _shipped() -> Path:
    """The harness's folder of task definitions."""
    import lm_eval

    return Path(lm_eval.__file__).parent / "tasks"

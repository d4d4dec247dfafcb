"""A data folder with a little of every task."""

from __future__ import annotations

import gzip
import json
import lzma
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ARC = {"question": "Which is hot?", "choices": {"text": ["ice", "fire"], "label": ["A", "B"]}, "answerKey": "B"}
FILES: dict[str, list[dict]] = {
    "arc_easy/test.jsonl": [{"id": str(i), **ARC} for i in range(6)],
    "arc_challenge/test.jsonl.xz": [{"id": str(i), **ARC} for i in range(5)],
    "hellaswag/validation.jsonl": [
        {"query": f"Cooking: She adds {i}", "choices": ["salt.", "a car.", "the sky.", "nine."], "label": i % 4}
        for i in range(5)
    ],
    "winogrande/validation.jsonl.gz": [
        {"sentence": f"Ann thanked Sue because _ helped {i}.", "option1": "Ann", "option2": "Sue", "answer": "2"}
        for i in range(5)
    ],
    "piqa/validation.jsonl": [{"goal": f"Dig {i}", "sol1": "spade", "sol2": "spoon", "label": 0} for i in range(5)],
    "lambada/lambada_openai_test.jsonl": [{"text": f"It was a dark and stormy night number {i}"} for i in range(5)],
    "gsm8k/test.jsonl": [{"question": f"{i} and 1?", "answer": f"{i} + 1\n#### {i + 1}"} for i in range(5)],
    "gsm8k/train.jsonl": [{"question": f"{i} and 2?", "answer": f"{i} + 2\n#### {i + 2}"} for i in range(7)],
    "mmlu/test.jsonl": [
        {"subject": subject, "question": f"Which is {i}?", "choices": ["a", "b", "c", "d"], "answer": i}
        for subject in ("anatomy", "philosophy")
        for i in range(3)
    ],
    "mmlu/dev.jsonl": [
        {"subject": subject, "question": f"Which was {i}?", "choices": ["a", "b", "c", "d"], "answer": i % 4}
        for subject in ("anatomy", "philosophy")
        for i in range(5)
    ],
}
PACK = {".xz": lzma.compress, ".gz": gzip.compress}


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(PACK.get(path.suffix, lambda data: data)(text))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name, rows in FILES.items():
        write_rows(tmp_path / "data" / name, rows)
    return tmp_path / "data"


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "DISABLE_MULTIPROC", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    if find_spec("datasets"):  # which reads the variable when it is first imported, perhaps for another test
        from datasets.utils import disable_progress_bars

        disable_progress_bars()
    if find_spec("lm_eval"):  # its bars heed TQDM_DISABLE only where that is set before tqdm is first imported
        import lm_eval.api.task
        import tqdm

        bar = tqdm.tqdm

        def quiet(rows: object = None, **options: Any) -> object:
            return bar(**options) if rows is None else rows

        monkeypatch.setattr(lm_eval.api.task, "tqdm", quiet)
        monkeypatch.setattr(tqdm, "tqdm", quiet)

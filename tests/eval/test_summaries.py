"""Summaries: what is asked, what a model writes through the engine, and what it scores."""

from __future__ import annotations

import json
import lzma
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from samba_lm.checkpoint import create
from samba_lm.config import Attention, LayerSpec, Mamba, ModelConfig
from samba_lm.engine.engine import Engine
from samba_lm.errors import UserError
from samba_lm.eval import summaries
from samba_lm.eval.records import read_records
from samba_lm.eval.summaries import Summary, means, measure, score
from samba_lm.eval.summary_tasks import TASKS, Sample
from samba_lm.generation.params import SamplingParams
from samba_lm.model import SambaLM
from samba_lm.tokenizer import ByteTokenizer

ROWS: dict[str, Any] = {
    "squality": {
        "document": "\nA story.\n",
        "questions": [
            {"question_text": "What is it? ", "responses": [{"response_text": "One."}, {"response_text": "Two."}]},
            {"question_text": "Who?", "responses": [{"response_text": "Three."}]},
        ],
    },
    "qmsum": {
        "meeting_transcripts": [{"speaker": "A", "content": "Hello."}, {"speaker": "B", "content": "No."}],
        "general_query_list": [{"query": "Summarize.", "answer": "Little."}],
        "specific_query_list": [{"query": "Why?", "answer": "So."}],
    },
    "govreport": {"input": "A report.", "outputs": ["Reported."]},
}
PARAMS = SamplingParams(temperature=0.0, max_tokens=12, stop=("\nQuestion:",))


def _samples(tmp_path: Path, task: str, *rows: Any, limit: int | None = None) -> list[Sample]:
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows or [ROWS[task]]))
    return TASKS[task].samples(read_records(tmp_path / "x.jsonl").rows, limit)


def test_what_is_asked(tmp_path: Path) -> None:
    first, second = _samples(tmp_path, "squality")
    assert (first.text, first.question) == ("A story.", "\n\nQuestion: What is it?\nAnswer:")
    assert (first.references, second.references) == (("One.", "Two."), ("Three.",))
    assert [(sample.number, sample.document) for sample in (first, second)] == [(0, 0), (1, 0)]
    first, second = _samples(tmp_path, "qmsum")
    assert first.text == second.text == "A: Hello.\nB: No."
    assert [sample.question for sample in (first, second)] == [
        "\n\nQuestion: Summarize.\nAnswer:", "\n\nQuestion: Why?\nAnswer:"
    ]  # fmt: skip
    (report,) = _samples(tmp_path, "govreport")
    assert (report.text, report.question, report.references) == (
        "A report.", "\n\nSummary of the report:", ("Reported.",)
    )  # fmt: skip
    three = _samples(tmp_path, "squality", ROWS["squality"], ROWS["squality"], limit=3)
    assert [(sample.number, sample.document) for sample in three] == [(0, 0), (1, 0), (2, 1)]


@pytest.mark.parametrize("task", TASKS)
def test_rows_of_another_task_are_refused(task: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 1 has no field"):
        _samples(tmp_path, task, {"question": "?"})
    with pytest.raises(UserError, match="without a text or a summary"):
        _samples(tmp_path, "govreport", {"input": "x", "outputs": []})
    with pytest.raises(UserError, match="not a list of texts"):
        _samples(tmp_path, "govreport", {"input": "x", "outputs": [3]})


def test_files_are_found_packed_or_not(tmp_path: Path) -> None:
    task = TASKS["squality"]
    with pytest.raises(UserError, match=r"put https://github.com/nyu-mll/SQuALITY.* there as squality/dev.jsonl"):
        task.file(tmp_path, "dev")
    (tmp_path / "squality").mkdir()
    packed = tmp_path / "squality" / "dev.jsonl.xz"
    packed.write_bytes(lzma.compress(b"{}"))
    assert task.file(tmp_path, "dev") == packed
    assert task.file(tmp_path / "squality", "dev") == packed
    with pytest.raises(UserError, match="no split 'val'"):
        task.file(tmp_path, "val")


def test_scores_are_those_of_the_best_reference() -> None:
    assert score("The cat sat.", ["the CAT sat", "a dog"]) == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}
    # "cats" and "sitting" have the stems of "cat" and "sits"; by hand: 3 of 4 and 3 of 5 words, in order 2.
    found = score("cats were sitting there", ["dogs", "sits the cat over there"])
    assert found["rouge1"] == pytest.approx(2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))
    assert found["rougeL"] == pytest.approx(2 * (2 / 4) * (2 / 5) / (2 / 4 + 2 / 5))
    assert found["rouge2"] == 0.0
    # Each score takes the reference that is best for it.
    both = score("a b c d", ["d c b a", "a b"])
    assert both["rouge1"] == 1.0
    assert both["rouge2"] == pytest.approx(2 * (1 / 3) * 1 / (1 / 3 + 1))
    assert score("", ["a"])["rougeL"] == 0.0


def _model(*layers: LayerSpec, max_context: int = 1 << 20) -> SambaLM:
    layers = layers or (Mamba(state=4), Attention(heads=2, window=16))
    config = ModelConfig(name="tiny", d_model=16, vocab_size=257, layers=layers, max_context=max_context)
    return create(config, seed=0)


def _texts(count: int, questions: int) -> list[Sample]:
    return [
        Sample(questions * i + j, i, f"Story {i}. " + "And so on. " * (5 * i), f"\nQuestion {j}?", ("And so on.",))
        for i in range(count)
        for j in range(questions)
    ]


@pytest.mark.parametrize("layers", [(), (Attention(heads=2),)])
def test_what_is_written_is_what_the_engine_writes_of_the_whole(layers: tuple[LayerSpec, ...]) -> None:
    model, samples, found, shares = _model(*layers), _texts(4, 5), [], []
    measure(model, ByteTokenizer(), samples, PARAMS, found.append, progress=shares.append)
    assert sorted(summary.number for summary in found) == list(range(20))
    with Engine(model, ByteTokenizer()) as engine:
        whole = engine.generate([sample.text + sample.question for sample in samples], PARAMS)
    for summary in found:
        sample, answer = samples[summary.number], whole[summary.number]
        assert summary.written == answer.text.strip()
        assert (summary.new_tokens, summary.finish) == (answer.end.new_tokens, answer.end.finish)
        assert summary.prompt_tokens == len(sample.text + sample.question)
        assert summary.document == sample.document
        assert summary.rougeL == score(summary.written, sample.references)["rougeL"]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_what_full_attention_cannot_hold_is_skipped() -> None:
    found: list[Summary] = []
    samples = _texts(3, 2)
    measure(_model(Attention(heads=2), max_context=80), ByteTokenizer(), samples, PARAMS, found.append)
    skipped = {summary.number for summary in found if summary.skipped}
    assert skipped == {s.number for s in samples if len(s.text + s.question) + 12 > 80} == {2, 3, 4, 5}
    assert len(found) == 6
    assert all("max_context = 80" in summary.skipped for summary in found if summary.number in skipped)
    assert means(found)["rouge1"].count == 2


def test_without_memory_the_rest_of_a_group_is_skipped() -> None:
    found: list[Summary] = []

    def note(summary: Summary) -> None:
        if len(found) == 1:
            found.append(summary)
            raise torch.OutOfMemoryError("CUDA out of memory")
        found.append(summary)

    measure(_model(), ByteTokenizer(), _texts(2, 2), PARAMS, note)
    assert [summary.skipped for summary in found] == ["", "", "out of memory", "out of memory"]
    assert sorted(summary.number for summary in found) == [0, 1, 2, 3]


def test_means_count_texts() -> None:
    some = [Summary(i, i // 2, rouge1=i / 8, rouge2=0.5, rougeL=0.25) for i in range(8)]
    found = means([*some, Summary(8, 9, skipped="out of memory")])
    assert (found["rouge1"].mean, found["rouge1"].count) == (pytest.approx(3.5 / 8), 8)
    assert (found["rouge2"].low, found["rouge2"].high) == (0.5, 0.5)
    apart = means(
        [Summary(0, 0, rouge1=0.1, rouge2=0.0, rougeL=0.9), Summary(1, 1, rouge1=0.2, rouge2=0.0, rougeL=0.8)]
    )
    assert (apart["rouge1"].low, apart["rougeL"].high) == (0.0, 1.0)
    assert math.isnan(means(some[:2])["rouge1"].low)
    assert math.isnan(means([])["rougeL"].mean)
    assert list(found) == list(summaries.METRICS)

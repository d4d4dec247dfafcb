"""lm_eval's ``local-completions`` against the server scores a task as its own evaluation in this process does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import Server, make_model

from samba_lm.tokenizer import ByteTokenizer

for package in ("lm_eval", "tenacity"):
    pytest.importorskip(package, reason="needs lm_eval (pip install 'lm_eval[api]')")

QUESTIONS = [
    {"question": "The sky is", "choices": ["blue", "a spoon", "on Tuesday"], "answer": 0},
    {"question": "Two and two is", "choices": ["five thousand", "four"], "answer": 1},
    {"question": "Fish live in", "choices": ["trees", "the sea", "books"], "answer": 1},
    {"question": "A night has", "choices": ["stars", "corners"], "answer": 0},
] * 3
TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_local_completions_scores_as_this_process(
    plain: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf" / "datasets"))
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    class InProcess(LM):
        """The model itself, one question at a time."""

        def __init__(self) -> None:
            super().__init__()
            self._model, self._tokenizer = make_model(), ByteTokenizer()

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return [self._score(*request.args) for request in requests]

        def _score(self, context: str, continuation: str) -> tuple[float, bool]:
            before, after = (self._tokenizer.encode(text).tolist() for text in (context, continuation))
            logits, _ = self._model(torch.tensor([before + after]))
            logprobs = logits[0, len(before) - 1 : -1, :257].detach().log_softmax(-1)
            own = logprobs.gather(1, torch.tensor(after)[:, None])[:, 0]
            return float(own.sum()), bool((logprobs.argmax(-1) == torch.tensor(after)).all())

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            raise NotImplementedError

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            raise NotImplementedError

    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny_choice.yaml").write_text(TASK.format(file=questions))
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    ByteTokenizer().save(tokenizer)
    (tokenizer / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    options = (
        f"model=tiny,base_url={plain.url}/v1/completions,tokenizer={tokenizer},tokenizer_backend=huggingface,"
        "num_concurrent=2,max_retries=1,tokenized_requests=True"
    )

    def score(model: Any, **more: Any) -> tuple[dict[str, Any], list[Any]]:
        found = lm_eval.simple_evaluate(
            model, tasks=["tiny_choice"], task_manager=manager, log_samples=True, bootstrap_iters=0, **more
        )
        return found["results"]["tiny_choice"], [one["filtered_resps"] for one in found["samples"]["tiny_choice"]]

    here, here_each = score(InProcess())
    there, there_each = score("local-completions", model_args=options, batch_size=4)
    assert here["acc,none"] == there["acc,none"]
    assert here["acc_norm,none"] == there["acc_norm,none"]
    for own, other in zip(here_each, there_each, strict=True):
        for (logprob, greedy), (told, told_greedy) in zip(own, other, strict=True):
            assert told == pytest.approx(logprob, abs=1e-3)
            assert bool(greedy) == bool(told_greedy)

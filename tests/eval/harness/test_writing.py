"""Texts written for a harness: the same as one by one, what a task asks of them, and windows of rolling likelihoods."""

from __future__ import annotations

import pytest
import torch

from samba_lm.checkpoint import create
from samba_lm.config import Attention, Mamba, ModelConfig
from samba_lm.errors import UserError
from samba_lm.eval.harness.scoring import windows
from samba_lm.eval.harness.writing import Prompt, sampling, write
from samba_lm.generation.api import generate
from samba_lm.generation.params import SamplingParams
from samba_lm.tokenizer import ByteTokenizer


def test_prompts_with_a_common_beginning_are_continued_as_alone() -> None:
    layers = (Mamba(state=4), Attention(heads=2, window=16))
    model = create(ModelConfig(name="t", d_model=16, vocab_size=257, layers=layers), seed=0).double()
    with torch.no_grad():
        model.embedding.mul_(8)
    tokenizer = ByteTokenizer()
    examples = "Question: How much is 2 and 2?\nAnswer: 4\n\n" * 6
    texts = [f"{examples}Question {i}" for i in range(6)] + ["Alone", "Alone"] + [examples] * 4
    params = [SamplingParams(temperature=0.7, top_p=0.9, max_tokens=12, seed=i, stop=("q",)) for i in range(12)]
    shares: list[float] = []
    prompts = [Prompt(tokenizer.encode(text).tolist(), each) for text, each in zip(texts, params, strict=True)]
    found = write(model, tokenizer, prompts, slots=3, progress=shares.append)
    assert found == [generate(model, tokenizer, text, each) for text, each in zip(texts, params, strict=True)]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert write(model, tokenizer, []) == []


def test_what_a_task_may_ask() -> None:
    nucleus = sampling({"do_sample": True, "temperature": 0.2, "top_p": 0.95, "num_beams": 1}, 256, 7)
    assert (nucleus.temperature, nucleus.top_p, nucleus.max_tokens, nucleus.seed) == (0.2, 0.95, 256, 7)
    greedy = sampling({"until": ["Q:", "", "</s>"], "do_sample": False, "temperature": 0.7, "top_k": 0}, 5, 0)
    assert (greedy.temperature, greedy.stop, greedy.top_k) == (0, ("Q:", "</s>"), None)
    assert sampling({"until": "\n", "max_new_tokens": 3}, 5, 0).max_tokens == 3
    assert sampling({"do_sample": True}, 5, 0).temperature == 1
    with pytest.raises(UserError, match="num_beams=4"):
        sampling({"num_beams": 4}, 5, 0)
    with pytest.raises(UserError, match="Did you mean 'top_p'"):
        sampling({"top_pp": 4}, 5, 0)
    with pytest.raises(UserError, match="top_p=2"):
        sampling({"temperature": 1, "top_p": 2}, 5, 0)


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 10, 11, None])
def test_windows_predict_each_token_once_from_as_much_as_may_be(limit: int | None) -> None:
    ids = list(range(100, 110))
    predicted: list[int] = []
    for i, window in enumerate(windows(ids, 0, limit)):
        read = [*window.context, *window.continuation][:-1]
        assert limit is None or len(read) <= limit
        before = [0, *ids[: len(predicted) + len(window.continuation) - 1]]
        assert read == before[len(before) - len(read) :], "what stands before its last token"
        assert not i or len(read) == limit
        predicted += window.continuation
    assert predicted == ids
    assert windows([], 0, limit) == []

"""Answers kept as they come: a task goes on from them, after Ctrl-C or a kill at any byte, and never from others'."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from samba_lm.checkpoint import create
from samba_lm.config import Attention, Mamba, ModelConfig
from samba_lm.errors import UserError
from samba_lm.eval.harness.answers import Answers
from samba_lm.eval.harness.scoring import Likelihood, Question, Scorer
from samba_lm.eval.harness.writing import Prompt, write
from samba_lm.generation.params import SamplingParams
from samba_lm.model import SambaLM
from samba_lm.tokenizer import ByteTokenizer

WHO = {"task": "t", "weights_sha256": "a" * 64, "dtype": "float32"}
QUESTIONS = [Question([1, 2, *range(i)], [i, 3]) for i in range(6)]


def model() -> SambaLM:
    layers = (Mamba(state=4), Attention(heads=2, window=16))
    return create(ModelConfig(name="t", d_model=16, vocab_size=257, layers=layers), seed=0).double()


class Counting(Scorer):
    """Says how many questions it was asked, and is interrupted after some."""

    def __init__(self, stop: int = 1 << 30) -> None:
        super().__init__(model(), batch=1)
        self.asked, self.stop = 0, stop

    def ask(self, questions, progress=None, note=None):  # type: ignore[no-untyped-def]
        def seen(i: int, answer: Likelihood) -> None:
            if self.asked == self.stop:
                raise KeyboardInterrupt
            self.asked += 1
            note(i, answer)

        return super().ask(questions, progress, seen)


def test_likelihoods_go_on_where_they_were_interrupted(tmp_path: Path) -> None:
    expected = Scorer(model()).ask(QUESTIONS)
    with pytest.raises(KeyboardInterrupt), Answers(tmp_path / "a", WHO) as answers:
        answers.likelihoods(Counting(stop=4), QUESTIONS)
    scorer, shares = Counting(), []
    with Answers(tmp_path / "a", WHO) as answers:
        assert answers.count == 4
        found = answers.likelihoods(scorer, QUESTIONS, shares.append)
        assert scorer.asked == 2
        assert [one.logprob for one in found] == pytest.approx([one.logprob for one in expected], abs=1e-10)
        assert [one.greedy for one in found] == [one.greedy for one in expected]
        assert shares == sorted(shares)
        assert shares[0] > 4 / 6 - 1e-9
        assert shares[-1] == pytest.approx(1.0)
        assert answers.likelihoods(scorer, QUESTIONS) == found, "to the last bit"
    with Answers(tmp_path / "a", WHO) as answers:
        assert answers.likelihoods(scorer, QUESTIONS) == found
        assert scorer.asked == 2
        answers.forget()
    assert not (tmp_path / "a").exists()


def test_texts_are_kept_too_and_other_requests_are_others(tmp_path: Path) -> None:
    tokenizer, own = ByteTokenizer(), model()
    params = SamplingParams(max_tokens=9, temperature=0.9, seed=1)
    prompts = [Prompt([65 + i], params) for i in range(5)]
    expected = write(own, tokenizer, prompts, slots=2)
    with Answers(tmp_path / "a", WHO) as answers:
        assert answers.texts(own, tokenizer, prompts[:3], slots=2) == expected[:3]
    with Answers(tmp_path / "a", WHO) as answers:
        assert answers.count == 3
        assert answers.texts(own, tokenizer, prompts, slots=2) == expected
        assert answers.count == 5
        for other in ({"seed": 2}, {"max_tokens": 8}, {"temperature": 0.0}, {"stop": ("q",)}):
            before = answers.count
            changed = [Prompt(prompts[0].ids, replace(params, **other))]
            assert answers.texts(own, tokenizer, changed) == write(own, tokenizer, changed)
            assert answers.count == before + 1
        assert answers.texts(own, tokenizer, []) == []


def test_a_file_cut_anywhere_is_gone_on_with(tmp_path: Path) -> None:
    """What is left of a kill -9, at every byte: nothing wrong is taken from it, and what follows is whole again."""
    found = [Likelihood(-1.5 - i, i % 2 == 0) for i in range(3)]

    class Told(Counting):
        def ask(self, questions, progress=None, note=None):  # type: ignore[no-untyped-def]
            for i, question in enumerate(questions):
                self.asked += 1
                note(i, found[QUESTIONS.index(question)])

    path = tmp_path / "a"
    with Answers(path, WHO) as answers:
        answers.likelihoods(Told(), QUESTIONS[:3])
    whole, scorer = path.read_bytes(), Told()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        scorer.asked = 0
        with Answers(path, WHO) as answers:
            assert answers.count >= whole[:cut].count(b"\n") - 1
            known = answers.count
            assert answers.likelihoods(scorer, QUESTIONS[:3]) == found
        assert scorer.asked == 3 - known
        with Answers(path, WHO) as answers:
            assert answers.count == 3
    path.write_bytes(whole.replace(b"-1.5", b"NaN") + b'\0\0\n[]\n{"request": "x"}\n{"request": "y", "answer": [1]}\n')
    with Answers(path, WHO) as answers:
        assert answers.count == 2


@pytest.mark.parametrize("other", [{"dtype": "bfloat16"}, {"weights_sha256": "b" * 64}, {"quantized": "int8"}])
def test_somebody_else_s_answers_are_not_taken(tmp_path: Path, other: dict[str, str]) -> None:
    with Answers(tmp_path / "a", WHO) as answers:
        answers.likelihoods(Counting(), QUESTIONS)
    scorer = Counting()
    with Answers(tmp_path / "a", WHO | other) as answers:
        assert answers.count == 0
        answers.likelihoods(scorer, QUESTIONS)
    assert scorer.asked == len(QUESTIONS)


def test_numbers_that_are_not_finite_are_not_kept(tmp_path: Path) -> None:
    scorer = Counting()
    scorer.model.embedding.data.fill_(float("nan"))
    with Answers(tmp_path / "a", WHO) as answers:
        with pytest.raises(UserError, match="not finite"):
            answers.likelihoods(scorer, QUESTIONS)
        assert answers.count == 0


KILLED = """
import sys, time
from pathlib import Path
from samba_lm.eval.harness.answers import Answers
from samba_lm.eval.harness.scoring import Likelihood, Question

class Slow:
    def ask(self, questions, progress, note):
        for i in range(len(questions)):
            note(i, Likelihood(-float(i), False))
            time.sleep(0.01)

Answers(Path(sys.argv[1]), {"task": "t"}).likelihoods(Slow(), [Question([1], [i]) for i in range(5000)])
"""


def test_what_was_answered_outlives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path)]) as process:
        ends = time.monotonic() + 60
        while not (path.exists() and path.read_bytes().count(b"\n") > 20) and time.monotonic() < ends:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert Answers(path, {"task": "t"}).count >= 20
    first = json.loads(path.read_text().splitlines()[1])
    assert first["answer"] == [0.0, False]

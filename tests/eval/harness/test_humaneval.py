"""HumanEval: pass@k by hand, and the whole way with a model whose answers are known."""

from __future__ import annotations

import itertools
import json
import lzma
from pathlib import Path

import pytest

from samba_lm.checkpoint import create
from samba_lm.config import Mamba, ModelConfig
from samba_lm.errors import UserError
from samba_lm.eval.harness import humaneval
from samba_lm.eval.harness.humaneval import Problems, measure, pass_at_k
from samba_lm.tokenizer import ByteTokenizer

ROWS = [
    {
        "task_id": f"T/{i}",
        "prompt": f'def add{i}(a, b):\n    """a + b + {i}"""\n',
        "entry_point": f"add{i}",
        "test": f"def check(candidate):\n    assert candidate(1, 2) == {3 + i}\n    assert candidate(0, 0) == {i}\n",
        "canonical_solution": f"    return a + b + {i}\n",
    }
    for i in range(4)
]


def write(folder: Path, rows: list[dict] = ROWS, packed: bool = False) -> Path:
    (folder / "humaneval").mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    name = folder / "humaneval" / ("HumanEval.jsonl.xz" if packed else "HumanEval.jsonl")
    name.write_bytes(lzma.compress(text) if packed else text)
    return folder


def test_pass_at_k_is_the_share_of_all_draws() -> None:
    for total, right in ((5, 0), (5, 2), (6, 5), (4, 4)):
        for k in range(1, total + 1):
            draws = list(itertools.combinations(range(total), k))
            expected = sum(any(i < right for i in draw) for draw in draws) / len(draws)
            assert pass_at_k(total, right, k) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match="3 right of 2"):
        pass_at_k(2, 3, 1)


def test_known_answers_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's writing is replaced, its judging is not."""
    problems = Problems.of(write(tmp_path, packed=True))
    answers = iter(
        ["    return a + b + 0", "    import sys; sys.exit(0)", "    return a - b", "    while True: pass"] * 2
        + [
            "    return a + b + 2\n\nprint('ok')",
            "    return 2 + b + a",
            "    return a + b + 2",
            "    return b + a + 2",
        ]
        + ["", "    print('passed')", "    return exit(", "    raise SystemExit(0)"]
    )
    asked: list = []

    def fake(model, tokenizer, prompts, progress=None):  # type: ignore[no-untyped-def]
        asked.extend(prompts)
        return [next(answers) for _ in prompts]

    monkeypatch.setattr(humaneval, "write", fake)
    score, attempts = measure(None, ByteTokenizer(), problems, samples=4, seconds=1.0)  # type: ignore[arg-type]
    by_problem = [[attempt.passed for attempt in attempts[4 * i : 4 * i + 4]] for i in range(4)]
    assert by_problem == [[True, False, False, False], [False] * 4, [True] * 4, [False] * 4]
    (metric,) = score.metrics
    assert (metric.name, metric.value) == ("pass@1", pytest.approx((0.25 + 0 + 1 + 0) / 4))
    assert metric.low is not None
    assert metric.high is not None
    assert 0 <= metric.low < metric.value < metric.high <= 1
    assert (score.documents, score.version) == (4, "4 samples")
    params = [prompt.params for prompt in asked]
    assert {(each.temperature, each.top_p) for each in params} == {(0.2, 0.95)}
    assert len({each.seed for each in params}) == 16
    assert "\ndef" in params[0].stop


def test_a_model_goes_the_whole_way(tmp_path: Path) -> None:
    problems = Problems.of(write(tmp_path))
    model = create(ModelConfig(name="t", d_model=16, vocab_size=257, layers=(Mamba(state=4),)), seed=0)
    shares: list[float] = []
    score, attempts = measure(
        model, ByteTokenizer(), problems, samples=2, limit=2, max_tokens=8, progress=shares.append
    )
    assert [attempt.problem for attempt in attempts] == ["T/0", "T/0", "T/1", "T/1"]
    assert score.metrics[0].value == 0
    assert score.metrics[0].high == pytest.approx(0.6576, abs=1e-3), "two problems say little"
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    again, _ = measure(model, ByteTokenizer(), problems, samples=2, limit=2, max_tokens=8)
    assert again.metrics == score.metrics


def test_more_samples_give_more_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = Problems.of(write(tmp_path, ROWS[:1]))
    monkeypatch.setattr(
        humaneval, "write", lambda *args, progress=None: ["    return a + b + 0", *["    return 1"] * 9]
    )
    score, _ = measure(None, ByteTokenizer(), problems, samples=10)  # type: ignore[arg-type]
    assert [(metric.name, round(metric.value, 9)) for metric in score.metrics] == [("pass@1", 0.1), ("pass@10", 1.0)]


def test_mistakes_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"put it at .*humaneval/HumanEval.jsonl"):
        Problems.of(tmp_path)
    with pytest.raises(UserError, match="line 1 has no field 'test'"):
        Problems.of(write(tmp_path, [{key: value for key, value in ROWS[0].items() if key != "test"}]))
    with pytest.raises(UserError, match="no name of a function"):
        Problems.of(write(tmp_path, [{**ROWS[0], "entry_point": "x) or exit("}]))
    with pytest.raises(UserError, match="samples is 0"):
        measure(None, ByteTokenizer(), Problems.of(write(tmp_path)), samples=0)  # type: ignore[arg-type]

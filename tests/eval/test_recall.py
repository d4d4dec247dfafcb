"""Asking for what was hidden: how answers are read, what a control knows, what is skipped, what figures show."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from samba_lm.checkpoint import create
from samba_lm.config import Attention, Mamba, ModelConfig
from samba_lm.data.names import Names
from samba_lm.data.recall import Example
from samba_lm.engine.engine import Engine
from samba_lm.engine.request import Request
from samba_lm.errors import UserError
from samba_lm.eval import recall
from samba_lm.eval.passkey import PasskeyTask
from samba_lm.eval.perplexity import attention_memory
from samba_lm.eval.phonebook import PhonebookTask
from samba_lm.eval.recall import Cell, Count, Plan, Trial, _emptied, _trial, measure
from samba_lm.eval.recall_figure import Spot, write_figure
from samba_lm.eval.recall_steps import by_run, step_curves
from samba_lm.eval.recall_steps import lines as steps_as_lines
from samba_lm.figures import short
from samba_lm.generation.params import SamplingParams
from samba_lm.model import SambaLM
from samba_lm.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
PLAN = Plan((300, 400), (0.0, 1.0), 2, seed=1, control=True)
NAMES = Names((("Ann", "Bob", "Cy", "Dora"), ("Moe", "Lee", "Fox", "Ray", "Kit")), "a test")


def model(window: int | None = 64, **fields: int) -> SambaLM:
    layers = (Mamba(state=4), Attention(heads=2, window=window))
    return create(ModelConfig(name="tiny", d_model=32, vocab_size=257, layers=layers, **fields))


def passkey(**changes: object) -> PasskeyTask:
    return PasskeyTask(replace(PLAN, **changes), TOKENIZER)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (" 12345", "12345"),
        ("12345. Remember", "12345"),
        (" the key 12345 or 54321", "12345"),
        (" 123456", "123456"),
        (" 1234", "1234"),
        (" 12 345", "12"),
        (" \u0661\u0662", ""),
        ("", ""),
    ],
)
def test_a_passkeys_answer_is_the_first_run_of_digits(written: str, read: str) -> None:
    assert passkey().read_off(written) == read


@pytest.mark.parametrize(("written", "read"), [(" 6123456789", "6123456789"), (" 612 345", "612 345"), ("", "")])
def test_a_phonebooks_answer_is_the_whole_line(written: str, read: str) -> None:
    task = PhonebookTask(Plan((3, 20), (None,), 1), TOKENIZER, NAMES)
    assert task.read_off(written) == read


def test_right_and_exact_are_told_apart() -> None:
    task = passkey()
    with Engine(model(), TOKENIZER) as engine:
        (answer,) = engine.complete([Request([np.arange(9)], SamplingParams(temperature=0.0, max_tokens=12))])
    written = np.array([token.id for token in answer.tokens])
    example = task.example((300, 0.0), 0)
    same = replace(example, answer=written[:5], text="none")
    assert (_trial(task, same, answer).right, _trial(task, same, answer).exact) == (False, True)
    told = replace(answer, text=f"it is {example.text}, surely")
    assert (_trial(task, example, told).right, _trial(task, example, told).exact) == (True, False)


def test_random_weights_find_nothing() -> None:
    shares: list[float] = []
    cells = list(measure(model(), TOKENIZER, passkey(), progress=shares.append))
    assert [cell.key for cell in cells] == [(300, 0.0), (300, 1.0), (400, 0.0), (400, 1.0)]
    assert Count.of(cells) == Count(total=8, right=0, exact=0, control_right=0)
    assert all(250 < trial.tokens < 400 and trial.control is not None for cell in cells for trial in cell.trials)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_answers_are_those_of_the_prompt_read_in_one_piece() -> None:
    task, net = passkey(), model()
    for weight in net.parameters():
        weight.data *= 2  # so that texts differ
    cell = next(measure(net, TOKENIZER, task, without=frozenset({(300, 0.0)})))
    examples = [task.example(cell.key, i) for i in range(2)]
    prompts = [np.concatenate((e.document, e.question)) for e in examples]
    with Engine(net, TOKENIZER) as engine:
        whole = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=15, stop=("\n",)))
    assert [trial.written for trial in cell.trials] == [answer.text for answer in whole]
    assert len({trial.written for trial in cell.trials}) == 2
    assert [trial.answer for trial in cell.trials] == [example.text for example in examples]


def test_the_control_knows_nothing_of_the_document() -> None:
    """Of two documents of one length, what comes after the question is the same to the last bit."""

    def first(examples: list[Example], emptied: bool) -> list[float | None]:
        with Engine(net, TOKENIZER, batch_invariant=True) as engine:
            nothing = SamplingParams(max_tokens=0)
            ends = engine.complete([Request([e.document], nothing, keep=True) for e in examples])
            readers = [_emptied(end.end.reader) if emptied else end.end.reader for end in ends]
            greedy = SamplingParams(temperature=0.0, max_tokens=1)
            asked = [
                Request([e.question], greedy, context=reader, logprobs=0)
                for e, reader in zip(examples, readers, strict=True)
            ]
            return [answer.tokens[0].logprob for answer in engine.complete(asked)]

    net = model()
    task = passkey(seed=None)
    one = task.example((300, 0.5), 0)
    other = replace(one, document=np.random.RandomState(0).permutation(one.document))
    knowing, controls = first([one, other], False), first([one, other], True)
    assert knowing[0] != knowing[1]
    assert controls[0] == controls[1]


def test_a_seed_gives_the_same_texts_and_none_never_does() -> None:
    for seed, same in ((3, True), (None, False)):
        tasks = [passkey(seed=seed) for _ in range(2)]
        texts = [[task.example((300, 0.0), i).text for i in range(4)] for task in tasks]
        assert (texts[0] == texts[1]) is same
        assert len(set(texts[0])) > 1
    assert passkey(seed=None).settings()["seed"] == "operating system's randomness"
    assert passkey(seed=3).settings() != passkey(seed=4).settings()
    assert passkey(seed=3).settings() == passkey(seed=3, sizes=(500,)).settings()


def test_what_full_attention_would_take_is_compared_with_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    full, some = model(window=None), Plan((300, 900), (0.5,), 2, seed=1)
    held = [attention_memory(full, size) for size in (300, 900)]
    assert held[0] < held[1]
    monkeypatch.setattr(recall, "free_memory", lambda: int(held[0]))
    first, second = measure(full, TOKENIZER, PasskeyTask(some, TOKENIZER))
    assert len(first.trials) == 2
    assert "full attention would take about 0.0 GiB, and 0.0 GiB are free" in second.skipped
    assert not any(cell.skipped for cell in measure(model(), TOKENIZER, PasskeyTask(some, TOKENIZER)))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_memory_that_ends_marks_the_cell(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object) -> None:
        raise error

    monkeypatch.setattr(recall, "_ask", none_left)
    assert all("out of memory with" in cell.skipped for cell in measure(model(), TOKENIZER, passkey()))


def test_what_full_attention_cannot_hold_is_skipped() -> None:
    cells = list(measure(model(window=None, max_context=350), TOKENIZER, passkey()))
    assert [bool(cell.skipped) for cell in cells] == [False, False, True, True]
    assert "full attention would have to hold 39" in cells[2].skipped
    assert "max_context is 350" in cells[2].skipped
    assert not cells[2].trials
    assert math.isnan(Count.of(cells[2:]).accuracy)


@pytest.mark.parametrize(("window", "message"), [(None, "max_context is 350"), (64, "the texts would take about")])
def test_texts_that_nothing_could_hold_are_not_made(
    window: int | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = PasskeyTask(Plan((10**11,), (0.5,), 3), TOKENIZER)
    monkeypatch.setattr(recall, "free_memory", lambda: 2**33)
    monkeypatch.setattr(PasskeyTask, "example", None)
    (cell,) = measure(model(window=window, max_context=350), TOKENIZER, task)
    assert message in cell.skipped


def test_phonebooks_are_asked_too() -> None:
    task = PhonebookTask(Plan((4, 20), (None,), 3), TOKENIZER, NAMES)
    cells = list(measure(model(), TOKENIZER, task))
    assert [(cell.key, len(cell.trials)) for cell in cells] == [((4, None), 3), ((20, None), 3)]
    assert all(trial.control is None and not trial.right for cell in cells for trial in cell.trials)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": (100, 400)}, "length 100 is too short"),
        ({"sizes": ()}, "no sizes or no depths"),
        ({"depths": (0.5, 1.1)}, r"depth is 1\.1: it must be from 0"),
        ({"trials": 0}, "There are 0 texts in each cell"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_mistakes(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        passkey(**changes)


def test_the_model_runs_as_before_when_left_early() -> None:
    net = model()
    cells = measure(net, TOKENIZER, passkey())
    next(cells)
    cells.close()
    assert net(torch.zeros(1, 4, dtype=torch.int64))[0].requires_grad


def test_figures_are_drawn(tmp_path: Path) -> None:
    trial = Trial("12345", " 12345", True, True, 300)
    some = [Cell(300, 0.0, (trial, replace(trial, right=False))), Cell(400, 0.0, skipped="too long")]
    for count in (1, 4):
        write_figure(tmp_path / "heat.png", PLAN, {f"$\\frac$ {i}": some for i in range(count)})
        assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")
    books = Plan((20, 40, 60), (None,), 2)
    curve = [Cell(size, None, (trial,) * 2) for size in (20, 40)]
    write_figure(tmp_path / "curve.png", books, {"one": curve, "unmeasured": []})
    assert (tmp_path / "curve.png").stat().st_size > 10_000
    assert [short(size) for size in (300, 4096, 262_144, 1 << 20, 3 << 30)] == ["300", "4K", "256K", "1M", "3G"]


def test_steps_of_runs_are_curves() -> None:
    """In the order of the steps, however given; a single step is no curve; runs of one name are told apart."""
    found = {f"runs/{name}/step-{step:08}": step for name in ("a/samba", "b/samba", "swa") for step in (20, 5, 10)}
    runs = by_run({**found, "runs/mamba/step-00000005": 5, "runs/other": 0})
    assert runs == {name: {5: 5, 10: 10, 20: 20} for name in ("runs/a/samba", "runs/b/samba", "swa")}
    assert list(runs["swa"]) == [5, 10, 20]
    assert by_run({"step-00000020": 20, "step-00000005": 5}) == {"": {5: 5, 20: 20}}  # called in the run's folder
    assert by_run({f"run/step-{'9' * digits}": digits for digits in (1, 400, 5000)}) == {}  # no steps of a training
    spots = {
        5: {(4096, 0.0): Spot(0, 2), (4096, 1.0): Spot(1, 2), (8192, 0.0): Spot(0, 0)},
        10: {(4096, 0.0): Spot(2, 2)},
    }
    axes = step_curves({"swa": spots}, "tokens").axes[0]
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines if line.get_label()[0] != "_"}
    assert lines == {"swa, 4K tokens": [[5, 25], [10, 100]]}  # and none of what was skipped at every step
    assert steps_as_lines({"": spots}, "tokens") == {"4K tokens": [(5, 1, 4), (10, 2, 2)]}

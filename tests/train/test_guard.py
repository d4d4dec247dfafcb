"""The guard against spikes, on runs that meet a stretch of noise in their text."""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import on_ranks
from safetensors.torch import load_file

from samba_lm import checkpoint, zoo
from samba_lm.data.loader import Batches, Loader
from samba_lm.data.mixture import Mixture, Part, source_seed
from samba_lm.data.shards import ShardWriter, TokenDataset
from samba_lm.errors import UserError
from samba_lm.tokenizer import ByteTokenizer
from samba_lm.train.finite import NonFiniteError
from samba_lm.train.guard import Guard, GuardState, Limits
from samba_lm.train.metrics import read_metrics
from samba_lm.train.observer import Observer, StepRecord
from samba_lm.train.recipe import Recipe, TrainSection
from samba_lm.train.run import train

STEPS, LENGTH = 40, 48


def guard(**fields: object) -> Guard:
    return Guard(TrainSection.model_validate({"spike": "skip", **fields}))


def after(steps: int, level: float = 3.0) -> GuardState:
    """What is known after quiet steps around a level of loss, with gradients of norm 1."""
    state, watch = GuardState(), guard()
    for step in range(steps):
        state = watch.accept(state, level + 0.1 * math.sin(step), 1.0)
    return state


def test_limits_are_robust() -> None:
    state = after(64)
    limits = guard().limits(state)
    assert limits is not None
    assert 3.3 < limits.loss < 4.0
    assert limits.grad_norm == pytest.approx(1.06), "where nothing varies, a hundredth of the median is a deviation"
    wild = guard().accept(guard().accept(state, 50.0, 1.0), 3.0, 1.0)
    assert guard().limits(wild) == Limits(50.0, limits.grad_norm), "what was accepted is never refused"
    for _ in range(128):
        wild = guard().accept(wild, 3.0, 1.0)
    assert guard().limits(wild) == Limits(pytest.approx(3.18), pytest.approx(1.06)), "and is forgotten"


@pytest.mark.parametrize(
    ("loss", "norm", "held"),
    [(3.0, 1.0, True), (9.0, 1.0, False), (3.0, 9.0, False), (math.nan, 1.0, False), (3.0, math.inf, False)],
)
def test_what_stands_out(loss: float, norm: float, held: bool) -> None:
    limits = guard().limits(after(64))
    assert limits is not None
    assert limits.hold(loss, norm) == held


def test_at_first_only_what_is_not_finite_is_refused_and_the_first_step_never() -> None:
    assert guard().limits(GuardState()) is None
    limits = guard().limits(after(3))
    assert limits is not None
    assert limits.hold(1e9, 1e9)
    assert not limits.hold(math.inf, 1.0)


def test_too_many_in_a_row_are_how_things_are() -> None:
    watch, state = guard(spike_limit=2), after(64)
    state = watch.skip(watch.skip(state))
    assert watch.limits(state) is None
    state = watch.accept(state, 9.0, 1.0)
    assert (state.losses, state.in_a_row, state.skipped) == ((9.0,), 0, 2)


def test_going_back_is_counted_until_a_checkpoint_is_made() -> None:
    watch = guard(spike="rollback", spike_limit=2)
    there, here = after(30), after(40)
    once = watch.go_back(here, there, 10)
    assert (once.rollbacks, once.passed, once.in_a_row, once.losses) == (1, 10, 1, there.losses)
    twice = watch.go_back(watch.accept(once, 3.0, 1.0), there, 4)
    assert (twice.rollbacks, twice.passed, twice.in_a_row) == (2, 14, 2)
    assert watch.limits(twice) is None
    assert watch.limits(watch.saved(twice)) is not None


def noisy_data(folder: Path) -> Path:
    """A text of few words with two rows' length of random bytes in it."""
    draw, tokenizer = random.Random(0), ByteTokenizer()
    with ShardWriter(folder, tokenizer) as writer:
        text = "".join(draw.choice(["one ", "two ", "three "]) for _ in range(450)).encode()
        noise = bytes(draw.randint(128, 255) for _ in range(2 * LENGTH))
        ids = np.frombuffer(text + noise + text, dtype=np.uint8).astype(np.int64)
        writer.append(ids, end=True, text_bytes=len(ids))
        writer.close()
    return folder


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, int]:
    """Data, a seed, and the step, counted from 1, that first meets noise under it: the guard knows enough by then."""
    folder = noisy_data(tmp_path_factory.mktemp("noisy"))
    dataset = TokenDataset.open(folder)
    return folder, *noise_after_20(lambda seed: Loader(dataset, 2, LENGTH, seed))


def noise_after_20(batches: Callable[[int], Batches]) -> tuple[int, int]:
    """A seed under which a run meets noise after its checkpoint of step 20, and the step, counted from 1, that does."""
    for seed in range(1000):
        source = batches(seed)
        noise = [int((source.batch(step).input_ids > 127).sum()) for step in range(STEPS)]
        bad = [step + 1 for step in range(STEPS) if noise[step]]
        if bad and 22 <= bad[0] <= 24 and noise[bad[0] - 1] >= LENGTH / 2 and all(step > 36 for step in bad[1:]):
            return seed, bad[0]
    raise AssertionError("no seed puts the noise where the test wants it")


def recipe(noisy: tuple[Path, int, int], out: Path, **fields: object) -> Recipe:
    data, seed, _ = noisy
    section = {"out": str(out), "steps": STEPS, "batch_size": 2, "length": LENGTH, "lr": 5e-3, "seed": seed}
    section |= {"log_every": 1, "save_every": 10, "device": "cpu", "spike_window": 20, "spike_factor": 8.0, **fields}
    return Recipe.from_dict({"model": {"name": "samba-micro"}, "data": {"train": str(data)}, "train": section})


class Watch(Observer):
    """Keeps what was told; fails like a crash, once, after ``crash`` in the ``life``-th time that this step is done."""

    def __init__(self, crash: int | None = None, life: int = 1) -> None:
        self.texts: list[str] = []
        self.crash, self.left = crash, life

    def step(self, record: StepRecord) -> None:
        if record.step == self.crash:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    def message(self, text: str) -> None:
        self.texts.append(text)


def weights(out: Path) -> str:
    digest = hashlib.sha256()
    for key, tensor in sorted(load_file(out / f"step-{STEPS:08d}" / "model.safetensors").items()):
        digest.update(key.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def test_a_spike_is_skipped_and_the_run_continues_exactly(noisy: tuple[Path, int, int], tmp_path: Path) -> None:
    bad = noisy[2]
    watch = Watch()
    train(recipe(noisy, tmp_path / "a", spike="skip", steps=STEPS), observer=watch)
    records = {record["step"]: record for record in read_metrics(tmp_path / "a" / "metrics.jsonl")}
    refused = [step for step, record in records.items() if record.get("refused")]
    assert refused[0] == bad
    assert records[bad]["loss"] > records[bad - 1]["loss"] + 1
    assert records[bad - 1]["skipped"] == 0
    assert records[STEPS]["skipped"] == len(refused)
    assert any(f"Step {bad} stands out, with loss" in text and "left out" in text for text in watch.texts)
    # Stopped by a crash after the spike and continued from before it.
    with pytest.raises(KeyboardInterrupt):
        train(recipe(noisy, tmp_path / "b", spike="skip"), observer=Watch(crash=bad + 1))
    train(recipe(noisy, tmp_path / "b", spike="skip"))
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    train(recipe(noisy, tmp_path / "c"))
    assert weights(tmp_path / "a") != weights(tmp_path / "c"), "without guard the noise is learnt"


def test_the_run_goes_back_and_passes_over_batches(noisy: tuple[Path, int, int], tmp_path: Path) -> None:
    bad = noisy[2]
    watch = Watch()
    train(recipe(noisy, tmp_path / "a", spike="rollback"), observer=watch)
    records = read_metrics(tmp_path / "a" / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1)), "each step once"
    assert [r["rollbacks"] for r in records[:20]] == [0] * 20
    assert records[20]["rollbacks"] == 1
    assert any(
        f"Step {bad} stands out" in t and f"back to step 20, passing over {bad - 20} b" in t for t in watch.texts
    )
    # The steps after the checkpoint read what comes after the noise.
    loader = Loader(TokenDataset.open(noisy[0]), 2, LENGTH, noisy[1])
    model, _ = checkpoint.load(tmp_path / "a" / "step-00000020")
    ids = loader.batch(bad)
    logits, _ = model(ids.input_ids)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.targets.flatten())
    assert records[20]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    # A crash after going back, before the next checkpoint: the continued run goes back again.
    with pytest.raises(KeyboardInterrupt):
        train(recipe(noisy, tmp_path / "b", spike="rollback"), observer=Watch(crash=22, life=2))
    again = Watch()
    train(recipe(noisy, tmp_path / "b", spike="rollback"), observer=again)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert any("back to step 20" in text for text in again.texts)


def test_a_run_that_passes_over_batches_may_read_on_where_epochs_end(
    noisy: tuple[Path, int, int], tmp_path: Path
) -> None:
    dataset, rows = TokenDataset.open(noisy[0]), 2 * STEPS

    def mixed(seed: int) -> Mixture:
        loader = Loader(dataset, 2, LENGTH, source_seed(seed, "data.mixture.a"))
        return Mixture({"a": Part(loader, 1.0, rows / loader.rows)}, seed)

    seed, bad = noise_after_20(mixed)
    mixture = mixed(seed)
    assert mixture.rows == rows, "just enough"
    told, given = Watch(), recipe((noisy[0], seed, bad), tmp_path / "a", spike="rollback").to_dict()
    source = {"path": str(noisy[0]), "weight": 1.0, "epochs": mixture.parts[0].epochs}
    given["data"] = {"mixture": {"a": source}}
    assert train(Recipe.from_dict(given), observer=told).steps == STEPS
    passed = [int(found[1]) for text in told.texts if (found := re.search(r"passing over (\d+) batches", text))]
    assert passed[0] == bad - 20
    assert told.texts[-1] == f"Tokens read: a {2 * (STEPS + sum(passed)) * LENGTH:,}."


def test_gradients_that_are_not_finite_are_skipped_so_often(noisy: tuple[Path, int, int], tmp_path: Path) -> None:
    def spoiled(first: int, count: int) -> Watch:
        model = checkpoint.create(zoo.get("samba-micro").with_overrides(vocab_size=320), seed=0)
        calls = iter(range(1, 1000))
        bad = range(first, first + count)
        model.norm.weight.register_hook(lambda grad: grad * (math.nan if next(calls) in bad else 1.0))
        watch = Watch()
        train(recipe(noisy, tmp_path / f"{count}", spike="skip", spike_limit=3, steps=12), model=model, observer=watch)
        return watch

    told = spoiled(5, 3).texts
    assert [text for text in told if "left out" in text] == [
        text for step in (5, 6, 7) for text in told if text.startswith(f"Step {step} stands out") and "norm nan" in text
    ]
    assert ["number 3 in a row" in text for text in told if "left out" in text] == [False, False, True]
    records = read_metrics(tmp_path / "3" / "metrics.jsonl")
    assert [record.get("skipped") for record in records] == [0, 0, 0, 0, 1, 2, 3, 3, 3, 3, 3, 3]
    assert "grad_norm" not in records[5], "JSON has no NaN"
    with pytest.raises(NonFiniteError, match="Step 8: the gradient's norm is nan"):
        spoiled(5, 4)
    with pytest.raises(NonFiniteError, match="Step 1"):
        spoiled(1, 1)


def test_without_a_checkpoint_to_go_back_to_the_step_is_left_out(noisy: tuple[Path, int, int], tmp_path: Path) -> None:
    watch = Watch()
    train(recipe(noisy, tmp_path / "a", spike="rollback", save_every=0), observer=watch)
    assert any("left out" in text for text in watch.texts)
    assert not any("back to" in text for text in watch.texts)


def guarded(data: str, seed: int, bad: int, out: str) -> list[list[float]]:
    """A run that goes back, and what its metrics then say."""
    train(recipe((Path(data), seed, bad), Path(out), spike="rollback"))
    records = read_metrics(Path(out) / "metrics.jsonl")
    return [[record["step"], record["loss"], record["rollbacks"]] for record in records]


@pytest.mark.slow
def test_all_processes_decide_alike(noisy: tuple[Path, int, int], tmp_path: Path) -> None:
    alone = guarded(str(noisy[0]), noisy[1], noisy[2], str(tmp_path / "one"))
    for found in on_ranks(2, guarded, str(noisy[0]), noisy[1], noisy[2], str(tmp_path / "two")):
        assert [row[::2] for row in found] == [row[::2] for row in alone]
        assert [row[1] for row in found] == pytest.approx([row[1] for row in alone], rel=1e-3)


@pytest.mark.parametrize("fields", [{"spike": "ignore"}, {"spike_limit": 0}, {"spike_factor": 0.0}])
def test_wrong_settings_are_told(fields: dict[str, object]) -> None:
    with pytest.raises(UserError, match=next(iter(fields))):
        Recipe.from_dict({"train": fields})

"""kill -9 of runs of two processes, at moments chosen at random, resumed in new processes: nothing but time is lost.

tests/cli/test_train_cli.py does the same with ``samba-lm train`` in one process.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks, run_ranks

from samba_lm import checkpoint
from samba_lm.train.checkpoints import list_checkpoints, verify
from samba_lm.train.metrics import read_metrics
from samba_lm.train.parallel import Parallel
from samba_lm.train.recipe import Recipe
from samba_lm.train.run import train

STEPS = 8
FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod"}
"""Of Python's audit: what writing, renaming and deleting checkpoints is made of, told just before it happens."""


def go(recipe: dict[str, Any], event: int | None = None) -> int:
    """What a process of a run does. ``event``: the main one kills itself before so many things done to checkpoints."""
    count = 0

    def hook(name: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if name in FILE_EVENTS and any("/step-" in str(argument) for argument in arguments[:2]):
            count += 1
            if count == event:
                os.kill(os.getpid(), signal.SIGKILL)

    if event is not None and os.environ["RANK"] == "0":
        sys.addaudithook(hook)
    return train(Recipe.from_dict(recipe)).steps


def nothing() -> None:
    """What a process does that only starts."""


def curve(out: Path) -> list[tuple[float, ...]]:
    path = out / "metrics.jsonl"
    return [(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(path)] if path.exists() else []


def final(out: Path) -> dict[str, bytes]:
    """The bytes of the last checkpoint's tensors."""
    return {path.name: path.read_bytes() for path in sorted((out / f"step-{STEPS:08d}").glob("*.safetensors"))}


@pytest.fixture(scope="module")
def plan(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, float]:
    """A recipe as plain data, the folder of its uninterrupted run, and how many seconds that took."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    recipe = {
        "model": {"name": "samba-micro"},
        "data": {"train": str(data / "train")},
        "train": {"out": str(out), "steps": STEPS, "batch_size": 4, "length": 32, "device": "cpu"},
    }
    recipe["train"] |= {"save_every": 1, "keep": 2, "log_every": 1}
    on_ranks(2, nothing)  # what starts the first ranks is no part of their time
    began = time.monotonic()
    assert on_ranks(2, go, recipe) == [STEPS, STEPS]
    return recipe, out, time.monotonic() - began


def kill_and_resume(plan: tuple[dict[str, Any], Path, float], out: Path, kills: int, seed: int) -> None:
    recipe, whole, seconds = plan
    print(f"seed of the moments: {seed}")
    moments = random.Random(seed)
    recipe = {**recipe, "train": {**recipe["train"], "out": str(out)}}
    hits = 0
    while hits < kills:
        if moments.random() < 0.5:
            delay = moments.uniform(0.2, 1.0) * seconds
            ended = run_ranks(2, go, recipe, timeout=delay)
            when = f"all after {delay:.3f} s"
        else:
            event = moments.randrange(1, 120)
            ended = run_ranks(2, go, recipe, event)
            when = f"the main one before file event {event}"
        hits += ended[0][0] == -signal.SIGKILL
        left = [path.name for path in out.glob("step-*.tmp-*")]
        print(
            f"killed {when}: exit codes {[code for code, _, _ in ended]}, {len(curve(out))} steps logged, left {left}"
        )
        assert all(code in (0, -signal.SIGKILL) or "LostProcessError" in text for code, _, text in ended), ended
        for folder in list_checkpoints(out):
            verify(folder, Parallel(torch.device("cpu")))
            checkpoint.load(folder)
        if (out / f"step-{STEPS:08d}").exists():  # it was done: from the beginning again
            assert final(out) == final(whole)
            out = out.with_name(out.name + "again")
            recipe["train"]["out"] = str(out)
    assert on_ranks(2, go, recipe) == [STEPS, STEPS]
    assert curve(out) == curve(whole)
    assert final(out) == final(whole)
    assert not list(out.glob("step-*.tmp-*"))
    assert len(list_checkpoints(out)) == 2


def test_killed_twice(plan: tuple[dict[str, Any], Path, float], tmp_path: Path) -> None:
    kill_and_resume(plan, tmp_path / "run", kills=2, seed=random.SystemRandom().randrange(1 << 32))


@pytest.mark.slow
@pytest.mark.parametrize("round_", range(5))
def test_killed_again_and_again(plan: tuple[dict[str, Any], Path, float], tmp_path: Path, round_: int) -> None:
    kill_and_resume(plan, tmp_path / "run", kills=4, seed=random.SystemRandom().randrange(1 << 32))

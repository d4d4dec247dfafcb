"""Passkeys learned for real: training, its files and the measurement together. Minutes on one core."""

from __future__ import annotations

from pathlib import Path

import pytest

from samba_lm import checkpoint
from samba_lm.data.passkey import FILLER, KEY_LINE, QUESTION, TASK
from samba_lm.eval.passkey import PasskeyTask
from samba_lm.eval.recall import Count, Plan, measure
from samba_lm.tokenizer import train_bpe
from samba_lm.train.recipe import Recipe
from samba_lm.train.run import train


@pytest.mark.slow
def test_samba_nano_learns_passkeys_and_the_control_does_not(tmp_path: Path) -> None:
    """3,000 steps of 2,048 tokens, four minutes; the loss falls from step 1,000 on. Seen: 37 of 40 right."""
    train_bpe([TASK + " ".join(FILLER) * 3 + "\n" + KEY_LINE.format(key="?") + QUESTION + "\n"] * 4, 400).save(tmp_path)
    recipe = {
        "model": {"name": "samba-micro"},
        "data": {
            "tokenizer": str(tmp_path),
            "passkey": {"lengths": [128, 256], "shares": [0.5, 0.5], "lm_weight": 0.2},
        },
        "train": {
            "out": str(tmp_path / "run"),
            "steps": 3000,
            "batch_size": 8,
            "length": 256,
            "lr": 3e-3,
            "warmup_fraction": 0.1,
            "save_every": 0,
            "device": "cpu",
        },
    }
    model, tokenizer = checkpoint.load(train(Recipe.from_dict(recipe)).folder)
    assert tokenizer is not None
    task = PasskeyTask(Plan((256,), (0.0, 0.25, 0.5, 0.75, 1.0), 8, seed=1, control=True), tokenizer)
    count = Count.of(list(measure(model, tokenizer, task)))
    assert count.total == 40
    assert count.right > 20
    assert count.control_right == 0

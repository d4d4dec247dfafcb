"""Runs that fine-tune on conversations: all weights or adapters, continued exactly, by one process or two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from safetensors.torch import load_file

from samba_lm import checkpoint
from samba_lm.cli.train import COLLECTED
from samba_lm.convert.peft import merge_adapter
from samba_lm.convert.transformers import to_transformers
from samba_lm.errors import UserError
from samba_lm.templates import TAUGHT
from samba_lm.tokenizer import ByteTokenizer
from samba_lm.train.metrics import read_metrics
from samba_lm.train.observer import Observer
from samba_lm.train.recipe import Recipe
from samba_lm.train.run import train

LAST = "step-00000006"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model, ``base``, conversations, ``chat.jsonl`` and ``val.jsonl``."""
    folder = tmp_path_factory.mktemp("finetune")
    config = checkpoint.create("samba-micro").config.with_overrides(vocab_size=257)
    checkpoint.save(checkpoint.create(config, seed=4), folder / "base", ByteTokenizer())
    for name, count, first in (("chat", 30, 0), ("val", 7, 50)):
        said = ({"prompt": f"After {i}?", "completion": f"Comes {i + 1}."} for i in range(first, first + count))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in said))
    return folder


def recipe(place: Path, out: Path, lora: dict[str, Any] | None = None, **train: Any) -> Recipe:
    settings = {"steps": 6, "batch_size": 4, "length": 96, "lr": 5e-3, "warmup_fraction": 0.2, "log_every": 1}
    saving = {"eval_every": 2, "eval_batches": 2, "save_every": 2, "device": "cpu", "out": str(out)}
    return Recipe.from_dict(
        {
            "model": {"init_from": str(place / "base")},
            "data": {"chat": {"files": [str(place / "chat.jsonl")], "val": [str(place / "val.jsonl")]}},
            "train": {**settings, **saving, **train},
            "lora": lora or {},
        }
    )


def go(plain: dict[str, Any]) -> float:
    return train(Recipe.from_dict(plain)).final_loss


def curve(out: Path) -> list[tuple[float, ...]]:
    keys = ("step", "loss", "grad_norm", "val_loss")
    return [tuple(record[key] for key in keys if key in record) for record in read_metrics(out / "metrics.jsonl")]


def close(some: list[tuple[float, ...]], others: list[tuple[float, ...]]) -> bool:
    return len(some) == len(others) and all(a == pytest.approx(b, rel=1e-4) for a, b in zip(some, others, strict=True))


class Messages(Observer):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


LORA = {"rank": 4, "alpha": 8.0}


@pytest.fixture(scope="module")
def adapted(place: Path) -> Path:
    """The folder of an uninterrupted run that trained adapters; look only."""
    return train(recipe(place, place / "adapted", LORA)).folder.parent


def test_all_weights_learn_the_answers_and_the_folder_says_its_template(place: Path) -> None:
    result = train(recipe(place, place / "all"))
    losses = [entry[1] for entry in curve(place / "all")]
    assert losses[0] == pytest.approx(5.55, abs=0.4)  # ln 257: nothing is known yet
    assert losses[-1] < 0.8 * losses[0]
    assert result.val_loss is not None
    _, tokenizer = checkpoint.load(place / "all")
    assert tokenizer is not None
    assert tokenizer.chat_template == TAUGHT
    assert not (place / "all" / "adapter").exists()


def test_adapters_alone_are_trained_and_a_step_is_still_a_model(place: Path, adapted: Path) -> None:
    base, last = (load_file(folder / "model.safetensors") for folder in (place / "base", adapted / LAST))
    assert all(torch.equal(base[name], last[name]) for name in base)
    trained = last.keys() - base.keys()
    assert {name.rpartition(".")[2] for name in trained} == {"lora_A", "lora_B"}
    kept = {name.partition(".")[2] for name in load_file(adapted / LAST / "optimizer.safetensors")}
    assert kept == trained
    loaded, tokenizer = checkpoint.load(adapted)
    assert tokenizer is not None
    merged, own = checkpoint.load(place / "base")
    merge_adapter(merged, adapted / "adapter", own)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids)[0], loaded(ids)[0])
        assert not torch.allclose(checkpoint.load(place / "base")[0](ids)[0], loaded(ids)[0], rtol=1e-2)
    assert own is not None
    assert own.chat_template == TAUGHT
    losses = [entry[1] for entry in curve(adapted)]
    assert losses[-1] < losses[0]


def test_adapters_continue_bit_for_bit(place: Path, adapted: Path, tmp_path: Path) -> None:
    steps = iter(range(10))
    assert train(recipe(place, tmp_path / "run", LORA), stop=lambda: next(steps) == 2).steps == 3
    torch.manual_seed(99)
    train(recipe(place, tmp_path / "run", LORA))
    assert curve(tmp_path / "run") == curve(adapted)
    ours, theirs = (load_file(out / LAST / "model.safetensors") for out in (tmp_path / "run", adapted))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for change, told in (
        ({"rank": 8}, "lora.rank = 4, not 8"),
        ({}, "lora.rank = 4, not 0"),
        ({**LORA, "targets": ["qkv"]}, "lora.targets"),
    ):
        with pytest.raises(UserError, match=told):
            train(recipe(place, tmp_path / "run", change, steps=8))
    train(recipe(place, tmp_path / "run", LORA, steps=7), fresh=True)  # moves the adapter aside too


def test_two_processes_train_what_one_does(place: Path, adapted: Path, tmp_path: Path) -> None:
    first, second = on_ranks(2, go, recipe(place, tmp_path / "two", LORA).to_dict())
    assert first == second
    assert close(curve(tmp_path / "two"), curve(adapted))
    ids = torch.arange(40)[None]
    with torch.no_grad():
        one, two = (checkpoint.load(out)[0](ids)[0] for out in (adapted, tmp_path / "two"))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
    # What two wrote, one goes on from.
    train(recipe(place, tmp_path / "two", LORA, steps=8))
    a, b = (load_file(out / "adapter" / "adapter_model.safetensors") for out in (adapted, tmp_path / "two"))
    assert a.keys() == b.keys()


def test_the_recipes_that_come_along_train(place: Path, tmp_path: Path) -> None:
    small: dict[str, Any] = {
        "steps": 2,
        "tokens": None,
        "batch_size": 4,
        "micro_batch": 2,
        "length": 256,
        "device": "cpu",
    }
    for name, rank in (("chat", 0), ("lora", 16), ("passkey", 0)):
        found = Recipe.from_toml(COLLECTED[f"finetune/{name}"]).to_dict()
        assert found["lora"]["rank"] == rank
        found["model"]["init_from"] = str(place / "base")
        found["train"] |= {**small, "out": str(tmp_path / name)}
        if name == "passkey":  # as the paper says
            assert Recipe.from_toml(COLLECTED["finetune/passkey"]).train.tokens_per_step == 2048 * 4096
        else:
            found["data"]["chat"] = {"files": [str(place / "chat.jsonl")]}
        assert train(Recipe.from_dict(found)).steps == 2


def test_what_is_cut_is_told(place: Path, tmp_path: Path) -> None:
    found = Messages()
    train(recipe(place, tmp_path / "run", steps=1, length=31), observer=found)
    assert any("of 30 conversations" in text and "train.length = " in text for text in found.texts)


def test_what_cannot_be_fine_tuned_is_told(place: Path, tmp_path: Path) -> None:
    good = recipe(place, tmp_path / "run").to_dict()

    def refused(told: str, section: str, **values: Any) -> None:
        changed = {**good, section: {**good[section], **values}}
        with pytest.raises(UserError, match=told):
            train(Recipe.from_dict(changed))

    to_transformers(
        checkpoint.create(
            checkpoint.create("samba-micro").config.with_overrides(
                vocab_size=257, layers=checkpoint.create("samba-micro").config.layers[:1]
            )
        ),
        tmp_path / "hf",
        ByteTokenizer(),
    )
    refused("is a model of transformers: `samba-lm convert from-transformers", "model", init_from=str(tmp_path / "hf"))
    refused("is no checkpoint's folder", "model", init_from="samba-421m")
    refused("give model.init_from", "model", init_from=None)
    refused("data.chat.files is empty", "data", chat={"files": []})
    refused("does not exist", "data", chat={"files": [str(tmp_path / "none.jsonl")]})
    refused("give chat.val", "data", val=str(place / "val.jsonl"))
    refused("keep one", "data", passkey={})
    refused("would be trained on text", "data", tokenizer="bpe:300")
    refused("is no linear map of this model", "lora", rank=2, targets=["query"])
    refused("rank = 0 makes none", "lora", targets=["qkv"])
    with pytest.raises(UserError, match=r"lora.rank = 2 adapts a model that is made"):
        Recipe.from_dict({"lora": {"rank": 2}})
    assert not (tmp_path / "run" / LAST).exists()

"""Recipes with mixtures, remote data and several validation sets: trained, continued, refused where they do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from samba_lm.cli.main import main
from samba_lm.data.shards import ShardWriter
from samba_lm.errors import UserError
from samba_lm.tokenizer import ByteTokenizer, train_bpe
from samba_lm.train.data import open_data
from samba_lm.train.observer import Observer
from samba_lm.train.recipe import Recipe
from samba_lm.train.run import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, documents in (("books", 60), ("code", 10), ("web", 90), ("tiny", 1), ("other", 5)):
        (folder / name).mkdir()
        tokenizer = train_bpe(["some words some"], 258) if name == "other" else ByteTokenizer()
        with ShardWriter(folder / name, tokenizer, shard_tokens=500) as writer:
            for _ in range(documents):
                writer.append(rng.integers(0, 256, 10 if name == "tiny" else 90), end=True)
            writer.close()
    return folder


def recipe(folder: Path, out: Path, data: dict[str, Any] | None = None, **train_: Any) -> Recipe:
    mixture = {
        "books": {"path": str(folder / "books"), "weight": 0.7},
        "code": {"path": str(folder / "code"), "weight": 0.3},
    }
    return Recipe.from_dict(
        {
            "model": {"name": "samba-micro"},
            "data": {"mixture": mixture, "val": {"web": str(folder / "web"), "code": str(folder / "code")}}
            if data is None
            else data,
            "train": {
                "out": str(out),
                "steps": 6,
                "batch_size": 4,
                "length": 32,
                "device": "cpu",
                "log_every": 1,
                "save_every": 3,
                "eval_every": 3,
                "eval_batches": 2,
                **train_,
            },
        }
    )


def curve(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: line.get(key) for key in ("step", "loss", "val_loss", "val_losses")} for line in lines]


class Told(Observer):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


def test_a_mixture_is_trained_and_continued(folder: Path, tmp_path: Path) -> None:
    told = Told()
    train(recipe(folder, tmp_path / "whole"), observer=told)
    assert told.texts[-1] in ("Tokens read: books 544, code 224.", "Tokens read: books 512, code 256.")
    validated = [line for line in curve(tmp_path / "whole") if line["val_loss"] is not None]
    assert [line["step"] for line in validated] == [3, 6]
    for line in validated:
        assert set(line["val_losses"]) == {"web", "code"}
        assert line["val_losses"]["web"] == line["val_loss"] != line["val_losses"]["code"]

    train(recipe(folder, tmp_path / "part"), stop=lambda: True)
    train(recipe(folder, tmp_path / "part"))
    whole, part = curve(tmp_path / "whole"), curve(tmp_path / "part")
    assert [line["loss"] for line in part] == [line["loss"] for line in whole]

    # Elsewhere, by another name of the folder: the same data. Other weights, sources, epochs: refused.
    moved = recipe(folder, tmp_path / "part").data.model_dump()
    for source in ("books", "code"):
        moved["mixture"][source]["path"] = f"{folder}/../{folder.name}/{source}"
    told = Told()
    assert train(recipe(folder, tmp_path / "part", moved, steps=7), observer=told).steps == 7
    assert not [text for text in told.texts if "data.mixture" in text]
    for change, words in (
        ({"books": {"weight": 0.5}}, r"was trained with data.mixture.books.weight = 0.7, not 0.5; set train.out"),
        ({"code": {"epochs": 3.0}}, r"was trained with data.mixture.code.epochs = None, not 3.0"),
        ({"web": {"path": str(folder / "web"), "weight": 1.0}}, r"data.mixture = \['books', 'code'\], not \['books'"),
        ({"code": {"path": str(folder / "web")}}, r"was trained on data .* \(data.mixture \(books, code\)\), but data"),
    ):
        data = recipe(folder, tmp_path / "part").data.model_dump()
        for name, fields in change.items():
            data["mixture"][name] = {**data["mixture"].get(name, {}), **fields}
        with pytest.raises(UserError, match=words):
            train(recipe(folder, tmp_path / "part", data, steps=9))


def test_mixtures_take_turns_with_made_rows(folder: Path, tmp_path: Path) -> None:
    data = recipe(folder, tmp_path).data.model_dump() | {"passkey": {"share": 0.5}, "val": None}
    opened = open_data(recipe(folder, tmp_path, data, length=512))
    alone = open_data(recipe(folder, tmp_path, length=512))
    assert opened.tokens_read is not None
    assert alone.tokens_read is not None
    assert opened.tokens_read(6) == alone.tokens_read(3)
    assert opened.loader.batch(0).input_ids.equal(alone.loader.batch(0).input_ids)
    assert opened.loader.batch(2).input_ids.equal(alone.loader.batch(1).input_ids)


def test_a_run_reads_from_a_url(folder: Path, tmp_path: Path) -> None:
    here = open_data(recipe(folder, tmp_path, {"train": str(folder / "books"), "shuffle_shards": 2}))
    files = fsspec.filesystem("memory")
    files.put(f"{folder}/books/", "/run/books/", recursive=True)
    files.put(f"{folder}/web/", "/run/web/", recursive=True)
    data = {"train": "memory://run/books", "val": "memory://run/web", "cache": str(tmp_path / "cache")}
    there = open_data(recipe(folder, tmp_path, data | {"shuffle_shards": 2}))
    assert there.fingerprint == here.fingerprint
    assert there.loader.batch(3).input_ids.equal(here.loader.batch(3).input_ids)
    train(recipe(folder, tmp_path / "out", data | {"shuffle_shards": 2}))
    with pytest.raises(UserError, match=r"was trained with data.shuffle_shards = 2, not None"):
        train(recipe(folder, tmp_path / "out", data, steps=9))
    small = data | {"cache_gb": 1e-5}
    with pytest.raises(
        UserError, match=r"\(memory://run/books 0\.0 MB, validation .*do not fit .*set data.shuffle_shards"
    ):
        open_data(recipe(folder, tmp_path, small))
    files.rm("/run/books/tokens-00001.npy")
    with pytest.raises(UserError, match=r"memory://run/books/tokens-00001.npy is missing \(shard 2 of \d+\)"):
        train(recipe(folder, tmp_path / "again", data | {"cache": str(tmp_path / "fresh")}))
    files.rm("/run", recursive=True)


def source(path: Path, weight: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"path": str(path), "weight": weight, **more}


def test_what_does_not_fit_is_told(folder: Path, tmp_path: Path) -> None:
    for mixture, words in (
        ({"a": source(folder / "books", 0.0)}, r"data.mixture.a.weight = 0.0: input should be greater than 0"),
        ({"a": source(folder / "books", -1.0)}, r"data.mixture.a.weight = -1.0: input should be greater than 0"),
        ({"a": {"path": "x"}}, r"data.mixture.a.weight is missing"),
        ({"a": source(folder / "books", wieght=2)}, r"data.mixture.a.wieght = 2: unknown key. Did you mean 'weight'"),
        ({"a": source(folder / "absent")}, r"data.mixture.a: .*absent is not a folder"),
        ({"a": source(folder / "books"), "b": source(folder / "tiny")}, r"data.mixture.b: .*tiny has 11 tokens, fewer"),
        (
            {"a": source(folder / "books"), "b": source(folder / "other")},
            r"'a' \(.*books\) and 'b' \(.*other\) were made with different tokenizers",
        ),
        (
            {"a": source(folder / "code", epochs=1.0)},
            r"as data.mixture.\*.epochs allow after 7 steps, fewer than the 9 that read them",
        ),
        ({" ": source(folder / "books")}, r"mixture has the name ' '"),
    ):
        with pytest.raises(UserError, match=words):
            open_data(recipe(folder, tmp_path, {"mixture": mixture}, steps=9))
    with pytest.raises(UserError, match="train = 'x' and mixture \\(a\\) are both given"):
        recipe(folder, tmp_path, {"train": "x", "mixture": {"a": source(folder / "books")}})
    with pytest.raises(UserError, match=r"data.val.o = .*was made with another tokenizer than data.train"):
        open_data(recipe(folder, tmp_path, {"train": str(folder / "web"), "val": {"o": str(folder / "other")}}))
    with pytest.raises(UserError, match=r"data.val.t: .*tiny has 11 tokens"):
        open_data(recipe(folder, tmp_path, {"train": str(folder / "web"), "val": {"t": str(folder / "tiny")}}))


def test_a_mixture_on_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"""
    [data]
    val = {{web = "{folder}/web"}}
    [data.mixture.books]
    path = "{folder}/books"
    weight = 3
    [data.mixture.code]
    path = "{folder}/code"
    weight = 1
    epochs = 2
    [train]
    steps = 2
    batch_size = 2
    length = 16
    device = "cpu"
    """
    (tmp_path / "mix.toml").write_text(text)
    words = ["train", str(tmp_path / "mix.toml"), "--model.name", "samba-micro"]
    assert main([*words, "--train.out", str(tmp_path / "out"), "--data.mixture.books.weight", "0.5"]) == 0
    assert "Tokens read: books" in capsys.readouterr().out
    assert main([*words, "--data.mixture.books.weight", "0"]) == 2
    assert "weight" in capsys.readouterr().err
    # A recipe over it may read one folder instead.
    (tmp_path / "one.toml").write_text(f'base = "mix.toml"\n[data]\ntrain = "{folder}/web"\n')
    assert Recipe.from_toml(tmp_path / "one.toml").data.mixture == {}

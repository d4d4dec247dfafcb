"""Streams of `datasets`: real data sets on the disk, read as they would be from the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from samba_lm.cli.main import main
from samba_lm.data import prepare as preparing
from samba_lm.data.hub import HubStream, parse_stream
from samba_lm.data.prepare import prepare
from samba_lm.data.shards import TokenDataset
from samba_lm.data.sources import PIECE_CHARS, ReadOptions
from samba_lm.errors import UserError
from samba_lm.tokenizer import BpeSpec, ByteTokenizer

datasets = pytest.importorskip("datasets")
import huggingface_hub  # noqa: E402

TEXTS = [f"Document {i} of the stream: " + "words and ÄÖ\n" * (i % 5) for i in range(40)]


@pytest.fixture(scope="module", autouse=True)
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parquet and JSON files with two configurations and two splits, as a data set of the hub has them."""
    folder = tmp_path_factory.mktemp("hub") / "set"
    for config in ("en", "de"):
        (folder / config).mkdir(parents=True)
        texts = [text + config for text in TEXTS]
        for number in range(2):
            part = datasets.Dataset.from_dict({"text": texts[number * 20 :][:20], "n": [*range(20)]})
            part.to_parquet(folder / config / f"train-{number:05d}.parquet")
        datasets.Dataset.from_dict({"text": [config, None, "  "], "n": [1, 2, 3]}).to_parquet(
            folder / config / "test-00000.parquet"
        )
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        + "".join(
            f"- config_name: {config}\n  data_files:\n  - split: train\n    path: {config}/train-*\n"
            f"  - split: test\n    path: {config}/test-*\n"
            for config in ("en", "de")
        )
        + "---\n"
    )
    return folder


def documents(folder: Path) -> list[str]:
    dataset = TokenDataset.open(folder)
    return [dataset.tokenizer.decode(dataset.document(i)[:-1]) for i in range(dataset.num_documents)]


@pytest.mark.parametrize("split", ["en:train", "de:train", "en"])
def test_a_stream_becomes_a_data_set(folder: Path, tmp_path: Path, split: str) -> None:
    prepared = prepare([f"hf:{folder}:{split}"], tmp_path / "out", ByteTokenizer())
    assert documents(prepared.folder) == [text + split[:2] for text in TEXTS]
    assert prepared.files == 1
    # The same bytes as from files.
    files = [folder / split[:2] / f"train-{number:05d}.parquet" for number in range(2)]
    prepare(files, tmp_path / "files", ByteTokenizer())
    for name in ("meta.json", "tokens-00000.npy", "offsets-00000.npy"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "files" / name).read_bytes()


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("A file comes first.")
    words = ["data", "prepare", f"hf:{folder}:en:test", str(tmp_path / "notes.txt")]
    out = tmp_path / "out"
    assert main(["data", "prepare", f"hf:{folder}:de:train", "--out", str(out), "--take", "7"]) == 0
    assert documents(out) == [text + "de" for text in TEXTS[:7]]
    assert "Read 1 input(s) in" in capsys.readouterr().out
    assert main([*words, "--out", str(out), "--overwrite"]) == 0
    assert documents(out) == ["A file comes first.", "en"]
    assert "skipped 2 empty" in capsys.readouterr().out


def test_nothing_is_read_that_is_not_asked_for(tmp_path: Path) -> None:
    """Rows come one by one: what stands far behind those that were asked for is not looked at."""
    (tmp_path / "set").mkdir()
    for name in "ab":
        (tmp_path / "set" / f"{name}.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "set" / "z.jsonl").write_text("no JSON\n")
    assert documents(prepare([f"hf:{tmp_path}/set"], tmp_path / "out", ByteTokenizer(), take=2).folder) == [
        "one",
        "two",
    ]
    with pytest.raises(UserError, match=r"hf:.*set:train cannot be read"):
        prepare([f"hf:{tmp_path}/set"], tmp_path / "whole", ByteTokenizer())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "set"], "all or nothing"


def test_long_documents_and_bpe(folder: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "set").mkdir()
    long = "all work and no play " * (PIECE_CHARS // 10)
    (tmp_path / "set" / "a.jsonl").write_text(json.dumps({"text": long}) + '\n{"text": "other"}\n')
    stream = parse_stream(f"hf:{tmp_path}/set")
    pieces = list(stream.read(ReadOptions()))
    assert [piece.end for piece in pieces] == [False] * (len(pieces) - 2) + [True, True]
    assert len(pieces) > 3
    assert "".join(piece.text for piece in pieces) == long + "other"
    assert pieces[-1].position == len(long) + 5
    monkeypatch.setattr(preparing, "BPE_SAMPLE_BYTES", 1000)
    told: list[tuple[str, int, int]] = []
    prepared = prepare(
        [f"hf:{folder}:en:train"], tmp_path / "out", BpeSpec(300), progress=lambda *words: told.append(words)
    )
    assert documents(prepared.folder) == [text + "en" for text in TEXTS]
    assert any("beginnings of the input" in note for note in prepared.notes)
    assert told[-1][1:] == (sum(len((text + "en").encode()) for text in TEXTS), 0)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("hf:", "names no data set"),
        ("hf:a:b:c:d", "names no data set"),
        ("hf:a::b", "names no data set"),
        ("hf:{folder}:fr:train", r"hf:.*:fr:train cannot be read \(.*'fr' not found"),
        ("hf:{folder}:en:nope", r"cannot be read \(.*nope.*train"),
        ("hf:{folder}", r"hf:.*:train cannot be read \(.*Config name is missing"),
        ("hf:{folder}/absent", r"absent:train cannot be read .*check its name"),
        ("hf:nobody/absent", r"hf:nobody/absent:train cannot be read .*HF_TOKEN"),
        ("hf:{folder}:en:train --field txt", r"has no column 'txt': name the text's column. Did you mean 'text'"),
        ("hf:{folder}:en:train --field n", r"row 1: field 'n' is '0', not a text"),
        ("hf:{folder}:en:train --take 0", r"take is 0: it must be at least 1"),
        ("{folder}/README.md --take 3", r"there is none: leave --take out"),
    ],
)
def test_what_is_wrong_is_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str, words: str
) -> None:
    arguments = given.format(folder=folder).split(" ")
    assert main(["data", "prepare", *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert re.search(words, error)
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_names() -> None:
    assert parse_stream("hf:user/set", 5) == HubStream("user/set", take=5)
    assert str(parse_stream("hf:user/set")) == "hf:user/set:train"
    assert parse_stream("hf:user/set:en:test") == HubStream("user/set", "en", "test")
    assert str(parse_stream("hf:user/set:en")) == "hf:user/set:en"

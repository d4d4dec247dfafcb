from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from samba_lm.data.shards import Meta, ShardWriter, TokenDataset, open_splits, token_dtype
from samba_lm.errors import UserError
from samba_lm.files import TMP_MARK
from samba_lm.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer

TEXTS = ["hello", "naïve 🙂", "x", "a longer document, longer than a shard", "end"]


def write(folder: Path, tokenizer: Tokenizer | None = None, shard_tokens: int = 12) -> Meta:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer or ByteTokenizer()
    with ShardWriter(folder, tokenizer, shard_tokens) as writer:
        for text in TEXTS:
            half = len(text) // 2
            writer.append(tokenizer.encode(text[:half]), end=False)
            writer.append(tokenizer.encode(text[half:]), end=True, text_bytes=len(text.encode()))
        return writer.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "data")
    return tmp_path / "data"


def test_round_trip_across_shards(folder: Path) -> None:
    dataset = TokenDataset.open(folder)
    stream = np.concatenate([np.append(ByteTokenizer().encode(text), 256) for text in TEXTS])
    assert len(dataset.meta.shards) == 3
    assert dataset.num_tokens == len(stream)
    assert dataset.num_documents == len(TEXTS)
    assert dataset.meta.text_bytes == len("".join(TEXTS).encode())
    assert dataset.tokens(0, len(stream)).dtype == np.int64
    for start in range(len(stream) + 1):
        for stop in range(start, len(stream) + 1):
            assert np.array_equal(dataset.tokens(start, stop), stream[start:stop])
            ends = np.flatnonzero(stream[start:stop] == 256) + start
            assert np.array_equal(dataset.document_ends(start, stop), ends)
    for index, text in enumerate(TEXTS):
        assert dataset.document(index)[-1] == 256
        assert dataset.tokenizer.decode(dataset.document(index)) == text
    for bad in (-1, len(TEXTS)):
        with pytest.raises(IndexError):
            dataset.document(bad)
    for start, stop in ((-1, 2), (0, len(stream) + 1), (3, 2)):
        with pytest.raises(IndexError):
            dataset.tokens(start, stop)


def test_bytes_are_deterministic(tmp_path: Path, folder: Path) -> None:
    write(tmp_path / "again")
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_files_are_plain_npy(folder: Path) -> None:
    tokens = np.load(folder / "tokens-00000.npy", allow_pickle=False)
    offsets = np.load(folder / "offsets-00000.npy", allow_pickle=False)
    assert (tokens.dtype, offsets.dtype) == (np.dtype("<u2"), np.dtype("<i8"))
    assert offsets.tolist() == [0, 6, 18]
    assert bytes(tokens[:5].astype(np.uint8)) == b"hello"


def test_dtype_follows_the_vocabulary(tmp_path: Path) -> None:
    assert token_dtype(65536) == np.dtype("<u2")
    assert token_dtype(65537) == np.dtype("<u4")
    document = json.loads(ByteTokenizer().to_json())
    document["model"]["vocab"]["far"] = 70_000
    tokenizer = FileTokenizer(json.dumps(document))
    assert tokenizer.vocab_size == 70_001
    with ShardWriter(tmp_path, tokenizer) as writer:
        writer.append(np.array([70_000, 5]), end=True)
        assert writer.close().dtype == "uint32"
    assert TokenDataset.open(tmp_path).document(0).tolist() == [70_000, 5, 256]


@pytest.mark.parametrize("bad", [-1, 257, 2**16])
def test_writer_refuses_ids_outside_the_vocabulary(tmp_path: Path, bad: int) -> None:
    with (
        ShardWriter(tmp_path, ByteTokenizer()) as writer,
        pytest.raises(UserError, match=rf"Token id {bad} is outside the vocabulary 0\.\.256"),
    ):
        writer.append(np.array([5, bad, 6]), end=True)


def test_vocabulary_of_the_model(folder: Path) -> None:
    dataset = TokenDataset.open(folder)
    dataset.check_vocab(257)
    with pytest.raises(UserError, match="up to 256, outside the model's vocabulary of 256: set the model's vocab_size"):
        dataset.check_vocab(256)


def damage(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return apply


def set_meta(**values: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "meta.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def foreign_tokenizer(folder: Path) -> None:
    document = json.loads(ByteTokenizer().to_json())
    document["model"]["vocab"]["new"] = 300
    FileTokenizer(json.dumps(document)).save(folder)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (remove("meta.json"), "has no meta.json"),
        (remove("tokens-00001.npy"), r"tokens-00001\.npy is missing"),
        (remove("offsets-00002.npy"), r"offsets-00002\.npy is missing"),
        (remove("tokenizer.json"), r"tokenizer\.json"),
        (foreign_tokenizer, "another tokenizer"),
        (damage("tokens-00001.npy", lambda data: data[:-2]), r"tokens-00001\.npy has \d+ bytes, not the \d+"),
        (damage("tokens-00000.npy", lambda data: data + b"\0"), r"tokens-00000\.npy has \d+ bytes, not the \d+"),
        (damage("tokens-00000.npy", lambda data: b"x" * len(data)), r"tokens-00000\.npy is not an array"),
        (damage("tokens-00000.npy", lambda data: data.replace(b"<u2", b"<i2")), r"tokens-00000\.npy holds int16"),
        (damage("offsets-00000.npy", lambda data: data[:-8] + b"\7" * 8), r"offsets-00000\.npy does not fit"),
        (damage("meta.json", lambda data: data[:-20]), r"meta\.json is not valid JSON"),
        (damage("meta.json", lambda _: b"\xff\xfe"), r"meta\.json is not valid JSON"),
        (set_meta(format="other"), "is not of the format 'samba-lm tokens'"),
        (set_meta(version=2), "is of version 2, and this samba-lm reads version 1"),
        (set_meta(tokens=-3), "damaged at 'tokens'"),
        (set_meta(tokens=5), "contradicts itself"),
        (set_meta(dtype="uint32"), "contradicts itself"),
        (set_meta(surprise=1), "damaged at 'surprise'"),
    ],
)
def test_damage_is_seen_when_opening(folder: Path, harm: Callable[[Path], None], words: str) -> None:
    TokenDataset.open(folder)
    harm(folder)
    with pytest.raises(UserError, match=words) as caught:
        TokenDataset.open(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pickles_are_not_loaded(folder: Path) -> None:
    path = folder / "tokens-00000.npy"
    size = path.stat().st_size
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    path.write_bytes(path.read_bytes().ljust(size, b"\0")[:size])
    with pytest.raises(UserError, match="is not an array of tokens"):
        TokenDataset.open(folder)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (damage("tokens-00000.npy", lambda data: data[:-4] + b"\1\0\0\1"), r"tokens-00000\.npy was changed"),
        (damage("offsets-00000.npy", lambda data: data[:-16] + b"\5" + data[-15:]), r"offsets-00000\.npy was changed"),
    ],
)
def test_verify_reads_every_byte(folder: Path, harm: Callable[[Path], None], words: str) -> None:
    told: list[tuple[int, int]] = []
    TokenDataset.open(folder).verify(lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] == TokenDataset.open(folder).num_tokens
    harm(folder)
    dataset = TokenDataset.open(folder)
    with pytest.raises(UserError, match=words):
        dataset.verify()


def test_verify_does_not_trust_the_hashes_alone(folder: Path) -> None:
    import hashlib

    path = folder / "tokens-00000.npy"
    for position, token, words in ((0, 300, "token id 300, outside the vocabulary"), (5, 7, "does not end")):
        kept = path.read_bytes(), (folder / "meta.json").read_bytes()
        array = np.load(path)
        array[position] = token
        np.save(path, array)
        content = json.loads(kept[1])
        content["shards"][0]["tokens_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        (folder / "meta.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=words):
            TokenDataset.open(folder).verify()
        path.write_bytes(kept[0])
        (folder / "meta.json").write_bytes(kept[1])
    TokenDataset.open(folder).verify()


def test_splits(tmp_path: Path, folder: Path) -> None:
    assert open_splits(folder)[1] is None
    write(tmp_path / "both" / "train")
    with pytest.raises(UserError, match="is not prepared data"):
        open_splits(tmp_path / "both")
    write(tmp_path / "both" / "val", shard_tokens=1000)
    train, val = open_splits(tmp_path / "both")
    assert val is not None
    assert (train.folder.name, val.folder.name) == ("train", "val")
    with pytest.raises(UserError, match=r"holds two data sets: name .*train or .*val"):
        TokenDataset.open(tmp_path / "both")
    shutil.rmtree(tmp_path / "both")
    with pytest.raises(UserError, match=r"is not a folder.*samba-lm data prepare"):
        open_splits(tmp_path / "both")


@pytest.mark.parametrize("splits", [False, True])
def test_a_replacement_cut_off_between_its_renames_is_undone(tmp_path: Path, splits: bool) -> None:
    whole = tmp_path / "kp"
    for name in ("train", "val") if splits else ("",):
        write(whole / name)
    whole.rename(tmp_path / f"kp{TMP_MARK}old")
    assert TokenDataset.open(whole / "train" if splits else whole).num_documents == len(TEXTS)
    assert [path.name for path in tmp_path.iterdir()] == ["kp"]


def set_array(name: str, at: int, value: int) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        array = np.load(folder / name)
        array[at] = value
        np.save(folder / name, array)

    return harm


def test_ids_and_offsets_are_checked_where_they_are_read(folder: Path) -> None:
    set_array("tokens-00000.npy", 3, 60_000)(folder)
    with pytest.raises(UserError, match=r"token id 60000 .*samba-lm data verify"):
        TokenDataset.open(folder).tokens(0, 5)
    set_array("offsets-00000.npy", 1, 2**40)(folder)
    dataset = TokenDataset.open(folder)
    for index in (0, 1):
        with pytest.raises(UserError, match=f"document {index} has the bounds"):
            dataset.document(index)
    set_array("offsets-00000.npy", 1, 3)(folder)
    with pytest.raises(UserError, match="a document does not end where it says"):
        TokenDataset.open(folder).document_ends(0, 12)


def test_deep_meta_is_told(folder: Path) -> None:
    (folder / "meta.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"meta\.json"):
        TokenDataset.open(folder)

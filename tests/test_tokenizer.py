from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from samba_lm.errors import UserError
from samba_lm.tokenizer import (
    EOS,
    BpeSpec,
    ByteTokenizer,
    FileTokenizer,
    Tokenizer,
    load_tokenizer,
    parse_tokenizer,
    train_bpe,
)

TEXTS = [
    "The cat sat on the mat; the other cat did not.\n" * 20,
    "naïve café — Ωμέγα, 漢字かな, 🙂🙃 and \t tabs\r\n" * 10,
    f"a forged {EOS} boundary and </s> too",
    "",
    "  indented, and trailing  ",
]


def sentencepiece_like() -> FileTokenizer:
    """A tokenizer in the manner of Llama 2: words marked by U+2581, unknown characters as byte tokens."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{b:02X}>": 3 + b for b in range(256)}}
    for piece in ["\u2581", "c", "a", "t", "s", "\u2581c", "\u2581ca", "\u2581cat", "<", "/", ">"]:
        vocab[piece] = len(vocab)
    merges = [("\u2581", "c"), ("\u2581c", "a"), ("\u2581ca", "t")]
    runner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    runner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    runner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    runner.add_special_tokens(["<unk>", "<s>", "</s>"])
    return FileTokenizer(runner.to_str())


@pytest.fixture(scope="module")
def bpe() -> FileTokenizer:
    return train_bpe(TEXTS, 400)


@pytest.fixture(scope="module", params=["byte", "bpe", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, bpe: FileTokenizer) -> Tokenizer:
    return {"byte": ByteTokenizer(), "bpe": bpe, "sentencepiece": sentencepiece_like()}[request.param]


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = tokenizer.stream_decoder()
    return [*(decoder.feed(i) for i in ids), decoder.flush()]


def lost_space(tokenizer: Tokenizer, text: str) -> str:
    # Tokenizers in the manner of Llama 2 mark the first word whether a space stands before it or not.
    return " " if "\u2581" in tokenizer.to_json() and text.startswith(" ") else ""


def test_round_trip(tokenizer: Tokenizer) -> None:
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert ids.dtype == np.int64
        assert ids.shape == (len(ids),)
        assert np.array_equal(ids, tokenizer.encode(text))
        assert ids.size == 0 or (ids.min() >= 0 and ids.max() < tokenizer.vocab_size)
        assert tokenizer.decode(ids) == text.removeprefix(lost_space(tokenizer, text))


def test_text_cannot_forge_the_separator(tokenizer: Tokenizer) -> None:
    for text in (EOS, f"x{EOS}y", f"{EOS} {EOS}", "</s>", "x</s>", "<s>cat</s>"):
        ids = tokenizer.encode(text)
        assert tokenizer.eos_id not in ids
        assert tokenizer.decode(ids) == text


def test_separator_has_no_text(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("cat"), tokenizer.eos_id, tokenizer.vocab_size, 10**9, -100]
    assert tokenizer.decode(ids) == "cat"
    assert tokenizer.decode(np.array(ids)) == "cat"
    assert tokenizer.decode(iter(ids)) == "cat"
    assert "".join(stream(tokenizer, ids)) == "cat"


def test_stream_never_shows_half_a_character(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        parts = stream(tokenizer, tokenizer.encode(text).tolist())
        assert "".join(parts) == text.removeprefix(lost_space(tokenizer, text))
        assert "\ufffd" not in "".join(parts)
    shown = [part for part in stream(ByteTokenizer(), list("é🙂".encode())) if part]
    assert shown == ["é", "🙂"]


def test_byte_sizes_add_up_to_the_text(bpe: FileTokenizer) -> None:
    for tokenizer in (ByteTokenizer(), bpe):
        sizes = tokenizer.byte_sizes()
        assert sizes is not None
        assert sizes.shape == (tokenizer.vocab_size,)
        assert sizes[tokenizer.eos_id] == 0
        for text in TEXTS:
            assert sizes[tokenizer.encode(text)].sum() == len(text.encode())
    assert sentencepiece_like().byte_sizes() is None  # a first word's space is no text


def test_stream_of_random_bytes_equals_decoding_them(bpe: FileTokenizer) -> None:
    rng = random.Random(0)
    for tokenizer in (ByteTokenizer(), bpe):
        for _ in range(50):
            ids = [rng.randrange(tokenizer.vocab_size) for _ in range(40)]
            assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_flush_shows_an_incomplete_character_and_starts_afresh() -> None:
    for tokenizer in (ByteTokenizer(), sentencepiece_like()):
        first, *_ = tokenizer.encode("🙂")[-4:].tolist()
        decoder = tokenizer.stream_decoder()
        assert decoder.feed(first) == ""
        assert decoder.flush() == "\ufffd"
        assert "".join(decoder.feed(i) for i in tokenizer.encode("cat").tolist()).strip() == "cat"


def test_stream_holds_back_a_bounded_number_of_tokens() -> None:
    # A poorly trained model may never complete a character: text must still come, and memory stay.
    decoder = sentencepiece_like().stream_decoder()
    first_byte_of_four = 3 + 0xF0
    assert sum(len(decoder.feed(first_byte_of_four)) for _ in range(1000)) > 900
    decoder = sentencepiece_like().stream_decoder()
    for _ in range(1000):
        assert decoder.feed(1) == ""  # <s>, which has no text
    assert decoder.feed(sentencepiece_like().encode("cat")[0]) == "cat"


def test_byte_ids_are_bytes() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("aé").tolist() == [0x61, 0xC3, 0xA9]
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)


def test_byte_file_is_readable_by_the_tokenizers_library(tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path)
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert other.get_vocab_size() == 257
    assert other.token_to_id(EOS) == 256
    # All 256 bytes, except those that never occur in UTF-8, in one text.
    text = "".join(chr(c) for c in [*range(0x800), *range(0xE000, 0x11000, 7), 0x1F642, 0x10FFFF])
    assert other.encode(text).ids == list(text.encode())
    assert other.decode(list(text.encode())) == text
    # Saved again by that library, it is still the byte tokenizer.
    other.save(str(tmp_path / "tokenizer.json"))
    again = load_tokenizer(tmp_path)
    assert isinstance(again, ByteTokenizer)
    assert again.fingerprint() == ByteTokenizer().fingerprint()


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "new")
    again = load_tokenizer(tmp_path / "new")
    assert type(again) is type(tokenizer)
    assert again.fingerprint() == tokenizer.fingerprint()
    assert (again.vocab_size, again.eos_id, again.eos_token) == (
        tokenizer.vocab_size,
        tokenizer.eos_id,
        tokenizer.eos_token,
    )
    assert np.array_equal(again.encode(TEXTS[1]), tokenizer.encode(TEXTS[1]))


def test_fingerprint_ignores_layout_and_nothing_else(bpe: FileTokenizer) -> None:
    document = json.loads(bpe.to_json())
    assert FileTokenizer(json.dumps(document, indent=7, sort_keys=True)).fingerprint() == bpe.fingerprint()
    document["model"]["merges"].pop()
    assert FileTokenizer(json.dumps(document)).fingerprint() != bpe.fingerprint()
    assert FileTokenizer(bpe.to_json(), eos="A").fingerprint() != bpe.fingerprint()


def test_bpe_is_the_same_in_another_process(bpe: FileTokenizer) -> None:
    program = (
        "import json, sys; from samba_lm.tokenizer import train_bpe;"
        "print(train_bpe(json.load(sys.stdin), 400).fingerprint())"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(TEXTS), capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == bpe.fingerprint()


def test_bpe_size(bpe: FileTokenizer) -> None:
    assert 257 < bpe.vocab_size <= 400
    assert train_bpe(["ab"], 5000).vocab_size == 257  # nothing repeats: only bytes and the separator
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0]) / 2
    for size in (256, 0, 10**7):
        with pytest.raises(UserError, match=str(size)):
            train_bpe(TEXTS, size)


def test_settings_saved_in_the_file_do_not_cut_or_pad(bpe: FileTokenizer) -> None:
    runner = tokenizers.Tokenizer.from_str(bpe.to_json())
    runner.enable_truncation(3)
    runner.enable_padding(length=50)
    assert np.array_equal(FileTokenizer(runner.to_str()).encode(TEXTS[0]), bpe.encode(TEXTS[0]))


def word_level(*words: str) -> str:
    runner = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    runner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return str(runner.to_str())


def test_separator_is_found_named_or_asked_for(tmp_path: Path) -> None:
    assert FileTokenizer(word_level("?", "<eos>")).eos_token == "<eos>"
    file = tmp_path / "tokenizer.json"
    file.write_text(word_level("?", "[STOP]", "[GO]"))
    with pytest.raises(UserError, match="--eos"):
        load_tokenizer(file)
    assert load_tokenizer(file, eos="[STOP]").eos_id == 1
    with pytest.raises(UserError, match=r"'\[STOPP\]'.*Did you mean '\[STOP\]'"):
        load_tokenizer(file, eos="[STOPP]")
    for described in ('"[STOP]"', '{"content": "[STOP]", "lstrip": false}'):
        (tmp_path / "tokenizer_config.json").write_text('{"eos_token": ' + described + "}")
        assert load_tokenizer(tmp_path).eos_id == 1
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(UserError, match="tokenizer_config"):
        load_tokenizer(tmp_path)


def test_separator_as_a_whole_word_is_refused() -> None:
    # A word-level model would look the name up like any word.
    tokenizer = FileTokenizer(word_level("?", "cat", "[EOS]"))
    assert tokenizer.encode("cat").tolist() == [1]
    with pytest.raises(UserError, match=r"the text '\[EOS\]' as its document separator"):
        tokenizer.encode("cat [EOS] cat")


def test_parse(tmp_path: Path, bpe: FileTokenizer) -> None:
    assert isinstance(parse_tokenizer("byte"), ByteTokenizer)
    assert parse_tokenizer("bpe:8192") == BpeSpec(8192)
    bpe.save(tmp_path)
    for spec in (tmp_path, tmp_path / "tokenizer.json"):
        parsed = parse_tokenizer(str(spec))
        assert isinstance(parsed, FileTokenizer)
        assert parsed.fingerprint() == bpe.fingerprint()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("bite", "'bite'.*Did you mean 'byte'"),
        ("bpe", "bpe:8192"),
        ("bpe:", "bpe:8192"),
        ("bpe:8k", "'bpe:8k'.*bpe:8192"),
        ("bpe:-5", "'bpe:-5'"),
        ("bpe:100", "100 is outside 257"),
        ("no/such/tokenizer.json", "no/such/tokenizer.json"),
    ],
)
def test_bad_specs(spec: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_tokenizer(spec)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b'{"model": 1}', b'{"version": "1.0"}', b"\xff\xfe"])
def test_foreign_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Cannot read the tokenizer"):
        load_tokenizer(tmp_path)


def test_lone_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"character 3 .*U\+D800"):
        tokenizer.encode("abc\ud800")


def without_unknown() -> str:
    runner = tokenizers.Tokenizer(models.WordLevel({"a": 0, EOS: 1}))
    runner.pre_tokenizer = pre_tokenizers.Whitespace()
    return runner.to_str()


def test_text_without_a_token_is_told() -> None:
    with pytest.raises(UserError, match="cannot encode this text"):
        FileTokenizer(without_unknown()).encode("a b")


def test_a_panic_of_the_library_is_told() -> None:
    document = json.loads(without_unknown())
    document["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    with pytest.raises(UserError, match=r"is not a tokenizer\.json"):
        FileTokenizer(json.dumps(document))


@pytest.mark.parametrize("eos", [5, [1], {"content": 5}])
def test_a_separator_that_is_no_name(tmp_path: Path, eos: object) -> None:
    ByteTokenizer().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    with pytest.raises(UserError, match=r"eos_token is .* not a token's name"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["[" * 100_000, "9" * 5000], ids=["deep", "long"])
def test_json_that_python_refuses(tmp_path: Path, name: str, content: str) -> None:
    ByteTokenizer().save(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{name} is not a tokenizer"):
        load_tokenizer(tmp_path)


def test_an_empty_name_is_not_the_current_folder() -> None:
    with pytest.raises(UserError, match="empty name"):
        parse_tokenizer("")


@pytest.mark.parametrize("digits", [True, False])
def test_long_texts_are_encoded_in_parts_that_cannot_be_seen(digits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts the library is faster. Texts of all that splitting looks at, cut at every place there is."""
    draw = random.Random(0)
    marks = ["a", "Zz", "é", "e\u0301", "漢", "٣", "7", "²", "_", "'s", "'ll", "-", ".", f"{EOS}", "\x1c", "\x85"]
    spaces = [" ", " ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000"]
    texts = ["".join(draw.choice(draw.choice([marks, spaces])) for _ in range(300)) for _ in range(60)]
    content = json.loads(train_bpe([*texts, *texts, *TEXTS], 700).to_json())
    if not digits:
        content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    ours = FileTokenizer(json.dumps(content))
    whole = tokenizers.Tokenizer.from_str(json.dumps(content))
    whole.encode_special_tokens = True
    monkeypatch.setattr("samba_lm.tokenizer._PART_CHARS", 1)
    given: list[str] = []
    own = ours._runner

    class Seen:
        def encode_batch_fast(self, parts: list[str], **options: bool) -> list[tokenizers.Encoding]:
            given.extend(parts)
            return own.encode_batch_fast(parts, **options)

    monkeypatch.setattr(ours, "_runner", Seen())
    found = ours.encode_batch([*texts, "", " "])
    assert len(given) > 20 * len(texts)
    assert "".join(given) == "".join([*texts, " "])
    for text, ids in zip([*texts, "", " "], found, strict=True):
        assert ids.tolist() == whole.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
        {"added": "the cat"},
    ],
)
def test_where_parts_might_be_seen_texts_stay_whole(
    change: dict, bpe: FileTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = json.loads(bpe.to_json())
    if "added" in change:
        entry = {**content["added_tokens"][0], "id": 400, "content": change["added"], "special": False}
        content["added_tokens"].append(entry)
    content |= {key: value for key, value in change.items() if key != "added"}
    ours = FileTokenizer(json.dumps(content))
    expected = ours.encode("all the cat sat on the mat" * 9).tolist()
    monkeypatch.setattr("samba_lm.tokenizer._PART_CHARS", 1)
    monkeypatch.setattr("samba_lm.tokenizer._parts", lambda text: pytest.fail("cut"))
    assert ours.encode("all the cat sat on the mat" * 9).tolist() == expected


def test_a_trained_bpe_reads_digits_one_by_one() -> None:
    tokenizer = train_bpe(["in 1815 and 1815 and 1815 again, 1815"] * 9, 300)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("1815")] == ["1", "8", "1", "5"]
    assert tokenizer.decode(tokenizer.encode("the year 1815.")) == "the year 1815."

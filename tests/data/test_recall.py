"""Passkey and phonebook texts: their form, their length, and that pieces put together are the whole."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from samba_lm import shipped
from samba_lm.data.entries import Entries, draw
from samba_lm.data.names import Names
from samba_lm.data.passkey import FILLER, KEY_LINE, MAX_WORDS, QUESTION, TASK, Passkey, sentences
from samba_lm.data.phonebook import Phonebook
from samba_lm.data.recall import Splicer, read_text
from samba_lm.data.recall_loader import RecallLoader
from samba_lm.errors import UserError
from samba_lm.loss import IGNORE_INDEX
from samba_lm.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer, load_tokenizer, train_bpe

BOOK = (
    "It was the year 10001. The night was dark, and nobody spoke!  Was it so? " * 3
    + "A long sentence " * 40
    + "ends.\n\nThen 20002300 stars shone."
)
PEOPLE = Names((("Ann", "Bob", "Cy", "Dora"), ("Moe", "Lee", "Fox", "Ray", "Kit")), "a test")


def random(seed: int = 0) -> np.random.RandomState:
    return np.random.RandomState(seed)


@functools.cache
def tokenizer(kind: str) -> Tokenizer:
    if kind == "byte":
        return ByteTokenizer()
    bpe = train_bpe([TASK + " ".join(FILLER) + "\n" + KEY_LINE + QUESTION + BOOK] * 2, 600)
    if kind == "bpe":
        return bpe
    # A tokenizer that marks the beginning of a text: the same merges, a space put before.
    before = '"add_prefix_space": false'
    assert before in bpe.to_json()
    return FileTokenizer(bpe.to_json().replace(before, '"add_prefix_space": true'), source="a marking one")


def test_the_five_lines() -> None:
    maker = Passkey(tokenizer("byte"))
    example = maker.example(random(), 600, 0.5)
    task, before, line, after, question, rest = tokenizer("byte").decode(example.tokens).split("\n")
    assert f"{task}\n" == TASK
    assert re.fullmatch(r"\d{5}", example.text)
    assert f"{line}\n" == KEY_LINE.format(key=example.text)
    assert (question, rest) == (f"{QUESTION} {example.text}", "")
    assert tokenizer("byte").decode(example.question) == QUESTION
    assert tokenizer("byte").decode(example.answer) == f" {example.text}"
    whole = f"{before} {after}"
    start = [whole.startswith(sentence) for sentence in FILLER].index(True)
    read = [FILLER[(start + i) % 5] for i in range(len(re.findall(r"\.", whole)))]
    assert whole == " ".join(read)  # it goes round and round, and on behind the key


@pytest.mark.parametrize("kind", ["byte", "bpe"])
@pytest.mark.parametrize("text", [None, BOOK])
@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_length_and_depth_are_right_within_a_sentence(kind: str, text: str | None, depth: float) -> None:
    maker, tokens = Passkey(tokenizer(kind), text), tokenizer(kind)
    longest = max(tokens.encode(f" {sentence}\n").size for sentence in maker.filler.sentences)
    for seed, length in enumerate((500, 777, 2048)):
        example = maker.example(random(seed), length, depth)
        assert length - longest - 2 < len(example) <= length
        told = tokens.decode(example.document)
        key_line = KEY_LINE.format(key=example.text)
        before, after = told.removeprefix(TASK).split(key_line)
        assert told.count(example.text) == 2  # in its own line, and nowhere else
        sizes = [tokens.encode(part).size for part in (before, after)]
        assert sizes[0] == pytest.approx(depth * sum(sizes), abs=longest + 2)
        assert (before == "", after == "") == (depth == 0, depth == 1)


@pytest.mark.parametrize("kind", ["byte", "bpe", "samba-nano"])
def test_the_pieces_are_what_the_whole_text_is_encoded_to(kind: str) -> None:
    tokens = load_tokenizer(shipped.FOLDER / shipped.DEFAULT) if kind == "samba-nano" else tokenizer(kind)
    for maker in (Passkey(tokens), Passkey(tokens, BOOK), Phonebook(tokens, PEOPLE), Phonebook(tokens, PEOPLE, 3)):
        for seed in range(4):
            example = maker.example(random(seed), 300 if kind == "byte" else 200)
            assert np.array_equal(tokens.encode(tokens.decode(example.tokens)), example.tokens)


def test_a_tokenizer_that_marks_where_a_text_begins_marks_no_piece() -> None:
    tokens = tokenizer("marking")
    assert tokens.decode(tokens.encode("The")) == " The"
    example = Passkey(tokens).example(random(), 300)
    text = tokens.decode(example.tokens)
    assert text.startswith(TASK)
    assert "\n " not in text


@pytest.mark.parametrize(("kind", "by_word"), [("byte", True), ("bpe", True), ("samba-nano", True), ("runs", False)])
def test_words_looked_up_are_what_the_whole_is_encoded_to(
    kind: str, by_word: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for a tokenizer that makes tokens of any run of digits: its pieces are encoded as texts."""
    if kind == "samba-nano":
        tokens = load_tokenizer(shipped.FOLDER / shipped.DEFAULT)
    else:
        tokens = numbers_as_runs() if kind == "runs" else tokenizer(kind)
    names = Names((("Ann", "Jo Ann", "Zo\u00eb"), ("van", "O'"), ("Moe", "de Vries")), "a test")
    entries = Entries(names, Splicer(tokens))
    drawn, numbers = draw(names, random(), 8)
    ids, pieces = entries.encode(drawn, numbers, blank=(2, 5))
    lines = [f"{names.name(name)}: {number}\n" for name, number in zip(drawn.tolist(), numbers.tolist(), strict=True)]
    lines[2], lines[5] = lines[2] + "\n", lines[5] + "\n"
    assert np.array_equal(ids, tokens.encode("".join(lines)))
    read = map(tokens.decode, np.split(ids, np.cumsum(pieces)[:-1]))
    split = re.findall(r"[^:\n]+:|[ ]\d+|\n+", "".join(lines))
    assert list(read) == split
    assert len(split) == pieces.size
    monkeypatch.setattr(tokens, "encode_batch", None)
    monkeypatch.setattr(tokens, "encode", None)
    if by_word:
        assert np.array_equal(entries.encode(drawn, numbers, blank=(2, 5))[0], ids)
    else:
        with pytest.raises(TypeError):
            entries.encode(drawn, numbers)


def numbers_as_runs() -> Tokenizer:
    """A tokenizer that merges digits into tokens of up to six, wherever they stand in a number."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    runner = tokenizers.Tokenizer(models.BPE())
    runner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    runner.decoder = decoders.ByteLevel()
    digits = np.random.RandomState(0).randint(60, 100, size=(400, 5)).tolist()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<eos>"], initial_alphabet=alphabet)
    runner.train_from_iterator(["".join(map(str, row)) for row in digits], trainer)
    return FileTokenizer(runner.to_str(), eos="<eos>", source="runs of digits")


@pytest.mark.parametrize("pair", ["05", "10", "61", "98", "n "])
def test_a_rare_merge_over_a_border_is_seen(pair: str) -> None:
    """Of two digits, or of a name's end and the space behind it: rows are what their whole texts are encoded to."""
    first = [f"{a}{b}{c}" for a in "ABCDEFGHIKLMNOP" for b in "aeiou" for c in "lmrs"]
    tokens, merged = one_merge(pair), 0
    book = Phonebook(tokens, Names((("Ann", *first), ("Moe",)), "a test"), 2)
    for seed in range(20):
        made = book.example(random(seed), 700).tokens
        assert np.array_equal(made, tokens.encode(tokens.decode(made)))
        merged += int((made == 257).sum())
    assert merged


def one_merge(pair: str) -> Tokenizer:
    """Bytes, and one token more, of two that stand side by side anywhere."""
    document = json.loads(ByteTokenizer().to_json())
    left, right = (letter.replace(" ", "\u0120") for letter in pair)
    document["model"]["vocab"][left + right] = 257
    document["model"]["merges"] = [[left, right]]
    return FileTokenizer(json.dumps(document), source="one merge")


def test_keys_phases_and_depths_are_drawn_from_the_seed() -> None:
    maker = Passkey(tokenizer("byte"))
    same = [maker.example(random(5), 512).tokens for _ in range(2)]
    assert np.array_equal(*same)
    many = [maker.example(random(seed), 512) for seed in range(40)]
    assert len({example.text for example in many}) > 35
    starts = {tokenizer("byte").decode(e.document).removeprefix(TASK)[:10] for e in many}
    assert len(starts) >= 5
    places = {tokenizer("byte").decode(e.document).index("The pass key is") for e in many}
    assert len(places) > 20


def test_a_number_of_the_filler_is_never_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("samba_lm.data.passkey.KEYS", (54_320, 54_324))
    maker = Passkey(tokenizer("byte"), "In 54320 they saw 154322 stars. 5432 54323 fell.")
    assert {maker.example(random(seed), 400).text for seed in range(20)} == {"54321"}
    with pytest.raises(UserError, match="holds every five-digit number"):
        Passkey(tokenizer("byte"), "5432054321, 54322 and 54323.")


def test_long_sentences_are_cut() -> None:
    found = sentences(BOOK)
    assert max(len(sentence.split()) for sentence in found) <= MAX_WORDS
    assert " ".join(found) == " ".join(BOOK.split())
    with pytest.raises(UserError, match="no words"):
        sentences(" \n")


def test_what_no_passkey_text_can_be() -> None:
    maker = Passkey(tokenizer("byte"))
    with pytest.raises(UserError, match=r"length 100 is too short: .* have 250 tokens"):
        maker.example(random(), 100)
    with pytest.raises(UserError, match=r"depth is 1\.5: it must be from 0"):
        maker.example(random(), 400, 1.5)
    assert len(maker.example(random(), 250)) == 250  # no filler at all


def test_a_phonebook() -> None:
    example = Phonebook(tokenizer("byte"), PEOPLE).of_pairs(random(3), 12)
    text = tokenizer("byte").decode(example.tokens)
    book, shown, asked = text.split("\n\n")
    entries = dict(line.split(": ") for line in book.split("\n"))
    assert len(entries) == len(set(entries.values())) == 12
    assert all(re.fullmatch(r"[6-9]\d{9}", number) for number in entries.values())
    examples = dict(line.split(": ") for line in shown.split("\n"))
    assert len(examples) == 2
    assert examples.items() <= entries.items()
    name, number = asked.rstrip("\n").split(": ")
    assert name not in examples
    assert entries[name] == number == example.text
    assert tokenizer("byte").decode(example.question) == f"{name}:"
    assert text.count(number) == 2  # in the book, and as the answer


def test_a_phonebook_asks_for_several_numbers() -> None:
    """Each asked once, each answered by the book; in short texts fewer; the loader has them all count."""
    tokens = tokenizer("byte")
    maker = Phonebook(tokens, Names.from_faker(), questions=5)
    example = maker.example(random(3), 2000)
    text = tokens.decode(example.tokens)
    assert len(example.answered) == 4
    assert maker.facts()["questions"] == 5
    book, shown, asked = text.split("\n\n")
    lines = dict(line.split(": ") for line in book.splitlines())
    assert dict(line.split(": ") for line in asked.splitlines()).items() <= lines.items()
    assert not set(shown.splitlines()) & set(asked.splitlines())
    answers = [tokens.decode(example.tokens[begin:end]) for begin, end in example.answered]
    assert [f" {number}\n" for number in map(lines.get, (line.split(":")[0] for line in asked.splitlines()))] == [
        *answers, f" {example.text}\n",
    ]  # fmt: skip
    assert [len(maker.example(random(), length).answered) for length in (300, 500, 700)] == [1, 3, 4]
    targets = RecallLoader(maker, tokens, 2, 2000, 3).batch(0).targets
    assert (targets != IGNORE_INDEX).sum(1).tolist() == [5 * len(" 6000000000\n")] * 2
    with pytest.raises(UserError, match="questions is 0"):
        Phonebook(tokens, PEOPLE, questions=0)


def test_a_phonebook_fills_a_length() -> None:
    maker = Phonebook(tokenizer("bpe"), Names.from_faker())
    for seed in range(3):
        assert 900 < len(maker.example(random(seed), 1024)) <= 1024
    with pytest.raises(UserError, match="length 30 is too short"):
        maker.example(random(), 30)
    with pytest.raises(UserError, match="more entries than a test has names"):
        Phonebook(tokenizer("byte"), PEOPLE).example(random(), 4000)
    with pytest.raises(UserError, match="needs 3 entries"):
        maker.of_pairs(random(), 2)
    with pytest.raises(UserError, match=r"21 entries needs as many names, and a test has 20"):
        Phonebook(tokenizer("byte"), PEOPLE).of_pairs(random(), 21)


def test_all_names_can_be_drawn() -> None:
    drawn = PEOPLE.draw(random(), 20)
    assert sorted(drawn.tolist()) == list(range(20))
    assert [PEOPLE.name(number) for number in (0, 1, 19)] == ["Ann Moe", "Ann Lee", "Dora Kit"]


def test_names_from_faker_are_the_seeds() -> None:
    names = Names.from_faker(1)
    assert names == Names.from_faker(1)
    assert names.count > 100_000
    assert names.source.startswith("faker ")


def test_names_from_files(tmp_path: Path) -> None:
    first, last = tmp_path / "first", tmp_path / "last.txt"
    first.write_text("MARY  2.6  2.6  1\nJo Ann\t7\n\nMARY 1\n")
    last.write_text("Smith\nde Vries\n")
    assert Names.from_files([first, last]).lists == (("Mary", "Jo Ann"), ("Smith", "de Vries"))
    (tmp_path / "bad").write_text("A: b\n")
    (tmp_path / "empty").write_text("1\n2\n")
    (tmp_path / "many").write_text("\n".join(f"{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(300)))
    assert Names.from_files([tmp_path / "many"] * 7).count == 300**7
    with pytest.raises(UserError, match="more names than can be counted"):
        Names.from_files([tmp_path / "many"] * 8)
    for name, message in (("bad", "holds the name 'A: b'"), ("empty", "holds no names"), ("none", "There is no file")):
        with pytest.raises(UserError, match=message):
            Names.from_files([tmp_path / name])


def test_names_that_two_pairs_make(tmp_path: Path) -> None:
    first, last = tmp_path / "first", tmp_path / "last"
    first.write_text("Mary\nMary Ann\nJo\n")
    last.write_text("Lee\nde Vries\nAnn Lee\n")
    with pytest.raises(UserError, match="make the name 'Mary Ann Lee' in two ways"):
        Names.from_files([first, last])
    last.write_text("Lee\nde Vries\nAnn Fox\n")
    names = Names.from_files([first, last])
    assert len({names.name(i) for i in range(names.count)}) == names.count == 9
    with pytest.raises(UserError, match="is a folder: give the path of a text file"):
        Names.from_files([tmp_path])


def test_a_row_with_too_long_names_is_drawn_again() -> None:
    """Training must not end at some step because of one draw: long names come seldom, or the length is refused."""
    firsts = tuple(f"Ann{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(400))
    lasts = [f"Moe{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(60)]
    both = (*lasts, "M" * 60), ("Moe", "M" * 60)
    seldom, often = (Phonebook(tokenizer("byte"), Names((firsts, last), "a test")) for last in both)
    seldom.check(230)
    assert any(seldom._drawn(random(seed), 230) is None for seed in range(400))
    assert all(len(seldom.example(random(seed), 230)) <= 230 for seed in range(400))
    with pytest.raises(UserError, match=r"length 230 is too short: .* about 480 tokens"):
        often.check(230)
    with pytest.raises(UserError, match="a test makes 2 names: a phonebook needs 3 at least"):
        Phonebook(tokenizer("byte"), Names((("Ann",), ("Moe", "Lee")), "a test"))


def test_a_text_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("One.\nTwo.")
    assert read_text(tmp_path / "a.md") == "One.\nTwo.\n"

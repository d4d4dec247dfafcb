"""Tokens to text: whole characters, and stop strings that never show."""

from __future__ import annotations

import itertools
import random

import pytest

from samba_lm.generation.params import SamplingParams
from samba_lm.generation.stream import Answer, StopMatcher
from samba_lm.tokenizer import ByteTokenizer


def feed_all(text: str, stops: list[str], cuts: list[int]) -> tuple[str, bool]:
    matcher, shown = StopMatcher(stops), ""
    for start, end in itertools.pairwise([0, *cuts, len(text)]):
        shown += matcher.feed(text[start:end])
        if matcher.stopped:
            return shown, True
    return shown + matcher.flush(), False


def first_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """Letter by letter: the first stop string to be complete, the longest of several."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


def test_stop_strings_are_found_however_the_text_is_cut() -> None:
    rng = random.Random(0)
    stopped = 0
    for _ in range(2000):
        text = "".join(rng.choices("ab\n", k=rng.randrange(1, 14)))
        stops = ["".join(rng.choices("ab\n", k=rng.randrange(1, 5))) for _ in range(rng.randrange(1, 4))]
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(0, 8)))
        want = first_stop(text, stops)
        assert feed_all(text, stops, cuts) == want, (text, stops, cuts)
        stopped += want[1]
    assert 500 < stopped < 1900


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(["\nUser:"])
    assert matcher.feed("all of this") == "all of this"
    assert matcher.feed(" and this\nUs") == " and this"
    assert matcher.held == "\nUs"
    assert matcher.feed("age") == "\nUsage"


def answer_pieces(data: bytes, **options: object) -> tuple[list[str], Answer]:
    answer = Answer(ByteTokenizer(), SamplingParams().replace(**options))
    return [answer.feed(byte) for byte in data], answer


def test_characters_come_whole() -> None:
    pieces, answer = answer_pieces("aé😀".encode())
    assert pieces == ["a", "", "é", "", "", "", "😀"]
    assert not answer.held
    assert answer.flush() == ""


def test_half_a_character_is_shown_as_such_only_at_the_end() -> None:
    pieces, answer = answer_pieces("b😀".encode()[:3])
    assert pieces == ["b", "", ""]
    assert answer.held
    assert answer.flush() == "\N{REPLACEMENT CHARACTER}"


def test_a_half_stop_string_is_text_after_all_when_the_text_ends() -> None:
    pieces, answer = answer_pieces(b"hi\nUs", stop="\nUser:", max_tokens=5)
    assert ("".join(pieces), answer.finish) == ("hi", "length")
    assert answer.flush() == "\nUs"


@pytest.mark.parametrize(
    ("options", "finish", "tokens"),
    [({"stop": "lo"}, "stop", 5), ({"stop_ids": (ord("o"),)}, "stop", 4), ({"max_tokens": 3}, "length", 3)],
)
def test_why_a_text_ends(options: dict[str, object], finish: str, tokens: int) -> None:
    answer = Answer(ByteTokenizer(), SamplingParams().replace(**options))
    for byte in b"hello":
        answer.feed(byte)
        if answer.finish is not None:
            break
    assert (answer.finish, answer.tokens) == (finish, tokens)


def test_the_end_of_text_token_ends_a_text_unless_told_otherwise() -> None:
    _, answer = answer_pieces(b"a")
    assert answer.feed(256) == ""
    assert answer.finish == "eos"
    _, answer = answer_pieces(b"a", stop_at_eos=False)
    assert answer.feed(256) == ""
    assert answer.finish is None
    assert answer.feed(ord("b")) == "b"

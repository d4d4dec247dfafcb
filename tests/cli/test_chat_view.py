"""What stands on the screen: words whole, nothing over the edge, no control character obeyed."""

from __future__ import annotations

import io
import random

import pytest
from rich.cells import cell_len
from terminal import screen

from samba_lm.cli.chat_view import View, WordWrap, visible

WORDS = [
    "a",
    "sea",
    "salt,",
    "tears\u0301",
    "日本語",
    "😀",
    "x" * 30,
    "(and)",
    "sand.",
    "ab-cd",
    "\t",
    "  ",
    "\n",
    "\n\n",
]


def pieces(text: str, generator: random.Random) -> list[str]:
    """A text as tokens come: some characters at a time."""
    cut = []
    while text:
        length = generator.randint(1, 6)
        cut.append(text[:length])
        text = text[length:]
    return cut


@pytest.mark.parametrize("columns", [2, 12, 20, 40, 80])
def test_words_stay_whole_at_any_width(columns: int) -> None:
    generator = random.Random(columns)
    for _ in range(40):
        text = " ".join(generator.choices(WORDS, k=40))
        wrap = WordWrap(lambda: columns)
        lines = screen("".join(map(wrap.feed, pieces(text, generator))), columns)
        assert all(cell_len(line) <= max(2, columns - 1) for line in lines)
        assert "".join("".join(lines).split()) == "".join(text.split())  # nothing is lost or comes twice
        if columns >= 20:
            shown = " ".join(lines).split()
            for word in ("sea", "salt,", "tears\u0301", "(and)", "sand.", "ab-cd"):
                assert shown.count(word) == text.split().count(word), (word, lines)


def test_pieces_do_not_matter() -> None:
    text = "The sea is salt, as the tears are; " * 5
    generator = random.Random(1)
    shown = set()
    for _ in range(20):
        wrap = WordWrap(lambda: 25)
        shown.add("\n".join(screen("".join(map(wrap.feed, pieces(text, generator))), 25)))
    (only,) = shown
    assert only.split("\n")[:2] == ["The sea is salt, as the ", "tears are; The sea is "]


def test_a_window_made_narrower_loses_nothing() -> None:
    width = 60
    wrap = WordWrap(lambda: width)
    text = "one two three four five six seven eight nine ten "
    before = wrap.feed(text[:42])
    width = 20
    lines = screen(wrap.feed(text[42:] + text), 20)
    assert "".join([before, *lines]).replace(" ", "").replace("\n", "") == (text + text).replace(" ", "")
    assert max(map(len, lines)) < 20


def test_control_characters_are_shown_and_do_nothing() -> None:
    assert visible("a\x1b[2Jb\r\x07\x7f\x9b\u2028\n\té") == "a␛[2Jb␍␇␡\ufffd\ufffd\n\té"
    wrap = WordWrap(lambda: 40)
    assert screen(wrap.feed("\x1b]0;title\x07 end"), 40) == ["␛]0;title␇ end"]


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environment", "terminal", "colour"),
    [
        ({"TERM": "xterm"}, True, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, True, False),
        ({"TERM": "dumb"}, False, False),
    ],
)
def test_colours_only_where_they_are_wanted(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], terminal: bool, colour: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    view = View(Screen())
    assert (view.terminal, view.colour) == (terminal, colour)
    view.note("hello")
    assert ("\x1b[2m" in view._out.getvalue()) == colour  # type: ignore[attr-defined]
    assert not View(io.StringIO()).terminal


def test_notes_and_tables_fit_40_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(View, "columns", lambda self: 40)
    out = Screen()
    view = View(out)
    view.status("reading: 1,000,000 tokens and much more than the line can hold")
    view.error("No such file:\n/" + "long/" * 30 + " and \x1b[31m some words that make it long")
    view.table([("/set [NAME VALUE]", "how answers are drawn, such as: /set temperature 0.7"), ("/b", "x")])
    with view.answer() as show:
        show(" ")
        show("  The answer")
        show(" and so on" * 10)
    lines = screen(out.getvalue(), 40)
    assert all(len(line) < 40 for line in lines)
    assert "reading" not in "".join(lines)  # its place was taken
    assert "  /set [NAME VALUE]" in lines
    assert "The answer and so on and so on and so " in lines


def test_on_a_pipe_an_answer_is_what_the_model_said() -> None:
    out = io.StringIO()
    view = View(out)
    view.status("reading")
    with view.answer() as show:
        show(" one\r")
        show("\x1btwo " * 50)
    assert out.getvalue() == " one\r" + "\x1btwo " * 50 + "\n"

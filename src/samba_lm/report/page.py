"""A page and its parts: sections, tables, figures, how each was made. One file, no scripts, nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from samba_lm.figures import NARROW, WIDE
from samba_lm.report.markup import Html, join, tag
from samba_lm.report.style import stylesheet
from samba_lm.report.svg import inline, swatch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw = Callable[[tuple[float, float]], "Figure"]
"""Makes a figure of a size in inches."""


def page(title: str, *body: object) -> str:
    """A whole document. Its policy lets a browser take the one style in it and pictures in it, and nothing else."""
    style = stylesheet()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    head = join(
        [
            tag("meta", charset="utf-8"),
            tag("meta", http_equiv="Content-Security-Policy", content=policy),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name="referrer", content="no-referrer"),
            tag("title", title),
            Html(f"<style>{style}</style>"),
        ]
    )
    document = tag("html", tag("head", head), tag("body", tag("main", tag("h1", title), *body)), lang="en")
    return f"<!doctype html>\n{document}\n"


def section(title: str, *body: object, anchor: str | None = None) -> Html:
    """A part of the page under a heading."""
    return tag("section", tag("h2", title), *body, id=anchor)


def paragraph(*text: object) -> Html:
    return tag("p", *text)


def note(*text: object) -> Html:
    """A line in small print, such as what the small print of a table is."""
    return tag("p", *text, class_="note")


def table(headings: Sequence[object], rows: Sequence[Sequence[object]], *, texts: Sequence[int] = ()) -> Html:
    """A table that scrolls by itself where it is too wide. Cells are numbers but the first and those of ``texts``.

    A cell that is an element ``td`` already stays as it is.
    """

    def cell(kind: str, value: object, column: int) -> Html:
        if isinstance(value, Html) and value.startswith("<td"):
            return value
        return tag(kind, value, class_="text" if column in texts else None)

    head = tag("tr", *(cell("th", heading, i) for i, heading in enumerate(headings)))
    body = [tag("tr", *(cell("td", value, i) for i, value in enumerate(row))) for row in rows]
    inside = tag("table", tag("thead", head), tag("tbody", *body))
    return tag("div", inside, class_="scroll", tabindex=0, role="region", aria_label="table")


def grid(unit: str, columns: Sequence[object], rows: Sequence[object], cells: Sequence[Sequence[object]]) -> Html:
    """A table of models in ``rows`` by something counted in ``unit``; turned round where it would be too wide."""
    if len(columns) > max(10, len(rows)):
        columns, rows = rows, columns
        cells = [list(column) for column in zip(*cells, strict=True)]
    return table([f"model / {unit}", *columns], [[name, *row] for name, row in zip(rows, cells, strict=True)])


def with_note(value: object, note: object, *, best: bool = False) -> Html:
    """A cell of a table with something small under its value."""
    return tag("td", value, tag("small", note), class_="best" if best else None)


def named(label: str, style: int | None = None) -> Html:
    """A model's name, with its line in the figures."""
    mark = () if style is None else (swatch(style),)
    return tag("span", *mark, label, class_="name", title=label)


def legend(names: Sequence[tuple[str, int]]) -> Html:
    """Names with their lines, under a figure."""
    return tag("ul", *(tag("li", named(label, style)) for label, style in names), class_="legend")


def curves_figure(draw: Draw, anchor: str, caption: str, names: Sequence[tuple[str, int]]) -> Html:
    """A figure drawn twice, for wide and for narrow screens, with one legend."""
    plots = [
        inline(draw(size), f"{anchor}-{kind}", caption, kind) for kind, size in (("wide", WIDE), ("narrow", NARROW))
    ]
    return tag("figure", legend(names), *plots, tag("figcaption", caption))


def how(lines: Sequence[object]) -> Html:
    """How a table was made, in small print under it."""
    return tag("div", *(tag("p", line) for line in lines), class_="how")


def command(words: Any) -> Html | None:
    """A command line to copy, of the words that a JSON file holds."""
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        return None
    import shlex

    return tag("code", shlex.join(words))


def facts(pairs: Sequence[tuple[str, object]]) -> Html:
    """Names and values in one line, with dots between."""
    return join([join([f"{name} ", tag("code", value)]) for name, value in pairs], " · ")

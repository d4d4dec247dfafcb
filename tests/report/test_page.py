"""Markup that nothing can break, figures inside a page, and the page's policy."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from html_page import check

from samba_lm.eval.recall_figure import Spot, heat_map
from samba_lm.figures import NARROW, PALETTE, WIDE, Axis, Curve, draw_curves, nice, powers_of_2
from samba_lm.report.markup import Html, escape, join, tag
from samba_lm.report.page import command, curves_figure, grid, named, page, table, with_note
from samba_lm.report.part import interval, number, percent, when
from samba_lm.report.svg import inline, swatch

NASTY = """<script>alert("1")</script> & 'x' </svg><b>"""


def test_text_stays_text() -> None:
    assert tag("td", NASTY, title=NASTY).count("<") == 2
    assert escape(escape("&")) == "&amp;"
    assert join(["<", Html("<br>")], " & ") == "&lt; &amp; <br>"
    assert tag("a", "x", class_="y", aria_label="z", href=None) == '<a class="y" aria-label="z">x</a>'
    assert tag("meta", name="a") == '<meta name="a">'
    reader = check(page(NASTY, table([NASTY], [[NASTY], [with_note(NASTY, NASTY)], [named(NASTY, 3)]])))
    assert reader.text.count("alert") == 7  # the title twice; none of them as a script


def curves(name: str = "one", style: int = 0) -> Curve:
    return Curve(name, [256, 512, 1024], [9.0, 8.0, 7.5], [8.0, 7.0, 6.0], [10.0, 9.0, 9.0], style)


def test_a_figure_is_drawn_in_the_pages_colours() -> None:
    def draw(size: tuple[float, float]) -> object:
        many = [curves(NASTY, 0), curves("two", len(PALETTE) + 1)]
        x, y = Axis("length & more", "log2"), Axis("perplexity", "log10")
        return draw_curves(many, x, y, size=size, legend=False, marks=[(512, "trained")])

    names = [(NASTY, 0), ("two", len(PALETTE) + 1)]
    text = page("x", curves_figure(draw, "a", NASTY, names), curves_figure(draw, "b", "c", names))
    reader = check(text)
    assert len([1 for name, _ in reader.seen if name == "svg"]) == 4 + 4  # with the swatches of the legends
    assert reader.text.count("length & more") == 4, "axes are text"
    assert reader.text.count(NASTY) == 7, "lines tell their names, the caption is text too"
    assert not re.search(r'(?:fill|stroke)="(?!none|url)', text), "colours are the style's"
    assert {f"c{i}-stroke" for i in (0, 1)} <= set(re.findall(r"c\d-stroke", text))
    assert "@media screen and (prefers-color-scheme: dark)" in text


def test_a_map_is_made_of_squares() -> None:
    spots = {(4096, 0.0): Spot(5, 5), (8192, 0.0): Spot(0, 5), (8192, 1.0): Spot(0, 0)}
    svg = inline(heat_map([4096, 8192], [0.0, 1.0], spots), "m", "a map", "map")
    assert "<image" not in svg
    assert svg.count('fill="#fde725"') == svg.count('fill="#440154"') == 1
    assert ">x</text>" in svg, "what was skipped"
    assert ">4K</text>" in svg
    ElementTree.fromstring(svg)


@pytest.mark.parametrize("style", range(0, 40, 3))
def test_every_place_of_the_palette_has_its_line(style: int) -> None:
    assert f"c{style % len(PALETTE)}-fill" in swatch(style)


def test_a_table_is_turned_round_where_it_would_be_wide() -> None:
    wide = grid("tokens", range(11), ["a", "b"], [["x"] * 11, ["y"] * 11])
    assert wide.count("<tr>") == 12
    assert grid("tokens", range(10), ["a", "b"], [["x"] * 10, ["y"] * 10]).count("<tr>") == 3


def test_figures_as_text() -> None:
    values = (12.345, 123.456, 1234.567, 12345678.0, None, math.nan)
    assert [number(value) for value in values] == ["12.35", "123.5", "1,235", "1.23e+07", "-", "-"]
    assert number(1_170_000.4, 0) == "1,170,000"
    assert (percent(0.256, 0), percent(None)) == ("26%", "-")
    assert interval(0.1, 0.25, 0, 100) == "10-25"
    assert interval(-1.0, 2.0, 1) == "-1.0 to 2.0"
    assert interval(None, 2.0) == ""
    assert when("2026-11-22T08:33:25+01:00") == "2026-11-22 07:33 UTC"
    assert when("yesterday") == "yesterday"
    assert command(["samba-lm", "a b"]) == "<code>samba-lm &#x27;a b&#x27;</code>"
    assert command("samba-lm") is None


def test_wide_intervals_do_not_press_the_curves_flat() -> None:
    x, y = Axis("x"), Axis("y", "log10")
    wide = Curve("a", [1, 2], [100, 110], [2, 90], [5000, 120])
    low, high = draw_curves([wide], x, y).axes[0].get_ylim()
    ticks = draw_curves([wide], x, y).axes[0].get_yticks()
    assert max(ticks) > 1.5 * max(wide.y), "numbers stand where the intervals reach, not only by the points"
    assert (low, high) == (pytest.approx(100 / 3), pytest.approx(330)), "three times as far as the values"
    low, high = draw_curves([Curve("a", [1, 2], [100, 110], [80, 90], [140, 120])], x, y).axes[0].get_ylim()
    assert low < 80 < 140 < high < 200


def test_ticks_are_round() -> None:
    assert powers_of_2(256, 4096) == [256, 512, 1024, 2048, 4096]
    assert powers_of_2(300, 400) == [300, 400]
    assert len(powers_of_2(2, 2**40)) <= 12
    assert nice([3.1, 8.9]) == [3, 4, 5, 6, 7, 8, 9]
    assert nice([84.0, 128.0]) == [90, 100, 110, 120], "as dense above a power of ten as below"
    assert nice([8.0, 300.0]) == [10, 20, 30, 50, 100, 200, 300]
    assert nice([14.0, 14.6]) == pytest.approx([14, 14.1, 14.2, 14.3, 14.4, 14.5, 14.6])
    assert len(nice([1e-3, 1e6])) == 10
    assert 5.0 in nice([5.0, 5.0])


def test_points_that_cannot_be_drawn_are_left_out() -> None:
    odd = Curve("odd", [0, 256, 512], [1.0, float("nan"), float("inf")], [0.0, 1.0, 1.0], [2.0, 1.0, 1.0])
    for size in (WIDE, NARROW):
        draw_curves([odd, curves()], Axis("x", "log2"), Axis("y", "log10"), size=size)
        draw_curves([odd], Axis("x", "log2"), Axis("y", "log10"), size=size)
    draw_curves([], Axis("x"), Axis("y"))

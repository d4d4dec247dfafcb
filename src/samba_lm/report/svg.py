"""matplotlib's figures inside a page: vectors whose text can be selected, in the page's colours, light and dark."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from samba_lm.figures import DASHES, FAINT, GRID, INK, MARKERS, PALETTE
from samba_lm.report.markup import Html, escape, tag

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Classes of report/style.py by the colour that matplotlib wrote.
_CLASSES = {light: f"c{i}" for i, (light, _) in enumerate(PALETTE)}
_CLASSES |= {INK: "i", FAINT: "d", GRID: "d", "#737373": "d", "#e0e0e0": "l"}
_GROUND = "#ffffff"
_FONT = {"font", "font-family", "font-style", "font-variant", "font-weight", "font-stretch"}
_SHAPES = {  # points of a marker around (0, 0), some 4 units wide
    "s": "-3.4,-3.4 3.4,-3.4 3.4,3.4 -3.4,3.4",
    "^": "0,-4.4 4,3.4 -4,3.4",
    "D": "0,-4.6 4.6,0 0,4.6 -4.6,0",
    "v": "0,4.4 4,-3.4 -4,-3.4",
    "<": "-4.4,0 3.4,-4 3.4,4",
    ">": "4.4,0 -3.4,-4 -3.4,4",
    "p": "0,-4.3 4.1,-1.3 2.5,3.5 -2.5,3.5 -4.1,-1.3",
    "h": "0,-4.4 3.8,-2.2 3.8,2.2 0,4.4 -3.8,2.2 -3.8,-2.2",
}
_DASHES = {"-": None, "--": "5 3", ":": "2 2.5", "-.": "6 2 2 2"}


def inline(figure: Figure, name: str, label: str, kind: str = "") -> Html:
    """A figure as an ``svg`` element.

    Args:
        figure: matplotlib's.
        name: unlike any other of the page: ids begin with it.
        label: what it shows, for those who do not see it.
        kind: a class of the page's style: "wide" or "narrow", as wide as there is room; "map", of its own size.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    width = float(str(root.get("viewBox")).split()[2])
    inside = "".join(_element(child, name) for child in root)
    return Html(
        f'<svg class="{escape(f"plot {kind}".strip())}" viewBox="{escape(root.get("viewBox"))}" '
        f'width="{width * 1.25:.0f}" role="img" '
        f'aria-label="{escape(label)}">{inside}</svg>'
    )


def swatch(style: int) -> Html:
    """The line and marker of a place in the palette, as figures draw it."""
    colour = f"c{style % len(PALETTE)}"
    marker = MARKERS[style % len(MARKERS)]
    dashes = _DASHES[DASHES[style // len(PALETTE) % len(DASHES)]]
    line = tag("path", d="M0 6H30", class_=f"{colour}-stroke", stroke_width=2, fill="none", stroke_dasharray=dashes)
    where = {"class_": f"{colour}-fill", "transform": "translate(15 6)"}
    shape = tag("circle", r=3.6, **where) if marker == "o" else tag("polygon", points=_SHAPES[marker], **where)
    return tag("svg", line, shape, class_="swatch", viewBox="0 0 30 12", aria_hidden="true")


def _element(node: ElementTree.Element, prefix: str) -> str:
    """An element without namespaces and without styles of its own, which the page's policy forbids."""
    kind = node.tag.rpartition("}")[2]
    if kind in ("metadata", "style"):
        return ""
    attributes: dict[str, str] = {}
    classes: list[str] = []
    title = ""
    for key, value in node.attrib.items():
        key = key.rpartition("}")[2]
        if key == "style":
            classes += _restyle(value, attributes)
        elif key == "id":
            if kind != "g":
                attributes["id"] = f"{prefix}-{value}"
            elif value.startswith("named "):
                title = f"<title>{escape(value.removeprefix('named '))}</title>"
        elif key == "href":
            attributes[key] = f"#{prefix}-{value[1:]}" if value.startswith("#") else value
        elif key == "clip-path":
            attributes[key] = value.replace("url(#", f"url(#{prefix}-")
        elif key != "type":
            attributes[key] = _rounded(value)
    if classes:
        attributes["class"] = " ".join(classes)
    said = "".join(f' {key}="{escape(value)}"' for key, value in attributes.items())
    text = escape(node.text.strip()) if node.text else ""
    inside = title + text + "".join(_element(child, prefix) for child in node)
    return f"<{kind}{said}>{inside}</{kind}>" if inside or kind != "g" else ""


def _restyle(style: str, attributes: dict[str, str]) -> list[str]:
    """Turn a ``style`` into attributes; returns the classes of the colours that the page has its own of."""
    classes = []
    for part in style.split(";"):
        key, _, value = (word.strip() for word in part.partition(":"))
        if key == "font":
            size = re.search(r"([\d.]+px)", value)
            if size:
                attributes["font-size"] = size[1]
        elif key in _FONT or not key:
            continue
        elif key in ("fill", "stroke") and value in _CLASSES:
            classes.append(f"{_CLASSES[value]}-{key}")
        elif value == _GROUND and key == "fill":  # the page's own ground shows
            attributes[key] = "none"
        elif value == _GROUND and key == "stroke":
            classes.append("g-stroke")
        else:
            attributes[key] = _rounded(value)
    return classes


def _rounded(text: str) -> str:
    """Numbers with two digits after the point: a hundredth of a point is not seen."""
    return " ".join(re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", text).split())

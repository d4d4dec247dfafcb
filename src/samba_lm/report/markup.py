"""HTML that nothing can break: only :class:`Html` is put into a page as it is, all other text is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable

VOID = {"br", "hr", "img", "meta"}


class Html(str):
    """Text that is HTML already, made by the functions here."""

    __slots__ = ()


def escape(value: object) -> Html:
    """``value`` as text of a page; what is Html already stays. Letters that no file can hold become question marks."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(str(value)).encode("utf-8", "replace").decode())


def join(parts: Iterable[object], between: str = "") -> Html:
    """The parts one after the other."""
    return Html(escape(between).join(escape(part) for part in parts))


def tag(element: str, /, *inside: object, **attributes: object) -> Html:
    """An element: ``tag("td", "a < b", class_="number")``. Attributes that are None are left out."""
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{element}{said}>" if element in VOID else f"<{element}{said}>{join(inside)}</{element}>")

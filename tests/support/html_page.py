"""What holds of every page that this package writes as a file."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser


class Reader(HTMLParser):
    """Follows a page's elements; each must be closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def check(text: str) -> Reader:
    """What holds of every page: no scripts, no styles but the one, nothing from elsewhere, each id once."""
    reader = Reader(text)
    ids = [attributes["id"] for _, attributes in reader.seen if "id" in attributes]
    assert len(ids) == len(set(ids))
    for name, attributes in reader.seen:
        assert name not in ("script", "link", "iframe", "object", "base", "form", "image")
        assert not any(key.startswith("on") or key == "style" for key in attributes), attributes
        for key in ("href", "src", "xlink:href"):
            if key in attributes:
                assert attributes[key][1:] in ids, attributes
        for value in attributes.values():
            for inside in re.findall(r"url\(#(.+?)\)", value or ""):
                assert inside in ids
    policy = next(a["content"] for _, a in reader.seen if a.get("http-equiv") == "Content-Security-Policy")
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "script" not in policy
    assert "://" not in style
    assert "url(" not in style
    return reader

"""Real text that every machine with Python has: the standard library's source and its English language reference."""

from __future__ import annotations

import json
import pydoc_data.topics
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from samba_lm.data.sources import ReadOptions, find_files, read_file
from samba_lm.errors import UserError
from samba_lm.files import write_text

# Tests (many installations leave them out), other people's packages, and the file that holds the reference.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "__pycache__"}


def standard_library() -> list[Path]:
    """The .py files of this Python's standard library that hold anything, in sorted order."""
    root = Path(sysconfig.get_path("stdlib"))
    files = (p for p in root.rglob("*.py") if not LEFT_OUT & set(p.relative_to(root).parts))
    return sorted(p for p in files if p.stat().st_size)


def write_reference(path: Path) -> None:
    """The language reference as JSON lines, one topic a document (79 in Python 3.11, half a megabyte of English)."""
    topics = sorted(pydoc_data.topics.topics.items())
    write_text(path, "".join(json.dumps({"text": text, "topic": name}) + "\n" for name, text in topics))


def read_texts(texts: Sequence[Path]) -> tuple[str, str]:
    """The user's texts as one, or the language reference, and what to call it.

    Raises UserError for a text that is missing, cannot be read, or has no words.
    """
    if not texts:
        return "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items())), "Python's language reference"
    pieces = (piece for file in find_files(list(texts), (".py",)) for piece in read_file(file, ReadOptions()))
    whole = "".join(f"{piece.text}\n" if piece.end else piece.text for piece in pieces)
    if not whole.strip():
        raise UserError("The texts hold no words: give others with --text.")
    return whole, ", ".join(path.name for path in texts)


def gather(work: Path, texts: Sequence[Path]) -> list[Path]:
    """The files to learn from: the user's own, or the standard library and its reference (written into ``work``)."""
    if texts:
        return list(texts)
    reference = work / "language_reference.jsonl"
    write_reference(reference)
    return [*standard_library(), reference]

"""Tables and figures of a study."""

from __future__ import annotations

from pathlib import Path


def write_tables(folder: Path, out: Path) -> list[Path]:
    raise NotImplementedError

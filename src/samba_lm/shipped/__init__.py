"""The trained models that come with the package: a checkpoint folder for each, beside this file."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(__file__).parent
DEFAULT = "samba-nano"
"""What commands take where no checkpoint is named."""


def names() -> list[str]:
    """The models that this installation brings."""
    return sorted(path.parent.name for path in FOLDER.glob("*/config.json"))


def find(name: str | os.PathLike[str]) -> Path | None:
    """The folder of the model of this name; None where there is none, or where a folder of one's own has that name."""
    if Path(name).exists() or os.fspath(name) not in names():
        return None
    return FOLDER / name

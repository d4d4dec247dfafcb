"""What the sections of a recipe have in common."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

MAX_NAME_BYTES = 255
"""Of one file's or folder's name, on all common file systems."""


class Section(BaseModel):
    """Frozen, no unknown keys, no silent conversion between types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


def _path(text: str) -> str:
    if not text or "\0" in text:
        raise ValueError(f"{text!r} names no folder")
    if any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in Path(text).parts):
        raise ValueError(f"a name in it is longer than {MAX_NAME_BYTES} bytes")
    return text


PathText = Annotated[str, AfterValidator(_path)]
"""A path that a file system can hold."""

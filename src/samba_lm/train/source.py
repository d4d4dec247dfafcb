"""What a recipe's model begins with: the checkpoint that model.init_from names."""

from __future__ import annotations

from pathlib import Path

from samba_lm import checkpoint
from samba_lm.errors import UserError


def source_folder(init_from: str) -> Path:
    """Where the checkpoint lies. Raises UserError where there is none."""
    folder = checkpoint.find(init_from)
    if folder is None:
        raise UserError(
            f"model.init_from = {init_from!r} is no checkpoint's folder, nor a trained model that comes along: check "
            "it, or train that first."
        )
    return folder

"""The folder that prepared data goes to: what may be replaced in it, and which split a document goes to."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from samba_lm.errors import UserError


def check_numbers(val_fraction: float, processes: int) -> None:
    """Raise UserError unless the share of the validation set and the number of processes can be."""
    if not 0 <= val_fraction < 1:
        raise UserError(f"val_fraction is {val_fraction}: it must be at least 0 and less than 1.")
    if processes < 1:
        raise UserError(f"processes is {processes}: it must be at least 1.")


def split_of(text: str, val_fraction: float) -> str:
    """The split of a document that begins with ``text``, by a hash: equal ones stay together. "" where all are one."""
    if not val_fraction:
        return ""
    value = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
    return "val" if value < val_fraction * 2**64 else "train"


def check_out(
    out: Path,
    inputs: Iterable[Path],
    overwrite: bool,
    *,
    what: str,
    is_ours: Callable[[Path], bool],
    names: re.Pattern[str],
) -> None:
    """Raise UserError unless ``out`` is new or empty, or ``overwrite`` may replace it and loses nothing else.

    Args:
        inputs: files that are read.
        what: what is made, for people.
        is_ours: whether a folder is such a thing, or holds its splits.
        names: of the files in one.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out} is a file: name a folder to make.")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{out} already exists: choose another folder, or add --overwrite to replace it.")
    if not is_ours(out):
        raise UserError(f"{out} is not {what}, so --overwrite will not remove it: choose another folder.")
    if Path.cwd().resolve().is_relative_to(out.resolve()):
        raise UserError(f"{out} holds the current folder, which --overwrite would remove: go elsewhere first.")
    for path in inputs:
        if path.resolve().is_relative_to(out.resolve()):
            raise UserError(f"{out} holds the input {path}, which --overwrite would remove: choose another folder.")
    foreign = _foreign_file(out, names)
    if foreign is not None:
        raise UserError(f"{foreign} is no {what}, and --overwrite would remove it: move it away first.")


def _foreign_file(folder: Path, names: re.Pattern[str]) -> Path | None:
    """The first file or folder in one, or in a pair of splits, that has none of ``names``."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name in ("train", "val") and not path.is_symlink():
            if (foreign := _foreign_file(path, names)) is not None:
                return foreign
        elif path.is_dir() or not names.fullmatch(path.name):
            return path
    return None

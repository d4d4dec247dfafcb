"""A demo's folder: what may stand in it, and what an earlier demo left there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from samba_lm.data.shards import is_dataset
from samba_lm.data.sources import find_files
from samba_lm.errors import UserError
from samba_lm.files import TMP_MARK, existing

TWINS = ("samba-tiny", "llama-tiny", "swa-tiny", "mamba-tiny")
"""The models that `demo --train` trains, a checkpoint each."""
PAGES = {"report.html", "report.json", "perplexity.png", "loss.png", "memory.png"}
OURS = {"data", "language_reference.jsonl", *PAGES, *TWINS}


def check(out: Path, texts: Sequence[Path]) -> None:
    """Raise UserError if a text is missing or lies in ``out``, or if ``out`` holds what no demo wrote."""
    for file in find_files(list(texts), (".py",)) if texts else ():
        if file.path.resolve().is_relative_to(out.resolve()):
            raise UserError(f"{file.path} lies in the demo's folder {out}: choose another folder with --out.")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is not a folder: choose another place with --out.")
    if not os.access(there := existing(out), os.W_OK | os.X_OK):
        raise UserError(f"nothing may be written in {there}: choose another place for {out} with --out.")
    found = list(out.iterdir()) if out.exists() else []
    strangers = sorted(p.name for p in found if p.name.partition(TMP_MARK)[0] not in OURS)
    if strangers:
        raise UserError(f"{out} holds {strangers[0]!r}, which is no demo's: choose another folder with --out.")
    if found and not any(is_dataset(out / "data" / split) for split in ("train", "val")) and (out / "data").exists():
        raise UserError(f"{out / 'data'} is no demo's: choose another folder with --out.")


def clean(out: Path, texts: Sequence[Path]) -> None:
    """Remove what an earlier demo left in ``out``, and nothing else. Raises UserError as :func:`check`, before that."""
    check(out, texts)
    for path in out.iterdir() if out.exists() else ():
        shutil.rmtree(path) if path.is_dir() else path.unlink()

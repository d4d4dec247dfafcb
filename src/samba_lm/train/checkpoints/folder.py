"""A run's folder: OUT/step-00000100/ for each checkpoint, held by one run at a time, and which of them stay."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from samba_lm.errors import UserError
from samba_lm.files import TMP_MARK, fsync_path
from samba_lm.train.checkpoints.state import STEP_FOLDER

ASIDE = ".aside-"
"""In the names of checkpoints that were passed over: kept for a look, taken for none."""


def step_folder(out: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` steps stands."""
    return out / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The number in a step folder's name."""
    return int(folder.name.removeprefix("step-"))


def list_checkpoints(out: Path) -> list[Path]:
    """The run's checkpoints, oldest first. What an interrupted write left behind is not among them."""
    if not out.is_dir():
        return []
    found = [
        (int(match[1]), path) for path in out.iterdir() if (match := STEP_FOLDER.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(found)]


def check_is_run(out: Path) -> None:
    """Raise UserError unless ``out`` is a run's folder (or empty) and may be moved aside.

    People keep logs and results beside a run's files; a folder or a hidden file that no run wrote means that this is
    some other place, such as a home.
    """
    if not out.is_dir():
        return  # run_folder tells
    if Path.cwd().resolve().is_relative_to(out.resolve()):
        raise UserError(f"--fresh cannot move {out} aside: it holds the current folder; go elsewhere, or rename it.")
    entries = sorted(out.iterdir())
    ours = [entry for entry in entries if _is_ours(entry)]
    foreign = [entry for entry in entries if entry not in ours and (entry.is_dir() or entry.name.startswith("."))]
    if foreign or (entries and not ours):
        what = (foreign or entries)[0].name
        raise UserError(f"--fresh moves only a run's folder aside, and {out} holds {what!r}: choose another train.out.")


def _is_ours(entry: Path) -> bool:
    name = entry.name.partition(TMP_MARK)[0].partition(ASIDE)[0]
    return (
        name in (".lock", "metrics.jsonl", "tensorboard", "wandb", "adapter") or STEP_FOLDER.fullmatch(name) is not None
    )


@contextmanager
def run_folder(out: Path) -> Iterator[None]:
    """Make and hold the run's folder: only one process may train into it. Clears what an interrupted write left.

    Raises UserError when another process holds it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"train.out = {str(out)!r} is a file: name a folder.") from None
    except IsADirectoryError:
        raise UserError(f"{out / '.lock'} is a folder: remove it, or choose another train.out.") from None
    except PermissionError:
        raise UserError(f"No permission to write {out}: set train.out to a folder you own.") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"Another process is training into {out}: wait for it, or choose another train.out."
            ) from None
        for left in out.glob(f"step-*{TMP_MARK}*"):
            shutil.rmtree(left, ignore_errors=True)
        yield


def prune(out: Path, keep: int, keep_every: int) -> None:
    """Delete all checkpoints but the newest ``keep`` and those after every ``keep_every`` steps (0: none of them)."""
    for folder in list_checkpoints(out)[:-keep]:
        if keep_every == 0 or step_of(folder) % keep_every:
            # Renamed first: a deletion cut short must not leave half a folder under a checkpoint's name.
            doomed = folder.with_name(folder.name + TMP_MARK + "deleted")
            folder.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def set_aside(folder: Path) -> Path:
    """Rename a checkpoint that the run does not go on from; its new place."""
    aside = folder.with_name(f"{folder.name}{ASIDE}{datetime.now():%Y%m%d-%H%M%S-%f}")
    folder.rename(aside)
    fsync_path(folder.parent)
    return aside

"""From which checkpoint a run goes on: the newest that is whole, or the one that was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from samba_lm.errors import UserError
from samba_lm.tensor_files import DamagedError
from samba_lm.train.checkpoints import (
    STEP_FOLDER,
    TrainerState,
    list_checkpoints,
    read_state,
    set_aside,
    step_of,
    verify,
)
from samba_lm.train.observer import Observer
from samba_lm.train.parallel import Parallel
from samba_lm.train.together import ElsewhereError, together


@dataclass(frozen=True)
class Resume:
    """Where to go on."""

    folder: Path
    state: TrainerState
    newer: tuple[tuple[Path, str], ...] = ()
    """Checkpoints of the run that are not gone on from, and why not."""


def find_resume(out: Path, asked: Path | None, steps: int, parallel: Parallel) -> Resume | None:
    """Find, on all processes, what the run in ``out`` goes on from; None: it has no checkpoint, so it begins.

    ``asked``: a step's folder, or a run's. A damaged checkpoint is passed over for the one before it. Of one that has
    all ``steps`` the optimizer's state may be gone. Raises UserError when all are damaged, or ``asked`` is no
    checkpoint that this run can go on from.
    """
    source, only, names = out, None, list[str]()
    with together(parallel):
        if parallel.is_main:
            names = [path.name for path in list_checkpoints(out)]
        if asked is not None:
            source, only = _asked(asked, out, bool(names))
            names = [path.name for path in list_checkpoints(source)] if parallel.is_main else []
    names = parallel.broadcast(names)
    if asked is not None and (not names or only not in (None, *names)):
        raise _told_once(
            UserError(f"--resume {asked} is no checkpoint of a run: give a folder like {source / 'step-00000100'}."),
            parallel,
        )
    newer: list[tuple[Path, str]] = []
    for name in reversed(names):
        folder = source / name
        if only is not None and name != only:
            if step_of(folder) > step_of(source / only):
                newer.append((folder, f"{folder} is newer than the one to go on from"))
            continue
        try:
            state = _read_state(folder, parallel)
            verify(folder, parallel, optimizer=state.step < steps)
        except DamagedError as error:
            if only is not None:
                raise _told_once(error, parallel) from None
            newer.append((folder, f"A damaged checkpoint was passed over: {error}".rstrip(".")))
            continue
        return Resume(folder, state, tuple(newer) if source == out else ())
    if not names:
        return None
    raise _told_once(
        DamagedError(f"{newer[0][1]}. {source} has no other to go on from: start over with --fresh."), parallel
    )


def _told_once(error: UserError, parallel: Parallel) -> UserError:
    """What all processes raise, and the main one is to tell."""
    if not parallel.is_main:
        error.patience = ElsewhereError.patience
    return error


def put_newer_aside(found: Resume, parallel: Parallel, observer: Observer) -> None:
    """Rename the run's checkpoints that are not gone on from, so that their steps can be written again, and tell."""
    with together(parallel):
        if parallel.is_main:
            for folder, why in found.newer:
                observer.message(f"{why}; it is now {set_aside(folder).name}.")


def _read_state(folder: Path, parallel: Parallel) -> TrainerState:
    """trainer.json, as the main process reads it, on all."""
    told, plain = None, None
    with together(parallel):
        if parallel.is_main:
            try:
                plain = read_state(folder).model_dump()
            except DamagedError as error:
                told = str(error)
    told, plain = parallel.broadcast((told, plain))
    if told is not None:
        raise DamagedError(told)
    return TrainerState.model_validate(plain)


def _asked(asked: Path, out: Path, has_run: bool) -> tuple[Path, str | None]:
    """The run's folder that ``asked`` names, and the step's name where it names one."""
    if not asked.is_dir():
        raise UserError(f"--resume {asked}: there is no such folder; give a step's folder, or a run's.")
    real = asked.resolve()
    step = real.name if STEP_FOLDER.fullmatch(real.name) else None
    source = real.parent if step else real
    if source == out.resolve():
        return out, step
    if has_run:
        raise UserError(
            f"train.out = {str(out)!r} has checkpoints of its own, so the run cannot go on from {asked}: "
            "choose another train.out."
        )
    return source, step

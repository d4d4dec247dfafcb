"""What a folder holds: files of `samba-lm eval`, records of a study's runs, metrics of trainings."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from samba_lm.errors import UserError
from samba_lm.files import TMP_MARK, read_json
from samba_lm.train.metrics import read_metrics

METRICS = "metrics.jsonl"
STUDY_RUN, STUDY = "samba-lm study run", "samba-lm study"
NO_RESULTS = {"config.json", "tokenizer.json", "tokenizer_config.json", "trainer.json", "generation_config.json"}
"""Files of checkpoints: never looked into."""
LARGEST = 1 << 28
"""Bytes of a file that is still looked into."""


@dataclass(frozen=True)
class Problem:
    """A file that could not be used, and why, in a line."""

    path: str
    why: str


@dataclass(frozen=True)
class ResultFile:
    """A file that ``samba-lm eval TASK --json`` wrote: its path in the folder, and all that it holds."""

    path: str
    record: dict[str, Any]

    @property
    def task(self) -> str:
        return str(self.record["task"])

    @property
    def settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = self.record["settings"]
        return settings

    @property
    def group(self) -> str:
        """The same for files whose figures may stand in one table."""
        known = self.record.get("settings_sha256")
        return known if isinstance(known, str) else json.dumps(self.settings, sort_keys=True)


@dataclass(frozen=True)
class Training:
    """A run's folder in the folder ("." for itself), its metrics in order, and its newest trainer.json ({}: none)."""

    path: str
    metrics: list[dict[str, Any]]
    state: dict[str, Any]


@dataclass(frozen=True)
class StudyRun:
    """A record of a study's run, and the study's folder in the folder."""

    path: str
    study: str
    record: dict[str, Any]


@dataclass
class Found:
    """All that was found, sorted by path."""

    results: list[ResultFile] = field(default_factory=list)
    trainings: list[Training] = field(default_factory=list)
    studies: list[StudyRun] = field(default_factory=list)
    study_files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """A study's own file, by its folder: what it is called, and its runs."""
    problems: list[Problem] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.results or self.trainings or self.studies)


def check_folder(folder: Path) -> None:
    """Raise UserError where ``folder`` is none."""
    if not folder.exists():
        raise UserError(f"There is no folder {folder}: give the one that holds your results.")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: give the folder that holds it.")


def search(folder: Path) -> Found:
    """Look through ``folder`` and the folders in it; hidden ones and links to folders are left out.

    Files of other kinds are passed over, damaged ones become problems. Raises UserError where ``folder`` is none.
    """
    check_folder(folder)
    found = Found()
    for path in _files(folder):
        shown = path.relative_to(folder).as_posix()
        try:
            if path.name == METRICS:
                if metrics := read_metrics(path):
                    found.trainings.append(Training(_parent(shown), metrics, _state(path.parent)))
            else:
                _sort_in(found, path, shown)
        except UserError as error:
            why = str(error).replace(str(path), shown).removeprefix(f"{shown} ").removesuffix(".")
            found.problems.append(Problem(shown, why))
        except OSError as error:
            found.problems.append(Problem(shown, f"cannot be read: {error.strerror}"))
    return found


def _files(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name == METRICS or (name.endswith(".json") and name not in NO_RESULTS):
                path = Path(root, name)
                if not name.startswith(".") and TMP_MARK not in name and path.is_file():
                    yield path


def _sort_in(found: Found, path: Path, shown: str) -> None:
    size = path.stat().st_size
    if size > LARGEST:
        raise UserError(f"{shown} has {size:,} bytes: results have at most {LARGEST:,}, so it was not read.")
    if not size:
        raise UserError(f"{shown} is empty: measure again.")
    record = read_json(path)
    if not isinstance(record, dict):
        return
    if record.get("format") == STUDY_RUN:
        found.studies.append(StudyRun(shown, _parent(_parent(shown)), record))
    elif record.get("format") == STUDY:
        found.study_files[_parent(shown)] = record
    elif isinstance(record.get("task"), str) and isinstance(record.get("models"), list):
        if not isinstance(record.get("settings"), dict):
            raise UserError(f"{shown} is damaged: its settings are missing.")
        found.results.append(ResultFile(shown, record))


def _parent(shown: str) -> str:
    return Path(shown).parent.as_posix()


def _state(folder: Path) -> dict[str, Any]:
    """The newest checkpoint's trainer.json, as far as it can be read."""
    steps = sorted(folder.glob("step-*/trainer.json"))
    try:
        state = read_json(steps[-1]) if steps else {}
    except UserError:
        return {}
    return state if isinstance(state, dict) else {}

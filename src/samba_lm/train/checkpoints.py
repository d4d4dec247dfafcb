"""Checkpoints of a run: OUT/step-00000100/, a model folder that also holds what is needed to go on exactly.

Besides config.json, model.safetensors and tokenizer.json (so the folder is a model for every other command):
optimizer.safetensors, the AdamW state by parameter name, and trainer.json, everything else. No pickle anywhere.
"""

from __future__ import annotations

import base64
import fcntl
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, FiniteFloat, NonNegativeInt, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from samba_lm import checkpoint as model_folder
from samba_lm.errors import UserError
from samba_lm.files import TMP_MARK, atomic_folder, write_text
from samba_lm.model import SambaLM
from samba_lm.tokenizer import Tokenizer
from samba_lm.train.optim import load_optimizer_tensors, optimizer_tensors
from samba_lm.train.recipe import Recipe
from samba_lm.validation import explain

FORMAT = "samba-lm trainer"
VERSION = 1
SECTIONS = {"model", "data", "train"}
"""Of a recipe, from the beginning; those that came later may be missing and then stand at their defaults."""
STEP_FOLDER = re.compile(r"step-(\d{8,})")


def _has_sections(recipe: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    known = set(Recipe.model_fields)
    if not SECTIONS <= set(recipe) <= known:
        raise ValueError(f"a recipe has the sections {', '.join(Recipe.model_fields)}")
    return recipe


class TrainerState(BaseModel):
    """What trainer.json holds: where a run stands, and what it must be continued with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str = FORMAT
    version: int = VERSION
    step: NonNegativeInt
    """Optimizer steps done."""
    tokens: NonNegativeInt
    """Tokens read."""
    seconds: FiniteFloat
    """Time spent in steps, over all resumed parts of the run."""
    loss: float
    """Loss of the last step."""
    val_loss: float | None
    """Last validation loss."""
    best_val_loss: float | None
    recipe: Annotated[dict[str, dict[str, Any]], AfterValidator(_has_sections)]
    config: str
    """Fingerprint of the model's config."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    data: str
    """Fingerprint of the training data."""
    threads: int
    """CPU threads used: sums are split by thread, so another number changes the last digits."""
    rng: dict[str, dict[str, str]]
    """Random generators' states by rank, then by device type ("cpu", "cuda"): base64 of their bytes."""


def step_folder(out: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` steps stands."""
    return out / f"step-{step:08d}"


def list_checkpoints(out: Path) -> list[Path]:
    """The run's checkpoints, oldest first. What an interrupted write left behind is not among them."""
    if not out.is_dir():
        return []
    found = [
        (int(match[1]), path) for path in out.iterdir() if (match := STEP_FOLDER.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(found)]


def save_checkpoint(
    out: Path,
    model: SambaLM,
    tokenizer: Tokenizer,
    optimizer: torch.optim.Optimizer,
    state: TrainerState,
    *,
    keep: int,
) -> Path:
    """Write OUT/step-N atomically, then delete all but the newest ``keep``; returns the new folder.

    A step folder is never written over. Raises UserError when the disk is full or not writable; the earlier
    checkpoints are untouched then.
    """
    folder = step_folder(out, state.step)
    if folder.exists():
        raise UserError(f"{folder} is there already: another run writes to {out}, or move that folder away.")
    try:
        with atomic_folder(folder) as tmp:
            model_folder.write(model, tmp, tokenizer)
            tensors = {name: tensor.detach().cpu() for name, tensor in optimizer_tensors(model, optimizer).items()}
            model_folder.write_tensors(tensors, tmp / "optimizer.safetensors")
            write_text(tmp / "trainer.json", state.model_dump_json(indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"Could not write {folder}: {error.strerror}. The checkpoints before it are untouched."
        ) from error
    for old in list_checkpoints(out)[:-keep]:
        _remove(old)
    return folder


def read_state(folder: Path) -> TrainerState:
    """Read trainer.json. Raises UserError when the folder is no checkpoint of a run, or a damaged one."""
    path = folder / "trainer.json"
    try:
        data = json.loads(path.read_bytes())
        state = TrainerState.model_validate(data)
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no trainer.json: it is a model, not a run's checkpoint; use model.init_from."
        ) from None
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, TrainerState)}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged: delete {folder} to continue from the checkpoint before it.") from None
    if state.format != FORMAT or state.version != VERSION:
        raise UserError(f"{path} is {state.format} {state.version}; this version reads {FORMAT} {VERSION}.")
    name = STEP_FOLDER.fullmatch(folder.name)
    if name is not None and int(name[1]) != state.step:
        raise UserError(f"{path} is of step {state.step}: delete {folder} to continue from the checkpoint before it.")
    return state


def restore_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load optimizer.safetensors into ``optimizer``. Raises UserError when it is missing, damaged or foreign."""
    path = folder / "optimizer.safetensors"
    try:
        load_optimizer_tensors(model, optimizer, load_file(path))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: delete {folder} to continue from the checkpoint before it.") from None
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): delete {folder} to continue from the one before it.") from None


def rng_state(device: torch.device) -> dict[str, str]:
    """The default generators' states of the CPU and of ``device``, as base64."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {kind: base64.b64encode(state.numpy().tobytes()).decode("ascii") for kind, state in states.items()}


def restore_rng(folder: Path, states: dict[str, str], device: torch.device) -> None:
    """Put back what :func:`rng_state` gave; a GPU's generator that was not saved (another device) is left as it is.

    Raises UserError, naming ``folder``, when they are no generators' states.
    """
    try:
        for kind, text in {"cpu": "", **states}.items():
            state = torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype=np.uint8).copy())
            if kind == "cpu":
                torch.set_rng_state(state)
            elif device.type == "cuda":
                torch.cuda.set_rng_state(state, device)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            f"{folder / 'trainer.json'} is damaged at 'rng' ({kind}): delete {folder} to continue from the one before."
        ) from error


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
    name = entry.name.partition(TMP_MARK)[0]
    return name in (".lock", "metrics.jsonl", "tensorboard") or STEP_FOLDER.fullmatch(name) is not None


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


def _remove(folder: Path) -> None:
    # Renamed first: a deletion cut short must not leave half a folder under a checkpoint's name.
    doomed = folder.with_name(folder.name + TMP_MARK + "deleted")
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)

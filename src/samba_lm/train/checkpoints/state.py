"""trainer.json: where a run stands, and what it must be continued with."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, FiniteFloat, NonNegativeInt, ValidationError

from samba_lm.errors import UserError
from samba_lm.tensor_files import DamagedError
from samba_lm.train.guard import GuardState
from samba_lm.train.recipe import Recipe
from samba_lm.validation import explain

FORMAT = "samba-lm trainer"
VERSION = 1
FILE = "trainer.json"
SECTIONS = {"model", "data", "train"}
"""Of a recipe, from the beginning; those that came later may be missing and then stand at their defaults."""
STEP_FOLDER = re.compile(r"step-(\d{8,})")


def _has_sections(recipe: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    known = set(Recipe.model_fields)
    if not SECTIONS <= set(recipe) <= known:
        raise ValueError(f"a recipe has the sections {', '.join(Recipe.model_fields)}")
    return recipe


class TrainerState(BaseModel):
    """What trainer.json holds."""

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
    guard: GuardState = GuardState()
    """What the guard against spikes remembers, and the batches it passed over."""
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

    @property
    def world(self) -> int:
        """Processes that trained."""
        return max(1, len(self.rng))


def read_state(folder: Path) -> TrainerState:
    """Read trainer.json. Raises UserError when the folder is no checkpoint of a run, DamagedError for a damaged one."""
    path = folder / FILE
    try:
        data = json.loads(path.read_bytes())
        state = TrainerState.model_validate(data)
    except FileNotFoundError:
        raise DamagedError(
            f"{path} is missing: as it is, {folder.name} is a model; model.init_from takes one."
        ) from None
    except ValidationError as error:
        raise DamagedError(f"{path}: {explain(error, TrainerState)}") from None
    except (ValueError, RecursionError):
        raise DamagedError(f"{path} is damaged.") from None
    if state.format != FORMAT or state.version != VERSION:
        raise UserError(f"{path} is {state.format} {state.version}; this version reads {FORMAT} {VERSION}.")
    name = STEP_FOLDER.fullmatch(folder.name)
    if name is not None and int(name[1]) != state.step:
        raise DamagedError(f"{path} is of step {state.step}.")
    return state


def rng_state(device: torch.device) -> dict[str, str]:
    """The default generators' states of the CPU and of ``device``, as base64."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {kind: base64.b64encode(state.numpy().tobytes()).decode("ascii") for kind, state in states.items()}


def restore_rng(folder: Path, state: TrainerState, seed: int, rank: int, device: torch.device) -> None:
    """Put back this rank's generators; a GPU's that was not saved (another device) is left as it is.

    A rank that the run did not have when it was saved begins with numbers of its own, made of seed, step and rank.
    Raises DamagedError, naming ``folder``, when they are no generators' states.
    """
    if rank > 0 and str(rank) not in state.rng:
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {state.step} {rank}".encode()).digest()[:8], "little"))
        return
    try:
        for kind, text in {"cpu": "", **state.rng.get(str(rank), {})}.items():
            values = torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype=np.uint8).copy())
            if kind == "cpu":
                torch.set_rng_state(values)
            elif device.type == "cuda":
                torch.cuda.set_rng_state(values, device)
    except (ValueError, TypeError, RuntimeError) as error:
        raise DamagedError(f"{folder / FILE} is damaged at 'rng' ({kind}).") from error

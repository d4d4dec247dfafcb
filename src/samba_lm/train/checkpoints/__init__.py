"""Checkpoints of a run: OUT/step-00000100/, a model's folder that also holds what is needed to go on exactly.

Besides config.json, the weights and tokenizer.json (so the folder is a model for every other command): the optimizer's
state by parameter name, trainer.json, and manifest.json, the sizes and checksums of all. A run of one process writes
model.safetensors and optimizer.safetensors; of several, each writes a file of the pieces that it holds
(model-00003.safetensors), the tensors' names the same: either kind is read by any number of processes. No pickle.
"""

from samba_lm.train.checkpoints.folder import (
    check_is_run,
    list_checkpoints,
    run_folder,
    set_aside,
    step_folder,
    step_of,
)
from samba_lm.train.checkpoints.manifest import verify
from samba_lm.train.checkpoints.restore import restore_model, restore_optimizer
from samba_lm.train.checkpoints.saver import Saver
from samba_lm.train.checkpoints.state import STEP_FOLDER, TrainerState, read_state, restore_rng, rng_state

__all__ = [
    "STEP_FOLDER",
    "Saver",
    "TrainerState",
    "check_is_run",
    "list_checkpoints",
    "read_state",
    "restore_model",
    "restore_optimizer",
    "restore_rng",
    "rng_state",
    "run_folder",
    "set_aside",
    "step_folder",
    "step_of",
    "verify",
]

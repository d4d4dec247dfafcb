"""Models on disk: a folder of config.json, model.safetensors and tokenizer.json. Never pickle, never half a folder.

Of a run of several processes, a step's folder has a file model-RANK.safetensors of each process in place of the one:
the pieces of the tensors that it held. It is read like any other.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from samba_lm import shipped, zoo
from samba_lm.config import ModelConfig
from samba_lm.errors import UserError, did_you_mean
from samba_lm.files import atomic_folder, read_json, recover_folder
from samba_lm.mixers.mamba import Selection
from samba_lm.model import SambaLM
from samba_lm.nn import lora
from samba_lm.nn.lora import LoraSettings
from samba_lm.tensor_files import DamagedError, TensorFiles
from samba_lm.tokenizer import CONFIG_FILE as TOKENIZER_CONFIG
from samba_lm.tokenizer import TOKENIZER_FILE as TOKENIZER
from samba_lm.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

FORMAT = "samba-lm"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
VERSION = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
SHARDED_WEIGHTS = "model-*.safetensors"


def create(
    model: str | ModelConfig, *, seed: int = 0, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> SambaLM:
    """A new model with initialised weights. ``model``: a name of the zoo or a ModelConfig; ``dtype``: None is fp32.

    Weights are drawn on the CPU, so the same seed gives the same model on every device.
    """
    config = zoo.get(model) if isinstance(model, str) else model
    built = build(config)
    built.reset_parameters(seed)
    return place(built, device, dtype)


def save(model: SambaLM, folder: str | os.PathLike[str], tokenizer: Tokenizer | None = None) -> None:
    """Write the model (and its tokenizer) as a checkpoint folder, replacing one that is there only when complete.

    Raises UserError when the disk is full, the folder holds something else, or the tokenizer is larger than the
    model's vocabulary.
    """
    folder = Path(folder)
    check_replaceable(folder)
    with atomic_folder(folder) as tmp:
        write(model, tmp, tokenizer)


def check_replaceable(folder: Path) -> None:
    """Raise UserError unless ``folder`` is absent, empty, or holds a checkpoint of this package and nothing else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        read_config(folder)
    except UserError:
        raise UserError(f"{folder} exists and is not a samba-lm checkpoint: choose another folder.") from None
    others = sorted({p.name for p in folder.iterdir()} - {CONFIG, WEIGHTS, TOKENIZER, TOKENIZER_CONFIG})
    if others:
        raise UserError(f"{folder} also holds {others[0]!r}, which would be lost: choose another folder.")


def write(model: SambaLM, folder: Path, tokenizer: Tokenizer | None = None) -> None:
    """Write a checkpoint's files into an existing folder (for callers that make the folder atomic themselves)."""
    write_config(model, folder, tokenizer)
    tensors = {name: t.detach().contiguous().cpu() for name, t in model.state_dict().items()}
    # One key only: safetensors writes several in an order that differs from run to run.
    write_tensors(tensors, folder / WEIGHTS, weights_metadata(model.config))


def write_config(model: SambaLM, folder: Path, tokenizer: Tokenizer | None = None) -> None:
    """Write all of a checkpoint but its weights into an existing folder. Raises UserError as :func:`save`."""
    if model.quantized is not None:
        raise UserError(
            f"This model is {model.quantized}, and checkpoints hold full numbers only: save it before it is quantised, "
            "and quantise what is loaded."
        )
    if tokenizer is not None:
        check_tokenizer(model.config, tokenizer)
        tokenizer.save(folder)
    header = {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer": None if tokenizer is None else tokenizer.fingerprint(),
        "model": model.config.to_dict(),
    }
    adapted = lora.settings_of(model)
    if adapted is not None:
        header["lora"] = asdict(adapted)
    (folder / CONFIG).write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")


def weights_metadata(config: ModelConfig) -> dict[str, str]:
    """What the header of a file of weights says of the model that they belong to."""
    return {"samba_lm_config": config.fingerprint()}


def write_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """safetensors' ``save_file``, its errors of the disk as OSError and its file readable like its neighbours."""
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    path.chmod(0o644)  # it is made for its owner alone


def load(
    folder_or_name: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    max_context: int | None = None,
) -> tuple[SambaLM, Tokenizer | None]:
    """Read a checkpoint folder, or the newest step of a training run's folder: (model, tokenizer or None).

    The name of a model that comes with the package (`samba_lm.shipped`) gives that one, a name of the zoo a model with
    fresh random weights (and a byte tokenizer where it fits). A folder of that name is taken first.
    ``dtype``: of the parameters; None takes the one that config.json names, else keeps the file's. (A model that comes
    with the package has 16 bits in its file, to be small, and is fp32 in memory, in which many processors are faster.)
    ``max_context``: replaces the config's, for full attention.
    Raises UserError for a missing, truncated, foreign or mismatched checkpoint.
    """
    if not os.fspath(folder_or_name):
        raise UserError("An empty name is no checkpoint: give a folder, or a model of the zoo.")
    recover_folder(Path(folder_or_name))
    folder = find(folder_or_name)
    if folder is None:
        return _from_name(str(folder_or_name), device, dtype)
    config, tokenizer_hash = read_config(folder)
    if dtype is None:
        dtype = memory_dtype(folder)
    if max_context is not None:
        config = config.with_overrides(max_context=max_context)
    model = build(config, read_weights(folder, config), read_lora(folder))
    lora.fold(model)
    tokenizer = read_tokenizer(folder, config, tokenizer_hash)
    return place(model, device, dtype).eval(), tokenizer


def find(folder_or_name: str | os.PathLike[str]) -> Path | None:
    """Where the checkpoint lies that :func:`load` reads: a folder, a training run's newest step, or one that comes with
    the package; None where there is none of that name."""
    folder = Path(folder_or_name)
    return latest_step(folder) or folder if folder.exists() else shipped.find(folder_or_name)


def latest_step(run: Path) -> Path | None:
    """The newest complete ``step-N`` folder of a training run, or None."""
    steps = [p for p in run.glob("step-*") if p.is_dir() and re.fullmatch(r"step-\d+", p.name)]
    return max(steps, key=lambda p: int(p.name.removeprefix("step-")), default=None)


def read_config(folder: Path) -> tuple[ModelConfig, str | None]:
    """The config of a checkpoint folder and the fingerprint of its tokenizer."""
    path = folder / CONFIG
    if not path.is_file():
        if (folder / "metrics.jsonl").is_file():
            raise UserError(f"{folder} is a run without a checkpoint so far: train.save_every says when it writes one.")
        inside = sorted({str(each.parent) for name in ("step-*", CONFIG) for each in folder.glob(f"*/{name}")})
        known = f": {', '.join(inside[:5])}{' and others' if len(inside) > 5 else ''}" if inside else ""
        raise UserError(
            f"{folder} is not a checkpoint: it has no {CONFIG}. Give a model's folder, a run's or a step's{known}."
        )
    header = read_json(path)
    if isinstance(header, dict) and "model_type" in header:
        raise UserError(
            f"{folder} is a model of transformers: `samba-lm convert from-transformers {folder} --out FOLDER` makes a "
            "checkpoint of it."
        )
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise UserError(
            f"{path} was not written by samba-lm. Convert it first: `samba-lm convert --help` shows from what."
        )
    if header.get("version") != VERSION:
        raise UserError(
            f"{path} has format version {header.get('version')!r}, this samba-lm reads {VERSION}: upgrade samba-lm."
        )
    model, tokenizer = header.get("model"), header.get("tokenizer")
    if not isinstance(model, dict) or not isinstance(tokenizer, str | None):
        raise UserError(f"{path} is damaged (its model or tokenizer is not what we write): use another checkpoint.")
    return ModelConfig.from_dict(model), tokenizer


def memory_dtype(folder: Path) -> torch.dtype | None:
    """The dtype that a checkpoint folder asks for in memory, ``"dtype"`` of its config.json; None: that of its file."""
    name = read_json(folder / CONFIG).get("dtype")
    known = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    if name is not None and name not in known:
        raise UserError(f"{folder / CONFIG} asks for dtype {name!r}: it must be one of {', '.join(known)}.")
    return known.get(name)


def read_weights(folder: Path, config: ModelConfig) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint folder, checked to be whole and to belong to ``config``."""
    files = open_weights(folder, config)
    return {name: files.read(name) for name in files.names()}


def weight_files(folder: Path) -> list[Path]:
    """Where a checkpoint folder's weights lie. Raises UserError when it has none."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    found = sorted(folder.glob(SHARDED_WEIGHTS))
    if not found:
        raise DamagedError(f"{folder} has no {WEIGHTS}: the checkpoint is incomplete, use another one.")
    return found


def open_weights(folder: Path, config: ModelConfig) -> TensorFiles:
    """A checkpoint folder's weights, to be read one by one. Raises UserError when they are damaged or of another model.

    What is open stays readable when the folder is deleted.
    """
    paths = weight_files(folder)
    try:
        files = TensorFiles(paths)
    except DamagedError as error:
        raise DamagedError(f"{error} Use another checkpoint.") from None
    written = files.metadata.get("samba_lm_config")
    if written is not None and written != config.fingerprint():
        raise DamagedError(
            f"{paths[0]} belongs to another model than {folder / CONFIG}: restore the pair that was saved together."
        )
    return files


def place(model: SambaLM, device: str | torch.device, dtype: torch.dtype | None) -> SambaLM:
    """Move a model to a device and its parameters to a dtype (None: as they are), in place.

    The parameters of the recurrence (A_log, D and the step's bias) never go below fp32: exp and softplus of a rounded
    number would change how long a channel remembers.
    """
    model.to(device=device)
    if dtype is None:
        return model
    for module in model.modules():
        if isinstance(module, Selection) and torch.finfo(dtype).bits < 32:
            continue
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
    return model


def read_lora(folder: Path) -> LoraSettings | None:
    """With what the weights of a checkpoint folder have adapters beside them, from its config.json; None: they have
    none. Only the steps of a run that trains adapters do."""
    found = read_json(folder / CONFIG).get("lora")
    if found is None:
        return None
    try:
        settings = LoraSettings(**{**found, "targets": tuple(found["targets"])})
        ok = settings.rank >= 1 and settings.alpha > 0
    except (TypeError, KeyError):
        ok = False
    if not ok:
        raise UserError(f"{folder / CONFIG} is damaged at 'lora' ({str(found)[:60]}): use another checkpoint.")
    return settings


def check_tokenizer(config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Raise UserError if the tokenizer makes ids that the model has no embedding for."""
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids but model {config.name!r} has a vocabulary of "
            f"{config.vocab_size}: use the tokenizer it was trained with, or set vocab_size"
        )


def build(
    config: ModelConfig, tensors: dict[str, torch.Tensor] | None = None, adapted: LoraSettings | None = None
) -> SambaLM:
    """A model with the given weights (checked by name and shape, UserError otherwise), or with uninitialised ones.

    ``adapted``: it has adapters, among the given weights, and trains them alone.
    """
    with torch.device("meta"):
        model = SambaLM(config)
        if adapted is not None:
            lora.attach(model, adapted)
    if tensors is None:
        return model.to_empty(device="cpu")
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    for name, shape in expected.items():
        if name not in tensors:
            raise UserError(f"the weights have no tensor {name!r}: they belong to another model than {config.name!r}")
        if tensors[name].dtype not in DTYPES:
            raise UserError(
                f"tensor {name!r} is {tensors[name].dtype}: weights are float32, bfloat16, float16 or float64"
            )
        if tuple(tensors[name].shape) != shape:
            found = list(tensors[name].shape)
            raise UserError(f"tensor {name!r} has shape {found}, but model {config.name!r} needs {list(shape)}")
    extra = sorted(tensors.keys() - expected.keys())
    if extra:
        raise UserError(f"the weights hold {extra[0]!r}, which model {config.name!r} does not have")
    model.load_state_dict(tensors, assign=True)
    return model


def read_tokenizer(folder: Path, config: ModelConfig, expected: str | None) -> Tokenizer | None:
    """A checkpoint folder's tokenizer, checked to be the one with the ``expected`` fingerprint; None: it has none."""
    if not (folder / TOKENIZER).is_file():
        if expected is not None:
            raise UserError(f"{folder} has lost its {TOKENIZER}: copy it back from where the model was trained.")
        return None
    tokenizer = load_tokenizer(folder)
    if expected is not None and tokenizer.fingerprint() != expected:
        raise UserError(
            f"{folder / TOKENIZER} is not the tokenizer this model was saved with "
            f"(fingerprint {tokenizer.fingerprint()[:12]}, expected {expected[:12]}): put the right one back."
        )
    check_tokenizer(config, tokenizer)
    return tokenizer


def _from_name(name: str, device: str | torch.device, dtype: torch.dtype | None) -> tuple[SambaLM, Tokenizer | None]:
    if name == shipped.DEFAULT:
        raise UserError(
            f"This installation does not bring {name}, the model that is taken where none is named: give a checkpoint."
        )
    if name not in zoo.ZOO:
        known = [*shipped.names(), *zoo.ZOO]
        path = "/" in name or "." in name
        near = "" if path else did_you_mean(name, known)
        if "mean" not in near:  # the first dozen of the zoo would tell nobody anything
            near = " Check the path." if path else " Check the path, or give a name that `samba-lm models` lists."
        raise UserError(f"There is no folder {name!r}, and no model of that name in the zoo.{near}")
    model = create(name, device=device, dtype=dtype).eval()
    byte = ByteTokenizer()
    return model, byte if byte.vocab_size <= model.config.vocab_size <= 2 * byte.vocab_size else None

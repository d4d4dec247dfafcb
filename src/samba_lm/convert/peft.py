"""Adapters in peft's format: adapter_config.json and adapter_model.safetensors.

Of a model that transformers has too (a Llama, Mistral or Mamba), names and shapes are those of the folder that
``samba-lm convert to-transformers`` writes, so that peft puts the adapter on it: a map of ours that is several of
theirs, such as q, k and v, gives each the same A and its rows of B. Of the others the names are our own.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from samba_lm.checkpoint import DTYPES, write_tensors
from samba_lm.config import ModelConfig
from samba_lm.convert.foreign import Tensors, read_json_object, read_safetensors
from samba_lm.convert.transformers import transformers_parts
from samba_lm.errors import UserError
from samba_lm.files import atomic_folder
from samba_lm.model import SambaLM
from samba_lm.nn.lora import LoraSettings, adapters, settings_of
from samba_lm.tensor_files import sha256
from samba_lm.tokenizer import CONFIG_FILE, TOKENIZER_FILE, Tokenizer, load_tokenizer
from samba_lm.validation import explain

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_FILES = {CONFIG, WEIGHTS, TOKENIZER_FILE, CONFIG_FILE}


class AdapterConfig(BaseModel):
    """What of peft's adapter_config.json decides what an adapter computes; what we cannot compute is refused."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    peft_type: Literal["LORA"]
    r: int = Field(ge=1)
    lora_alpha: float = Field(gt=0, allow_inf_nan=False)
    use_rslora: bool = False
    bias: Literal["none"] = "none"
    use_dora: Literal[False] = False
    fan_in_fan_out: Literal[False] = False
    modules_to_save: None = None
    rank_pattern: dict[str, int] | None = Field(default=None, max_length=0)
    alpha_pattern: dict[str, float] | None = Field(default=None, max_length=0)

    @property
    def settings(self) -> LoraSettings:
        """Ours."""
        return LoraSettings(self.r, self.lora_alpha, rslora=self.use_rslora)


def save_adapter(
    model: SambaLM, folder: str | os.PathLike[str], base: str | None = None, tokenizer: Tokenizer | None = None
) -> None:
    """Write the adapters of a model that has some, and the tokenizer with its chat template.

    ``base``: the name of what they belong to. The folder appears when it is complete, in place of an adapter there.
    Raises UserError where it holds something else.
    """
    folder, settings = Path(folder), settings_of(model)
    assert settings is not None, "a model without adapters"
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - _FILES):
        raise UserError(f"{folder} exists and is no adapter: choose another folder.")
    parts = _parts(model.config)
    tensors: Tensors = {}
    for name, module in adapters(model):
        A, B = module.lora_A.detach().cpu(), module.lora_B.detach().cpu()
        theirs = parts.get(f"{name}.weight", [(name, B.shape[0])])
        for (their, _), rows in zip(theirs, B.split([rows for _, rows in theirs]), strict=True):
            tensors[f"{PREFIX}{their}.lora_A.weight"] = A.clone()
            tensors[f"{PREFIX}{their}.lora_B.weight"] = rows.clone()
    targets = sorted({name.removeprefix(PREFIX).split(".")[-3] for name in tensors})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha,
        "use_rslora": settings.rslora,
        "target_modules": targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with atomic_folder(folder) as tmp:
        (tmp / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_tensors(tensors, tmp / WEIGHTS, {"format": "pt"})
        if tokenizer is not None:
            tokenizer.save(tmp)


@torch.no_grad()
def merge_adapter(model: SambaLM, folder: str | os.PathLike[str], tokenizer: Tokenizer | None = None) -> int:
    """Add an adapter to a model's weights, in place; returns how many matrices changed. ``tokenizer``: the model's,
    which takes over the chat template that lies with the adapter.

    Raises UserError for a folder that holds no whole adapter, or one of another model or tokenizer.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is no adapter: it has no {CONFIG}.")
    try:
        config = AdapterConfig.model_validate(read_json_object(folder / CONFIG))
    except ValidationError as error:
        raise UserError(f"{folder / CONFIG}: {explain(error, AdapterConfig)}") from None
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder} has no {WEIGHTS}: copy the adapter again.")
    changes = _changes(read_safetensors(folder / WEIGHTS), folder / WEIGHTS, model, config)
    if tokenizer is not None and (folder / TOKENIZER_FILE).is_file():
        beside = load_tokenizer(folder)
        if beside.fingerprint() != tokenizer.fingerprint():
            raise UserError(f"{folder} was trained with another tokenizer than this model has: give its base.")
        tokenizer.chat_template = beside.chat_template or tokenizer.chat_template
    for weight, change in changes:
        weight.copy_(weight + change.to(weight.device))
    return len(changes)


def adapter_sha256(folder: str | os.PathLike[str]) -> str:
    """Of what decides what an adapter computes: the hash of its two files' hashes."""
    return hashlib.sha256("".join(sha256(Path(folder, name)) for name in (CONFIG, WEIGHTS)).encode()).hexdigest()


def _changes(
    tensors: Tensors, file: Path, model: SambaLM, config: AdapterConfig
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Rows of the model's weights, and what is added to them."""
    weights = {name: p for name, p in model.named_parameters() if p.dim() == 2}
    rows_of: dict[str, torch.Tensor] = {name.removesuffix(".weight"): p.data for name, p in weights.items()}
    for ours, parts in _parts(model.config).items():
        if ours in weights:
            pieces = weights[ours].data.split([rows for _, rows in parts])
            rows_of |= {their: rows for (their, _), rows in zip(parts, pieces, strict=True)}
    found = []
    for name in sorted(name for name in tensors if name.endswith(".lora_A.weight")):
        module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        A, B = tensors.pop(name), tensors.pop(name.replace(".lora_A.", ".lora_B."), None)
        weight = rows_of.get(module)
        if weight is None:
            raise UserError(
                f"{file} adapts {module!r}, which model {model.config.name!r} does not have: give its base."
            )
        if B is None or A.dtype not in DTYPES or B.dtype not in DTYPES:
            raise UserError(f"{file} has no whole adapter of {module!r}: copy it again.")
        if A.shape != (config.r, weight.shape[1]) or B.shape != (weight.shape[0], config.r):
            raise UserError(
                f"{file}: the adapter of {module!r} has shapes {list(A.shape)} and {list(B.shape)}, but rank "
                f"{config.r} and a weight {list(weight.shape)} of {model.config.name!r}: give its base."
            )
        wide = torch.promote_types(weight.dtype, torch.float32)
        found.append((weight, config.settings.scale * (B.to(wide) @ A.to(wide))))
    if not found or tensors:
        what = f"holds {next(iter(tensors))!r}, which is no adapter's" if tensors else "holds no adapter"
        raise UserError(f"{file} {what}: only plain LoRA is read.")
    return found


def _parts(config: ModelConfig) -> dict[str, list[tuple[str, int]]]:
    """Our name of a weight -> theirs of its modules and their rows, from top to bottom; empty for models that
    transformers does not have."""
    try:
        parts: Any = transformers_parts(config)
    except UserError:
        return {}
    return {
        ours: [(part.name.removesuffix(".weight"), part.shape[0]) for part in theirs] for ours, theirs in parts.items()
    }

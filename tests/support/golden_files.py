"""The reference code's tensors (tests/golden): configs, weights, inputs, and what must come out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from samba_lm.config import ModelConfig
from samba_lm.convert.official import read_official_config, rename_official

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
MANIFEST: dict[str, Any] = json.loads((GOLDEN / "manifest.json").read_text())
ARCHS: dict[str, Any] = MANIFEST["archs"]

Tensors = dict[str, torch.Tensor]


def read(name: str) -> tuple[ModelConfig, Tensors, Tensors]:
    """(our config, the file's tensors, its weights under our names)."""
    arch, tensors = ARCHS[name], load_file(GOLDEN / f"{name}.safetensors")
    config = read_official_config({**arch["config"], "size_overrides": arch["size_overrides"]})
    return config, tensors, renamed(tensors, "param.", config)


def renamed(tensors: Tensors, prefix: str, config: ModelConfig) -> Tensors:
    """The tensors of one kind ("param." or "grad.") under our names."""
    return rename_official({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}, config)

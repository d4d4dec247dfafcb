"""samba-lm: train, evaluate and run Samba hybrid language models (arXiv 2406.07522).

The public names below are imported when first used, so that ``import samba_lm`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from samba_lm.checkpoint import create, load, save
    from samba_lm.config import LayerSpec, ModelConfig
    from samba_lm.errors import UserError
    from samba_lm.generation.api import generate, stream
    from samba_lm.mixers.base import Mixer
    from samba_lm.mixers.registry import register_mixer
    from samba_lm.model import SambaLM
    from samba_lm.quantization import quantize
    from samba_lm.span import Span
    from samba_lm.tokenizer import ByteTokenizer, load_tokenizer
    from samba_lm.zoo import register_architecture

__version__ = "0.1.0"

__all__ = [
    "ByteTokenizer",
    "LayerSpec",
    "Mixer",
    "ModelConfig",
    "SambaLM",
    "Span",
    "UserError",
    "create",
    "generate",
    "load",
    "load_tokenizer",
    "quantize",
    "register_architecture",
    "register_mixer",
    "save",
    "stream",
]

_HOMES = {
    "ByteTokenizer": "samba_lm.tokenizer",
    "LayerSpec": "samba_lm.config",
    "Mixer": "samba_lm.mixers.base",
    "ModelConfig": "samba_lm.config",
    "SambaLM": "samba_lm.model",
    "Span": "samba_lm.span",
    "UserError": "samba_lm.errors",
    "create": "samba_lm.checkpoint",
    "generate": "samba_lm.generation.api",
    "load": "samba_lm.checkpoint",
    "load_tokenizer": "samba_lm.tokenizer",
    "quantize": "samba_lm.quantization",
    "register_architecture": "samba_lm.zoo",
    "register_mixer": "samba_lm.mixers.registry",
    "save": "samba_lm.checkpoint",
    "stream": "samba_lm.generation.api",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value  # the next use is a plain look-up
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})

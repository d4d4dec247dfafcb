"""What a state belongs to: a model's shape, its weights, its tokenizer and the numbers it computes in."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    import torch

    from samba_lm.model import SambaLM
    from samba_lm.tokenizer import Tokenizer

T = TypeVar("T")

_BLOCK = 32 << 20
"""Bytes of weights that a thread hashes at once."""


@dataclass(frozen=True)
class Identity:
    """A state goes on only with what made it; fields are compared in the order of the cost of knowing them."""

    model: str
    """The name, for people only."""
    config: str
    """The config's fingerprint."""
    tokenizer: str
    """The tokenizer's fingerprint."""
    dtype: str
    """Of the parameters, and after a slash what is computed in, such as ``float32/bfloat16``."""
    weights: str
    """See :func:`weights_hash`."""


def identify(model: SambaLM, tokenizer: Tokenizer) -> Identity:
    """Who a model and its tokenizer are. The first time, all weights are read (about 2 GB/s a core)."""
    return Identity(
        model.config.name, model.config.fingerprint(), tokenizer_hash(tokenizer), dtypes(model), weights_hash(model)
    )


def mismatch(made_by: Identity, model: SambaLM, tokenizer: Tokenizer) -> str | None:
    """What of ``made_by`` these are not, and what to do, to stand after a file's name; None where all agrees."""
    config, own = model.config, made_by.config[:12]
    if made_by.config != config.fingerprint():
        return (
            f"was made by the model {made_by.model!r} (config {own}), and this is {config.name!r} "
            f"({config.fingerprint()[:12]}): give the checkpoint that made it, or read the text again."
        )
    if made_by.tokenizer != tokenizer_hash(tokenizer):
        return (
            f"was made with another tokenizer (fingerprint {made_by.tokenizer[:12]}, this is "
            f"{tokenizer_hash(tokenizer)[:12]}): give the checkpoint that made it, or read the text again."
        )
    if made_by.dtype != dtypes(model):
        return (
            f"was made in {made_by.dtype} (parameters/computation), and this model runs in {dtypes(model)}: load the "
            "model so (--dtype, --quantize), or read the text again."
        )
    if made_by.weights != weights_hash(model):
        return (
            f"was made by other weights of {made_by.model!r} (hash {made_by.weights[:12]}, these are "
            f"{weights_hash(model)[:12]}): give the checkpoint that made it, or read the text again."
        )
    return None


def dtypes(model: SambaLM) -> str:
    """What the parameters are in (the large ones, where they are quantised), and what is computed in."""
    return f"{model.quantized or _name(model.embedding.dtype)}/{_name(model.dtype)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_lock = threading.Lock()
_tokenizers: WeakKeyDictionary[Tokenizer, str] = WeakKeyDictionary()
_models: WeakKeyDictionary[SambaLM, tuple[object, str]] = WeakKeyDictionary()


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """The tokenizer's fingerprint, kept with the object: a large vocabulary takes a while."""
    with _lock:
        if tokenizer not in _tokenizers:
            _tokenizers[tokenizer] = tokenizer.fingerprint()
        return _tokenizers[tokenizer]


def weights_hash(model: SambaLM) -> str:
    """sha256 (hex) of all weights: names, dtypes, shapes, bytes. Made once a model, and again where they changed."""
    tensors = sorted(model.state_dict(keep_vars=True).items())
    # What PyTorch counts up when a tensor is written to; a new tensor has another address.
    now = [(name, t.data_ptr(), t.dtype, 0 if t.is_inference() else t._version) for name, t in tensors]
    with _lock:
        known = _models.get(model)
        if known is None or known[0] != now:
            _models[model] = known = (now, _hash(tensors))
        return known[1]


def _hash(tensors: list[tuple[str, torch.Tensor]]) -> str:
    import torch

    whole = hashlib.sha256()
    blocks = []
    for name, tensor in tensors:
        whole.update(f"{name} {_name(tensor.dtype)} {list(tensor.shape)}\n".encode())
        data = tensor.detach().reshape(-1).view(torch.uint8)
        blocks += [data[begin : begin + _BLOCK] for begin in range(0, data.numel(), _BLOCK)]
    for digest in in_threads(lambda block: hashlib.sha256(block.cpu().numpy()).digest(), blocks):
        whole.update(digest)
    return whole.hexdigest()


def in_threads(function: Callable[..., T], items: Iterable[object]) -> list[T]:
    """``function`` of each item, in order; hashing and reading files run beside each other in threads."""
    items = list(items)
    if len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(min(len(items), os.cpu_count() or 1, 16)) as pool:
        return list(pool.map(function, items))

"""The peak memory of a training step on a GPU, found without one: tensors have shapes and lifetimes but no contents.

Operators run on fake tensors, through the GPU kernels' own registrations (shapes, what backward keeps), at full size in
seconds. Of samba-421m and samba-1.3b it gives what `samba-lm bench train` measured on an H100 to 0.3%.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from samba_lm.config import ModelConfig
from samba_lm.model import SambaLM
from samba_lm.nn.cast import cast_once
from samba_lm.ops import backend
from samba_lm.ops.linear_cross_entropy import linear_cross_entropy
from samba_lm.span import Span
from samba_lm.train.recipe import TrainSection
from samba_lm.train.transforms import checkpoint_activations, remake_cheap_activations


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are there, and their most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.seen:
                    self.seen.add(key)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, key, size)
        return out

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


@contextmanager
def kernels_on_fakes() -> Iterator[Live]:
    """Fake tensors, whose operators take the GPU's kernels for granted."""
    before, live = backend.INTERPRETED, Live()
    backend.INTERPRETED = True  # what a tensor on no GPU may be given to kernels by
    try:
        with warnings.catch_warnings(), FakeTensorMode(), backend.preferring("triton"), live:
            warnings.simplefilter("ignore")  # that fake tensors have no address
            yield live
    finally:
        backend.INTERPRETED = before


def peak_of_a_step(config: ModelConfig, train: TrainSection, micro_batch: int) -> int:
    """Bytes at the peak of one GPU's step of two micro-batches, AdamW's state counted as there."""
    with kernels_on_fakes() as live:
        model = SambaLM(config)
        model.compute_dtype = getattr(torch, train.dtype)
        if train.activation_checkpointing == "selective":
            remake_cheap_activations(model.layers)
        elif train.activation_checkpointing == "full":
            checkpoint_activations(model.layers)
        ids = torch.zeros(micro_batch, train.length, dtype=torch.int64)
        with cast_once():
            for _ in range(2):
                span = Span.of(*ids.shape, ids.device, None, None, keep=False)
                hidden = model.run(ids, None, span)[0]
                loss = linear_cross_entropy(hidden, model.head_weight, ids)
                del hidden
                loss.backward()
    return live.peak + 8 * config.parameters()

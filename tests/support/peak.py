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
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from samba_lm.config import ModelConfig
from samba_lm.model import SambaLM
from samba_lm.nn.cast import cast_once
from samba_lm.ops import backend
from samba_lm.ops.linear_cross_entropy import linear_cross_entropy
from samba_lm.span import Span
from samba_lm.train.parallel.sharding import shard
from samba_lm.train.recipe import TrainSection
from samba_lm.train.transforms import checkpoint_activations, remake_cheap_activations, use_float8

RESIZE = torch.UntypedStorage.resize_


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are there, and their most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._set(storage, storage.nbytes())
        return out

    def _set(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key not in self.sizes:
            weakref.finalize(storage, self._gone, key)
        self.now += size - self.sizes.get(key, 0)
        self.sizes[key] = size
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def resized(self, storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        """What FSDP frees and takes again."""
        RESIZE(storage, size)
        self._set(storage, size)
        return storage


@contextmanager
def kernels_on_fakes() -> Iterator[Live]:
    """Fake tensors, whose operators take the GPU's kernels for granted."""
    before, live = backend.INTERPRETED, Live()
    backend.INTERPRETED = True  # what a tensor on no GPU may be given to kernels by
    torch.UntypedStorage.resize_ = lambda storage, size: live.resized(storage, size)  # type: ignore[method-assign]
    try:
        with warnings.catch_warnings(), FakeTensorMode(), backend.preferring("triton"), live:
            warnings.simplefilter("ignore")  # that fake tensors have no address
            yield live
    finally:
        backend.INTERPRETED = before
        torch.UntypedStorage.resize_ = RESIZE  # type: ignore[method-assign]


def peak_of_a_step(config: ModelConfig, train: TrainSection, micro_batch: int, gpus: int = 1) -> int:
    """Bytes at the peak of one GPU's step of two micro-batches, without the optimizer's state.

    With several ``gpus`` the model is shared out among them by FSDP2, whose communication does nothing here.
    """
    mesh = _pretended(gpus) if gpus > 1 else None
    try:
        with kernels_on_fakes() as live:
            model = _prepared(config, train)
            if mesh is not None:
                shard(model, mesh, torch.device("cpu"), model.compute_dtype)
                live.now -= 4 * config.parameters()  # fake tensors outlive their parameters' being shared out
                live.peak = live.now
            _step(model, train, micro_batch)
        return live.peak
    finally:
        if mesh is not None:
            dist.destroy_process_group()


def _pretended(gpus: int) -> DeviceMesh:
    dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    return init_device_mesh("cpu", (1, gpus), mesh_dim_names=("replicate", "fsdp"))


def _prepared(config: ModelConfig, train: TrainSection) -> SambaLM:
    model = SambaLM(config)
    model.compute_dtype = getattr(torch, train.dtype)
    if train.float8:
        use_float8(model.layers)
    if train.activation_checkpointing == "selective":
        remake_cheap_activations(model.layers)
    elif train.activation_checkpointing == "full":
        checkpoint_activations(model.layers)
    return model


def _step(model: SambaLM, train: TrainSection, micro_batch: int) -> None:
    ids = torch.zeros(micro_batch, train.length, dtype=torch.int64)
    with cast_once():
        for last in (False, True):
            span = Span.of(*ids.shape, ids.device, None, None, keep=False)
            hidden = model.run(ids, None, span)[0]
            loss = linear_cross_entropy(hidden, model.head_weight, ids)
            del hidden
            if isinstance(model, FSDPModule):
                model.set_is_last_backward(last)
            loss.backward()

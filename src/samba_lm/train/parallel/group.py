"""One of several processes: what it reads, what it holds of the model, and how it and the others add up."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from samba_lm.errors import UserError
from samba_lm.neighbours import Neighbours
from samba_lm.train.parallel.parallel import M, Parallel
from samba_lm.train.parallel.sharding import shard

T = TypeVar("T")

LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|timed out|broken pipe|socket", re.IGNORECASE)
"""What errors say that come of another process's end, or of its silence."""


class LostProcessError(UserError):
    """Another process of the run ended, or does not answer."""

    topic = "a lost process"

    def __init__(self, parallel: Parallel, error: RuntimeError) -> None:
        # The first sentence, without where in its source the library was and whom it spoke with.
        words = re.sub(r"\[[^\]]*\](:\d+)?", "", str(error).strip() or type(error).__name__)
        reason = " ".join(re.split(r"\. |\n", words, maxsplit=1)[0].replace(" :", ":").split())
        super().__init__(
            f"Process {parallel.rank} of {parallel.world} lost another one, which ended or did not answer within "
            f"parallel.timeout ({reason[:120]}). The same command goes on from the last checkpoint."
        )


@dataclass(frozen=True)
class Group(Parallel):
    """A process among others. ``holders``: all of them, as ("replicate", "fsdp"): a model is shared out among the
    second, which are those of "shard" and "context" together."""

    holders: DeviceMesh | None = None

    def wrap(self, model: M, dtype: torch.dtype | None = None) -> M:
        assert self.holders is not None
        return shard(model, self.holders, self.device, dtype)

    def begin_backward(self, model: nn.Module, last: bool) -> None:
        assert isinstance(model, FSDPModule)
        # Gradients are shared out after each micro-batch, or each process would hold the whole model's; but between
        # replicas they are summed once.
        model.set_requires_all_reduce(last)
        model.set_is_last_backward(last)

    def finish_gradients(self, model: nn.Module) -> None:
        whole = [p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)]
        if not whole:
            return
        for parameter in whole:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in whole if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        sums = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [s.view_as(g) for s, g in zip(sums, gradients, strict=True)])

    def norm(self, tensors: Iterable[Tensor]) -> Tensor:
        assert self.holders is not None
        tensors = list(tensors)
        wide = torch.zeros((), dtype=torch.float64, device=self.device)
        parts = [t.to_local() for t in tensors if isinstance(t, DTensor)]
        whole = [t for t in tensors if not isinstance(t, DTensor)]
        squares = wide + torch.nn.utils.get_total_norm(parts).double() ** 2 if parts else wide
        # Over the replicas too, which have the same: sums of theirs made in another order would part them for good.
        dist.all_reduce(squares)
        squares = squares / self.holders.size(0)
        if whole:
            squares = squares + torch.nn.utils.get_total_norm(whole).double() ** 2
        return squares.sqrt().to(tensors[0].dtype if tensors else torch.float32)

    def local(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def settle(self, model: nn.Module) -> None:
        assert isinstance(model, FSDPModule)
        model.reshard()

    def sum(self, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def largest(self, number: int) -> int:
        numbers = torch.tensor(number)  # on the host, which need not wait for what its GPU still has to do
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        return int(numbers)

    def broadcast(self, value: T) -> T:
        text = json.dumps(value).encode() if self.is_main else b""
        length = torch.tensor(len(text))
        dist.broadcast(length, 0)
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(int(length)).byte()
        dist.broadcast(data, 0)
        received: T = json.loads(bytes(data.tolist()))
        return received

    @contextmanager
    def joined(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, dist.DistError) or LOST.search(str(error)):
                raise LostProcessError(self, error) from error
            raise
        self.close()

    def close(self) -> None:
        dist.destroy_process_group()


def group(device: torch.device, sizes: tuple[int, int, int]) -> Group:
    """The processes of the default process group, arranged by ``sizes`` (replicate, shard, context)."""
    replicate, shards, context = sizes
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("replicate", "shard", "context"))
    holders = init_device_mesh(device.type, (replicate, shards * context), mesh_dim_names=("replicate", "fsdp"))
    rank = dist.get_rank()
    us = Group(
        device=device,
        rank=rank,
        world=dist.get_world_size(),
        data_rank=rank // context,
        data_world=replicate * shards,
        context=Neighbours(mesh["context"].get_group()) if context > 1 else None,
        mesh=mesh,
        holders=holders,
    )
    us.barrier()  # none leaves before all are connected
    return us

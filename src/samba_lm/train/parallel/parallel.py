"""What the loop, checkpoints and data know of a run's other processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from samba_lm.neighbours import Neighbours

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


@dataclass(frozen=True)
class Parallel:
    """The processes of a run, as one of them sees them. The loop calls these and stays single-device code.

    This one is alone: it computes everything, and there is nobody to wait for. Where there are others, all of them make
    the same calls in the same order.
    """

    device: torch.device
    rank: int = 0
    """Of all processes."""
    world: int = 1
    """How many processes there are."""
    data_rank: int = 0
    """Which part of a batch's rows this process reads. Those that share rows out among them read the same ones."""
    data_world: int = 1
    """How many parts there are."""
    context: Neighbours | None = None
    """The processes that hold the consecutive parts of the same rows; None: one holds all."""
    mesh: DeviceMesh | None = None
    """All processes, with dimensions "replicate", "shard" and "context" (innermost); None: nothing is sharded."""

    @property
    def is_main(self) -> bool:
        """Whether this process speaks for all: prints, writes metrics."""
        return self.rank == 0

    def wrap(self, model: M, dtype: torch.dtype | None = None) -> M:
        """Place the model, whose layers are already checkpointed and compiled, on this run's device(s), in place.

        ``dtype``: what its layers compute in (None: the parameters' own).
        """
        return model.to(self.device)

    def begin_backward(self, model: nn.Module, last: bool) -> None:
        """A micro-batch's backward comes next, the step's ``last`` or not."""

    def finish_gradients(self, model: nn.Module) -> None:
        """After a step's backwards: every gradient is the sum over all processes."""

    def norm(self, tensors: Iterable[Tensor]) -> Tensor:
        """The Euclidean norm of parameters' gradients taken as one vector; the same on all processes."""
        return torch.nn.utils.get_total_norm(tensors)

    def local(self, tensor: Tensor) -> Tensor:
        """What this process holds of a parameter, its gradient or its optimizer state."""
        return tensor

    def settle(self, model: nn.Module) -> None:
        """After forwards without backward: ``model.parameters()`` are again what the optimizer knows."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all processes; the same on all."""
        return tensor

    def agree(self, flag: bool) -> bool:
        """True on all processes as soon as it is true on one of them."""
        return bool(self.largest(int(flag)))

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers, on all."""
        return number

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.agree(False)

    def broadcast(self, value: T) -> T:
        """The main process's ``value``, small plain data (what JSON holds), on all."""
        return value

    @contextmanager
    def joined(self) -> Iterator[None]:
        """While this lasts, another process's end is told as a UserError. Then the others are left; not after an
        error, for leaving may wait for a process that is gone."""
        yield

    def close(self) -> None:
        """Leave the other processes; nothing here may be called afterwards."""

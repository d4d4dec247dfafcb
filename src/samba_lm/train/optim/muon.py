"""Muon: momentum made orthogonal, for matrices (https://kellerjordan.github.io/posts/muon/; arXiv:2502.16982).

The update is torch.optim.Muon's with ``adjust_lr_fn="match_rms_adamw"``, whose learning rates are AdamW's. Two things
are ours. A map that is several maps on top of each other ([Q; K; V]) is taken apart: each is orthogonal by itself. And
matrices that are sharded by rows among processes are put together, each at one process, made orthogonal there and
given back, so that no process does the work of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic that is applied to the singular values: it takes (0, 1] to about 0.7 to 1.2."""
ITERATIONS = 5
RMS = 0.2
"""Root mean square of an update at learning rate 1, about that of AdamW's (arXiv:2502.16982, section 2.2)."""


class Muon(torch.optim.Optimizer):
    """Muon over 2-D parameters, plain tensors or DTensors sharded by rows.

    Args:
        params: parameters or groups of them. A group's ``parts`` are, for each of its parameters, the rows of the maps
            that stand in it on top of each other.
        lr: the learning rate that AdamW would be given.
        momentum: decay rate of the gradient's running mean (Nesterov's form).
        weight_decay: decoupled, as AdamW's.
    """

    # What torch.amp.GradScaler asks, and the training loop: `found_inf` and `grad_scale` are looked at on the device.
    _step_supports_amp_scaling = True

    def __init__(self, params: Any, lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            group.setdefault("parts", [(p.shape[0],) for p in group["params"]])
            for p, parts in zip(group["params"], group["parts"], strict=True):
                assert p.ndim == 2, "Muon is for matrices"
                assert sum(parts) == p.shape[0]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient. All processes must call it together.

        With ``found_inf`` (0 or 1, a scalar on the device) 1, nothing changes; by ``grad_scale`` gradients are divided
        in place, both as in fused AdamW.
        """
        assert closure is None
        refused, scale = vars(self).get("found_inf"), vars(self).get("grad_scale")
        for group in self.param_groups:
            found = [(p, parts) for p, parts in zip(group["params"], group["parts"], strict=True) if p.grad is not None]
            for some in _rounds(found):
                updates = [self._momentum(p, group["momentum"], refused, scale) for p, _ in some]
                for (p, _), update in zip(some, _orthogonal(updates, [parts for _, parts in some]), strict=True):
                    weight = _local(p)
                    share = 1.0 if refused is None else (1 - refused).to(weight.dtype)
                    weight.mul_(1 - group["lr"] * group["weight_decay"] * share)
                    weight.add_(update.to(weight.dtype).mul_(-group["lr"] * share))

    def _momentum(self, parameter: Tensor, rate: float, refused: Tensor | None, scale: Tensor | None) -> Tensor:
        """The running mean with this step's gradient in it, looked ahead; same shape and placement."""
        state = self.state[parameter]
        if not state:
            state |= first_state(parameter)
        grad, mean = _local(parameter.grad), _local(state["momentum_buffer"])
        if scale is not None:
            grad.div_(scale)
        if refused is not None:
            grad = torch.where(refused != 0, mean, grad)  # not a factor 0: what is refused may be NaN
        mean.lerp_(grad, 1 - rate)
        update = grad.lerp(mean, rate)
        if isinstance(parameter, DTensor):
            return DTensor.from_local(
                update,
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
        return update


def first_state(parameter: Tensor) -> dict[str, Tensor]:
    """What Muon keeps of a parameter, before its first step."""
    return {"momentum_buffer": torch.zeros_like(parameter, requires_grad=False)}


def orthogonal(matrix: Tensor, parts: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Each part of ``matrix`` [sum(parts), n] with its singular values brought near 1, scaled to an RMS of about 0.2.

    Newton-Schulz iterations in ``dtype``, which the result is in: bfloat16 is enough of it on a GPU.
    """
    found = []
    for part in matrix.split(list(parts)):
        x = part.to(dtype)
        tall = x.shape[0] > x.shape[1]
        x = x.T if tall else x
        x = x / x.norm().clamp(min=1e-7)
        a, b, c = COEFFICIENTS
        for _ in range(ITERATIONS):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        found.append((x.T if tall else x) * (RMS * math.sqrt(max(part.shape))))
    return torch.cat(found) if len(found) > 1 else found[0]


def _orthogonal(updates: Sequence[Tensor], parts: Sequence[Sequence[int]]) -> list[Tensor]:
    """The updates made orthogonal; of a sharded one this process's rows."""
    dtype = torch.bfloat16 if updates[0].is_cuda and updates[0].dtype == torch.float32 else updates[0].dtype
    if isinstance(updates[0], DTensor):
        sharded = [update for update in updates if isinstance(update, DTensor)]
        return _shared_out(sharded, parts, dtype)
    return [orthogonal(update, rows, dtype) for update, rows in zip(updates, parts, strict=True)]


def _rounds(found: list[tuple[Tensor, Sequence[int]]]) -> Iterator[list[tuple[Tensor, Sequence[int]]]]:
    """As many matrices at a time as processes share them, those of like size together; one at a time where none do."""
    yield from ([entry] for entry in found if not isinstance(entry[0], DTensor))
    sharded = sorted((e for e in found if isinstance(e[0], DTensor)), key=lambda entry: -entry[0].numel())
    size = _sharded_over(sharded[0][0])[0] if sharded else 1
    for i in range(0, len(sharded), size):
        yield sharded[i : i + size]


def _local(tensor: Tensor | None) -> Tensor:
    """What this process holds of a tensor."""
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _sharded_over(tensor: Tensor) -> tuple[int, int, dist.ProcessGroup]:
    """How many processes hold the rows of ``tensor``, which of them this one is, and their group."""
    assert isinstance(tensor, DTensor)
    mesh = tensor.device_mesh
    dims = [i for i, placement in enumerate(tensor.placements) if placement == Shard(0)]
    assert len(dims) == 1, f"Muon knows matrices that are sharded by rows once, not {tensor.placements}"
    return mesh.size(dims[0]), mesh.get_local_rank(dims[0]), mesh.get_group(dims[0])


def _shared_out(updates: Sequence[DTensor], parts: Sequence[Sequence[int]], dtype: torch.dtype) -> list[Tensor]:
    """This process's rows of each update made orthogonal; the i-th process puts the i-th together and does the work."""
    size, me, group = _sharded_over(updates[0])
    mine = [update.to_local().to(dtype) for update in updates]
    sends = [rows.numel() for rows in mine] + [0] * (size - len(mine))
    receives = [0] * size
    if me < len(updates):
        rows, columns = updates[me].shape
        receives = [count * columns for count in _chunks(rows, size)]
    whole = mine[0].new_empty(sum(receives))
    dist.all_to_all_single(whole, torch.cat([rows.flatten() for rows in mine]), receives, sends, group=group)
    if me < len(updates):
        whole = orthogonal(whole.view(updates[me].shape), parts[me], dtype).flatten()
    back = mine[0].new_empty(sum(sends))
    dist.all_to_all_single(back, whole, sends, receives, group=group)
    return [flat.view(rows.shape) for flat, rows in zip(back.split(sends[: len(mine)]), mine, strict=True)]


def _chunks(rows: int, size: int) -> list[int]:
    """How many of ``rows`` each of ``size`` processes holds: as torch.chunk cuts."""
    most = -(-rows // size)
    return [max(0, min(most, rows - i * most)) for i in range(size)]

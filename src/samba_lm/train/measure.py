"""What is measured of each step: speed, model FLOPs utilisation, waiting, memory, gradient norms of groups."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from samba_lm.memory import peak_memory
from samba_lm.model import SambaLM
from samba_lm.nn.norm import RMSNorm
from samba_lm.train.metrics import device_peak, mfu
from samba_lm.train.parallel import Parallel

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Measure:
    """Measures the steps of one training.

    Args:
        length: tokens of a row, which the FLOPs of attention depend on.
        every: steps between those that are logged, which more is measured of; so are the first and the ``last``.
    """

    def __init__(self, model: SambaLM, parallel: Parallel, *, length: int, every: int, last: int) -> None:
        self.parallel, self.every, self.last = parallel, every, last
        self.groups = gradient_groups(model)
        self.flops = model.config.flops_per_token(length)
        self.peak = device_peak(parallel.device)
        self._taken: tuple[int, int | None] = (0, None)

    def mfu(self, tokens_per_s_per_gpu: float) -> float | None:
        """Model FLOPs utilisation of each GPU, 0 to 1; None where its peak is not known."""
        return mfu(tokens_per_s_per_gpu, self.flops, self.peak)

    def memory(self, step: int) -> tuple[int, int | None]:
        """Bytes of this process at most up to the last logged step: taken, and held by its GPU's allocator (None on a
        CPU)."""
        if self._taken[0] == 0 or self._logged(step):
            device = self.parallel.device
            if device.type == "cuda":
                self._taken = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
            else:
                self._taken = peak_memory(), None
        return self._taken

    def grad_norms(self, step: int, total: float) -> dict[str, float]:
        """The norm of each group's gradients as ``step`` left them, scaled to what they were before clipping, when
        all of them had the norm ``total``; empty where that is not finite or the step not logged.

        All processes call it.
        """
        if not (math.isfinite(total) and self._logged(step)):
            return {}
        some = {
            name: [p.grad for p in group if p.grad is not None]
            for name, group in self.groups.items()
            if any(p.grad is not None for p in group)
        }
        norms = torch.stack([self.parallel.norm(gradients).double() for gradients in some.values()]).tolist()
        now = math.hypot(*norms)
        return {name: norm * total / now if now else norm for name, norm in zip(some, norms, strict=True)}

    def _logged(self, step: int) -> bool:
        return step % self.every == 0 or step in (1, self.last)


def sizes(mesh: DeviceMesh | None) -> dict[str, int]:
    """A mesh's dimensions by their names."""
    return {} if mesh is None else dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True))


def gradient_groups(model: SambaLM) -> Mapping[str, list[Tensor]]:
    """The model's trainable parameters by where they stand: embedding, norms, head, layers by their kind."""
    norms = {p for module in model.modules() if isinstance(module, RMSNorm) for p in module.parameters()}
    groups: dict[str, list[Tensor]] = {}

    def add(name: str, parameter: Tensor | None) -> None:
        if parameter is not None and parameter.requires_grad:
            groups.setdefault(name, []).append(parameter)

    add("embedding", model.embedding)
    for spec, layer in zip(model.config.layers, model.layers, strict=True):
        for parameter in layer.parameters():
            add("norms" if parameter in norms else spec.kind if spec.is_mixer else "mlp", parameter)
    for parameter in model.norm.parameters():
        add("norms", parameter)
    add("head", model.unembedding)
    return groups

"""A model shared out among processes: FSDP2, or HSDP where several groups each hold all of it.

Each layer is a unit: its large matrices (the weights of :class:`Linear`) are sharded, and are gathered, in what the
layers compute in, when it is their layer's turn. Embedding and head are another unit, gathered as they are.

Everything else (norms, convolutions, A_log, D, biases; under one hundredth of a model) is not sharded: each process
holds it, and gradients are summed (``Group.finish_gradients``). FSDP casts a unit as a whole, and these must not be
cast; so every number is rounded exactly where one process rounds it.

Not so with float8 (``train.float8``): weights are gathered in bf16 and rounded to float8 from there, their gradients
leave a process in bf16, and a gradient's scale is that of a process's own rows, as it is of a micro-batch's. That is
within what float8 products are off anyway. What a process makes of the gathered weights, 2 bytes a number, it keeps for
all layers until the step ends.
"""

from __future__ import annotations

import warnings

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from samba_lm.model import SambaLM
from samba_lm.nn.linear import Linear
from samba_lm.train.parallel.parallel import M


def shard(model: M, mesh: DeviceMesh, device: torch.device, dtype: torch.dtype | None) -> M:
    """Share ``model`` out over the second dimension of ``mesh``, once for each of its first. In place.

    ``mesh``: of dimensions "replicate" and "fsdp". ``dtype``: what the layers compute in (None: the
    parameters' own). All processes hold the same model, on any device.
    """
    assert isinstance(model, SambaLM)
    if mesh.size(0) == 1:
        mesh = mesh["fsdp"]
    matrices = {m.weight for m in model.layers.modules() if isinstance(m, Linear)}
    kept = {p for p in [*model.layers.parameters(), *model.norm.parameters()] if p not in matrices}
    own = dtype is None or dtype == model.embedding.dtype
    as_it_is = MixedPrecisionPolicy(cast_forward_inputs=False)
    narrow = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=model.embedding.dtype, cast_forward_inputs=False)
    for layer in model.layers:
        if any(parameter in matrices for parameter in layer.parameters()):
            fully_shard(layer, mesh=mesh, mp_policy=as_it_is if own else narrow, ignored_params=kept)
    fully_shard(model, mesh=mesh, mp_policy=as_it_is, ignored_params=kept)
    register_fsdp_forward_method(model, "run")
    # Branches may be views; nothing is added to them in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    for parameter in kept:
        parameter.data = parameter.data.to(device)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # a plain sum: not every backend has others
    return model

"""Several processes train as one does."""

from __future__ import annotations

from typing import Any

import torch
from ranks import on_ranks

from samba_lm import checkpoint
from samba_lm.config import Attention, Mamba, ModelConfig, SwiGLU
from samba_lm.data.loader import Batch
from samba_lm.train.loop import make_optimizer, train_step
from samba_lm.train.parallel import Parallel, connect
from samba_lm.train.recipe import ParallelSection, TrainSection

CONFIG = ModelConfig(
    name="parallel-test",
    vocab_size=50,
    d_model=16,
    layers=(Mamba(state=4), SwiGLU(width=24), Attention(heads=2, window=8), SwiGLU(width=24)),
)
STEPS = 3


def batch(step: int, rank: int, world: int, rows: int = 8, length: int = 16) -> Batch:
    """Rows of documents with very different numbers of valid tokens; their parts depend on nothing but the step."""
    draw = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 50, (rows, length), generator=draw)
    targets = torch.randint(0, 50, (rows, length), generator=draw)
    targets[0, 3:] = -100
    targets[5] = -100
    segments = torch.randint(0, 2, (rows, length), generator=draw).cumsum(1) // 5
    mine = slice(rank * rows // world, (rank + 1) * rows // world)
    return Batch(ids[mine], targets[mine], segments[mine], stretch=1.0 + step)


def trained(parallel: Parallel, **fields: Any) -> dict[str, Any]:
    """Losses, gradient norms, last gradients and weights of some fp64 steps, whole, as plain lists."""
    settings = TrainSection(steps=STEPS, batch_size=8, length=16, lr=0.01, clip=0.5, **fields)
    model = checkpoint.create(CONFIG, seed=1).double()
    model = parallel.wrap(model)
    optimizer = make_optimizer(model, settings)
    steps = []
    for step in range(STEPS):
        rows = batch(step, parallel.data_rank, parallel.data_world)
        steps.append(train_step(model, optimizer, rows, settings, parallel, step=step))
    named = dict(model.named_parameters())
    return {
        "steps": steps,
        "gradients": {name: whole(p.grad) for name, p in named.items() if p.grad is not None},
        "weights": {name: whole(p) for name, p in named.items()},
    }


def whole(tensor: torch.Tensor) -> Any:
    from torch.distributed.tensor import DTensor

    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).tolist()


def layouts(cases: list[dict[str, Any]]) -> list[Any]:
    """Each case's layout and settings on the ranks there are."""
    return [trained(connect("cpu", ParallelSection(**case.pop("parallel"))), **case) for case in cases]


def check(got: dict[str, Any], want: dict[str, Any]) -> None:
    steps = (torch.tensor(each["steps"], dtype=torch.float64) for each in (got, want))
    torch.testing.assert_close(*steps, rtol=1e-10, atol=0)
    for kind in ("gradients", "weights"):
        assert got[kind].keys() == want[kind].keys()
        for name, value in want[kind].items():
            a, b = (torch.tensor(v, dtype=torch.float64) for v in (got[kind][name], value))
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13, msg=f"{kind} of {name}")


def test_every_layout_trains_as_one_process() -> None:
    want = trained(connect("cpu"))
    cases: list[dict[str, Any]] = [
        {"parallel": {}},
        {"parallel": {}, "micro_batch": 1},
        {"parallel": {"replicate": 2}},
        {"parallel": {"replicate": 2}, "micro_batch": 2},
    ]
    for world in (2, 4):
        for results in on_ranks(world, layouts, cases):
            for result in results:
                check(result, want)

"""``samba-lm bench scale``: what is measured by the processes of one run, and what runs of several sizes give together.

Each number of GPUs is a torchrun of its own, whose processes call :func:`measure`; the one that started them puts the
parts together with :func:`figures`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from samba_lm import zoo
from samba_lm.bench.figure import Figure
from samba_lm.bench.gpu import Laps, Memory, NotMeasured, attempt, release
from samba_lm.bench.training import new_model
from samba_lm.data.loader import Batch
from samba_lm.train.parallel import Parallel, connect
from samba_lm.train.prepare import make_optimizer, prepare_model
from samba_lm.train.recipe import ParallelSection, TrainSection
from samba_lm.train.step import train_step

BUSY = 2.0
"""GiB of a GPU that other programs hold: with so much they work there too, and speeds tell little."""
UNSTEADY = 1.25
"""A median step of so many times the shortest one: something else was at work."""
EFFICIENCY = 0.92
"""What a GPU among others should keep of its speed alone."""
BOUNDS: dict[Literal["float32", "bfloat16"], float] = {"float32": 1e-4, "bfloat16": 3e-3}
"""How far losses of several GPUs may be from those of one, relative: sums are made in another order, and the updates
carry that on. In fp64, on CPUs, tests hold them to 1e-10."""
Mode = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Work:
    """What is measured. Rows are of random tokens, those of a step always the same whatever reads them."""

    model: str = "samba-1.3b"
    """Whose speed."""
    rows: int = 8
    """Of each GPU and step; ``length`` tokens each."""
    micro_batch: int = 4
    length: int = 4096
    activation_checkpointing: Mode = "selective"
    warm_up: int = 3
    steps: int = 8
    long_model: str = "samba-421m"
    """Whose rows are shared out among all GPUs (context), with full activation checkpointing."""
    long_length: int = 1 << 20
    """Tokens of such a row among the most GPUs; fewer GPUs share a row as much shorter."""
    long_steps: int = 3
    loss_model: str = "samba-421m"
    """Whose losses are compared."""
    loss_rows: int = 8
    loss_length: int = 2048
    loss_steps: int = 5


def layouts(gpus: int) -> dict[str, ParallelSection]:
    """The layouts of so many GPUs whose losses are compared, by name."""
    if gpus == 1:
        return {"one GPU": ParallelSection()}
    found = {f"shard {gpus}": ParallelSection(), f"context {gpus}": ParallelSection(context=gpus)}
    if gpus % 2 == 0 and gpus > 2:
        half = gpus // 2
        found |= {
            f"replicate 2 x shard {half}": ParallelSection(replicate=2),
            f"shard 2 x context {half}": ParallelSection(context=half),
        }
    return found


def measure(work: Work, most: int, device: str) -> tuple[dict[str, Any], bool]:
    """One process's part of a measurement: plain data, the same on all of them, and whether this one writes it.

    ``most``: GPUs of the largest run, among which the longest rows are shared out.
    """
    parallel = connect(device, ParallelSection())
    gpus = parallel.world
    found: dict[str, Any] = {"gpus": gpus, "device": str(parallel.device), "others_GiB": _others(parallel)}
    found["speed"] = _told(lambda: _speed(work, parallel))
    found["losses"] = {
        dtype: {
            name: _told(lambda: _losses(work, connect(device, section), dtype))  # noqa: B023
            for name, section in layouts(gpus).items()
        }
        for dtype in BOUNDS
    }
    section = ParallelSection(context=gpus)
    length = work.long_length * gpus // most
    found["context"] = {"length": length, **_told(lambda: _context(work, connect(device, section), length))}
    main = parallel.is_main
    if gpus > 1:
        parallel.barrier()
        parallel.close()
    return found, main


def _others(parallel: Parallel) -> list[float] | None:
    """GiB of each process's GPU that other programs hold; None on CPUs."""
    if parallel.device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(parallel.device)
    held = torch.zeros(parallel.world, dtype=torch.float64, device=parallel.device)
    held[parallel.rank] = (total - free - torch.cuda.memory_reserved(parallel.device)) / 2**30
    return [float(each) for each in parallel.sum(held)]


def _told(run: Any) -> Any:
    """What ``run`` gives, or why it gives nothing. (Memory ends on all processes alike: their work is the same.)"""
    try:
        return attempt(run)
    except NotMeasured as failure:
        return {"failed": str(failure)}


def _speed(work: Work, parallel: Parallel) -> dict[str, Any]:
    settings = TrainSection(
        batch_size=work.rows * parallel.data_world,
        micro_batch=work.micro_batch,
        length=work.length,
        steps=work.warm_up + work.steps,
        dtype="bfloat16",
        activation_checkpointing=work.activation_checkpointing,
    )
    return _steps(work.model, settings, parallel, work.warm_up)


def _context(work: Work, parallel: Parallel, length: int) -> dict[str, Any]:
    settings = TrainSection(
        batch_size=1,
        length=length,
        steps=1 + work.long_steps,
        dtype="bfloat16",
        activation_checkpointing="full",
    )
    return _steps(work.long_model, settings, parallel, 1)


def _losses(work: Work, parallel: Parallel, dtype: Literal["float32", "bfloat16"]) -> dict[str, Any]:
    settings = TrainSection(
        batch_size=work.loss_rows, length=work.loss_length, steps=work.loss_steps, dtype=dtype, lr=3e-4
    )
    found = _steps(work.loss_model, settings, parallel, 0)
    return {"losses": found["losses"], "grad_norms": found["grad_norms"]}


def _steps(name: str, settings: TrainSection, parallel: Parallel, warm_up: int) -> dict[str, Any]:
    """Steps of a new model: tokens a second, each GPU's peak memory, losses and gradients' norms."""
    config = zoo.get(name)
    memory, laps = Memory(parallel.device), Laps(parallel.device)
    model = new_model(config, parallel.device)
    prepare_model(model, settings, parallel)
    optimizer = make_optimizer(model, settings)
    model.train()
    told = []
    for step in range(settings.total_steps):
        if step == warm_up:
            parallel.barrier()
        if step >= warm_up:
            laps.mark()
        batch = batch_of(step, settings, config.vocab_size, parallel)
        told.append(train_step(model, optimizer, batch, settings, parallel, step=step + 1))
    laps.mark()
    timing, peak = laps.timing(), memory.peak()
    del model, optimizer
    release(parallel.device)
    peaks = torch.zeros(parallel.world, dtype=torch.float64, device=parallel.device)
    peaks[parallel.rank] = 0.0 if peak is None else peak[0]
    rate = settings.tokens_per_step / (timing.median / 1e3)
    return {
        "tokens_per_s": rate,
        "tokens_per_s_per_gpu": rate / parallel.world,
        "step_ms": timing.median,
        **timing.facts(),
        "peak_GiB": None if peak is None else parallel.sum(peaks).tolist(),
        "losses": [loss for loss, _ in told],
        "grad_norms": [norm for _, norm in told],
    }


def batch_of(step: int, settings: TrainSection, vocab_size: int, parallel: Parallel) -> Batch:
    """This process's rows of a step's batch of random tokens."""
    size = (settings.batch_size, settings.length + 1)
    ids = torch.randint(0, vocab_size, size, generator=torch.Generator().manual_seed(step))
    own = ids.chunk(parallel.data_world)[parallel.data_rank]
    return Batch(own[:, :-1].contiguous(), own[:, 1:].contiguous(), None)


def figures(work: Work, parts: Mapping[int, Mapping[str, Any]]) -> list[Figure]:
    """What the runs, by their numbers of GPUs, say together; one that failed is a figure without a value."""
    found = []
    alone = parts.get(1, {})
    for gpus, part in parts.items():
        where = f"{gpus} GPU{'s' if gpus > 1 else ''}"
        found += _speeds(f"{work.model}, {where}", part.get("speed", part), alone.get("speed", alone), _busy(part))
    for gpus, part in parts.items():
        where = f"{gpus} GPU{'s' if gpus > 1 else ''}"
        rows = part.get("context", part)
        length = rows.get("length", work.long_length * gpus // max(parts))
        title = f"{work.long_model}, a row of {length:,} tokens among {where}"
        found += _speeds(title, rows, alone.get("context", alone), _busy(part), context=True)
    for dtype, bound in BOUNDS.items():
        one = alone.get("losses", {}).get(dtype, {}).get("one GPU", {})
        for gpus, part in parts.items():
            for name, told in part.get("losses", {}).get(dtype, {}).items():
                if gpus > 1:
                    found.append(_difference(f"{work.loss_model}, {dtype}, {name}", told, one, bound))
    return found


def _busy(part: Mapping[str, Any]) -> str:
    """Who else was at work on the GPUs, as far as it shows."""
    most = max(part.get("others_GiB") or [0.0])
    return f"other programs hold {most:.0f} GiB of a GPU" if most > BUSY else ""


def _speeds(
    title: str, told: Mapping[str, Any], alone: Mapping[str, Any], busy: str, context: bool = False
) -> list[Figure]:
    """A GPU's speed, its share of what it is alone, and its memory. ``busy``: why the speed may tell little."""
    unit = "thousand tokens/s a GPU"
    if "failed" in told:
        return [Figure(title, None, unit, low_is_good=False, note=str(told["failed"]))]
    each = told["tokens_per_s_per_gpu"]
    facts = {key: value for key, value in told.items() if key not in ("losses", "grad_norms")}
    if told["step_ms"] > UNSTEADY * told["min"]:
        busy = f"{busy}{', ' if busy else ''}steps of {told['min']:,.0f} to {told['max']:,.0f} ms"
    found = [Figure(title, each / 1e3, unit, low_is_good=False, note=busy, facts=facts)]
    if told is not alone and "failed" not in alone and alone:
        share = each / alone["tokens_per_s_per_gpu"]
        of = "a GPU with a row of its own, as long as its part" if context else "a GPU alone with as many rows"
        bar = None if context else EFFICIENCY
        found.append(Figure(f"{title}: share of the speed of {of}", share, "", bar, low_is_good=False))
    if told["peak_GiB"] is not None:
        found.append(Figure(f"{title}: peak memory, the fullest GPU", max(told["peak_GiB"]), "GiB"))
    return found


def _difference(title: str, told: Mapping[str, Any], one: Mapping[str, Any], bound: float) -> Figure:
    """The largest relative difference of losses and gradients' norms from those of one GPU."""
    name = f"{title}: losses against one GPU's, largest relative difference"
    for run in (told, one):
        if "losses" not in run:
            return Figure(name, None, "", bound, check=True, note=str(run.get("failed", "one GPU was not measured")))
    losses = max(abs(a / b - 1) for a, b in zip(told["losses"], one["losses"], strict=True))
    norms = max(abs(a / b - 1) for a, b in zip(told["grad_norms"], one["grad_norms"], strict=True))
    return Figure(name, losses, "", bound, check=True, facts={"grad_norms": norms, "steps": len(told["losses"])})

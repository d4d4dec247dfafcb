"""``samba-lm bench train``: one optimizer step as the trainer does it, in tokens a second, GiB and MFU."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from samba_lm import zoo
from samba_lm.bench.bars import NONE, TRAIN, default_batch
from samba_lm.bench.ceilings import Ceilings
from samba_lm.bench.figure import Figure
from samba_lm.bench.gpu import WARM_UP, Laps, Memory, NotMeasured, attempt, release, synchronize
from samba_lm.bench.parity import largest_difference, require_noise
from samba_lm.checkpoint import create
from samba_lm.config import Attention, LayerSpec, ModelConfig, SelfExtend, SwiGLU
from samba_lm.data.loader import Batch
from samba_lm.model import SambaLM
from samba_lm.ops.linear.float8 import require_float8
from samba_lm.train.parallel import Parallel
from samba_lm.train.prepare import make_optimizer, prepare_model
from samba_lm.train.recipe import TrainSection
from samba_lm.train.step import train_step
from samba_lm.train.transforms import use_float8

PARITY_BATCH, PARITY_LENGTH = 3, 200
PARITY_LEAST = 100.0
"""Which of the narrow twin's maps are float8 ones: those that are so in the model."""
TOP_KERNELS = 30


def narrow(config: ModelConfig) -> ModelConfig:
    """A small model with the first layers of ``config`` (of Samba: one block of each kind) and its head sizes."""
    heads = [part for spec in config.layers for part in spec.parts() if isinstance(part, Attention)]
    width = 256
    if heads:
        share = heads[0].heads // heads[0].groups
        width = max(2, share) * heads[0].head_dim(config.d_model)

    def smaller(spec: LayerSpec) -> LayerSpec:
        if isinstance(spec, Attention):
            share = spec.heads // spec.groups
            few: dict[str, Any] = {"heads": max(2, share), "kv_heads": max(2, share) // share}
            if isinstance(spec, SelfExtend):  # so that short texts have far keys too
                few["neighbor_window"] = 40
            return spec.model_copy(update={**few, "window": None if spec.window is None else 70})
        return spec.model_copy(update={"width": width}) if isinstance(spec, SwiGLU) else spec

    layers = tuple(spec.changed(smaller).model_dump() for spec in config.layers[:4])
    return config.with_overrides(name=f"narrow {config.name}", d_model=width, vocab_size=512, layers=layers)


def random_batch(rows: int, length: int, vocab_size: int) -> Batch:
    """Rows of random tokens, on the CPU as the loader gives them; always the same."""
    ids = torch.randint(0, vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None)


def gradients(model: SambaLM, batch: Batch, settings: TrainSection, device: torch.device) -> dict[str, Tensor]:
    """The loss and every gradient of one step on ``device``, in fp64 if the model is."""
    parallel = Parallel(device=device)
    wide = model.embedding.dtype == torch.float64
    prepare_model(model, settings, parallel)
    if wide:
        model.compute_dtype = None
    model.train()
    loss, _ = train_step(model, make_optimizer(model, settings), batch, settings, parallel, step=1)
    found = {name: p.grad.detach().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": torch.tensor(loss, dtype=torch.float64), **found}


def check(config: ModelConfig, settings: TrainSection, device: torch.device) -> list[Figure]:
    """A narrow twin's loss and gradients against fp64, and against what bf16 costs the plain path on the CPU.

    With float8 the twin's maps are float8 ones although they are small, on the CPU too: what rounding costs is then
    what their definition in PyTorch costs. Raises ParityError where the GPU's error is more than rounding explains.
    """
    small = narrow(config)
    batch = random_batch(PARITY_BATCH, PARITY_LENGTH, small.vocab_size)
    plain = settings.model_copy(update={"compile": False, "activation_checkpointing": "none", "float8": False})
    model = create(small)
    rounded = create(small), create(small)
    if settings.float8:
        require_float8(device)
        for twin in rounded:
            use_float8(twin.layers, PARITY_LEAST)
    ours = gradients(rounded[0], batch, settings.model_copy(update={"float8": False}), device)
    noise = gradients(rounded[1], batch, plain, torch.device("cpu"))
    exact = gradients(model.double(), batch, plain, device)
    errors = require_noise(ours, exact, noise)
    loss_off = largest_difference(ours["loss"], exact["loss"])
    low = "float8" if settings.float8 else "bf16"
    worst = max((name for name in errors if name != "loss"), key=lambda name: errors[name][0])
    facts = {name: {"relative": own, f"plain {low} on the CPU": rounding} for name, (own, rounding) in errors.items()}
    return [
        Figure(f"{small.name}, loss, relative difference from fp64", loss_off, "", facts={"errors": facts}),
        Figure(f"{small.name}, worst gradient ({worst}), relative error", errors[worst][0], ""),
        Figure(f"the same of plain {low} on the CPU", errors[worst][1], "", by="PyTorch"),
    ]


def run_train(
    name: str,
    ceilings: Ceilings,
    device: torch.device,
    *,
    batch: int | None = None,
    length: int = 4096,
    micro_batches: tuple[int, ...] = (),
    steps: int = 8,
    settings: TrainSection | None = None,
    activation_checkpointing: Literal["none", "selective", "full"] | None = None,
    profile: bool = False,
) -> tuple[list[Figure], list[dict[str, object]]]:
    """Steps of one model for each micro-batch size, and the kernels of the last where ``profile`` asks for them.

    bf16 compute on fp32 weights, AdamW; ``settings`` gives what else differs from the trainer's defaults,
    ``micro_batches`` and ``activation_checkpointing`` where nothing is given are what the memory bar asks for. A run
    that fails (memory) is a figure without a value.
    """
    config = zoo.get(name)
    asked = TRAIN.get(name)
    batch = batch or default_batch(name)
    default = asked.micro_batch if asked and batch % asked.micro_batch == 0 else batch
    again = activation_checkpointing or (asked.activation_checkpointing if asked else "none")
    changes = {"dtype": "bfloat16", "length": length, "activation_checkpointing": again}
    settings = (settings or TrainSection()).model_copy(update=changes)
    try:
        figures = attempt(lambda: check(config, settings.model_copy(update={"clip": 0.0}), device))
    except NotMeasured as failure:
        return [Figure(f"{name}, training", None, "thousand tokens/s", note=str(failure))], []
    release(device)
    kernels: list[dict[str, object]] = []
    for micro in micro_batches or (default,):
        one = settings.model_copy(update={"batch_size": batch, "micro_batch": micro, "steps": WARM_UP + steps})
        try:
            measured = attempt(partial(measure, config, one, ceilings, device, profile))
        except NotMeasured as failure:
            what = title(name, one)
            bar = _speed_bar(name, batch, length)
            figures.append(
                Figure(what, None, "thousand tokens/s", bar.bar, False, bar.stretch, bar.goal, note=str(failure))
            )
        else:
            figures += measured[0]
            kernels = measured[1]
        release(device)
    return figures, kernels


def title(name: str, settings: TrainSection) -> str:
    """What was timed, in a line of a table."""
    remade = settings.activation_checkpointing
    return ", ".join(
        [name, f"{settings.batch_size} x {settings.length}", f"micro-batch {settings.micro_batch_size}"]
        + (["float8"] if settings.float8 else [])
        + (["compiled"] if settings.compile else [])
        + ([] if remade == "none" else [f"{remade} checkpointing"])
    )


def _speed_bar(name: str, batch: int, length: int) -> Any:
    asked = TRAIN.get(name)
    return asked.speed if asked and (batch, length) == (asked.batch, 4096) else NONE


def measure(
    config: ModelConfig, settings: TrainSection, ceilings: Ceilings, device: torch.device, profile: bool = False
) -> tuple[list[Figure], list[dict[str, object]]]:
    """Figures of ``settings.steps`` steps, the first ones not counted, and the kernels of one more."""
    parallel = Parallel(device=device)
    memory = Memory(device)
    model = new_model(config, device)
    prepare_model(model, settings, parallel)
    optimizer = make_optimizer(model, settings)
    batch = random_batch(settings.batch_size, settings.length, config.vocab_size)
    model.train()
    laps, losses = Laps(device), []
    for step in range(settings.total_steps):
        if step >= WARM_UP:
            laps.mark()
        loss, _ = train_step(model, optimizer, batch, settings, parallel, step=step + 1)
        losses.append(loss)
    laps.mark()
    timing, peak = laps.timing(), memory.peak()
    what = title(config.name, settings)
    rate = settings.tokens_per_step / timing.median  # thousand tokens a second
    flops = 3 * config.flops_per_token(settings.length)
    bar = _speed_bar(config.name, settings.batch_size, settings.length)
    figures = [
        Figure(
            what, rate, "thousand tokens/s", bar.bar, False, bar.stretch, bar.goal,
            facts={"ms a step": timing.median, **timing.facts(), "micro_batch": settings.micro_batch_size,
                   "compile": settings.compile, "float8": settings.float8,
                   "activation_checkpointing": settings.activation_checkpointing},
        ),
        *bar.figures(what, "thousand tokens/s", low_is_good=False),
        Figure(f"{what}: a step", timing.median, "ms"),
        Figure("model FLOPs a token, forward and backward", flops / 1e9, "GFLOP"),
        Figure(f"{what}: MFU of the measured matmul rate", rate * 1e3 * flops / ceilings.matmul, ""),
        Figure(f"{what}: loss, first", losses[0], "nats"),
        Figure(f"{what}: loss, last, always the same batch", losses[-1], "nats"),
    ]  # fmt: skip
    if peak is not None:
        limit = TRAIN[config.name].memory if bar is not NONE else NONE
        figures += [
            Figure(f"{what}: peak memory", peak[0], "GiB", limit.bar, facts={"reserved GiB": peak[1]}),
            *limit.figures(f"{what}: peak memory", "GiB"),
        ]
    if not math.isfinite(losses[-1]):
        figures = [replace(figure, value=None, note="the loss is not finite") for figure in figures]
    if not profile:
        return figures, []
    again = partial(train_step, model, optimizer, batch, settings, parallel, step=settings.total_steps + 1)
    try:
        return figures, attempt(partial(kernel_table, again, device))
    except NotMeasured as failure:
        return [*figures, Figure(f"{what}: profile", None, "ms", note=str(failure))], []


def new_model(config: ModelConfig, device: torch.device) -> SambaLM:
    """A model initialised on the device: much faster than on the CPU, and its exact weights do not matter here."""
    with torch.device("meta"):
        model = SambaLM(config)
    model.to_empty(device=device)
    model.reset_parameters(0)
    return model


def kernel_table(run: Any, device: torch.device) -> list[dict[str, object]]:
    """The kernels of one call by summed time: name, calls, ms, share of all kernels' time. On a CPU: its operators."""
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CUDA if on_gpu else activity.CPU]
    synchronize(device)
    with torch.profiler.profile(activities=activities, acc_events=True) as recorded:
        run()
        synchronize(device)
    rows = []
    for event in recorded.key_averages():
        if event.is_user_annotation or (on_gpu and "CUDA" not in str(event.device_type)):
            continue
        micro = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        rows.append((str(event.key), int(event.count), micro / 1e3))
    total = sum(ms for _, _, ms in rows) or 1.0
    rows.sort(key=lambda row: -row[2])
    return [{"kernel": key, "calls": n, "ms": ms, "share": ms / total} for key, n, ms in rows[:TOP_KERNELS]]

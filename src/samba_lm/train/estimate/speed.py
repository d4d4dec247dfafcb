"""Tokens a second of one GPU: measured where it was, else by a stated share of the GPU's peak."""

from __future__ import annotations

from dataclasses import dataclass

from samba_lm.config import Attention, Mamba, ModelConfig, SwiGLU
from samba_lm.train.estimate.gpus import Gpu
from samba_lm.train.estimate.layout import NODE, Layout
from samba_lm.train.recipe import TrainSection


@dataclass(frozen=True)
class Measured:
    """A line of `samba-lm bench train` on one GPU."""

    model: str
    gpu: str
    """As in GPUS' titles."""
    length: int
    tokens_per_s: float
    mfu: float
    """Of the data sheet's peak."""
    peak_memory: float
    """GiB that tensors took."""
    micro_batch: int
    activation_checkpointing: str
    source: str


_H100 = "docs/results/h100/train.json"
MEASURED = (
    Measured("samba-421m", "H100 80GB", 4096, 164_515, 0.449, 29.23, 8, "none", _H100),
    Measured("samba-1.3b", "H100 80GB", 4096, 57_536, 0.486, 45.52, 4, "selective", _H100),
)
SHARE = 0.45
"""Of the peak (MFU), where nothing was measured: what the smaller of the two measured models has."""
AGAIN = 3 / 4
"""Speed with `full` checkpointing: a forward more, of what are three forwards' work."""
PAIR, SHARED_ROWS = 0.936, 0.785
"""Speed of a GPU over its speed alone, of two H200s on NVLink: with rows of their own (samba-1.3b), and sharing rows of
1,048,576 tokens (samba-421m). docs/results/h200x2/scale.json."""
WITHIN, BETWEEN = 0.92, 0.85
"""The same among more GPUs of one machine, and of several machines. Assumed until measured."""


@dataclass(frozen=True)
class Speed:
    """Tokens a second, and what they rest on."""

    each: float
    """Of one GPU of the layout."""
    all: float
    """Of all of them."""
    mfu: float
    """Model FLOPs a second over the peak, of one GPU."""
    basis: str
    """A sentence on where it comes from."""


def speed(
    config: ModelConfig,
    train: TrainSection,
    layout: Layout,
    gpu: Gpu,
    *,
    given: float | None = None,
    efficiency: float | None = None,
) -> Speed:
    """How fast ``layout`` trains. ``given``: tokens a second of one of its GPUs, which nothing is then taken from.

    ``efficiency``: speed of a GPU among the others over its speed alone; None: what was measured or is assumed.
    """
    flops = 3 * config.flops_per_token(train.length)
    if given is not None:
        return Speed(given, given * layout.gpus, flops * given / gpu.peak, "As given.")
    alone, basis = _alone(config, train, gpu, flops)
    words = [basis]
    if train.activation_checkpointing == "full":
        alone *= AGAIN
        words.append("A quarter off for full checkpointing.")
    if layout.gpus > 1:
        share, source = _together(layout) if efficiency is None else (efficiency, "as given")
        alone *= share
        words.append(f"{share:.0%} of it in {layout.gpus} GPUs, {source}.")
    if train.float8:
        words.append("float8 is not counted.")
    return Speed(alone, alone * layout.gpus, flops * alone / gpu.peak, " ".join(words))


def _together(layout: Layout) -> tuple[float, str]:
    """Speed of one of the layout's GPUs over its speed alone, and where that comes from."""
    one_machine = layout.gpus <= NODE
    if layout.context > 1:
        source = "as two H200s that share rows have"
        if one_machine:
            return SHARED_ROWS, source
        return SHARED_ROWS * BETWEEN / WITHIN, f"{source}, and less between machines"
    if layout.gpus == 2:
        return PAIR, "as measured on two H200s"
    return (WITHIN if one_machine else BETWEEN), "assumed"


def _alone(config: ModelConfig, train: TrainSection, gpu: Gpu, flops: int) -> tuple[float, str]:
    for line in MEASURED:
        same = config.name == line.model and train.length == line.length and train.dtype == "bfloat16"
        if same and gpu.peak == 989e12:
            other = "" if gpu.title == line.gpu else f", whose cores an {gpu.title.split()[0]} has too"
            return line.tokens_per_s, f"Measured: {line.tokens_per_s:,.0f} tokens/s on one {line.gpu}{other}."
    basis = f"Not measured: {SHARE:.0%} of the {gpu.title}'s {gpu.peak / 1e12:.0f} TFLOP/s in bf16, as samba-421m has"
    basis += " on an H100." if gpu.peak == 989e12 else " on an H100; other GPUs may have less."
    if any(type(part) not in (Mamba, Attention, SwiGLU) for spec in config.layers for part in spec.parts()):
        basis += " Some layers have no kernels of ours: expect less."
    if train.dtype != "bfloat16":
        basis += " In float32 it is several times slower."
    return SHARE * gpu.peak / flops, basis

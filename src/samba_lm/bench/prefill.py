"""``samba-lm bench prefill``: reading a very long prompt on a GPU, up to the logits of its last token."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samba_lm import zoo
from samba_lm.bench.bars import NONE, PREFILL, PREFILL_LLAMA, PREFILL_TOKENS
from samba_lm.bench.ceilings import Ceilings
from samba_lm.bench.environment import version
from samba_lm.bench.figure import Figure
from samba_lm.bench.gpu import Memory, NotMeasured, Timing, attempt, release, wall_clock
from samba_lm.bench.parity import largest_difference, require_noise
from samba_lm.bench.training import narrow, new_model
from samba_lm.checkpoint import create, place
from samba_lm.config import ModelConfig
from samba_lm.convert.transformers import transformers_config
from samba_lm.generation.params import SamplingParams
from samba_lm.generation.prefill import Reader, prefill
from samba_lm.model import SambaLM

PEER = "llama3-1.6b"
PARITY_TOKENS, PARITY_CHUNK = 300, 128
CHUNKS_AGREE = 0.1
"""Largest difference of logits, relative to the largest, between ways to cut the same prompt: what bf16 leaves."""


def run_prefill(
    name: str,
    ceilings: Ceilings,
    device: torch.device,
    *,
    tokens: int = PREFILL_TOKENS,
    chunks: tuple[int, ...] = (),
    repeats: int = 5,
    peers: bool = False,
) -> list[Figure]:
    """Time reading ``tokens`` random tokens with a bf16 model of the zoo, for each number of tokens read at once.

    Without ``chunks``: all at once, and in the chunks that generation takes by default and the next larger sizes. What
    fails is a figure without a value.
    """
    config = zoo.get(name)
    bar = PREFILL.get(name, NONE) if tokens == PREFILL_TOKENS else NONE
    what = f"{name}, {tokens:,} tokens"
    try:
        figures = attempt(lambda: check(config, device))
        model = attempt(lambda: place(new_model(config, device), device, torch.bfloat16).eval())
    except NotMeasured as failure:
        return [Figure(what, None, "ms", bar.bar, True, bar.stretch, bar.goal, note=str(failure))]
    ids = np.random.default_rng(0).integers(0, config.vocab_size, tokens)
    flops = tokens * (config.flops_per_token(tokens) - 2 * config.vocab_size * config.d_model)
    first: Tensor | None = None
    for chunk in chunks or (tokens, *(size for size in (8192, 2048) if size < tokens)):
        title = f"{what}, {'all at once' if chunk >= tokens else f'{chunk:,} at once'}"
        memory = Memory(device)
        try:
            logits, timing = attempt(partial(_times, model, ids, chunk, repeats, device))
        except NotMeasured as failure:
            figures.append(Figure(title, None, "ms", bar.bar, True, bar.stretch, bar.goal, note=str(failure)))
            continue
        facts = {"chunk": chunk, **timing.facts(), "of_matmul": flops / (timing.median / 1e3) / ceilings.matmul}
        figures.append(Figure(title, timing.median, "ms", bar.bar, True, bar.stretch, bar.goal, facts=facts))
        if (peak := memory.peak()) is not None:
            figures.append(Figure(f"{title}: peak memory", peak[0], "GiB", facts={"reserved GiB": peak[1]}))
        if first is None:
            first = logits
        else:
            off = largest_difference(logits, first)
            figures.append(Figure(f"{title}: logits against the first", off, "", CHUNKS_AGREE, check=True))
        release(device)
    figures += bar.figures(what, "ms")
    return [*figures, *_peer(tokens, device)] if peers else figures


def read(model: SambaLM, ids: np.ndarray, chunk: int) -> Tensor:
    """Logits [1, V] after the last token, read as generation does it."""
    reader = Reader.create(model, SamplingParams(), batch=1)
    with torch.inference_mode():
        prefill(model, [[ids]], reader, chunk)
    assert reader.logits is not None
    return reader.logits


def check(config: ModelConfig, device: torch.device) -> list[Figure]:
    """A narrow twin, at once and in chunks, against fp64 and against what bf16 costs the plain path on the CPU.

    Raises ParityError where the GPU's error is more than rounding explains.
    """
    small = narrow(config)
    ids = np.random.default_rng(0).integers(0, small.vocab_size, PARITY_TOKENS)
    rounded = place(create(small), "cpu", torch.bfloat16).eval()
    noise = read(rounded, ids, PARITY_TOKENS)
    rounded.to(device)
    cut = {f"{PARITY_TOKENS} at once": PARITY_TOKENS, f"{PARITY_CHUNK} at once": PARITY_CHUNK}
    ours = {title: read(rounded, ids, chunk) for title, chunk in cut.items()}
    exact = read(rounded.double(), ids, PARITY_TOKENS)
    errors = require_noise(ours, dict.fromkeys(ours, exact), dict.fromkeys(ours, noise))
    worst = max(errors, key=lambda title: errors[title][0])
    return [
        Figure(f"{small.name}, last logits, {worst}, relative error", errors[worst][0], ""),
        Figure("the same of plain bf16 on the CPU", errors[worst][1], "", by="PyTorch"),
    ]


def _times(model: SambaLM, ids: np.ndarray, chunk: int, repeats: int, device: torch.device) -> tuple[Tensor, Timing]:
    """The logits, and wall-clock times of reading: the work is long, and all of it counts."""
    logits = read(model, ids, chunk)
    return logits, wall_clock(lambda: read(model, ids, chunk), repeats, device)


def _peer(tokens: int, device: torch.device) -> list[Figure]:
    """transformers' Llama at the Llama-3 1.6B shape of the paper, its weights random, with SDPA."""
    title, by = f"{PREFILL_LLAMA[0]}, {tokens:,} tokens", f"transformers {version('transformers') or ''}".strip()
    try:
        timing = attempt(lambda: _llama(tokens, device))
    except NotMeasured as failure:
        return [Figure(title, None, "ms", by=by, note=str(failure))]
    finally:
        release(device)
    return [Figure(title, timing.median, "ms", by=by, facts=timing.facts())]


def _llama(tokens: int, device: torch.device) -> Timing:
    import transformers

    shape = transformers_config(zoo.get(PEER))
    kept = {k: v for k, v in shape.items() if k not in ("architectures", "model_type", "dtype", "torch_dtype")}
    options: dict[str, Any] = {**kept, "attn_implementation": "sdpa"}
    config = transformers.LlamaConfig(**options)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model: Any = transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.eval()
    ids = torch.randint(0, config.vocab_size, (1, tokens), device=device)

    def run() -> object:
        with torch.inference_mode():
            return model(ids, logits_to_keep=1).logits

    run()
    return wall_clock(run, 2, device)

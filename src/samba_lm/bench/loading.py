"""From a context's file to the first token that goes on from it."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from samba_lm.bench.bars import LOAD
from samba_lm.bench.figure import Figure
from samba_lm.bench.gpu import synchronize
from samba_lm.bench.steps import GREEDY, Steps
from samba_lm.contexts import info, reading, snapshot
from samba_lm.generation.sampling import require_finite
from samba_lm.model import SambaLM
from samba_lm.tokenizer import ByteTokenizer

REPEATS = 9
READ_AT_ONCE = 32_768


def run_loading(model: SambaLM, texts: Steps, tokens: tuple[int, ...]) -> Iterator[Figure]:
    """Contexts of texts of these lengths, each saved and loaded: medians of the whole and of its parts.

    ``texts``: slots of the same model, all free; a server's, which has recorded its steps long ago.
    """
    tokenizer, name = ByteTokenizer(), model.config.name
    texts.sampled(GREEDY)
    for count in dict.fromkeys(tokens):
        ids = np.random.default_rng(0).integers(0, tokenizer.eos_id, count)
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            path = Path(folder) / "text.ctx"
            made = reading.read(model, tokenizer, ids, chunk=min(READ_AT_ONCE, count))
            snapshot.save(path, made, model, tokenizer)
            size = path.stat().st_size
            go_on(path, model, tokenizer, texts)
            runs = [go_on(path, model, tokenizer, texts) for _ in range(REPEATS)]
            parts = {
                "ms: bytes read": _median(path.read_bytes),
                "ms: read and verified": _median(lambda path=path: info.inspect(path)),  # type: ignore[misc]
                "ms: these and on the device": 1e3 * statistics.median(loaded for loaded, _ in runs),
                "ms: then slot, step, token on the host": 1e3 * statistics.median(step for _, step in runs),
            }
            total = 1e3 * statistics.median(loaded + step for loaded, step in runs)
            # A file that was just written is in the system's memory; this one is asked back from the disk.
            cold = 1e3 * statistics.median(sum(_forgotten(path, model, tokenizer, texts)) for _ in range(3))
        what = f"{name}, context of {count:,} tokens, file to first token"
        note = ", ".join(f"{part.removeprefix('ms: ')} {ms:.1f}" for part, ms in parts.items())
        slowest = 1e3 * max(loaded + step for loaded, step in runs)
        facts = {"bytes": size, "repeats": REPEATS, "max": slowest, **parts}
        yield Figure(what, total, "ms", LOAD.bar, note=note, facts=facts)
        yield Figure(f"{what}, from the disk", cold, "ms")


def go_on(path: Path, model: SambaLM, tokenizer: ByteTokenizer, texts: Steps) -> tuple[float, float]:
    """Seconds for loading, and from there to the first token."""
    began = time.perf_counter()
    loaded = snapshot.load(path, model, tokenizer)
    synchronize(model.device)
    there = time.perf_counter()
    row = texts.slots.put(loaded.reader().state, loaded.tokens)
    ids = texts.decoder.step([tokenizer.eos_id], [loaded.tokens + 1])[0].tolist()
    ended = time.perf_counter()
    texts.slots.drop(row)
    require_finite(ids)
    return there - began, ended - there


def _forgotten(path: Path, model: SambaLM, tokenizer: ByteTokenizer, texts: Steps) -> tuple[float, float]:
    """:func:`go_on`, after the system was told that the file's pages are not needed (some file systems keep them)."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return go_on(path, model, tokenizer, texts)


def _median(call: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)

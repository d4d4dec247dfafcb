"""Peak memory of reading a very long prompt, each length in a process of its own."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from samba_lm import checkpoint
from samba_lm.bench.figure import Figure
from samba_lm.bench.parity import require_close
from samba_lm.generation.params import DEFAULT_CHUNK
from samba_lm.memory import peak_memory
from samba_lm.model import SambaLM

SHORT, LONG = 10_000, 1_000_000
PARITY_TOKENS, PARITY_BOUND = 2 * DEFAULT_CHUNK + 100, 1e-4


def run_memory(name: str = "samba-tiny", short: int = SHORT, long: int = LONG) -> list[Figure]:
    """Read ``short`` and ``long`` random tokens with a model of the zoo; the peaks may differ by 50 MB."""
    off = check(name)
    (low, _), (high, seconds) = (_in_process(name, tokens) for tokens in (short, long))
    return [
        Figure("parity: worst relative difference from reading at once", off, "", PARITY_BOUND),
        Figure(f"{name} peak memory reading {short:,} tokens", low, "MB"),
        Figure(f"{name} peak memory reading {long:,} tokens", high, "MB"),
        Figure("growth", high - low, "MB", 50.0),
        Figure(f"{name} reading {long:,} tokens", long / seconds, "tokens/s"),
    ]


def check(name: str) -> float:
    """The last logits of a prompt read in chunks against the same read at once; the worst relative difference."""
    model = checkpoint.create(name).eval()
    chunks = list(random_chunks(model.config.vocab_size, PARITY_TOKENS))
    whole = last_logits(model, [torch.cat(chunks, dim=1)])
    return require_close(last_logits(model, chunks), whole, PARITY_BOUND, "logits of a prompt read in chunks")


def _in_process(name: str, tokens: int) -> tuple[float, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(read, (name, tokens))


def read(name: str, tokens: int) -> tuple[float, float]:
    """Peak resident memory of this process in MB after reading ``tokens`` tokens, and the seconds that took."""
    model = checkpoint.create(name).eval()
    began = time.perf_counter()
    last_logits(model, random_chunks(model.config.vocab_size, tokens))
    seconds = time.perf_counter() - began
    return peak_memory() / 1e6, seconds


def random_chunks(vocab_size: int, tokens: int) -> Iterator[Tensor]:
    """Always the same random ids, int64 [1, chunk], the last chunk possibly shorter."""
    generator = torch.Generator().manual_seed(0)
    for start in range(0, tokens, DEFAULT_CHUNK):
        yield torch.randint(0, vocab_size, (1, min(DEFAULT_CHUNK, tokens - start)), generator=generator)


@torch.inference_mode()
def last_logits(model: SambaLM, chunks: Iterable[Tensor]) -> Tensor:
    """Logits [1, V] after the last token of one sequence, given in chunks of ids [1, L]."""
    state = model.init_state(1)
    for ids in chunks:
        hidden, state = model.features(ids, state)
    return model.head(hidden[:, -1])

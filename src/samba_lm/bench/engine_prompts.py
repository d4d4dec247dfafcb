"""An engine at work: how long it takes over a long prompt, and how far apart the tokens of many streams are."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import numpy as np

from samba_lm.bench.bars import NONE, PREFILL, PREFILL_TOKENS
from samba_lm.bench.figure import Figure
from samba_lm.bench.gpu import Timing
from samba_lm.engine.engine import Engine
from samba_lm.engine.request import End, Request
from samba_lm.generation.params import DEFAULT_CHUNK, SamplingParams
from samba_lm.model import SambaLM
from samba_lm.tokenizer import ByteTokenizer

CHUNKS = (DEFAULT_CHUNK, 8192)
REPEATS = 3
STREAM_PROMPT, STREAM_TOKENS = 16, 256


def run_prompts(model: SambaLM, tokens: int, chunks: tuple[int, ...] = CHUNKS) -> Iterator[Figure]:
    """A prompt of ``tokens`` random tokens, from its first token read to its answer's first made, for each number of
    tokens that the engine reads between two steps."""
    name = model.config.name
    bar = PREFILL.get(name, NONE) if tokens == PREFILL_TOKENS else NONE
    for chunk in chunks:
        timing = read_prompts(model, tokens, chunk)
        yield Figure(
            f"{name}, the engine reads {tokens:,} tokens, {chunk:,} at once", timing.median, "ms",
            bar.bar, True, bar.stretch, bar.goal, facts={**timing.facts(), "tokens/s": 1e3 * tokens / timing.median},
        )  # fmt: skip


def read_prompts(model: SambaLM, tokens: int, chunk: int) -> Timing:
    """As the engine itself tells it, after a short prompt that has it record its graphs."""
    tokenizer, times = ByteTokenizer(), []
    ids = np.random.default_rng(0).integers(0, tokenizer.eos_id, tokens)
    once = SamplingParams(temperature=0, max_tokens=1, stop_at_eos=False)
    with Engine(model, tokenizer, slots=1, chunk=chunk) as engine:
        for prompt in (ids[: 2 * chunk], *[ids] * REPEATS):
            for event in engine.stream(Request([prompt], once)):
                if isinstance(event, End):
                    times.append(1e3 * event.read_seconds)
    return Timing(tuple(times[1:]))


def run_streams(model: SambaLM, streams: int, tokens: int = STREAM_TOKENS) -> Iterator[Figure]:
    """So many streams at once, greedy: what one waits from token to token, the engine's own work counted."""
    tokenizer = ByteTokenizer()
    prompts = list(np.random.default_rng(0).integers(0, tokenizer.eos_id, (streams, STREAM_PROMPT)))
    params = SamplingParams(temperature=0, max_tokens=tokens, stop_at_eos=False)
    with Engine(model, tokenizer, slots=streams) as engine:
        engine.generate(prompts, params.replace(max_tokens=8))
        ends = [answer.end for answer in engine.generate(prompts, params)]
    # The first and the last streams read their prompts while others are decoding: the median did so least.
    ms = statistics.median(1e3 * end.decode_seconds / (end.new_tokens - 1) for end in ends)
    facts = {"streams": streams, "tokens": tokens, "tokens/s": 1e3 * streams / ms}
    yield Figure(f"{model.config.name}, {streams} streams of an engine: token to token", ms, "ms", facts=facts)

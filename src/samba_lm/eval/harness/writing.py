"""Texts continued for a harness: by the inference engine, what prompts have in common read once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from samba_lm.engine.engine import Engine
from samba_lm.engine.request import End, Event, Piece, Request
from samba_lm.errors import UserError, did_you_mean
from samba_lm.eval.harness.prefixes import families
from samba_lm.generation.params import DEFAULT_CHUNK, SamplingParams
from samba_lm.generation.prefill import Reader
from samba_lm.model import SambaLM
from samba_lm.tokenizer import Tokenizer

OnProgress = Callable[[float], None]
OnText = Callable[[int, str], None]
SLOTS = {"cpu": 16, "cuda": 64}
"""Texts written at once."""
GPU_CHUNK = 8192
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call the most tokens of an answer; the first that is given counts."""
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
NO_EFFECT = {"num_beams": 1, "early_stopping": False, "length_penalty": 1.0}
"""What tasks say for another library, with the value that asks nothing of us."""


@dataclass(frozen=True)
class Prompt:
    """Token ids to continue, at least one, and how."""

    ids: list[int]
    params: SamplingParams


def write(
    model: SambaLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    slots: int | None = None,
    progress: OnProgress | None = None,
    note: OnText | None = None,
) -> list[str]:
    """The continuations, in the order of the prompts; stop strings are no part of them.

    ``note``: told each prompt's number and text as it ends. Raises UserError as the engine does.
    """
    kind = "cpu" if model.device.type == "cpu" else "cuda"
    texts = [""] * len(prompts)
    done = 0

    def see(i: int, event: Event) -> None:
        nonlocal done
        if isinstance(event, Piece):
            texts[i] += event.text
        elif isinstance(event, End) and event.finish not in ("cancelled", "error"):
            done += 1
            if note is not None:
                note(i, texts[i])
            if progress is not None:
                progress(done / len(prompts))

    chunk = DEFAULT_CHUNK if kind == "cpu" else GPU_CHUNK
    with Engine(model, tokenizer, slots=slots or SLOTS[kind], chunk=chunk) as engine:
        for family in families([prompt.ids for prompt in prompts]):
            root = None if not family.shared else _read(engine, prompts[family.members[0]].ids[: family.shared])
            requests = [
                Request([np.array(prompts[i].ids[family.shared :])], prompts[i].params, context=root)
                for i in family.members
            ]
            engine.complete(requests, lambda k, event, members=family.members: see(members[k], event))  # type: ignore[misc]
    return texts


def _read(engine: Engine, ids: Sequence[int]) -> Reader:
    """Where a text stands after these tokens."""
    nothing = SamplingParams(max_tokens=0, temperature=0.0)
    (answer,) = engine.complete([Request([np.array(ids)], nothing, keep=True)])
    assert answer.end.reader is not None, "it was asked for"
    return answer.end.reader


def sampling(options: Mapping[str, Any], default_tokens: int, seed: int) -> SamplingParams:
    """What a task's ``generation_kwargs`` ask: until, max_gen_toks, do_sample, temperature, top_p, top_k, min_p,
    repetition_penalty. Greedy unless they ask for a temperature.

    Raises UserError for any other that would change the answer.
    """
    known = {*LIMITS, *SAMPLING, *NO_EFFECT, "until", "do_sample"}
    for name, value in options.items():
        if name not in known or value != NO_EFFECT.get(name, value):
            raise UserError(f"{name}={value!r} of generation_kwargs cannot be done.{did_you_mean(name, known)}")
    until = options.get("until") or []
    stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
    tokens = next((int(options[name]) for name in LIMITS if options.get(name) is not None), default_tokens)
    chosen = {name: options[name] for name in SAMPLING if options.get(name) is not None}
    if options.get("do_sample") is False or "temperature" not in chosen:
        chosen["temperature"] = 1.0 if options.get("do_sample") and "temperature" not in chosen else 0.0
    if chosen.get("top_k") == 0:  # what transformers calls all
        del chosen["top_k"]
    return SamplingParams(max_tokens=tokens, stop=stop, seed=seed, **chosen)

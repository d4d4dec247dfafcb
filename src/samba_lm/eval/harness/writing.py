"""Texts continued for a harness: by the inference engine, what prompts have in common read once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from samba_lm.engine.engine import Engine
from samba_lm.engine.request import End, Event, Request
from samba_lm.eval.harness.prefixes import families
from samba_lm.generation.params import DEFAULT_CHUNK, SamplingParams
from samba_lm.generation.prefill import Reader
from samba_lm.model import SambaLM
from samba_lm.tokenizer import Tokenizer

OnProgress = Callable[[float], None]
SLOTS = {"cpu": 16, "cuda": 64}
"""Texts written at once."""
GPU_CHUNK = 8192


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
) -> list[str]:
    """The continuations, in the order of the prompts; stop strings are no part of them.

    Raises UserError as the engine does.
    """
    kind = "cpu" if model.device.type == "cpu" else "cuda"
    texts = [""] * len(prompts)
    done = 0

    def note(_: int, event: Event) -> None:
        nonlocal done
        if isinstance(event, End):
            done += 1
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
            for i, answer in zip(family.members, engine.complete(requests, note), strict=True):
                texts[i] = answer.text
    return texts


def _read(engine: Engine, ids: Sequence[int]) -> Reader:
    """Where a text stands after these tokens."""
    nothing = SamplingParams(max_tokens=0, temperature=0.0)
    (answer,) = engine.complete([Request([np.array(ids)], nothing, keep=True)])
    assert answer.end.reader is not None, "it was asked for"
    return answer.end.reader

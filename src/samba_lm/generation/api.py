"""``samba_lm.generate`` and ``samba_lm.stream``: continuing texts in memory that does not grow with them."""

from __future__ import annotations

from typing import Any, overload

import torch

from samba_lm.generation.params import DEFAULT_CHUNK, SamplingParams
from samba_lm.generation.prefill import OnProgress, Reader, prefill
from samba_lm.generation.prompt import Prompt, prompt_chunks
from samba_lm.generation.stream import (
    Answer,
    Sampler,
    TextStream,
    Timing,
    advance,
    check_request,
    stream_pieces,
)
from samba_lm.model import SambaLM, evaluating
from samba_lm.tokenizer import Tokenizer


def stream(
    model: SambaLM,
    tokenizer: Tokenizer,
    prompt: Prompt,
    params: SamplingParams | None = None,
    *,
    chunk: int = DEFAULT_CHUNK,
    on_progress: OnProgress | None = None,
    context: Reader | None = None,
    **options: Any,
) -> TextStream:
    """Continue a prompt and yield the text, piece by piece, as it is made.

    Args:
        prompt: a text, token ids [L] as a numpy array, or an iterator of such arrays (for what is too long to hold).
            An empty prompt starts a new document: the end-of-text token is read instead.
        params: see :class:`SamplingParams`; any of its fields may be given by name, e.g. ``temperature=0``.
        chunk: prompt tokens read at once; more is faster and takes more memory.
        on_progress: called with the number of prompt tokens read, after each chunk.
        context: where to begin instead of nothing, such as ``Snapshot.reader()``; it is copied, never changed. The
            prompt follows it at once, and an empty one adds nothing.

    The pieces are whole characters and end before a stop string, never showing a part of it. The model is in
    evaluation mode until the text ends or the stream is closed.

    Raises UserError for options out of range or a tokenizer that does not fit the model, at once; for a bad prompt,
    when the first piece is asked for.
    """
    params = _params(params, options)
    check_request(model, tokenizer, chunk)
    timing = Timing()
    return TextStream(stream_pieces(model, tokenizer, prompt, params, chunk, on_progress, timing, context), timing)


@overload
def generate(
    model: SambaLM,
    tokenizer: Tokenizer,
    prompt: list[Prompt] | list[str],
    params: SamplingParams | None = None,
    *,
    chunk: int = DEFAULT_CHUNK,
    on_progress: OnProgress | None = None,
    context: Reader | None = None,
    **options: Any,
) -> list[str]: ...


@overload
def generate(
    model: SambaLM,
    tokenizer: Tokenizer,
    prompt: Prompt,
    params: SamplingParams | None = None,
    *,
    chunk: int = DEFAULT_CHUNK,
    on_progress: OnProgress | None = None,
    context: Reader | None = None,
    **options: Any,
) -> str: ...


def generate(
    model: SambaLM,
    tokenizer: Tokenizer,
    prompt: Prompt | list[Prompt] | list[str],
    params: SamplingParams | None = None,
    *,
    chunk: int = DEFAULT_CHUNK,
    on_progress: OnProgress | None = None,
    context: Reader | None = None,
    **options: Any,
) -> str | list[str]:
    """Continue a prompt and return the new text, or a list of prompts together and return the list of texts.

    The arguments are those of :func:`stream`. A list is decoded as one batch; each text is the one that its prompt
    gives alone with the same seed, up to the rounding of the model's matrix products. With ``max_tokens=None`` a text
    ends only at a stop string, a stop id or the end-of-text token.

    Raises UserError as :func:`stream` does.
    """
    if not isinstance(prompt, list):
        more: dict[str, Any] = {"chunk": chunk, "on_progress": on_progress, "context": context, **options}
        return "".join(stream(model, tokenizer, prompt, params, **more))
    params = _params(params, options)
    check_request(model, tokenizer, chunk)
    return _generate_batch(model, tokenizer, prompt, params, chunk, on_progress, context)


@torch.inference_mode()
def _generate_batch(
    model: SambaLM,
    tokenizer: Tokenizer,
    prompts: list[Prompt] | list[str],
    params: SamplingParams,
    chunk: int,
    on_progress: OnProgress | None,
    context: Reader | None,
) -> list[str]:
    answers = [Answer(tokenizer, params) for _ in prompts]
    texts: list[list[str]] = [[] for _ in prompts]
    if not prompts:
        return []
    with evaluating(model):
        sampler = Sampler(params, len(prompts), tokenizer, model.device)
        reader = Reader.create(model, params, batch=len(prompts), context=context)
        before = sum(reader.lengths)
        chunks = [prompt_chunks(prompt, tokenizer, begins=before == 0) for prompt in prompts]
        tell = None if on_progress is None else lambda tokens: on_progress(tokens - before)
        prefill(model, chunks, reader, chunk, tell)
        # The prompts whose texts still go on, in the order of the reader's rows.
        running = [i for i, answer in enumerate(answers) if answer.finish is None]
        while running:
            ids = sampler.draw(reader)
            for i, token_id in zip(running, ids, strict=True):
                texts[i].append(answers[i].feed(token_id))
            rows = [row for row, i in enumerate(running) if answers[i].finish is None]
            if len(rows) < len(running):
                running = [running[row] for row in rows]
                if not running:
                    break
                reader, ids = reader.select(rows), [ids[row] for row in rows]
            advance(model, reader, ids)
    return ["".join(text) + answer.flush() for text, answer in zip(texts, answers, strict=True)]


def _params(params: SamplingParams | None, options: dict[str, Any]) -> SamplingParams:
    return (params or SamplingParams()).replace(**options)

"""Tokens to text as they are made: whole characters only, and never a part of a stop string."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from samba_lm.checkpoint import check_tokenizer
from samba_lm.errors import UserError
from samba_lm.generation.params import SamplingParams
from samba_lm.generation.prefill import OnProgress, Reader, prefill
from samba_lm.generation.prompt import Prompt, prompt_chunks
from samba_lm.generation.sampling import Options, bias_of, require_finite, sample
from samba_lm.model import SambaLM, evaluating
from samba_lm.tokenizer import Tokenizer

Finish = Literal["length", "stop", "eos"]


class StopMatcher:
    """Holds text back while it may be the start of a stop string.

    The string that is complete first ends the text (of two complete at the same character, the longer), so the result
    does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self.held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """Return the text that is certain to stand before any stop string."""
        if not self._stops:
            return text
        text = self.held + text
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)[1]]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Return what is held back, when the text ended otherwise."""
        text, self.held = self.held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that `stop` starts with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Answer:
    """The text of one sequence as its tokens arrive, and why it ended."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._decoder = tokenizer.stream_decoder()
        self._matcher = StopMatcher(params.stop)
        self._ends = set(params.stop_ids)
        self._eos = tokenizer.eos_id if params.stop_at_eos else None
        self._max_tokens = params.max_tokens
        self.tokens = 0
        """Tokens made, the one that ended the text not counted."""
        self.finish: Finish | None = "length" if params.max_tokens == 0 else None
        """Why the text ended; None while it goes on."""
        self.held = False
        """Whether text of the tokens so far may not have been returned yet: half a character, half a stop string."""

    def feed(self, token_id: int) -> str:
        """Take the next token and return the text that is certain by now, possibly none; may set `finish`."""
        if token_id == self._eos or token_id in self._ends:
            self.finish = "eos" if token_id == self._eos else "stop"
            return ""
        self.tokens += 1
        decoded = self._decoder.feed(token_id)
        text = self._matcher.feed(decoded)
        # After damaged bytes (shown as U+FFFD) the decoder may hold the start of a character besides.
        self.held = not decoded or decoded.endswith("\N{REPLACEMENT CHARACTER}") or bool(self._matcher.held)
        if self._matcher.stopped:
            self.finish = "stop"
        elif self.tokens == self._max_tokens:
            self.finish = "length"
        return text

    def flush_stop(self) -> str:
        """Return the half stop string that the text ended in, if it ended otherwise."""
        return self._matcher.flush()

    def flush(self) -> str:
        """Return all that is held back at the end, half a character as U+FFFD."""
        if self._matcher.stopped:
            return ""
        return self._matcher.feed(self._decoder.flush()) + self._matcher.flush()


@dataclass
class Timing:
    """What a text cost."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    read_seconds: float = 0.0
    """From the start of reading until the first token is drawn."""
    decode_seconds: float = 0.0
    """From there until the last token; without the time that the consumer of the text took."""
    finish: Finish | None = None

    @property
    def read_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.read_seconds if self.read_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """The first token comes from reading, so it is not counted."""
        return (self.new_tokens - 1) / self.decode_seconds if self.decode_seconds and self.new_tokens > 1 else 0.0


class TextStream(Iterator[str]):
    """An iterator over the pieces of a text as they are made; `timing` is up to date between any two pieces.

    Closing it (or dropping it) ends the work; the model's training flags are then as they were.
    """

    def __init__(self, pieces: Generator[str, None, None], timing: Timing) -> None:
        self._pieces = pieces
        self.timing = timing

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """End the text here."""
        self._pieces.close()


def check_request(model: SambaLM, tokenizer: Tokenizer, chunk: int) -> None:
    """Raise UserError, before any work, for a tokenizer that does not fit the model or a chunk of no tokens."""
    check_tokenizer(model.config, tokenizer)
    if chunk < 1:
        raise UserError(f"chunk={chunk} is too small: read at least 1 token at once.")


@torch.inference_mode()
def stream_pieces(
    model: SambaLM,
    tokenizer: Tokenizer,
    prompt: Prompt,
    params: SamplingParams,
    chunk: int,
    on_progress: OnProgress | None,
    timing: Timing,
    context: Reader | None = None,
) -> Generator[str, None, None]:
    """Read a prompt, after a context, and yield the non-empty pieces of what follows, keeping `timing` up to date."""
    # The decorator enters inference mode only while this generator runs: the consumer's own code is not under it.
    answer = Answer(tokenizer, params)
    with evaluating(model):
        began = time.perf_counter()

        def note(tokens: int) -> None:
            timing.prompt_tokens, timing.read_seconds = tokens - before, time.perf_counter() - began
            if on_progress is not None:
                on_progress(tokens - before)

        sampler = Sampler(params, 1, tokenizer, model.device)
        reader = Reader.create(model, params, batch=1, context=context)
        before = reader.lengths[0]
        prefill(model, [prompt_chunks(prompt, tokenizer, begins=before == 0)], reader, chunk, note)
        while answer.finish is None:
            ids = sampler.draw(reader)  # waits for the device
            piece = answer.feed(ids[0])
            seconds = time.perf_counter() - began
            if timing.new_tokens == 0:
                timing.read_seconds = seconds
            else:
                timing.decode_seconds += seconds
            timing.new_tokens, timing.finish = answer.tokens, answer.finish
            if piece:
                yield piece
            began = time.perf_counter()
            if answer.finish is None:
                advance(model, reader, ids)
        timing.finish = answer.finish
        if piece := answer.flush():
            yield piece


class Sampler:
    """Draws the next tokens of up to ``batch`` sequences that all have the same options."""

    def __init__(self, params: SamplingParams, batch: int, tokenizer: Tokenizer, device: torch.device) -> None:
        """Raises UserError for a logit bias of a token that there is not."""
        self._vocab_size = tokenizer.vocab_size
        self._options = Options.of([params] * batch, self._vocab_size, device)
        bias = bias_of(params, self._vocab_size)
        self._bias = None if bias is None else bias[None].to(device)

    def draw(self, reader: Reader) -> list[int]:
        """The next token of each sequence, not yet read. Raises UserError where the model's outputs are no numbers."""
        assert reader.logits is not None, "nothing was read yet"
        options = self._options.rows(slice(len(reader.lengths)))
        positions = torch.tensor(reader.lengths).to(reader.logits.device)
        ids: list[int] = sample(
            reader.logits, options, positions, reader.history, self._vocab_size, self._bias
        ).tolist()
        require_finite(ids)
        return ids


def advance(model: SambaLM, reader: Reader, token_ids: list[int]) -> None:
    """Read one token of each sequence; moves `reader` in place."""
    ids = torch.tensor(token_ids).to(model.device)
    reader.logits = model.step(ids, reader.state)
    reader.lengths = [length + 1 for length in reader.lengths]
    if reader.history is not None:
        reader.history.add(ids)

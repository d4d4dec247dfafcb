"""Reading a text into a snapshot, and going on from one in generation and chat."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
import torch

import samba_lm
from samba_lm.contexts.reading import read, read_file
from samba_lm.contexts.token_hash import BLOCK, TokenHash
from samba_lm.errors import UserError
from samba_lm.generation.chat import ChatSession
from samba_lm.generation.params import SamplingParams
from samba_lm.model import SambaLM
from samba_lm.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
BOOK = "The sea is salt, as the tears are; and the sand: é😀.\n" * 40
GREEDY = SamplingParams(temperature=0, max_tokens=30, stop_at_eos=False)


def test_a_text_read_in_any_pieces_is_the_same_text(model: SambaLM) -> None:
    whole = read(model, TOKENIZER, BOOK, "book")
    told: list[int] = []
    file = read_file(model, TOKENIZER, io.BytesIO(BOOK.encode()), "book", chunk=100, on_progress=told.append)
    assert file.read == whole.read == TokenHash().add(TOKENIZER.encode(BOOK))
    assert file.tokens == len(BOOK.encode()) == told[-1] == int(file.state.position[0])
    assert told == [*range(100, file.tokens, 100), file.tokens]
    assert torch.allclose(file.logits, whole.logits, atol=1e-4)


def test_reading_goes_on_after_a_snapshot(model: SambaLM) -> None:
    first = read(model, TOKENIZER, BOOK[:500], "first")
    before = first.logits.clone(), first.read
    told: list[int] = []
    both = read(model, TOKENIZER, BOOK[500:], "both", after=first, on_progress=told.append)
    assert told[-1] == both.tokens - first.tokens
    whole = read(model, TOKENIZER, BOOK, "whole")
    assert both.read == whole.read
    assert torch.allclose(both.logits, whole.logits, atol=1e-4)
    assert both.seen is not None
    assert whole.seen is not None
    assert torch.equal(both.seen, whole.seen)
    assert torch.equal(first.logits, before[0])
    assert first.read == before[1]


def test_the_hash_of_tokens_does_not_depend_on_the_pieces() -> None:
    ids = np.random.default_rng(0).integers(0, 50000, 1000)
    whole = TokenHash().add(ids)
    for cuts in ([1], [BLOCK], [BLOCK - 1, BLOCK + 1], [999], list(range(1, 1000)), [500, 500]):
        hashed = TokenHash()
        for part in np.split(ids, cuts):
            hashed = hashed.add(part.astype(np.int32))
        assert hashed == whole
    others = [ids[:-1], ids[1:], ids[::-1], np.concatenate([ids, [0]]), np.where(np.arange(1000) == 3, ids + 1, ids)]
    digests = {TokenHash().add(other).hexdigest() for other in (ids, *others, ids[:0], np.zeros(BLOCK, int))}
    assert len(digests) == 8


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"", "book is empty"), (b"fine \xff", "book is not UTF-8: byte 5 cannot be read")],
)
def test_what_cannot_be_read(model: SambaLM, data: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_file(model, TOKENIZER, io.BytesIO(data), "book")


def test_ids_outside_the_vocabulary_and_titles_of_two_lines(model: SambaLM) -> None:
    with pytest.raises(UserError, match="Token id 260 at position 2"):
        read(model, TOKENIZER, np.array([1, 2, 260]))
    for title in ("two\nlines", "x" * 201, "\x1b[31mred", "\ud800"):
        with pytest.raises(UserError, match="is no line of at most 200"):
            read(model, TOKENIZER, "text", title)


def test_generation_goes_on_from_a_context_as_from_the_text(model: SambaLM) -> None:
    snapshot = read(model, TOKENIZER, BOOK, "book")
    for prompt in ("", " And then"):
        for params in (GREEDY, GREEDY.replace(repetition_penalty=1.5), GREEDY.replace(temperature=1, seed=3)):
            expected = samba_lm.generate(model, TOKENIZER, BOOK + prompt, params)
            text = samba_lm.stream(model, TOKENIZER, prompt, params, context=snapshot.reader())
            assert "".join(text) == expected
            assert text.timing.prompt_tokens == len(prompt)
    again = samba_lm.generate(model, TOKENIZER, "", GREEDY, context=snapshot.reader())
    assert again == samba_lm.generate(model, TOKENIZER, BOOK, GREEDY)  # nothing above moved the snapshot


def test_a_batch_goes_on_from_one_context(model: SambaLM) -> None:
    reader = read(model, TOKENIZER, BOOK, "book").reader()
    prompts = ["", " And then", " x" * 50]
    told: list[int] = []
    texts = samba_lm.generate(model, TOKENIZER, prompts, GREEDY, context=reader, chunk=60, on_progress=told.append)
    assert texts == [samba_lm.generate(model, TOKENIZER, BOOK + prompt, GREEDY) for prompt in prompts]
    assert told[-1] == sum(map(len, prompts))
    with pytest.raises(UserError, match="context of 2 sequences"):
        samba_lm.generate(model, TOKENIZER, prompts, GREEDY, context=reader.select([0, 0]))


def test_a_conversation_goes_on_from_a_context(model: SambaLM) -> None:
    snapshot = read(model, TOKENIZER, BOOK, "book")

    def talk(**options: object) -> tuple[str, str]:
        session = ChatSession(model, TOKENIZER, params=GREEDY, **options)  # type: ignore[arg-type]
        first = "".join(session.ask("Is it salt?"))
        session.reset()
        assert first == "".join(session.ask("Is it salt?"))
        return first, session.text

    with_context, text = talk(context=snapshot.reader())
    assert text.startswith("\nUser: Is it salt?")
    assert with_context != talk()[0]
    assert with_context == samba_lm.generate(
        model, TOKENIZER, BOOK + "\nUser: Is it salt?\nAssistant:", GREEDY.replace(stop=("\nUser:", "\nAssistant:"))
    )


MEMORY = """
import io, sys, torch
torch.set_num_threads(1)
import samba_lm
from samba_lm.config import Attention, Mamba, ModelConfig, SwiGLU
from samba_lm.contexts.reading import read_file
from samba_lm.contexts.snapshot import save
from samba_lm.memory import peak_memory

class Text(io.RawIOBase):  # without end, so that the text itself takes no memory
    def __init__(self, size): self.left = size
    def read(self, size=-1):
        size = min(size, self.left); self.left -= size
        return (b"The sea is salt.\\n" * (size // 17 + 1))[:size]

layers = (Mamba(), SwiGLU(width=24), Attention(heads=1, window=24), SwiGLU(width=24))
model = samba_lm.create(ModelConfig(name="tiny", d_model=16, vocab_size=260, layers=layers))
tokenizer = samba_lm.ByteTokenizer()
for tokens in (30_000, 1_000, 200_000):
    snapshot = read_file(model, tokenizer, Text(tokens), "text")
    save(f"{tokens}.ctx", snapshot, model, tokenizer)
    print(snapshot.tokens, snapshot.nbytes(), peak_memory())
"""


def test_memory_and_files_do_not_grow_with_the_text(tmp_path) -> None:
    ran = subprocess.run([sys.executable, "-c", MEMORY], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    (_, _, warm), short, long = ([int(word) for word in line.split()] for line in ran.stdout.splitlines())
    assert (short[0], long[0]) == (1_000, 200_000)
    assert short[1] == long[1]
    assert (tmp_path / "1000.ctx").stat().st_size == (tmp_path / "200000.ctx").stat().st_size
    # Its tokens alone would be 1.6 MB, its activations far more.
    assert long[2] - warm < 8 << 20

"""generate and stream: chunked equals whole, batched equals single, constant memory, clean endings."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

from samba_lm.errors import UserError
from samba_lm.generation.api import generate, stream
from samba_lm.generation.params import SamplingParams
from samba_lm.generation.prefill import Reader, prefill
from samba_lm.model import SambaLM
from samba_lm.tokenizer import Tokenizer

PROMPT = "The state of a sequence never grows, however long the text that was read: é😀. " * 3


def greedy_by_hand(model: SambaLM, tokenizer: Tokenizer, prompt: str, n: int) -> list[int]:
    """The definition: read everything again for each token."""
    ids = tokenizer.encode(prompt).tolist()
    for _ in range(n):
        logits, _ = model(torch.tensor([ids]))
        ids.append(int(logits[0, -1, : tokenizer.vocab_size].argmax()))
    return ids[-n:]


@pytest.mark.parametrize("chunk", [1, 7, 64, 100_000])
def test_reading_in_chunks_continues_as_reading_again_and_again(model, tokenizer, chunk: int) -> None:
    with torch.no_grad():
        want = greedy_by_hand(model, tokenizer, PROMPT, 40)
    assert len(set(want)) > 5
    text = generate(model, tokenizer, PROMPT, temperature=0, max_tokens=40, stop_at_eos=False, chunk=chunk)
    assert text == tokenizer.decode(want)


def test_prompts_may_be_text_ids_or_chunks(model, tokenizer) -> None:
    ids = tokenizer.encode(PROMPT)
    texts = {
        generate(model, tokenizer, prompt, max_tokens=30)
        for prompt in (PROMPT, ids, ids.astype(np.uint16), iter([ids[:5], ids[5:5], ids[5:]]))
    }
    assert len(texts) == 1


def test_the_progress_of_reading_is_told(model, tokenizer) -> None:
    told: list[int] = []
    generate(model, tokenizer, "x" * 100, max_tokens=1, chunk=40, on_progress=told.append)
    assert told == [40, 80, 100]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"seed": 5, "top_k": 20},
        {"seed": 6, "repetition_penalty": 1.3, "frequency_penalty": 0.2, "stop": ("e", "7")},
        {"max_tokens": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("chunk", [8, 2048])
def test_a_batch_gives_what_each_prompt_gives_alone(model, tokenizer, options: dict, chunk: int) -> None:
    prompts = ["a", PROMPT, "", "User: hello\nAssistant:", "é", "x" * 33]
    options = {"max_tokens": 60, **options}
    alone = [generate(model, tokenizer, prompt, chunk=chunk, **options) for prompt in prompts]
    assert generate(model, tokenizer, prompts, chunk=chunk, **options) == alone
    assert len(set(alone)) > 3 or options["max_tokens"] == 0
    assert generate(model, tokenizer, []) == []


def test_the_same_seed_gives_the_same_text_and_another_seed_another(model, tokenizer) -> None:
    first = generate(model, tokenizer, PROMPT, seed=1, max_tokens=50)
    assert generate(model, tokenizer, PROMPT, seed=1, max_tokens=50) == first
    assert generate(model, tokenizer, PROMPT, seed=2, max_tokens=50) != first


def test_resuming_at_a_position_continues_the_same_draws(model, tokenizer) -> None:
    """The seed counts positions, so a text cut in two and read again goes on as if never cut."""
    model.allow(list(b"abcdefgh \n"))
    whole = generate(model, tokenizer, "abc", seed=4, max_tokens=60)
    assert generate(model, tokenizer, "abc" + whole[:25], seed=4, max_tokens=35) == whole[25:]


def test_pieces_are_whole_characters_and_make_up_the_text(model, tokenizer) -> None:
    model.allow([*"😀éa".encode()])
    pieces = list(stream(model, tokenizer, "a", max_tokens=300, seed=2))
    assert "".join(pieces) == generate(model, tokenizer, "a", max_tokens=300, seed=2)
    assert all(pieces)
    # The model has read all but the last of the 300 bytes; how an unfinished character looks is not the point.
    assert "".join(pieces).startswith(tokenizer.decode(model.tokens(300)[1:])[:-4])
    assert {"é", "a"} <= set(pieces)


def test_the_prompt_counts_for_the_repetition_penalty(model, tokenizer) -> None:
    generate(model, tokenizer, "abcdef", temperature=0, repetition_penalty=1e6, max_tokens=60, stop_at_eos=False)
    read = model.tokens(65)
    assert len(set(read)) == len(read)


def test_padded_columns_are_never_generated(model, tokenizer) -> None:
    with torch.no_grad():
        model.unembedding[257:] = 0  # logit 0, above many others
    generate(model, tokenizer, "a", temperature=50.0, max_tokens=300, stop_at_eos=False)
    assert max(model.tokens(300)) <= 256


def test_unlimited_text_ends_when_the_consumer_leaves(model, tokenizer) -> None:
    model.train()
    model.layers[0].eval()  # a flag of its own, which must come back as it was
    flags = [module.training for module in model.modules()]
    text = stream(model, tokenizer, "a", max_tokens=None, stop_at_eos=False)
    for _ in itertools.islice(text, 400):
        assert not model.training
        assert not torch.is_inference_mode_enabled()
    assert text.timing.new_tokens >= 400
    assert text.timing.finish is None
    text.close()
    assert next(text, None) is None
    assert [module.training for module in model.modules()] == flags


def test_timing_counts_tokens_and_tells_the_end(model, tokenizer) -> None:
    text = stream(model, tokenizer, "hello", max_tokens=20, stop_at_eos=False)
    list(text)
    assert (text.timing.prompt_tokens, text.timing.new_tokens, text.timing.finish) == (5, 20, "length")
    assert text.timing.read_tokens_per_second > 0
    assert text.timing.decode_tokens_per_second > 0


def test_the_state_after_10_tokens_is_as_large_as_after_10_000(model, tokenizer) -> None:
    sizes = []
    for length in (10, 10_000):
        reader = Reader.create(model, SamplingParams(repetition_penalty=1.1), batch=1)
        prefill(model, [[np.full(length, 97)]], reader)
        sizes.append(reader.state.nbytes())
    assert sizes[0] == sizes[1] == model.init_state(1).nbytes()


READ = """
import sys
import numpy as np
import torch
import samba_lm
from samba_lm.config import Attention, Mamba, ModelConfig, SwiGLU
from samba_lm.memory import peak_memory
from samba_lm.model import SambaLM
from samba_lm.tokenizer import ByteTokenizer

torch.set_num_threads(1)
layers = (Mamba(), SwiGLU(width=48), Attention(heads=2, window=24), SwiGLU(width=48))
model = SambaLM(ModelConfig(name="tiny", d_model=32, vocab_size=257, layers=layers))
model.reset_parameters(0)
for length in (10_000, int(sys.argv[1])):
    chunks = (np.arange(start, min(start + 5000, length)) % 256 for start in range(0, length, 5000))
    samba_lm.generate(model, ByteTokenizer(), chunks, max_tokens=20, repetition_penalty=1.1)
    print(peak_memory())
"""


@pytest.mark.parametrize("length", [200_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_reading_a_long_prompt_takes_no_more_memory_than_a_short_one(length: int) -> None:
    done = subprocess.run([sys.executable, "-c", READ, str(length)], capture_output=True, text=True, check=True)
    short, long = map(int, done.stdout.split())
    assert long - short < 8e6  # 200,000 tokens' hidden states alone would be 25 MB


@pytest.mark.parametrize("prompt", ["", [""]])
def test_an_empty_prompt_starts_a_document(model, tokenizer, prompt) -> None:
    generate(model, tokenizer, prompt, max_tokens=3)
    assert model.tokens(1) == [tokenizer.eos_id]


def test_a_tokenizer_larger_than_the_model_is_refused_at_once(make_model: Callable, tokenizer) -> None:
    for run in (generate, stream):
        with pytest.raises(UserError, match=r"tokenizer has 257 ids but model .* has a vocabulary of 200"):
            run(make_model(200), tokenizer, "a")


@pytest.mark.parametrize("bad", [320, -1])
def test_a_token_id_outside_the_vocabulary_is_named(model, tokenizer, bad: int) -> None:
    ids = np.full(100, 97)
    ids[70] = bad
    with pytest.raises(UserError, match=rf"Token id {bad} at position 70 is outside the model's vocabulary of 320"):
        generate(model, tokenizer, ids, chunk=30)
    with pytest.raises(UserError, match=rf"Token id {bad} at position 70"):
        generate(model, tokenizer, ["abc", ids], chunk=60)


def test_bad_options_are_told_before_any_work(model, tokenizer) -> None:
    with pytest.raises(UserError, match="Did you mean 'top_p'"):
        stream(model, tokenizer, "a", topp=0.9)
    with pytest.raises(UserError, match="chunk=0"):
        stream(model, tokenizer, "a", chunk=0)
    assert model.read == {}


def test_a_bpe_model_streams_text_too(make_model: Callable, bpe) -> None:
    model = make_model(bpe.vocab_size)
    text = "".join(stream(model, bpe, "User: is the sea salt?", max_tokens=50, stop_at_eos=False))
    read = model.tokens(bpe.encode("User: is the sea salt?").size + 49)  # all but the last one made
    assert text.startswith(bpe.decode(read[-49:])[:-3])


@pytest.mark.parametrize("prompt", [5, None, [1, 2]])
def test_a_prompt_of_another_kind_is_told(model, tokenizer, prompt) -> None:
    with pytest.raises(UserError, match=r"A prompt may not be a \w+ \((5|None|1)\): give a text or a numpy array"):
        generate(model, tokenizer, prompt)

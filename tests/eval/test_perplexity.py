"""Every protocol against brute force: each counted token predicted anew from exactly the tokens it may have seen."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from samba_lm.checkpoint import create
from samba_lm.config import Attention, LayerSpec, Mamba, ModelConfig, SwiGLU
from samba_lm.data.prepare import prepare
from samba_lm.data.shards import TokenDataset
from samba_lm.errors import UserError
from samba_lm.eval import losses
from samba_lm.eval import perplexity as module
from samba_lm.eval.perplexity import LengthResult, difference, measure, perplexity
from samba_lm.eval.protocols import OF_DOCUMENTS, Protocol, Settings
from samba_lm.memory import free_memory
from samba_lm.model import SambaLM
from samba_lm.span import Span
from samba_lm.state import State
from samba_lm.tokenizer import ByteTokenizer, train_bpe

VOCAB = 23


class RecordingLM(SambaLM):
    """SambaLM that notes the largest call of its layers and of its head, in tokens."""

    widest = 0
    most_rows = 0
    most_logits = 0

    def run(self, input_ids: Tensor, state: State | None, span: Span) -> tuple[Tensor, State]:
        self.widest = max(self.widest, input_ids.shape[1])
        self.most_rows = max(self.most_rows, input_ids.shape[0])
        return super().run(input_ids, state, span)

    def head(self, hidden: Tensor) -> Tensor:
        logits = super().head(hidden)
        self.most_logits = max(self.most_logits, logits.numel())
        return logits


def _model(*layers: LayerSpec, vocab_size: int = VOCAB) -> RecordingLM:
    model = RecordingLM(ModelConfig(name="tiny", d_model=16, vocab_size=vocab_size, layers=layers))
    model.reset_parameters(seed=3)
    with torch.no_grad():
        model.embedding.mul_(20)  # far from uniform, so that a wrong context shows
    return model.double()


@pytest.fixture(scope="module")
def model() -> RecordingLM:
    """One layer of each kind of memory: recurrent, a window, everything."""
    return _model(Mamba(state=4), Attention(heads=2, window=5), SwiGLU(width=24), Attention(heads=2))


def _tokens(size: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, VOCAB, size)


@torch.no_grad()
def _loss(model: SambaLM, tokens: np.ndarray, begin: int, target: int) -> float:
    """Loss of token ``target`` when the model has read tokens ``begin .. target - 1`` and nothing else."""
    logits, _ = model(torch.from_numpy(tokens[begin:target].astype(np.int64))[None])
    return float(-logits[0, -1].log_softmax(-1)[int(tokens[target])])


def _check(result: LengthResult, samples: Iterable[list[float]]) -> None:
    samples = list(samples)
    losses = np.concatenate(samples)
    means = [np.mean(sample) for sample in samples]
    assert result.note == ""
    assert result.windows == len(samples)
    assert result.tokens == losses.size
    assert result.loss == pytest.approx(losses.mean(), rel=1e-10)
    assert result.perplexity == pytest.approx(math.exp(losses.mean()), rel=1e-10)
    if len(samples) > 1:
        assert result.standard_error == pytest.approx(np.std(means, ddof=1) / math.sqrt(len(means)), rel=1e-7)
    else:
        assert math.isnan(result.standard_error)


# Pieces and batches that end everywhere: inside windows, at their ends, beyond.
@pytest.mark.parametrize(("batch", "chunk"), [(None, 2048), (1, 5), (3, 7), (100, 1)])
@pytest.mark.parametrize("stride", [None, 4, 9])
def test_full_window(model: SambaLM, stride: int | None, batch: int | None, chunk: int) -> None:
    tokens = _tokens(33)
    results = perplexity(model, tokens, [12, 8], stride=stride, batch=batch, chunk=chunk)
    assert [result.length for result in results] == [8, 12]
    for result in results:
        starts = range(0, 33 - result.length + 1, stride or result.length)
        assert result.positions == (1, result.length)
        _check(result, [[_loss(model, tokens, s, s + i) for i in range(1, result.length)] for s in starts])


@pytest.mark.parametrize(("batch", "chunk"), [(None, 2048), (2, 5), (1, 6)])
def test_prefix_measures_the_same_documents_at_every_length(model: SambaLM, batch: int | None, chunk: int) -> None:
    documents = [_tokens(size, seed=size) for size in (21, 11, 17, 5, 16)]
    results = perplexity(model, documents, [4, 9, 16, 99], protocol="prefix", batch=batch, chunk=chunk)
    long = [document for document in documents if document.size >= 16]
    for result in results[:3]:
        _check(result, [[_loss(model, document, 0, i) for i in range(1, result.length)] for document in long])
    assert results[3].windows == 0
    assert results[3].note == "length 99 needs a document of that many tokens, and the longest has 21"


@pytest.mark.parametrize(("batch", "chunk"), [(None, 2048), (2, 5), (1, 6)])
def test_stream_counts_each_token_in_the_bucket_where_it_stands(model: SambaLM, batch: int | None, chunk: int) -> None:
    documents = [_tokens(size, seed=size) for size in (21, 11, 17)]
    results = perplexity(model, documents, [4, 9, 16], protocol="stream", batch=batch, chunk=chunk)
    assert [result.positions for result in results] == [(1, 4), (4, 9), (9, 16)]
    for result in results:
        _check(
            result, [[_loss(model, d, 0, i) for i in range(*result.positions)] for d in (documents[0], documents[2])]
        )


@pytest.mark.parametrize(("batch", "chunk"), [(None, 2048), (2, 5), (1, 6)])
def test_every_document_that_is_long_enough(model: SambaLM, batch: int | None, chunk: int) -> None:
    documents = [_tokens(size, seed=size) for size in (9, 21, 3, 16, 17)]

    def results(protocol: Protocol, **more: int) -> list[LengthResult]:
        return perplexity(
            model, documents, [4, 9, 16], protocol=protocol, documents="every", batch=batch, chunk=chunk, **more
        )

    for result in results("stream"):
        long = [d for d in documents if d.size >= result.length]
        assert len(long) == {4: 4, 9: 4, 16: 3}[result.length]
        _check(result, [[_loss(model, d, 0, i) for i in range(*result.positions)] for d in long])
    for result in results("prefix"):
        long = [d for d in documents if d.size >= result.length]
        _check(result, [[_loss(model, d, 0, i) for i in range(1, result.length)] for d in long])
    # With a bound the longest are read, so that those of a length are among those of a shorter one.
    starts = [result.starts for result in results("prefix", max_tokens=33)]
    assert starts == [(0, 9, 33, 49), (9, 33, 49), (9, 49)]


def test_a_length_does_not_depend_on_what_else_is_measured(model: SambaLM) -> None:
    documents = [_tokens(size, seed=size) for size in (21, 9, 17, 40)]
    for protocol in get_args(Protocol):
        for chosen in ("same", "every") if protocol in OF_DOCUMENTS else ("same",):
            window = 6 if protocol == "sliding-window" else None
            settings = Settings.of(protocol, [4, 9, 16, 99], window=window, documents=chosen)
            whole = {result.length: result for result in measure(model, documents, settings)}
            assert sorted(whole) == [4, 9, 16, 99]
            for without in ({9}, {4, 16}, {4, 9, 16}, {99}):
                parts = list(measure(model, documents, settings, without=without, chunk=5))
                assert {result.length for result in parts} == whole.keys() - without
                for result in parts:
                    assert result.means == pytest.approx(whole[result.length].means, rel=1e-12)
                    assert result.positions == whole[result.length].positions


def test_facts_tell_what_a_length_depends_on() -> None:
    def facts(protocol: Protocol, lengths: list[int], **more: int | str) -> dict[str, object]:
        return Settings.of(protocol, lengths, **more).facts()

    assert facts("full-window", [8, 16]) == facts("full-window", [64])
    assert facts("full-window", [8, 16]) != facts("full-window", [8, 16], stride=4)
    assert facts("prefix", [8, 16]) == facts("prefix", [16, 12])
    assert facts("prefix", [8, 16]) != facts("prefix", [8, 32])
    assert facts("prefix", [8], documents="every") == facts("prefix", [32], documents="every")
    assert facts("last-stride", [8, 16]) != facts("last-stride", [4, 16])  # half of it is the stride
    assert facts("stream", [8, 16]) != facts("stream", [8, 12, 16])


def test_intervals_come_from_the_windows_means(model: SambaLM) -> None:
    (result,) = perplexity(model, _tokens(400), [8], max_tokens=5 * 8)
    low, high = result.loss_interval
    assert high - low == pytest.approx(2 * 2.7764451 * np.std(result.means, ddof=1) / math.sqrt(5))
    assert result.loss == pytest.approx((low + high) / 2)
    assert result.interval == (pytest.approx(math.exp(low)), pytest.approx(math.exp(high)))
    assert result.starts == (0, 8, 16, 24, 32)
    (one,) = perplexity(model, _tokens(400), [8], max_tokens=8)
    assert all(math.isnan(end) for end in (*one.loss_interval, *one.interval, *one.bits_interval))
    (alike,) = perplexity(model, np.tile(_tokens(8), 4), [8], tokenizer=ByteTokenizer())
    assert alike.bits_interval == (pytest.approx(alike.bits_per_byte),) * 2


@pytest.mark.parametrize(("batch", "chunk"), [(None, 2048), (1, 5), (3, 4)])
def test_last_stride(model: SambaLM, batch: int | None, chunk: int) -> None:
    tokens = _tokens(30)  # the last window ends with the text
    results = perplexity(model, tokens, [8, 12, 20], protocol="last-stride", stride=5, batch=batch, chunk=chunk)
    for result in results:
        ends = (20, 25, 30)  # of the longest windows: the targets do not depend on the length
        assert result.positions == (result.length - 5, result.length)
        _check(result, [[_loss(model, tokens, e - result.length, i) for i in range(e - 5, e)] for e in ends])


def test_last_stride_scores_the_same_tokens_at_every_length() -> None:
    """A model that sees only the current token gives each target one loss, whatever the window: equal sums."""
    memoryless = _model(SwiGLU(width=24))
    results = perplexity(
        memoryless, _tokens(500), [8, 32, 128, 999], protocol="last-stride", stride=6, max_tokens=2 * 128
    )
    assert [result.windows for result in results] == [2, 2, 2, 0]
    assert len({round(result.loss, 12) for result in results[:3]}) == 1
    full = perplexity(memoryless, _tokens(500), [8, 32, 128])
    assert len({round(result.loss, 12) for result in full}) == 3  # here the tokens do differ


@pytest.mark.parametrize(("batch", "chunk"), [(None, 2048), (1, 5), (3, 4)])
@pytest.mark.parametrize(("window", "stride"), [(8, None), (8, 3), (7, 6), (2, 1), (64, 8)])
def test_sliding_window(model: SambaLM, window: int, stride: int | None, batch: int | None, chunk: int) -> None:
    tokens = _tokens(41)
    results = perplexity(
        model, tokens, [6, 8, 9, 20], protocol="sliding-window", window=window, stride=stride, batch=batch, chunk=chunk
    )
    step = stride or window // 2
    for result in results:
        samples = []
        for text in range(0, 41 - result.length + 1, result.length):
            losses = []
            for i in range(1, result.length):
                # The first window, of those that move by `step` and stop at the text's end, that reaches token i.
                moved = max(0, -(-(i + 1 - window) // step)) * step
                begin = min(moved, max(0, result.length - window))
                assert begin <= i - 1
                assert i + 1 - begin <= window
                losses.append(_loss(model, tokens, text + begin, text + i))
            samples.append(losses)
        _check(result, samples)


@pytest.mark.parametrize("protocol", ["full-window", "prefix", "last-stride", "stream", "sliding-window"])
def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(protocol: Protocol) -> None:
    uniform = _model(Mamba(state=4), Attention(heads=2, window=5)).float()
    torch.nn.init.zeros_(uniform.embedding)
    window = 6 if protocol == "sliding-window" else None
    for result in perplexity(uniform, _tokens(64), [8, 16], protocol=protocol, window=window):
        assert result.perplexity == pytest.approx(VOCAB, rel=1e-6)
        assert result.tokens >= 3


@pytest.mark.parametrize("protocol", ["full-window", "prefix", "last-stride", "stream", "sliding-window"])
def test_progress_counts_every_token_read(model: SambaLM, protocol: Protocol) -> None:
    told: list[tuple[int, int]] = []
    window = 6 if protocol == "sliding-window" else None
    perplexity(
        model,
        [_tokens(40), _tokens(30)],
        [8, 16],
        protocol=protocol,
        window=window,
        chunk=5,
        progress=lambda done, total: told.append((done, total)),
    )
    done, totals = zip(*told, strict=True)
    assert set(totals) == {done[-1]}
    assert list(done) == sorted(set(done))


def test_max_tokens_bounds_the_windows_but_reads_one(model: SambaLM) -> None:
    tokens = _tokens(64)
    assert [r.windows for r in perplexity(model, tokens, [4, 16, 32], max_tokens=20)] == [5, 1, 1]
    documents = [tokens] * 5
    assert [r.windows for r in perplexity(model, documents, [4, 16], protocol="prefix", max_tokens=40)] == [2, 2]
    spread = perplexity(model, tokens, [8, 16], protocol="last-stride", stride=4, max_tokens=32)
    assert [r.windows for r in spread] == [2, 2]
    # Not the first two of 13 ends, 16 and 20, but the first and one in the middle.
    _check(spread[0], [[_loss(model, tokens, e - 8, i) for i in range(e - 4, e)] for e in (16, 40)])


def test_bits_per_byte_of_bytes_and_of_longer_tokens() -> None:
    uniform = _model(Mamba(state=4), vocab_size=300)
    torch.nn.init.zeros_(uniform.embedding)
    text = "the sea is salt and the sand is dry, " * 20
    for tokenizer in (ByteTokenizer(), train_bpe([text], 280)):
        ids = tokenizer.encode(text)
        (result,) = perplexity(uniform, ids, [ids.size], tokenizer=tokenizer)
        scored = len(text) - len(tokenizer.decode(ids[:1]))
        assert result.bits_per_byte == pytest.approx((ids.size - 1) * math.log2(300) / scored)
        decoded = sum(len(tokenizer.decode([i])) for i in ids[1:])  # one by one, by a way of its own
        assert decoded == scored
        (padded,) = perplexity(uniform, np.append(ids, 299), [ids.size + 1], tokenizer=tokenizer)
        assert padded.bits_per_byte == pytest.approx(ids.size * math.log2(300) / scored)
    (unknown,) = perplexity(uniform, ids, [16])
    assert unknown.bits_per_byte is None


def test_bytes_of_prefixes_add_up_over_buckets() -> None:
    uniform = _model(Mamba(state=4), vocab_size=300)
    torch.nn.init.zeros_(uniform.embedding)
    documents = [np.arange(97, 97 + 20), np.full(20, 98)]
    for result in perplexity(uniform, documents, [5, 9, 20], protocol="prefix", tokenizer=ByteTokenizer()):
        assert result.bits_per_byte == pytest.approx(math.log2(300))


def test_prepared_data_and_maps_give_what_arrays_give(model: SambaLM, tmp_path: Path) -> None:
    letters = ["abcdefghijklmnopqrstuv" * 2, "vutsrq" * 4, "aabbccddeeff" * 3]
    files = []
    for i, text in enumerate(letters):
        files.append(tmp_path / f"{i}.txt")
        files[-1].write_text(text)
    wide = _model(Mamba(state=4), Attention(heads=2, window=5), vocab_size=257)
    prepare(files, tmp_path / "data", ByteTokenizer(), shard_tokens=30)
    documents = [np.append(ByteTokenizer().encode(text), 256).astype(np.uint16) for text in letters]
    dataset = TokenDataset.open(tmp_path / "data")
    np.save(tmp_path / "map.npy", np.concatenate(documents))
    mapped = np.load(tmp_path / "map.npy", mmap_mode="r")
    for protocol in ("full-window", "prefix"):
        given = perplexity(wide, documents, [8, 30], protocol=protocol, tokenizer=ByteTokenizer())
        assert given == perplexity(wide, dataset, [8, 30], protocol=protocol)
    assert perplexity(wide, mapped, [8, 30], tokenizer=ByteTokenizer()) == perplexity(wide, dataset, [8, 30])


def test_a_loss_that_is_not_finite_is_named_and_spares_the_other_lengths(model: SambaLM) -> None:
    class Overflowing(RecordingLM):
        def run(self, input_ids: Tensor, state: State | None, span: Span) -> tuple[Tensor, State]:
            hidden, after = super().run(input_ids, state, span)
            late = after.position[:, None] - input_ids.shape[1] + torch.arange(input_ids.shape[1]) >= 20
            return hidden.masked_fill(late[..., None], torch.nan), after

    broken = Overflowing(model.config).double()
    broken.load_state_dict(model.state_dict())
    tokens = _tokens(64)
    good, bad = perplexity(broken, tokens, [16, 32])
    assert good == perplexity(model, tokens, [16])[0]
    assert math.isnan(bad.loss)
    assert math.isnan(bad.perplexity)
    assert bad.windows == 2
    assert bad.note.startswith("at length 32 the loss is not finite in 2 of 2 window(s)")


def test_a_loss_too_large_for_exp_is_an_infinite_perplexity() -> None:
    wild = _model(SwiGLU(width=24))
    with torch.no_grad():
        wild.embedding.mul_(1e4)
    (result,) = perplexity(wild, _tokens(32), [16])
    assert result.loss > 710
    assert result.perplexity == math.inf
    assert result.note == ""


def test_calls_stay_within_their_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(Mamba(state=4), Attention(heads=2, window=5)).float()
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 64 * VOCAB)
    monkeypatch.setattr(losses, "TOKENS_AT_ONCE", {"cpu": 128})
    perplexity(model, _tokens(2000), [16, 1000], chunk=100)
    assert model.widest == 100
    assert model.most_rows == 128 // 16
    assert model.most_logits == 64 * VOCAB
    full = _model(Attention(heads=2)).float()
    perplexity(full, _tokens(2000), [100], chunk=10)
    assert full.most_rows == 1  # full attention keeps all 100 of each window, not 10


_READ = """
import numpy as np, torch
from samba_lm.checkpoint import create
from samba_lm.config import Attention, Mamba, ModelConfig
from samba_lm.eval.perplexity import perplexity
from samba_lm.memory import peak_memory

torch.set_num_threads(1)
layers = (Mamba(expand=1, state=2), Attention(heads=1, window=16))
model = create(ModelConfig(name="tiny", d_model=8, vocab_size=512, layers=layers))
tokens = np.zeros(1 << 17, dtype=np.uint16)
for length in (1 << 13, 1 << 17):
    for protocol in ("full-window", "stream"):
        perplexity(model, tokens, [length], protocol=protocol, max_tokens=length)
    print(peak_memory())
"""


def test_memory_does_not_grow_with_the_length() -> None:
    told = subprocess.run([sys.executable, "-c", _READ], capture_output=True, text=True, check=True).stdout
    short, long = map(int, told.split())
    assert long - short < 20 * 2**20, told  # the logits of 2**17 tokens alone would be 256 MiB


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": []}, r"lengths are \[\]: give at least one"),
        ({"lengths": [1, 8]}, r"lengths are \[1, 8\]: give at least one, each of 2 tokens or more"),
        ({"lengths": [50, 60]}, "The text has 40 tokens, fewer than the shortest length, 50"),
        ({"lengths": [50], "protocol": "stream"}, r"The longest of 1 document\(s\) has 40 tokens"),
        ({"protocol": "prefx"}, "Unknown protocol 'prefx'. Did you mean 'prefix'?"),
        ({"stride": 0}, "stride is 0: it must be at least 1"),
        ({"documents": "all"}, "documents is 'all': it must be same or every"),
        ({"documents": "every"}, "documents is every, but full-window reads over their boundaries"),
        ({"max_tokens": 0}, "max_tokens is 0: it must be at least 1"),
        ({"batch": 0}, "batch is 0: it must be at least 1"),
        ({"chunk": 0}, "chunk is 0: it must be at least 1"),
        ({"protocol": "stream", "stride": 4}, "stride is 4, but stream has none"),
        ({"protocol": "last-stride", "stride": 8}, "stride is 8: it must be less than the shortest length, 8"),
        ({"window": 4}, "window is 4, but full-window has none"),
        ({"protocol": "sliding-window"}, "sliding-window needs a window"),
        ({"protocol": "sliding-window", "window": 4, "stride": 4}, "stride is 4: it must be less than the window, 4"),
        ({"protocol": "sliding-window", "window": 1}, "stride is 1: it must be less than the window, 1"),
        ({"tokens": np.zeros(40)}, r"tokens is float64 of shape \[40\]"),
        ({"tokens": np.zeros((4, 10), dtype=np.int64)}, r"tokens is int64 of shape \[4, 10\]"),
        ({"tokens": []}, "tokens is an empty list"),
        (
            {"tokens": np.arange(VOCAB + 1)},
            "Token id 23 at token 23 of the text is outside the model's vocabulary of 23",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(model: SambaLM, change: dict, message: str) -> None:
    arguments: dict = {"tokens": _tokens(40), "lengths": [8], **change}
    with pytest.raises(UserError, match=message) as error:
        perplexity(model, arguments.pop("tokens"), arguments.pop("lengths"), **arguments)
    assert "\n" not in str(error.value)


def test_two_models_are_compared_window_by_window(model: SambaLM) -> None:
    other = _model(Mamba(state=4), SwiGLU(width=24))
    tokens = _tokens(400)
    (one,), (two,) = (perplexity(each, tokens, [16]) for each in (model, other))
    change = difference(one, two)
    gaps = np.array(one.means) - two.means
    assert change.mean == pytest.approx(one.loss - two.loss)
    assert change.reach == pytest.approx(2.0638986 * np.std(gaps, ddof=1) / math.sqrt(25))
    assert difference(one, one).mean == difference(one, one).reach == 0
    for unlike in (perplexity(model, tokens, [8])[0], perplexity(model, tokens[:99], [16])[0]):
        assert math.isnan(difference(one, unlike).mean)
    assert math.isnan(difference(one, replace(two, means=())).mean)


@pytest.mark.parametrize("protocol", ["full-window", "prefix", "stream"])
def test_what_full_attention_may_not_hold_is_skipped(protocol: Protocol) -> None:
    config = ModelConfig(name="full", d_model=16, vocab_size=VOCAB, max_context=20, layers=(Attention(heads=2),))
    model = create(config)
    told: list[tuple[int, int]] = []
    results = perplexity(model, _tokens(64), [8, 16, 32, 64], protocol=protocol, progress=lambda *t: told.append(t))
    assert [result.windows > 0 for result in results] == [True, True, False, False]
    assert results[2].note == "full attention would have to hold 31 positions, and max_context is 20"
    assert math.isnan(results[2].perplexity)
    assert results[:2] == perplexity(model, _tokens(64), [8, 16], protocol=protocol)
    assert told[-1][0] == told[-1][1]
    (none,) = perplexity(model, _tokens(64), [32], protocol=protocol)
    assert none.windows == 0
    assert perplexity(model, _tokens(64), [8, 32], protocol="sliding-window", window=16)[1].tokens == 62


class SmallLM(RecordingLM):
    """SambaLM with room for so many tokens: its own keys and values, and one piece of what is read."""

    room = 1 << 30

    def run(self, input_ids: Tensor, state: State | None, span: Span) -> tuple[Tensor, State]:
        held = 0 if state is None or self.config.constant_state else state.layers[0]["k"].shape[1]
        if input_ids.shape[0] * (held + input_ids.shape[1]) > self.room:
            raise torch.OutOfMemoryError("no more")
        return super().run(input_ids, state, span)


@pytest.mark.parametrize("protocol", ["full-window", "prefix", "stream"])
def test_memory_that_ends_makes_batches_smaller_then_skips(protocol: Protocol, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK", 8)
    monkeypatch.setattr(losses, "TOKENS_AT_ONCE", {"cpu": 4096})
    model = SmallLM(ModelConfig(name="full", d_model=16, vocab_size=VOCAB, layers=(Attention(heads=2),))).double()
    model.reset_parameters(seed=1)
    documents = [_tokens(70, seed=seed) for seed in range(6)]
    told: list[tuple[int, int]] = []

    def measured() -> list[LengthResult]:
        return perplexity(model, documents, [8, 16, 64], protocol=protocol, progress=lambda *t: told.append(t))

    whole = measured()
    assert model.most_rows > 4
    assert model.widest > 8
    for room, lengths in ((128, 3), (80, 3), (40, 2), (1, 0)):
        model.room, model.most_rows = room, 0
        results = measured()
        for result, expected in zip(results[:lengths], whole, strict=False):
            assert result.means == pytest.approx(expected.means)
            assert result.bits_per_byte == expected.bits_per_byte
        ended = (64,) if lengths == 2 else (8, 16, 64) if protocol == "full-window" else (8, 8, 8)
        assert [result.note for result in results[lengths:]] == [
            f"out of memory with {length} tokens" for length in ended[: 3 - lengths]
        ]
    model.room = 128
    told.clear()
    measured()
    assert told[-1][0] == told[-1][1]  # what was read twice counts once


_OUT = """
import resource
from pathlib import Path
import numpy as np, torch
from samba_lm.checkpoint import create
from samba_lm.config import Attention, ModelConfig
from samba_lm.eval.perplexity import perplexity

torch.set_num_threads(1)
config = ModelConfig(name="full", d_model=64, vocab_size=64, layers=(Attention(heads=1),) * 2)
model, tokens = create(config), np.zeros(1 << 16, dtype=np.uint16)
perplexity(model, tokens, [64])
status = Path("/proc/self/status").read_text().splitlines()
taken = next(int(line.split()[1]) for line in status if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, ((taken << 10) + (48 << 20),) * 2)
for result in perplexity(model, tokens, [512, 1 << 16], max_tokens=1 << 16):
    print(result.length, result.windows, result.note)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_that_really_ends_does_not_end_the_run() -> None:
    told = subprocess.run([sys.executable, "-c", _OUT], capture_output=True, text=True, check=True).stdout
    assert told.splitlines() == ["512 128 ", "65536 0 out of memory with 65,536 tokens"]


def test_what_full_attention_would_take_is_compared_with_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    full, recurrent = _model(Attention(heads=2)).float(), _model(Mamba(state=4)).float()
    monkeypatch.setattr(module, "free_memory", lambda: 60_000)
    some, none = perplexity(full, _tokens(512), [100, 500])
    assert some.windows == 5
    assert none.note == "full attention would take about 0.0 GiB at length 500, and 0.0 GiB are free"
    assert perplexity(recurrent, _tokens(512), [500])[0].windows == 1
    free = free_memory()
    assert sys.platform != "linux" or (free is not None and free > 1 << 20)


@pytest.mark.gpu
@pytest.mark.parametrize("protocol", ["full-window", "stream"])
def test_a_gpu_gives_what_the_cpu_gives(protocol: Protocol) -> None:
    layers = (Mamba(), SwiGLU(width=96), Attention(heads=2, window=96), SwiGLU(width=96))
    model = create(ModelConfig(name="tiny", d_model=64, vocab_size=VOCAB, layers=layers))
    documents = [_tokens(size, seed=size) for size in (5000, 3000, 4100)]
    on_cpu = perplexity(model, documents, [512, 2048, 4096], protocol=protocol)
    model.cuda()
    for batch, chunk in ((None, None), (1, 700), (2, 4096)):
        on_gpu = perplexity(model, documents, [512, 2048, 4096], protocol=protocol, batch=batch, chunk=chunk)
        for ours, theirs in zip(on_gpu, on_cpu, strict=True):
            assert ours.means == pytest.approx(theirs.means, rel=2e-4)


@pytest.mark.gpu
def test_a_gpu_is_not_waited_for_between_pieces() -> None:
    layers = (Mamba(), Attention(heads=2, window=96), SwiGLU(width=96))
    model = create(ModelConfig(name="tiny", d_model=64, vocab_size=VOCAB, layers=layers)).cuda()
    documents = [_tokens(8192, seed=seed) for seed in range(3)]

    def waits(chunk: int) -> int:
        perplexity(model, documents, [8192], protocol="stream", chunk=chunk)  # kernels are made ready
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                perplexity(model, documents, [8192], protocol="stream", chunk=chunk)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("called a synchronizing" in str(each.message) for each in told)

    assert waits(512) == waits(4096)


@pytest.mark.gpu
def test_a_gpu_without_room_for_all_keys_skips_the_length() -> None:
    model = create(ModelConfig(name="full", d_model=1024, vocab_size=64, layers=(Attention(heads=8),) * 4)).cuda()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (1 << 29)) / total)
    try:
        some, none = perplexity(model, np.zeros(1 << 18, dtype=np.uint16), [4096, 1 << 18], max_tokens=1 << 18)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert some.windows == 64
    assert none.note == "out of memory with 262,144 tokens"

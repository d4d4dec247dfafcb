"""Going on from a file is going on in memory, to the last bit; what does not fit or is not whole never loads."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import resource
import shutil
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import samba_lm
from samba_lm.config import Attention, GatedLinearAttention, Mamba, MegaS6, ModelConfig, Retention, SelfExtend, SwiGLU
from samba_lm.contexts import file
from samba_lm.contexts.identity import identify, weights_hash
from samba_lm.contexts.info import inspect
from samba_lm.contexts.reading import read
from samba_lm.contexts.snapshot import Snapshot, load, save
from samba_lm.contexts.token_hash import TokenHash
from samba_lm.engine.engine import Engine
from samba_lm.engine.request import End, Request
from samba_lm.errors import UserError
from samba_lm.generation.params import SamplingParams
from samba_lm.generation.prefill import Reader, prefill
from samba_lm.model import SambaLM
from samba_lm.tokenizer import ByteTokenizer, train_bpe

TOKENIZER = ByteTokenizer()
TEXT = "The sea is salt, as the tears are; and the sand: é😀.\n" * 5


@pytest.fixture
def book(model: SambaLM, tmp_path: Path) -> Path:
    path = tmp_path / "book.ctx"
    save(path, read(model, TOKENIZER, TEXT, "A book"), model, TOKENIZER)
    return path


def all_bits(reader: Reader) -> list[torch.Tensor]:
    layers = [t for layer in reader.state.layers for _, t in sorted(layer.items())]
    assert reader.logits is not None
    return [reader.logits, reader.state.cursor.segment, reader.state.position, *layers]


def go_on(model: SambaLM, reader: Reader) -> list[torch.Tensor]:
    """All that comes of some steps, a chunk and a step more."""
    seen = []
    for token in range(5):
        seen.append(model.step(torch.tensor([token]), reader.state))
    reader.lengths[0] += 5
    prefill(model, [[np.arange(40) % 7]], reader)
    assert reader.logits is not None
    seen.append(reader.logits)
    seen.append(model.step(torch.tensor([9]), reader.state))
    return [*seen, *all_bits(reader)]


SAMBA = (Mamba(), SwiGLU(width=48), Attention(heads=2, window=24))
EVERY_KIND = (
    *SAMBA,
    Attention(heads=4, kv_heads=2, window=16, short_conv=4),
    Attention(heads=2),
    SelfExtend(heads=2, group=4, neighbor_window=16),
    GatedLinearAttention(heads=2),
    Retention(heads=2),
    MegaS6(z_dim=8, chunk=16),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layers", [SAMBA, EVERY_KIND], ids=["samba", "every-kind"])
def test_going_on_from_a_file_is_going_on_in_memory(layers: tuple, dtype: torch.dtype, tmp_path: Path) -> None:
    config = ModelConfig(name="kinds", d_model=32, vocab_size=260, layers=layers, max_context=4096)
    model = samba_lm.create(config, dtype=dtype).eval()
    snapshot = read(model, TOKENIZER, TEXT, "A book")
    save(tmp_path / "a.ctx", snapshot, model, TOKENIZER)
    loaded = load(tmp_path / "a.ctx", model, TOKENIZER)
    assert (loaded.title, loaded.created, loaded.read) == (snapshot.title, snapshot.created, snapshot.read)
    assert loaded.seen is not None
    assert snapshot.seen is not None
    assert torch.equal(loaded.seen, snapshot.seen)
    pairs = zip(go_on(model, snapshot.reader()), go_on(model, loaded.reader()), strict=True)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
    # Neither reader moved its snapshot.
    pairs = zip(all_bits(snapshot.reader()), all_bits(loaded.reader()), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_computing_in_another_dtype_than_the_parameters(model: SambaLM, make_model: Callable, tmp_path: Path) -> None:
    mixed = make_model()
    mixed.compute_dtype = torch.bfloat16
    save(tmp_path / "a.ctx", read(mixed, TOKENIZER, TEXT), mixed, TOKENIZER)
    assert load(tmp_path / "a.ctx", mixed, TOKENIZER).logits.dtype == torch.bfloat16
    with pytest.raises(UserError, match=r"made in float32/bfloat16 .*, and this model runs in float32/float32"):
        load(tmp_path / "a.ctx", model, TOKENIZER)


def test_an_engine_goes_on_from_a_file_and_keeps_what_another_goes_on_from(model: SambaLM, tmp_path: Path) -> None:
    """What a server does: a context from a file, an answer, and the state after it as a file again."""
    save(tmp_path / "a.ctx", read(model, TOKENIZER, TEXT), model, TOKENIZER)
    params = SamplingParams(temperature=0, max_tokens=20, stop_at_eos=False)
    question, answers = TOKENIZER.encode(" And why?"), []
    with Engine(model, TOKENIZER, slots=2) as engine:
        for context in (load(tmp_path / "a.ctx", model, TOKENIZER).reader(), read(model, TOKENIZER, TEXT).reader()):
            *pieces, end = engine.stream(Request([question], params, context=context, keep=True))
            answer = [token.id for piece in pieces for token in getattr(piece, "tokens", ())]
            answers.append(answer)
            assert isinstance(end, End)
            assert end.reader is not None
            assert end.last == answer[-1]
            hashed = TokenHash().add(TOKENIZER.encode(TEXT)).add(question).add(np.array(answer))
            snapshot = Snapshot.of_answer(model, end.reader, answer[-1], hashed, "talk")
            assert [snapshot.tokens] == snapshot.state.position.tolist()
            save(tmp_path / "b.ctx", snapshot, model, TOKENIZER)
    assert answers[0] == answers[1]
    assert len(answers[0]) == 20
    after = samba_lm.generate(model, TOKENIZER, "", params, context=load(tmp_path / "b.ctx", model, TOKENIZER).reader())
    whole = np.concatenate([TOKENIZER.encode(TEXT), question, answers[0]])
    assert after == samba_lm.generate(model, TOKENIZER, whole, params)


# What does not fit.


def test_what_does_not_fit_is_refused_with_what_differs(model: SambaLM, make_model: Callable, book: Path) -> None:
    def refusal(model: SambaLM, tokenizer=TOKENIZER) -> str:
        with pytest.raises(UserError) as caught:
            load(book, model, tokenizer)
        message = str(caught.value)
        assert message.startswith(f"{book} ")
        assert message.endswith((".", "."))
        assert "\n" not in message
        return message

    assert "was made by the model 'tiny' (config " in refusal(make_model(width=40))
    assert "was made by other weights of 'tiny' (hash " in refusal(make_model(seed=2))
    assert "was made with another tokenizer (fingerprint " in refusal(model, train_bpe([TEXT], 260))
    bfloat16 = samba_lm.checkpoint.place(make_model(), "cpu", torch.bfloat16)
    assert "was made in float32/float32 (parameters/computation), and this model runs in bfloat16" in refusal(bfloat16)
    trained = make_model()
    load(book, trained, TOKENIZER)
    with torch.no_grad():
        next(trained.parameters()).view(-1)[7] += 1e-3
    assert "other weights" in refusal(trained)


def test_the_weights_are_hashed_once_and_again_when_they_change(make_model: Callable, monkeypatch) -> None:
    from samba_lm.contexts import identity

    model, calls = make_model(), []
    hashing = identity._hash
    monkeypatch.setattr(identity, "_hash", lambda tensors: calls.append(1) or hashing(tensors))
    first = weights_hash(model)
    assert [weights_hash(model), weights_hash(model), len(calls)] == [first, first, 1]
    assert weights_hash(make_model()) == first
    before = model.norm.weight.detach().clone()
    with torch.no_grad():
        model.norm.weight.add_(1)
    assert weights_hash(model) != first
    model.norm.weight = torch.nn.Parameter(before)
    assert weights_hash(model) == first
    with torch.no_grad():  # the same bytes under other names
        model.layers[1].norm.weight.fill_(2)
        one = weights_hash(model)
        model.layers[1].norm.weight.fill_(1)
        model.layers[3].norm.weight.fill_(2)
    assert weights_hash(model) != one


def test_blocks_of_weights_are_hashed_in_order(make_model: Callable, monkeypatch) -> None:
    from samba_lm.contexts import identity

    monkeypatch.setattr(identity, "_BLOCK", 4096)
    assert weights_hash(make_model()) == weights_hash(make_model()) != weights_hash(make_model(seed=2))


# What is not whole.


def refused(path: Path, model: SambaLM) -> str:
    """Why a file does not load, which is also why it cannot be inspected."""
    with pytest.raises(UserError) as inspected:
        inspect(path)
    with pytest.raises(UserError) as loaded:
        load(path, model, TOKENIZER)
    assert str(loaded.value) == str(inspected.value)
    return str(loaded.value)


def test_a_flipped_bit_anywhere_never_loads(model: SambaLM, book: Path) -> None:
    whole = book.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    places = [*range(header), *random.sample(range(header, len(whole)), 300), len(whole) - 1]
    reasons = set()
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << random.randrange(8)
        book.write_bytes(damaged)
        with pytest.raises(UserError) as caught:
            inspect(book)
        reasons.add(re.sub(r"version '.*?'", "version", str(caught.value)).removeprefix(str(book)))
    for place in random.sample(places, 40):
        book.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        refused(book, model)
    assert 2 <= len(reasons) <= 3  # no context; damaged; another version, where that was what changed
    book.write_bytes(whole)
    load(book, model, TOKENIZER)


def test_a_cut_or_grown_file_never_loads(model: SambaLM, book: Path) -> None:
    whole = book.read_bytes()
    for size in [0, 1, 7, 8, 9, 500, *random.sample(range(len(whole)), 40), len(whole) - 1]:
        book.write_bytes(whole[:size])
        assert re.search("no context, or its beginning is damaged|damaged or cut off", refused(book, model))
    for more in (b"\0", b" ", whole):
        book.write_bytes(whole + more)
        assert "damaged or cut off" in refused(book, model)


def rewrite(path: Path, change: Callable[[dict], None]) -> None:
    """Change the header and make the checksum right, as somebody could who wants to."""
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    change(header)
    header.get("__metadata__", {}).update(checksum="0" * 64)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])
    place = 8 + text.index(b'"checksum":"') + 12
    with path.open("r+b") as opened:
        checksum = file._checksum(opened.fileno(), path.stat().st_size, place)
        opened.seek(place)
        opened.write(checksum.encode())


def of_metadata(**changes: object) -> Callable[[dict], None]:
    return lambda header: header["__metadata__"].update(changes)


def of_tensor(name: str, **changes: object) -> Callable[[dict], None]:
    return lambda header: header[name].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_metadata(version="2"), "has format version '2', this samba-lm reads '1': upgrade samba-lm, or make it"),
        (of_metadata(format="pt"), "is no context"),
        (of_metadata(tokens="12"), "not written by this version"),
        (of_metadata(tokens="-1"), "not written by this version"),
        (of_metadata(token_chain="zz"), "not written by this version"),
        (of_metadata(title="two\nlines"), "not written by this version"),
        (of_metadata(title=3), "not written by this version"),
        (of_metadata(created=None), "not written by this version"),
        (lambda header: header["__metadata__"].pop("made_by_weights"), "not written by this version"),
        (of_tensor("logits", shape="260"), "does not understand"),
        (of_tensor("logits", shape=[-1, 260]), "does not understand"),
        (of_tensor("logits", data_offsets=[0, 1 << 40]), "does not understand"),
        (of_tensor("logits", data_offsets=[9, 8]), "does not understand"),
        (of_tensor("logits", data_offsets=3), "does not understand"),
        (lambda header: header.update(logits=[]), "does not understand"),
    ],
)
def test_a_strange_header_is_refused(model: SambaLM, book: Path, change: Callable, message: str) -> None:
    rewrite(book, change)
    assert message in refused(book, model)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.pop("logits"),
        lambda header: header.pop("layers.0.ssm"),
        lambda header: header.update(more=header["logits"]),
        of_tensor("logits", shape=[260]),
        of_tensor("logits", shape=[1, 261]),
        of_tensor("logits", dtype="I32"),
        of_tensor("logits", dtype="F8_E4M3"),
        of_tensor("seen", dtype="U8"),
        of_tensor("layers.0.ssm", shape=[2, 32, 16]),
        of_tensor("cursor.position", shape=[]),
        of_tensor("cursor.position", data_offsets=[0, 8]),  # the segment's: 0
    ],
)
def test_strange_tensors_are_refused(model: SambaLM, book: Path, change: Callable) -> None:
    rewrite(book, lambda header: header)
    load(book, model, TOKENIZER)
    rewrite(book, change)
    with pytest.raises(UserError, match="holds a state of another shape than 'tiny' has"):
        load(book, model, TOKENIZER)


def test_other_files_are_no_contexts(model: SambaLM, tmp_path: Path) -> None:
    samba_lm.save(model, tmp_path / "checkpoint", TOKENIZER)
    text = tmp_path / "book.txt"
    text.write_text(TEXT)
    deep = tmp_path / "deep"
    deep.write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000)
    listed = tmp_path / "list"
    listed.write_bytes(struct.pack("<Q", 8) + b"[1, 2]  ")
    for path in (text, deep, listed, tmp_path / "checkpoint" / "model.safetensors"):
        assert "is no context" in refused(path, model)
    assert "is a folder, and no context's file" in refused(tmp_path, model)
    assert "does not exist: it is no context's file" in refused(tmp_path / "nowhere", model)
    os.mkfifo(tmp_path / "pipe")
    assert "is no context's file" in refused(tmp_path / "pipe", model)


# Writing.


def test_the_file_is_safetensors_for_its_owner_alone(model: SambaLM, book: Path) -> None:
    assert stat.S_IMODE(book.stat().st_mode) == 0o600
    info = inspect(book)
    assert (info.title, info.tokens, info.nbytes) == ("A book", len(TEXT.encode()), book.stat().st_size)
    assert info.made_by == identify(model, TOKENIZER)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", info.created)
    loaded = load(book, model, TOKENIZER)
    with safe_open(book, "pt") as opened:
        metadata = opened.metadata()
        assert torch.equal(opened.get_tensor("logits"), loaded.logits)
        assert torch.equal(opened.get_tensor("layers.0.ssm"), loaded.state.layers[0]["ssm"])
    assert int(metadata["tokens"]) == info.tokens
    assert metadata["token_hash"] == TokenHash().add(TOKENIZER.encode(TEXT)).hexdigest()
    assert metadata["title"] == "A book"


def test_an_older_file_is_replaced_and_anything_else_is_not(model: SambaLM, book: Path, tmp_path: Path) -> None:
    save(book, read(model, TOKENIZER, "More", "Another"), model, TOKENIZER)
    assert inspect(book).title == "Another"
    snapshot = load(book, model, TOKENIZER)
    text = tmp_path / "precious.txt"
    text.write_text(TEXT)
    with pytest.raises(UserError, match="exists and is no context"):
        save(text, snapshot, model, TOKENIZER)
    assert text.read_text() == TEXT
    with pytest.raises(UserError, match="is a folder: give a file in it"):
        save(tmp_path, snapshot, model, TOKENIZER)
    with pytest.raises(UserError, match="cannot be written: "):
        save(text / "a.ctx", snapshot, model, TOKENIZER)
    with pytest.raises(UserError, match="cannot be written: file name too long"):
        save(tmp_path / ("x" * 300), snapshot, model, TOKENIZER)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["book.ctx", "precious.txt"]


@pytest.mark.skipif(os.geteuid() == 0 and shutil.which("setpriv") is None, reason="root may do everything")
def test_no_permission(book: Path, tmp_path: Path) -> None:
    """In a process without root's rights."""
    script = (
        "import sys, numpy as np; from samba_lm.contexts import file, info\n"
        "for do in (lambda: info.inspect(sys.argv[1]), lambda: file.write(sys.argv[2], {}, [])):\n"
        "    try: do()\n"
        "    except Exception as error: print(type(error).__name__, error)\n"
    )
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--clear-groups", "--reuid=65534", "--regid=65534"]
    for parent in [tmp_path, *tmp_path.parents]:
        if parent.stat().st_mode & 0o005 != 0o005 and parent.stat().st_uid == os.geteuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    book.chmod(0o000)
    ran = subprocess.run(
        [*(drop if os.geteuid() == 0 else ()), sys.executable, "-c", script, str(book), str(closed / "a.ctx")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert re.fullmatch(
        r"UserError .*book\.ctx cannot be read: permission denied\. .*\n"
        r"UserError No permission to write .*a\.ctx: choose a folder you own\.\n",
        ran.stdout,
    ), ran


def test_a_full_disk_leaves_what_was_there(model: SambaLM, book: Path, tmp_path: Path) -> None:
    """As far as a limit on the size of files can stand for one."""
    before, snapshot = book.read_bytes(), load(book, model, TOKENIZER)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 100, 5000, len(before) - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(UserError, match=f"cannot be written: {os.strerror(errno.EFBIG).lower()}"):
                save(book, snapshot, model, TOKENIZER)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert book.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["book.ctx"]


KILLED = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
import samba_lm
from samba_lm.contexts.info import inspect
from samba_lm.contexts.reading import read
from samba_lm.contexts.snapshot import save
from samba_lm.config import Attention, Mamba, ModelConfig

layers = (Mamba(), Attention(heads=4, window=2048), Attention(heads=4, window=2048))
model = samba_lm.create(ModelConfig(name="tiny", d_model=256, vocab_size=260, layers=layers))
tokenizer = samba_lm.ByteTokenizer()
snapshots = [read(model, tokenizer, title * 9, title) for title in ("first", "second")]
began = time.perf_counter()
save("a.ctx", snapshots[0], model, tokenizer)
took = time.perf_counter() - began
random.seed(0)
torn = 0
for _ in range(25):
    child = os.fork()
    if child == 0:
        for turn in range(10**9):
            save("a.ctx", snapshots[turn % 2], model, tokenizer)
    time.sleep(took * random.uniform(0.2, 4))
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert inspect("a.ctx").title in ("first", "second")
    for name in os.listdir("."):
        if name != "a.ctx":
            assert name.startswith("a.ctx.tmp-"), name
            assert os.stat(name).st_mode & 0o077 == 0 or os.path.getsize(name) == 0
            torn += os.path.getsize(name) > 0
            os.unlink(name)
print(torn)
"""


def test_killed_while_saving_the_file_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", KILLED], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) > 3, "hardly any save was caught in the middle"


def test_full_attention_is_saved_with_its_growing_cache(make_model: Callable, tmp_path: Path) -> None:
    model = make_model(window=None)
    sizes = []
    for repeats in (1, 2):
        snapshot = read(model, TOKENIZER, TEXT * repeats)
        save(tmp_path / "a.ctx", snapshot, model, TOKENIZER)
        loaded = load(tmp_path / "a.ctx", model, TOKENIZER)
        pairs = zip(go_on(model, snapshot.reader()), go_on(model, loaded.reader()), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        sizes.append(inspect(tmp_path / "a.ctx").nbytes)
    cache = 2 * 4 * 32 * len(TEXT.encode())
    assert cache <= sizes[1] - sizes[0] < cache + 100  # their shapes in the header have more digits
    # A cache shorter than what it should hold.
    rewrite(tmp_path / "a.ctx", lambda header: [header[f"layers.2.{n}"].update(shape=[1, 1, 2, 16]) for n in "kv"])
    with pytest.raises(UserError, match="holds a state of another shape"):
        load(tmp_path / "a.ctx", model, TOKENIZER)


def test_nothing_read_is_nothing_to_keep(model: SambaLM) -> None:
    with pytest.raises(UserError, match="Nothing was read yet"):
        Snapshot.of(Reader.create(model, SamplingParams(), batch=1), TokenHash())


def test_a_damaged_models_state_is_not_kept(make_model: Callable) -> None:
    model = make_model()
    with torch.no_grad():
        model.embedding.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite numbers"):
        read(model, TOKENIZER, "abc")


def test_a_dtype_that_no_file_holds(model: SambaLM, tmp_path: Path) -> None:
    snapshot = read(model, TOKENIZER, TEXT)
    snapshot = replace(snapshot, logits=snapshot.logits.to(torch.complex64))
    with pytest.raises(UserError, match=r"logits is torch\.complex64, which no file can hold"):
        save(tmp_path / "a.ctx", snapshot, model, TOKENIZER)


def test_inspecting_needs_no_torch(book: Path) -> None:
    script = (
        "import sys; from samba_lm.contexts.info import inspect; "
        "print(inspect(sys.argv[1]).title, 'torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", script, str(book)], capture_output=True, text=True, check=True)
    assert ran.stdout == "A book False\n"

"""Steps in the decoding kernels, on the CPU in their emulator: they give what ``model.step`` gives, rounded alike."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from cuda_emulator import needs_compiler, run

import samba_lm
from samba_lm.checkpoint import place
from samba_lm.config import Attention, LayerSpec, Mamba, ModelConfig, SelfExtend, SwiGLU
from samba_lm.engine import fast_step
from samba_lm.engine.decoder import Decoder
from samba_lm.engine.fast_step import FastStep
from samba_lm.engine.slots import Slots
from samba_lm.generation.params import SamplingParams
from samba_lm.model import SambaLM
from samba_lm.ops import nvrtc
from samba_lm.ops.decode.plan import Tuning
from samba_lm.quantization import quantize
from samba_lm.state import State

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
MLP = SwiGLU(width=72)
SAMBA = (Mamba(), MLP, Attention(heads=2, kv_heads=1, window=150), MLP)
WHOLE = (Mamba(), SwiGLU(width=336), Attention(heads=2, kv_heads=1, window=150), SwiGLU(width=80))
"""Of widths that kernels for 8-bit weights know."""
GROWING = (Attention(heads=2, kv_heads=1), MLP, SelfExtend(heads=2, kv_heads=1, neighbor_window=60), MLP)


def make(layers: tuple[LayerSpec, ...] = SAMBA, d_model: int = 128, **options: object) -> SambaLM:
    config = ModelConfig(name="small", d_model=d_model, vocab_size=260, layers=layers, **options)  # type: ignore[arg-type]
    model = samba_lm.create(config, device=DEVICE)
    with torch.no_grad():  # as larger ones, whose weights make branches as large as the stream
        for name, p in model.named_parameters():
            if p.dim() == 2 and "A_log" not in name and "conv" not in name:
                p.mul_(3)
    model = place(model, DEVICE, torch.bfloat16).eval()
    model.fix_parameters()
    return model


def states(model: SambaLM, lengths: list[int]) -> State:
    """Of texts of these lengths."""
    with torch.no_grad():
        read = [model(torch.randint(0, 260, (1, n), device=DEVICE))[1] for n in lengths]
        slots = Slots(model, len(lengths))
        for state, n in zip(read, lengths, strict=True):
            slots.put(state, n)
    return slots._state


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    if not GPU:
        seeds = itertools.count()  # every other kernel's copies arrive at once
        monkeypatch.setattr(nvrtc, "launch", lambda what, device: run(what, next(seeds)))


def errors(fast: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    scale = exact.norm()
    return float((fast.double() - exact).norm() / scale), float((plain.double() - exact).norm() / scale)


@needs_compiler
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("layers", "d_model", "lengths", "kind"),
    [
        pytest.param(SAMBA, 128, [1, 160, 149], None, id="samba"),
        pytest.param(WHOLE, 128, [1, 160, 149], "int8", id="8-bit samba"),
        pytest.param(WHOLE, 128, [1, 160, 149], "int4", id="4-bit samba"),
        pytest.param((Attention(heads=2, window=40, rope=False), Mamba(state=8)), 128, [3], None, id="one row"),
        pytest.param((Attention(heads=2, kv_heads=1), MLP), 128, [1, 130, 20], None, id="full attention"),
        pytest.param(
            (SelfExtend(heads=4, kv_heads=2, neighbor_window=50), MLP), 256, [1, 49, 120], None, id="self-extend"
        ),
        pytest.param(
            (Mamba(state=32, dt_rank=40), SwiGLU(width=40)), 72, [4] * 9, None, id="nine rows", marks=pytest.mark.slow
        ),
        pytest.param(
            (Mamba(state=32, dt_rank=40), SwiGLU(width=48)),
            80,
            [4] * 9,
            "int8",
            id="8-bit nine rows",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            (SelfExtend(heads=4, kv_heads=2, neighbor_window=50), SwiGLU(width=48)),
            256,
            [1, 49, 120],
            "int8",
            id="8-bit self-extend",
            marks=pytest.mark.slow,
        ),
    ],
)
@torch.inference_mode()
def test_as_near_to_fp64_as_the_plain_step(
    layers: tuple[LayerSpec, ...], d_model: int, lengths: list[int], kind: str | None
) -> None:
    model = make(layers, d_model)
    if kind is not None:
        quantize(model, kind)
    assert fast_step.why_not(model) == ""
    plain = states(model, lengths)
    fast = plain.fork()
    exact_model = copy.deepcopy(model).double()
    exact_model.fix_parameters()
    exact = State(plain.cursor, [{name: t.double() for name, t in tensors.items()} for tensors in plain.fork().layers])
    step = FastStep(model, fast, Tuning(processors=3))
    for _ in range(2):
        ids = torch.randint(0, 260, (len(lengths),), device=DEVICE)
        found, known, truth = step.step(ids), model.step(ids, plain), exact_model.step(ids, exact)
        ours, theirs = errors(found, known, truth)
        assert ours < 1.3 * theirs + 1e-3, (ours, theirs)
        assert ours < 0.03
        assert torch.equal(fast.position, exact.position)
        for tensors, others, truths in zip(fast.layers, plain.layers, exact.layers, strict=True):
            for name in tensors:
                ours, theirs = errors(tensors[name], others[name], truths[name])
                assert ours < 1.3 * theirs + 1e-3, name


@needs_compiler
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    "kind", [None, pytest.param("int8", marks=pytest.mark.slow), pytest.param("int4", marks=pytest.mark.slow)]
)
@torch.inference_mode()
def test_a_row_is_the_same_alone_and_among_others(kind: str | None) -> None:
    """To the last bit, however the work is cut: the kernels' sums have one order."""
    model = make() if kind is None else quantize(make(WHOLE), kind)
    together = states(model, [5, 140, 150, 2, 9, 33, 149, 1, 151])
    ids = torch.randint(0, 260, (9,), device=DEVICE)
    kept = together.fork()
    expected = FastStep(model, together, Tuning(processors=5)).step(ids).clone()
    for row in (1, 8):
        alone = kept.select([row])
        tuning = Tuning(processors=2, depth=2, blocks=1, stages=1, early=False)
        logits = FastStep(model, alone, tuning).step(ids[row : row + 1])
        assert torch.equal(logits[0], expected[row])
        for tensors, others in zip(alone.layers, together.layers, strict=True):
            for name in tensors:
                assert torch.equal(tensors[name][0], others[name][row]), name


@needs_compiler
@pytest.mark.usefixtures("emulated")
@torch.inference_mode()
def test_slots_take_fast_steps_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_step, "runs_on", lambda device: True)
    model = make((Mamba(),), 128)
    slots = Slots(model, 2)
    _, state = model(torch.zeros(1, 3, dtype=torch.int64, device=DEVICE))
    slots.put(state, 3), slots.put(state, 3)
    ids = torch.tensor([7, 7], device=DEVICE)
    logits = slots.step(ids, 3)
    assert slots._fast is not None
    assert logits.data_ptr() == slots._fast._logits.data_ptr()
    expected = model.step(ids[:1], state.fork())
    torch.testing.assert_close(logits[:1].float(), expected.float(), atol=0.02, rtol=0.02)
    assert slots.rows(0, 2).position.tolist() == [4, 4]


@needs_compiler
@pytest.mark.usefixtures("emulated")
@torch.inference_mode()
def test_steps_go_on_where_a_cache_has_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels follow the tensors that the slots of full attention replace; the bits are those of a larger room."""
    monkeypatch.setattr(fast_step, "runs_on", lambda device: True)
    monkeypatch.setattr("samba_lm.engine.slots.LEAST", 4)
    model = make((Attention(heads=2, kv_heads=1),), 128)
    _, state = model(torch.randint(0, 260, (1, 7), device=DEVICE))
    growing, roomy, plain = Slots(model, 2), Slots(model, 2), state.fork()
    growing.put(state, 7), roomy.put(state, 100)
    for length in range(8, 11):
        ids = torch.randint(0, 260, (1,), device=DEVICE)
        growing.reserve(length), roomy.reserve(length)
        logits, expected = growing.step(ids, length - 1).clone(), roomy.step(ids, length - 1)
        assert growing._fast is not None
        assert torch.equal(logits, expected)
        torch.testing.assert_close(logits.float(), model.step(ids, plain).float(), atol=0.02, rtol=0.02)
    assert growing.reserved < roomy.reserved
    growing.drop(0)
    assert growing.rows(0, 1).position.tolist() == [0]


@pytest.mark.gpu
@torch.inference_mode()
def test_recorded_steps_while_a_cache_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("samba_lm.engine.slots.LEAST", 16)
    model = make(GROWING)
    _, plain = model(torch.randint(0, 260, (1, 10), device=DEVICE))
    slots = Slots(model, 1)
    slots.put(plain, 10)
    decoder = Decoder(slots, 257, torch.device(DEVICE))
    decoder.set_options([SamplingParams(temperature=0)])
    for length in range(11, 150):
        ids = torch.randint(0, 257, (1,), device=DEVICE)
        _, logits = decoder.step(ids.tolist(), [length])
        torch.testing.assert_close(logits.float(), model.step(ids, plain).float(), atol=0.05, rtol=0.05)
    assert slots._fast is not None
    assert slots.reserved == 256


@pytest.mark.gpu
@pytest.mark.parametrize("layers", [SAMBA, GROWING], ids=["samba", "growing"])
@torch.inference_mode()
def test_recorded_steps_whose_kernels_overlap(layers: tuple[LayerSpec, ...]) -> None:
    """In a CUDA graph, where kernels begin early, the bits are those of kernels that wait for one another."""
    model = make(layers)
    waiting = states(model, [5, 150, 3, 77])
    slots = Slots(model, 4)
    for row in range(4):
        slots.put(waiting.select([row]), 150)
    decoder = Decoder(slots, 257, torch.device(DEVICE))
    decoder.set_options([SamplingParams(temperature=0)] * 4)
    step = FastStep(model, waiting, Tuning(early=False))
    for _ in range(20):
        ids = torch.randint(0, 257, (4,), device=DEVICE)
        _, logits = decoder.step(ids.tolist(), [9, 9, 9, 9], None)
        assert slots._fast is not None
        assert torch.equal(logits, step.step(ids))
        assert torch.equal(slots.rows(0, 4).position, waiting.position)


def test_what_the_kernels_do_not_know() -> None:
    assert fast_step.why_not(make()) == ""
    unfixed = make()
    unfixed.fix_parameters(False)
    assert "may still change" in fast_step.why_not(unfixed)
    assert "not bf16" in fast_step.why_not(make().float())
    assert "convolution" in fast_step.why_not(make((Attention(heads=2, short_conv=4),)))
    assert "heads" in fast_step.why_not(make((Attention(heads=4, window=8),)))
    assert "rotation" in fast_step.why_not(
        make((Attention(heads=2, window=8), Attention(heads=2, window=8, rope_base=7.0)))
    )
    assert fast_step.why_not(quantize(make(WHOLE), "int8")) == ""
    assert fast_step.why_not(quantize(make(), "int4")) == ""
    assert "inputs" in fast_step.why_not(quantize(make(), "int8"))
    assert fast_step.of(make(), states(make(), [1])) is None or GPU

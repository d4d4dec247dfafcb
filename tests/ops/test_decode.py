"""The decoding kernels one by one, on the CPU in their emulator, against fp64; NVRTC compiles every variant."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cuda_emulator import needs_compiler, run

from samba_lm.ops import nvrtc
from samba_lm.ops.decode import plan
from samba_lm.ops.decode.plan import Tuning
from samba_lm.ops.quantized_linear import dequantize, quantize
from samba_lm.ops.selective_scan.reference import scan_reference

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BF16 = torch.bfloat16
needs_nvrtc = pytest.mark.skipif(bool(nvrtc.why_not()), reason="needs cuda-bindings and nvidia-cuda-nvrtc")


def launch(what: nvrtc.Launch, seed: int = 0) -> None:
    if GPU:
        torch.cuda.synchronize()  # what a kernel reads before its turn has to lie there
        nvrtc.launch(what, torch.device(DEVICE))
    else:
        run(what, seed)


def random(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """NaN: what a kernel leaves out is found."""
    return torch.full(shape, float("nan"), device=DEVICE, dtype=dtype)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def operand(x: torch.Tensor) -> torch.Tensor:
    """[M, K] as products read it: 32 columns of eight rows together; NaN where there is nothing."""
    (M, K), eights = x.shape, plan.ceil_div(x.shape[0], 8)
    wide = F.pad(x, (0, -K % 32, 0, -M % 8), value=float("nan"))
    return wide.unflatten(1, (-1, 32)).unflatten(0, (eights, 8)).permute(2, 0, 1, 3).contiguous()


def unpacked(y: torch.Tensor, M: int, K: int) -> torch.Tensor:
    """The other way round, of the first numbers of ``y``."""
    blocks, eights = plan.ceil_div(K, 32), plan.ceil_div(M, 8)
    found = y.flatten()[: blocks * eights * 256].view(blocks, eights, 8, 32).permute(1, 2, 0, 3)
    return found.reshape(eights * 8, blocks * 32)[:M, :K]


@needs_compiler
@pytest.mark.parametrize(
    ("M", "N", "K", "tuning"),
    [
        pytest.param(1, 2, 8, Tuning(processors=1), id="least"),
        pytest.param(5, 40, 584, Tuning(processors=2, depth=3), id="two chunks"),
        pytest.param(16, 36, 4104, Tuning(processors=3), id="three slices"),
        pytest.param(11, 70, 1544, Tuning(processors=1, depth=8), id="many tiles", marks=pytest.mark.slow),
    ],
)
def test_products_of_few_rows(M: int, N: int, K: int, tuning: Tuning) -> None:
    x, w = random(M, K), random(N, K)
    parts = plan.slices(K)
    y, given, last = empty(parts, M, N), operand(x), operand(x[-1:])
    launch(plan.linear(given, w, y, M, "PARTIAL", tuning, parts=parts))
    assert error(y.sum(0), x.double() @ w.double().t()) < 2e-5
    # The order in which threads take turns, how the work is cut and the other rows change no bit.
    again = empty(parts, 1, N)
    other = tuning._replace(processors=4, depth=2, blocks=1)
    launch(plan.linear(last, w, again, 1, "PARTIAL", other, parts=parts), seed=1)
    assert torch.equal(again[:, 0], y[:, -1])


@needs_compiler
@pytest.mark.parametrize(
    ("M", "N", "K", "tuning"),
    [
        pytest.param(1, 2, 16, Tuning(processors=1), id="least"),
        pytest.param(5, 40, 592, Tuning(processors=2), id="half a chunk"),
        pytest.param(16, 36, 4112, Tuning(processors=3), id="three slices"),
        pytest.param(11, 70, 1552, Tuning(processors=1, depth=8), id="many tiles", marks=pytest.mark.slow),
    ],
)
def test_products_with_whole_numbers(M: int, N: int, K: int, tuning: Tuning) -> None:
    x, w = random(M, K), torch.randint(-128, 128, (N, K), device=DEVICE, dtype=torch.int8)
    scale = torch.rand(N, device=DEVICE) + 0.1
    parts = plan.slices(K)
    y, given, last = empty(parts, M, N), operand(x), operand(x[-1:])
    launch(plan.linear(given, w, y, M, "PARTIAL", tuning, parts=parts, scale=scale))
    assert error(y.sum(0), x.double() @ w.double().t() * scale.double()) < 2e-5
    again = empty(parts, 1, N)
    other = tuning._replace(processors=4, depth=2, blocks=1)
    launch(plan.linear(last, w, again, 1, "PARTIAL", other, parts=parts, scale=scale), seed=1)
    assert torch.equal(again[:, 0], y[:, -1])


@needs_compiler
@pytest.mark.parametrize(
    ("M", "N", "K", "tuning"),
    [
        pytest.param(1, 2, 8, Tuning(processors=1), id="least"),
        pytest.param(5, 40, 584, Tuning(processors=2), id="part of a chunk"),
        pytest.param(16, 36, 4232, Tuning(processors=3), id="three slices"),
        pytest.param(11, 70, 2440, Tuning(processors=1, depth=8), id="many tiles", marks=pytest.mark.slow),
    ],
)
def test_products_with_4_bits(M: int, N: int, K: int, tuning: Tuning) -> None:
    x, parts = random(M, K), plan.slices(K)
    w, scale = quantize(random(N, K) * torch.rand(N, K, device=DEVICE), "int4")
    y, given, last = empty(parts, M, N), operand(x), operand(x[-1:])
    launch(plan.linear(given, w, y, M, "PARTIAL", tuning, parts=parts, scale=scale, columns=K))
    assert error(y.sum(0), x.double() @ dequantize(w, scale, K, torch.float64).t()) < 2e-5
    again = empty(parts, 1, N)
    other = tuning._replace(processors=4, depth=2, blocks=1)
    launch(plan.linear(last, w, again, 1, "PARTIAL", other, parts=parts, scale=scale, columns=K), seed=1)
    assert torch.equal(again[:, 0], y[:, -1])


@needs_compiler
def test_every_whole_number_is_exact() -> None:
    numbers = torch.arange(-128, 128, device=DEVICE, dtype=torch.int8)
    w, found = numbers.view(16, 16), empty(1, 16, 16)
    ones = torch.ones(16, device=DEVICE)
    identity = operand(torch.eye(16, device=DEVICE, dtype=BF16))
    launch(plan.linear(identity, w, found, 16, "PARTIAL", Tuning(processors=1), scale=ones))
    assert torch.equal(found[0].t(), w.float())


@needs_compiler
@pytest.mark.parametrize("M", [3, 10])
def test_what_follows_a_product(M: int) -> None:
    x, w, tuning = random(M, 200), random(52, 200) / 14, Tuning(processors=2)
    exact, given = x.double() @ w.double().t(), operand(x)
    plain, opened = empty(M, 52, dtype=BF16), empty(*plan.operand_shape(26), dtype=BF16)
    launch(plan.linear(given, w, plain, M, "PLAIN", tuning))
    launch(plan.linear(given, w, opened, M, "SWIGLU", tuning))
    gate, up = exact.chunk(2, -1)
    assert error(plain, exact) < 3e-3
    assert error(unpacked(opened, M, 26), F.silu(gate) * up) < 6e-3


@needs_compiler
def test_what_follows_a_product_with_whole_numbers() -> None:
    """Each row has its own scale, those of a pair's first and second too."""
    M = 10
    x, tuning = random(M, 208), Tuning(processors=2)
    w, scale = quantize(random(52, 208) * torch.arange(1, 53, device=DEVICE)[:, None] / 260, "int8")
    exact, given = x.double() @ (w.double() * scale.double()[:, None]).t(), operand(x)
    plain, opened = empty(M, 52, dtype=BF16), empty(*plan.operand_shape(26), dtype=BF16)
    launch(plan.linear(given, w, plain, M, "PLAIN", tuning, scale=scale))
    launch(plan.linear(given, w, opened, M, "SWIGLU", tuning, scale=scale))
    gate, up = exact.chunk(2, -1)
    assert error(plain, exact) < 3e-3
    assert error(unpacked(opened, M, 26), F.silu(gate) * up) < 6e-3


def attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor, tuning: Tuning, seed: int = 0
) -> torch.Tensor:
    rows, heads, width = q.shape
    room = plan.runs(keys.shape[1]) + 1  # more than is needed
    counters = torch.zeros(rows, keys.shape[2], dtype=torch.int32, device=DEVICE)
    parts = plan.Parts(empty(rows, heads, room, width), empty(rows, heads, room, 2), counters)
    y = empty(*plan.operand_shape(heads * width), dtype=BF16)
    launch(plan.attend([plan.Cache(q, keys, values)], position, parts, y, rows, width**-0.5, tuning), seed)
    assert not counters.any()
    return unpacked(y, rows, heads * width).unflatten(1, (heads, width))


def exact_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp64 attention over the slots ``seen`` [rows, slots], and the log-sum-exp [rows, H]."""
    share = q.shape[1] // keys.shape[2]
    k, v = (t.double().repeat_interleave(share, 2) for t in (keys, values))
    scores = torch.einsum("mhk,mshk->mhs", q.double(), k) * q.shape[2] ** -0.5
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    return torch.einsum("mhs,mshk->mhk", scores.softmax(-1), v), scores.logsumexp(-1)


@needs_compiler
@pytest.mark.parametrize(
    ("groups", "share", "width", "slots"),
    [
        pytest.param(3, 1, 64, 20, id="a head each", marks=pytest.mark.slow),
        pytest.param(1, 8, 64, 300, id="eight heads"),
        pytest.param(2, 11, 128, 130, id="eleven heads"),
        pytest.param(2, 2, 64, 1500, id="runs that are joined"),
    ],
)
def test_attention_over_rings(groups: int, share: int, width: int, slots: int) -> None:
    position = torch.tensor([0, 7, slots - 1, slots, 3 * slots + 5], device=DEVICE)
    M, heads = position.shape[0], groups * share
    q, keys, values = random(M, heads, width), random(M, slots, groups, width), random(M, slots, groups, width)
    y = attention(q, keys, values, position, Tuning(processors=2))
    seen = torch.arange(slots, device=DEVICE) <= position[:, None]
    assert error(y, exact_attention(q, keys, values, seen)[0]) < 4e-3
    one = slice(3, 4)
    again = attention(q[one], keys[one], values[one], position[one], Tuning(processors=50, stages=4), seed=1)
    assert torch.equal(again[0], y[3])


@needs_compiler
def test_attention_in_a_cache_that_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs become longer with what a row sees; a row's bits depend neither on the cache's room nor on the others."""
    monkeypatch.setattr(plan, "RUN", 128)
    monkeypatch.setattr(plan, "MOST", 4)
    position = torch.tensor([0, 127, 128, 511, 512, 513, 1100], device=DEVICE)
    M, heads, groups, slots = 7, 4, 2, 1200
    q, keys, values = random(M, heads, 64), random(M, slots, groups, 64), random(M, slots, groups, 64)
    y = attention(q, keys, values, position, Tuning(processors=3))
    seen = torch.arange(slots, device=DEVICE) <= position[:, None]
    assert error(y, exact_attention(q, keys, values, seen)[0]) < 4e-3
    for row, room in ((1, 128), (3, 512), (4, 600)):
        one = slice(row, row + 1)
        less = (t[one, :room].contiguous() for t in (keys, values))
        assert torch.equal(attention(q[one], *less, position[one], Tuning(), seed=1)[0], y[row])


@needs_compiler
@pytest.mark.parametrize("together", [2, 4, 8])
def test_attention_with_several_key_heads_to_a_block(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "TOGETHER", together)
    monkeypatch.setattr(plan, "RUN", 512 // together)
    position = torch.tensor([90, 200], device=DEVICE)
    q, keys, values = random(2, 8, 64), random(2, 256, 4, 64), random(2, 256, 4, 64)
    y = attention(q, keys, values, position, Tuning(processors=2))
    seen = torch.arange(256, device=DEVICE) <= position[:, None]
    assert error(y, exact_attention(q, keys, values, seen)[0]) < 4e-3


@needs_compiler
def test_one_softmax_over_two_caches() -> None:
    """The near keys in a ring, the far ones in a cache that is seen up to some way back, each with its own queries."""
    near, slots, groups, heads = 96, 700, 2, 6
    position = torch.tensor([0, 95, 96, 97, 650], device=DEVICE)
    M = position.shape[0]
    q, far_q = random(M, heads, 64), random(M, heads, 64)
    caches = [plan.Cache(q, random(M, near, groups, 64), random(M, near, groups, 64))]
    caches.append(plan.Cache(far_q, random(M, slots, groups, 64), random(M, slots, groups, 64), near))
    room = plan.runs(near) + plan.runs(slots)
    counters = torch.zeros(M, groups, dtype=torch.int32, device=DEVICE)
    parts = plan.Parts(empty(M, heads, room, 64), empty(M, heads, room, 2), counters)
    made = empty(*plan.operand_shape(heads * 64), dtype=BF16)
    launch(plan.attend(caches, position, parts, made, M, 0.125, Tuning(processors=3)))
    y = unpacked(made, M, heads * 64).unflatten(1, (heads, 64))
    slot, at = torch.arange(slots, device=DEVICE), position[:, None]
    close, close_sum = exact_attention(*caches[0][:3], slot[:near] <= at)
    far, far_sum = exact_attention(*caches[1][:3], slot <= at - near)
    share = torch.sigmoid(far_sum - close_sum)[..., None]
    assert error(y, close + share * (far.nan_to_num() - close)) < 4e-3


@needs_compiler
@pytest.mark.parametrize(("M", "E", "N", "rank"), [(2, 40, 64, 8), (9, 32, 8, 40)])
def test_steps_of_the_scan(M: int, E: int, N: int, rank: int) -> None:
    partials = random(3, M, rank + 2 * N, dtype=torch.float32)
    weight, u, z = random(E, rank) / rank**0.5, random(M, E), random(M, E)
    A, D, bias = -torch.rand(E, N, device=DEVICE) * 4, random(E, dtype=torch.float32), random(E, dtype=torch.float32)
    state = random(M, E, N, dtype=torch.float32)
    before, y = state.double(), empty(*plan.operand_shape(E), dtype=BF16)
    inputs, gate = operand(u), operand(z)
    launch(plan.scan(partials, weight, inputs, gate, A, D, bias, state, y, M, 3, Tuning()))
    low, B, C = partials.sum(0).to(BF16).double().split((rank, N, N), -1)
    delta = (low @ weight.double().t()).to(BF16).double()
    given = (t.double() for t in (u, delta))
    rest = (t.double()[:, None] for t in (B, C))
    one = [t[:, None] for t in given]
    expected, after = scan_reference(
        *one, A.double(), *rest, D.double(), z.double()[:, None], bias.double(), before, None, None
    )
    assert error(unpacked(y, M, E), expected[:, 0]) < 4e-3
    assert error(state, after) < 2e-3  # where the step's sum fell on the other side of a rounding


@needs_compiler
def test_the_stream_and_its_norm() -> None:
    M, D, parts = 3, 1032, 3
    stream, partials, weight = random(M, D, dtype=torch.float32), random(parts, M, D, dtype=torch.float32), random(D)
    normed, position = empty(*plan.operand_shape(D), dtype=BF16), torch.tensor([4, 1 << 40, 0], device=DEVICE)
    expected = stream + partials.sum(0).to(BF16)
    launch(plan.norm(stream, partials, weight, normed, M, 1e-5, parts, Tuning(), position))
    assert torch.equal(stream, expected)
    assert error(unpacked(normed, M, D), F.rms_norm(expected.double(), (D,), weight.double(), 1e-5)) < 3e-3
    assert position.tolist() == [5, (1 << 40) + 1, 1]


class Somewhere(torch.Tensor):
    """A shape without memory: launches are planned for it, not run."""

    def data_ptr(self) -> int:
        return 16


def somewhere(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(*shape, device="meta", dtype=dtype).as_subclass(Somewhere)


def variants() -> Iterator[nvrtc.Launch]:
    tuning, some = Tuning(), somewhere(1)
    for rows in (1, 16):
        x, keys = somewhere(rows, 2048), somewhere(rows, 2048, 4, 64)
        rings, conv = plan.Rings(some, some, keys, keys, some, 32), plan.Convolution(some, some, some, some)
        for dtype in plan.BITS:

            def product(N: int, K: int, epilogue: str, dtype: torch.dtype = dtype, **rest: Any) -> nvrtc.Launch:
                four = dtype == torch.uint8
                weight = somewhere(N, K // 2 if four else K, dtype=dtype)
                rest |= {"scale": None if dtype == BF16 else some, "columns": K if four else None}
                return plan.linear(x, weight, some, rows, epilogue, tuning, **rest)  # noqa: B023

            yield product(2560, 2048, "QKV", rings=rings)
            yield product(8192, 2048, "CONV", convolution=conv)
            yield product(16384, 2816, "SWIGLU")
            yield product(2048, 8192, "PARTIAL", parts=plan.slices(8192))
        sixteen = somewhere(4096, 16)
        yield plan.scan(some, somewhere(4096, 128), some, some, sixteen, some, some, some, some, rows, 4, tuning)
        caches = [plan.Cache(some, keys, keys), plan.Cache(some, keys, keys, 1024)]
        parts = plan.Parts(somewhere(rows, 32, 8, 64), some, some)
        yield plan.attend(caches[:1], some, parts, some, rows, 0.125, tuning)
        yield plan.attend(caches, some, parts, some, rows, 0.125, tuning)
        yield plan.turn(somewhere(rows, 32, 64), some, some, some, some, *caches, 4, 768, rows, tuning)
    stream = somewhere(16, 2048)
    yield plan.norm(stream, some, some, some, 16, 1e-5, 4, tuning)
    yield plan.begin(stream, some, some, 16, 1e-5, some, some, stream, (somewhere(32), some, some), tuning)


@needs_nvrtc
def test_variants_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for each in variants():
        assert nvrtc.compiled(each.files, each.defines, "sm_90")[:4] == b"\x7fELF"
        assert each.shared <= 227 * 1024
    assert len(list(tmp_path.rglob("*.cubin"))) == 31

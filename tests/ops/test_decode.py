"""The decoding kernels one by one, on the CPU in their emulator, against fp64; NVRTC compiles every variant."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cuda_emulator import needs_compiler, run

from samba_lm.ops import nvrtc
from samba_lm.ops.decode import plan
from samba_lm.ops.decode.plan import Tuning
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


@needs_compiler
@pytest.mark.parametrize(
    ("M", "N", "K", "tuning"),
    [
        pytest.param(1, 2, 8, Tuning(processors=1), id="least"),
        pytest.param(5, 40, 584, Tuning(processors=2, depth=3), id="two chunks"),
        pytest.param(16, 36, 4104, Tuning(processors=3), id="three slices"),
        pytest.param(11, 70, 1544, Tuning(processors=1, depth=8, ahead=3), id="many tiles", marks=pytest.mark.slow),
    ],
)
def test_products_of_few_rows(M: int, N: int, K: int, tuning: Tuning) -> None:
    x, w = random(M, K), random(N, K)
    parts = plan.slices(K)
    y = empty(parts, M, N)
    launch(plan.linear(x, w, y, M, "PARTIAL", tuning, parts=parts))
    assert error(y.sum(0), x.double() @ w.double().t()) < 2e-5
    # The order in which threads take turns, how the work is cut and the other rows change no bit.
    again = empty(parts, 1, N)
    other = tuning._replace(processors=4, depth=2, ahead=0)
    launch(plan.linear(x[-1:], w, again, 1, "PARTIAL", other, parts=parts), seed=1)
    assert torch.equal(again[:, 0], y[:, -1])


@needs_compiler
@pytest.mark.parametrize("M", [3, 10])
def test_what_follows_a_product(M: int) -> None:
    x, w, tuning = random(M, 200), random(52, 200) / 14, Tuning(processors=2)
    exact = x.double() @ w.double().t()
    plain, opened = empty(M, 52, dtype=BF16), empty(M, 26, dtype=BF16)
    launch(plan.linear(x, w, plain, M, "PLAIN", tuning))
    launch(plan.linear(x, w, opened, M, "SWIGLU", tuning))
    gate, up = exact.chunk(2, -1)
    assert error(plain, exact) < 3e-3
    assert error(opened, F.silu(gate) * up) < 6e-3


@needs_compiler
@pytest.mark.parametrize(
    ("groups", "share", "width", "slots"),
    [
        pytest.param(3, 1, 64, 20, id="a head each", marks=pytest.mark.slow),
        pytest.param(1, 8, 64, 300, id="eight heads"),
        pytest.param(2, 11, 128, 130, id="eleven heads"),
    ],
)
def test_attention_over_rings(groups: int, share: int, width: int, slots: int) -> None:
    position = torch.tensor([0, 7, slots - 1, slots, 3 * slots + 5], device=DEVICE)
    M, heads = position.shape[0], groups * share
    q, keys, values = random(M, heads, width), random(M, slots, groups, width), random(M, slots, groups, width)
    splits = plan.ceil_div(slots, plan.SPLIT)

    def attention(rows: slice, tuning: Tuning) -> torch.Tensor:
        count = position[rows].shape[0]
        parts = empty(count, heads, splits, width), empty(count, heads, splits), empty(count, heads, splits)
        y = empty(count, heads, width, dtype=BF16)
        given = q[rows], keys[rows], values[rows], position[rows]
        launch(plan.attend(*given, parts, count, heads, width**-0.5, tuning))
        launch(plan.join(parts, y, count * heads, width, splits, tuning))
        return y

    seen = torch.arange(slots, device=DEVICE) <= position[:, None]
    expected = F.scaled_dot_product_attention(
        q.double()[:, :, None],
        keys.double().transpose(1, 2).repeat_interleave(share, 1),
        values.double().transpose(1, 2).repeat_interleave(share, 1),
        attn_mask=seen[:, None, None],
    )[:, :, 0]
    y = attention(slice(None), Tuning(processors=2))
    assert error(y, expected) < 4e-3
    assert torch.equal(attention(slice(3, 4), Tuning(processors=50, stages=1))[0], y[3])


@needs_compiler
@pytest.mark.parametrize(("M", "E", "N", "rank"), [(2, 40, 64, 8), (9, 32, 8, 40)])
def test_steps_of_the_scan(M: int, E: int, N: int, rank: int) -> None:
    partials = random(3, M, rank + 2 * N, dtype=torch.float32)
    weight, u, z = random(E, rank) / rank**0.5, random(M, E), random(M, E)
    A, D, bias = -torch.rand(E, N, device=DEVICE) * 4, random(E, dtype=torch.float32), random(E, dtype=torch.float32)
    state = random(M, E, N, dtype=torch.float32)
    before, y = state.double(), empty(M, E, dtype=BF16)
    launch(plan.scan(partials, weight, u, z, A, D, bias, state, y, M, 3, Tuning()))
    low, B, C = partials.sum(0).to(BF16).double().split((rank, N, N), -1)
    delta = (low @ weight.double().t()).to(BF16).double()
    given = (t.double() for t in (u, delta))
    rest = (t.double()[:, None] for t in (B, C))
    one = [t[:, None] for t in given]
    expected, after = scan_reference(
        *one, A.double(), *rest, D.double(), z.double()[:, None], bias.double(), before, None, None
    )
    assert error(y, expected[:, 0]) < 4e-3
    assert error(state, after) < 2e-3  # where the step's sum fell on the other side of a rounding


@needs_compiler
def test_the_stream_and_its_norm() -> None:
    M, D, parts = 3, 1032, 3
    stream, partials, weight = random(M, D, dtype=torch.float32), random(parts, M, D, dtype=torch.float32), random(D)
    normed, position = empty(M, D, dtype=BF16), torch.tensor([4, 1 << 40, 0], device=DEVICE)
    expected = stream + partials.sum(0).to(BF16)
    launch(plan.norm(stream, partials, weight, normed, M, 1e-5, parts, Tuning(), position))
    assert torch.equal(stream, expected)
    assert error(normed, F.rms_norm(expected.double(), (D,), weight.double(), 1e-5)) < 3e-3
    assert position.tolist() == [5, (1 << 40) + 1, 1]


class Somewhere(torch.Tensor):
    """A shape without memory: launches are planned for it, not run."""

    def data_ptr(self) -> int:
        return 16


def somewhere(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta").as_subclass(Somewhere)


def variants() -> Iterator[nvrtc.Launch]:
    tuning, some = Tuning(), somewhere(1)
    for rows in (1, 16):
        x, keys = somewhere(rows, 2048), somewhere(rows, 2048, 4, 64)
        rings, conv = plan.Rings(some, some, keys, keys, some, 32), plan.Convolution(some, some, some, some)
        yield plan.linear(x, somewhere(2560, 2048), some, rows, "QKV", tuning, rings=rings)
        yield plan.linear(x, somewhere(8192, 2048), some, rows, "CONV", tuning, convolution=conv)
        yield plan.linear(x, somewhere(16384, 2816), some, rows, "SWIGLU", tuning)
        yield plan.linear(x, somewhere(2048, 8192), some, rows, "PARTIAL", tuning, parts=plan.slices(8192))
        sixteen = somewhere(4096, 16)
        yield plan.scan(some, somewhere(4096, 128), some, some, sixteen, some, some, some, some, rows, 4, tuning)
        yield plan.attend(some, keys, keys, some, (some, some, some), rows, 32, 0.125, tuning)
    yield plan.join((some, some, some), some, 512, 64, 16, tuning)
    stream = somewhere(16, 2048)
    yield plan.norm(stream, some, some, some, 16, 1e-5, 4, tuning)
    yield plan.begin(stream, some, some, 16, 1e-5, some, some, stream, (somewhere(32), some, some), tuning)


@needs_nvrtc
def test_variants_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for each in variants():
        assert nvrtc.compiled(each.files, each.defines, "sm_90")[:4] == b"\x7fELF"
        assert each.shared <= 227 * 1024
    assert len(list(tmp_path.rglob("*.cubin"))) == 15

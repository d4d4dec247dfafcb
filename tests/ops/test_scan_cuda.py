"""The selective scan in CUDA C++: its kernels run in an emulator on the CPU, compile by NVRTC, and agree on a GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_emulator import needs_compiler, run
from kernels import needs_triton

from samba_lm.errors import UserError
from samba_lm.ops import nvrtc
from samba_lm.ops.backend import INTERPRETED, choose
from samba_lm.ops.selective_scan import STATE_SIZES
from samba_lm.ops.selective_scan import cuda as scan
from samba_lm.ops.selective_scan import cuda_launch as plan
from samba_lm.ops.selective_scan.cuda_launch import Shape
from samba_lm.ops.selective_scan.reference import scan_reference

needs_nvrtc = pytest.mark.skipif(bool(nvrtc.why_not()), reason="needs cuda-bindings and nvidia-cuda-nvrtc")
TOLERANCE = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}
INPUTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "state")


def inputs(
    b: int, L: int, E: int, N: int, dtype: torch.dtype, device: str = "cpu", without: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Arguments of ``scan_cuda``: u, z and B, C are parts of wider rows, as the projections give them."""
    u, z = torch.randn(b, L, 2 * E, device=device).to(dtype).chunk(2, -1)
    _, B, C = torch.randn(b, L, 2 * N + 6, device=device).to(dtype).split((6, N, N), -1)
    all_of_them = {
        "u": u,
        "delta": torch.randn(b, L, E, device=device).to(dtype),
        "A": -torch.rand(E, N, device=device) * 4 - 0.1,
        "B": B,
        "C": C,
        "D": torch.randn(E, device=device),
        "z": z,
        "delta_bias": torch.randn(E, device=device) - 1,
        "state": torch.randn(b, E, N, device=device),
        "resets": torch.rand(b, L, device=device) < 0.15,
        "lengths": torch.randint(0, L + 1, (b,), device=device),
    }
    return {name: None if name in without else t for name, t in all_of_them.items()}


def truth(given: dict[str, Any], dy: torch.Tensor, dfinal: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """In fp64: y, the final state and the gradients of the inputs that there are, by name."""
    own = {name: None if given[name] is None else given[name].detach().double().requires_grad_() for name in INPUTS}
    padding = resets = None
    if given["lengths"] is not None:
        padding = torch.arange(dy.shape[1], device=dy.device) >= given["lengths"][:, None]
    if given["resets"] is not None:
        resets = given["resets"] if padding is None else given["resets"] & ~padding
    if own["state"] is None:
        (b, _, E), N = own["u"].shape, own["A"].shape[1]
        state = own["u"].new_zeros(b, E, N)
    else:
        state = own["state"]
    y, final = scan_reference(*(own[name] for name in INPUTS[:-1]), state, resets, padding)
    used = [name for name in INPUTS if own[name] is not None]
    dfinal = torch.zeros_like(final) if dfinal is None else dfinal.double()
    grads = torch.autograd.grad((y, final), [own[name] for name in used], (dy.double(), dfinal))
    return {"y": y.detach(), "final": final.detach(), **dict(zip(used, grads, strict=True))}


def close(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    error = float((found.double() - expected).norm() / expected.norm().clamp_min(1e-12))
    assert error < TOLERANCE[found.dtype], f"{name}: relative error {error:.2e}"


def emulate(
    given: dict[str, Any],
    dy: torch.Tensor,
    dfinal: torch.Tensor | None,
    shapes: tuple[Shape, Shape],
    span: int = plan.SPAN_BYTES,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """What the kernels give in the emulator, by name as in ``truth``."""
    forward, *results, _ = plan.plan_forward(**given, save=True, shape=shapes[0])
    fill(results)
    run(forward, seed)
    rest = {name: t for name, t in given.items() if name != "state"}
    launches, grads, _ = plan.plan_backward(
        dy, dfinal, **rest, checkpoints=results[2], shape=shapes[1], span_bytes=span
    )
    fill(grads)
    for launch in launches:
        run(launch, seed)
    return {"y": results[0], "final": results[1], **plan.summed(grads)._asdict()}


def fill(tensors: Any) -> None:
    """NaN: what a kernel leaves out is found."""
    for t in tensors:
        t.fill_(float("nan"))


def many(N: int) -> Shape:
    return plan.forward_shape(8, 3072, N, 2)


HELPED, LONG = Shape(4, 1, 128), Shape(4, 1, 128, 32)
TWO = plan.backward_shape(8, 3072, 16)
EMULATED = [
    # Odd sizes; channels beyond the last; several tiles; single elements read and written.
    pytest.param((2, 70, 33, 16), torch.float32, (Shape(4, stage=4), TWO), (), id="fp32"),
    pytest.param((2, 85, 33, 16), torch.float32, (HELPED, HELPED), (), id="fp32, helped"),
    pytest.param((2, 53, 33, 16), torch.float32, (LONG, HELPED), ("z",), id="fp32, long tiles"),
    pytest.param((1, 85, 34, 16), torch.bfloat16, (LONG, TWO), ("lengths",), id="bf16, long tiles"),
    pytest.param((1, 20, 34, 16), torch.bfloat16, (Shape(4), HELPED), ("lengths",), id="bf16"),
    pytest.param((1, 33, 20, 8), torch.float16, (LONG, HELPED), ("resets",), id="fp16, 8 states"),
    pytest.param((2, 1, 5, 16), torch.bfloat16, (Shape(8), HELPED), (), id="one token"),
    pytest.param((1, 37, 34, 16), torch.bfloat16, (Shape(8, 6), TWO), (), id="eight states a thread"),
    pytest.param(
        (1, 50, 34, 8), torch.bfloat16, (many(8), plan.backward_shape(8, 3072, 8)), (), id="many rows, 8 states"
    ),
    pytest.param((1, 21, 34, 64), torch.bfloat16, (many(64), HELPED), (), id="many rows, 64 states"),
    pytest.param((1, 17, 6, 64), torch.float32, (HELPED, HELPED), (), id="64 states"),
    pytest.param(
        (1, 18, 32, 32),
        torch.float32,
        (Shape(4), HELPED),
        ("D", "z", "delta_bias", "state", "resets", "lengths"),
        id="nothing optional",
    ),
]


@needs_compiler
@pytest.mark.parametrize(("size", "dtype", "shapes", "without"), EMULATED)
def test_kernels_agree_in_the_emulator(
    size: tuple[int, int, int, int], dtype: torch.dtype, shapes: tuple[Shape, Shape], without: tuple[str, ...]
) -> None:
    b, L, E, N = size
    given = inputs(b, L, E, N, dtype, without=without)
    dy, dfinal = torch.randn(b, L, E).to(dtype), torch.randn(b, E, N)
    expected = truth(given, dy, dfinal)
    found = emulate(given, dy, dfinal, shapes)
    for name, value in expected.items():
        close(found[name], value, name)
    # Threads in another order: the same bits, unless some barrier is missing.
    for name, value in emulate(given, dy, dfinal, shapes, seed=1).items():
        assert torch.equal(found[name], value), name
    # Every tile in a launch of its own.
    spans = emulate(given, dy, dfinal, shapes, span=1)
    for name, value in expected.items():
        close(spans[name], value, name)


@needs_compiler
def test_gradient_of_the_final_state_alone() -> None:
    given = inputs(1, 18, 32, 16, torch.float32)
    dy, dfinal = torch.zeros(1, 18, 32), torch.randn(1, 32, 16)
    found = emulate(given, dy, dfinal, (Shape(4), HELPED))
    for name, value in truth(given, dy, dfinal).items():
        close(found[name], value, name)
    assert not found["z"].any()


@needs_compiler
@needs_triton
@pytest.mark.skipif(not INTERPRETED, reason="Triton links the segments, and takes CPU tensors only in its interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "without"), [(2, ()), (1, ("state", "z", "delta_bias", "lengths", "resets"))])
def test_segments_of_a_long_row(
    dtype: torch.dtype, batch: int, without: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows cut into three segments that run at once: documents at and beside the cuts, padding over whole segments."""
    monkeypatch.setattr(nvrtc, "launch", lambda what, device: run(what))
    monkeypatch.setattr(scan, "segments_of", lambda batch, L, E, reverse: 3)
    given = inputs(batch, 96, 34, 16, dtype, without=without)
    if not without:
        given["resets"] = torch.zeros(2, 96, dtype=torch.bool)
        given["resets"][0, 32] = given["resets"][0, 63] = given["resets"][1, 5] = True
        given["lengths"] = torch.tensor([96, 20])
    dy, dfinal = torch.randn(batch, 96, 34).to(dtype), torch.randn(batch, 34, 16)
    expected = truth(given, dy, dfinal)
    own = leaves(given)
    used = [name for name in INPUTS if own[name] is not None]
    y, final = scan.scan_cuda(**own)
    grads = torch.autograd.grad((y, final), [own[name] for name in used], (dy, dfinal))
    found = {"y": y.detach(), "final": final.detach(), **dict(zip(used, grads, strict=True))}
    for name, value in expected.items():
        close(found[name], value, name)


def test_blocks_fit_small_gpus_in_bf16() -> None:
    for batch in (1, 4, 8):
        forward, backward = plan.forward_shape(batch, 3072, 16, 2), plan.backward_shape(batch, 3072, 16)
        assert plan.forward_shared(16, forward, 2, True) <= plan.SMALL_SHARED
        assert plan.backward_shared(16, backward, 2, True) <= plan.SMALL_SHARED


def test_how_many_segments() -> None:
    def both(batch: int, L: int, E: int) -> tuple[int, int]:
        return plan.segments_of(batch, L, E, reverse=False), plan.segments_of(batch, L, E, reverse=True)

    assert both(8, 4096, 3072) == (1, 1)
    assert both(1, 131072, 4096) == (1, 1)
    assert both(1, 131072, 512) == (32, 64)
    assert both(1, 4096, 4096) == (1, 1)
    assert both(1, 4096, 512) == (2, 8)
    assert both(1, 4100, 512) == (1, 1)  # not into equal ones
    for batch, L, E in [(2, 48000, 1024), (1, 17, 64), (3, 999, 8)]:
        assert all(n == 1 or L % (16 * n) == 0 for n in both(batch, L, E))


VARIANTS = [
    *((N, torch.bfloat16, plan.forward_shape(8, 3072, N, 2), plan.backward_shape(8, 3072, N)) for N in STATE_SIZES),
    *((N, torch.bfloat16, plan.forward_shape(1, 64, N, 2), plan.backward_shape(1, 64, N)) for N in STATE_SIZES),
    (16, torch.float32, plan.forward_shape(4, 3072, 16, 4), plan.backward_shape(8, 3072, 16)),
    (16, torch.float16, plan.forward_shape(1, 64, 16, 4), plan.backward_shape(1, 64, 16)),
]


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("N", "dtype", "forward", "backward"), VARIANTS)
def test_variants_compile(
    N: int,
    dtype: torch.dtype,
    forward: Shape,
    backward: Shape,
    arch: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    given = inputs(1, 20, 64, N, dtype)
    launch, _, _, checkpoints, _ = plan.plan_forward(**given, save=True, shape=forward)
    rest = {name: t for name, t in given.items() if name != "state"}
    launches, *_ = plan.plan_backward(given["u"], None, **rest, checkpoints=checkpoints, shape=backward)
    segments, *_ = plan.plan_segments(
        *(given[name] for name in ("u", "delta", "A", "B", "z", "delta_bias", "resets", "lengths")), reverse=True
    )
    for each in (launch, launches[0], segments):
        code = nvrtc.compiled(each.files, each.defines, arch)
        assert code[:4] == b"\x7fELF"
        assert nvrtc.compiled(each.files, each.defines, arch) == code
    assert len(list(tmp_path.rglob("*.cubin"))) == 3
    assert not list(tmp_path.rglob("*.part"))


def test_a_damaged_kernel_is_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "kernel.cubin"
    assert nvrtc._kept(path) is None
    nvrtc._keep(path, b"machine code")
    assert nvrtc._kept(path) == b"machine code"
    path.write_bytes(path.read_bytes()[:-1])
    assert nvrtc._kept(path) is None
    path.write_bytes(b"")
    assert nvrtc._kept(path) is None


@pytest.fixture
def no_bindings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    nvrtc._why_not.cache_clear()
    yield
    nvrtc._why_not.cache_clear()


@pytest.mark.usefixtures("no_bindings")
def test_without_the_packages_the_error_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError, match="needs the packages cuda-bindings and nvidia-cuda-nvrtc"):
        nvrtc.compiled(plan.files("forward"), (), "sm_90")


def test_the_cuda_backend_wants_a_gpu() -> None:
    with pytest.raises(UserError, match="the cuda backend needs tensors on a CUDA GPU, these are on cpu"):
        choose("cuda", ("cpu", "cuda"), "scan", torch.zeros(1))
    assert choose("auto", ("cpu", "triton", "cuda"), "scan", torch.zeros(1)) == "cpu"
    assert not scan.fits(torch.zeros(1, 1, 1), 16)


def test_the_choice_of_this_backend_breaks_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it asks of the bindings is asked while a graph is traced, and is a constant in it."""
    asked = []

    def limit(device: torch.device) -> int:
        asked.append(Path(__file__).read_text() != "")  # nothing that could be traced
        return 1 << 20

    def run(x: torch.Tensor) -> torch.Tensor:
        return x + len(nvrtc.why_not()) * 0 + nvrtc.shared_limit(x.device)

    monkeypatch.setattr(nvrtc, "_shared_limit", limit)
    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="eager")
    for L in (3, 4, 9):
        assert torch.equal(compiled(torch.zeros(L)), torch.full((L,), float(1 << 20)))
    assert len(asked) == 1
    torch.compiler.reset()


def test_pairs_are_read_at_once_only_where_they_are_aligned() -> None:
    x = torch.zeros(2, 6, 16, dtype=torch.bfloat16)
    assert plan._wide(8, (x[..., :8], x[..., 8:], None))
    assert not plan._wide(8, (x[..., 1:9],))  # starts at an odd element
    assert not plan._wide(7, (x[..., :7],))  # odd width
    assert not plan._wide(8, (x.flatten()[: 2 * 6 * 15].view(2, 6, 15)[..., :8],))  # every other row is odd
    assert plan._wide(8, (x[:, :1, :8],))


def test_spans_cover_every_tile_last_to_first() -> None:
    given = inputs(1, 100, 40, 16, torch.float32, without=("state",))
    del given["state"]
    one_tile = 2 * 16 * 2 * 16 * 4
    checkpoints = torch.empty(1, 7, 16, 40)
    launches, *_ = plan.plan_backward(given["u"], None, **given, checkpoints=checkpoints, span_bytes=3 * one_tile)
    names = [each.entry for each in launches]
    assert names == ["scan_backward", "sum_partials"] * 3
    # The parameters end in L, E, first, end and the strides of six tensors.
    spans = [memoryview(each.parameters).cast("q").tolist()[-14:-12] for each in launches[::2]]
    assert spans == [[4, 7], [1, 4], [0, 1]]


GPU = [
    ((1, 1, 5, 16), torch.bfloat16, ()),
    ((2, 77, 33, 16), torch.float32, ()),
    ((3, 130, 72, 16), torch.float16, ("lengths",)),
    ((2, 100, 40, 8), torch.bfloat16, ("resets",)),
    ((1, 100, 48, 32), torch.float32, ("z", "D", "delta_bias", "state")),
    ((1, 100, 48, 64), torch.bfloat16, ()),
    ((40, 90, 320, 16), torch.bfloat16, ()),
    ((1, 1024, 40, 16), torch.bfloat16, ()),  # in segments backwards
    ((1, 4096, 40, 16), torch.bfloat16, ("lengths",)),  # in segments both ways
    # More rows, which have block shapes of their own.
    ((40, 37, 320, 8), torch.bfloat16, ()),
    ((40, 37, 320, 32), torch.float16, ()),
    ((40, 37, 320, 64), torch.bfloat16, ()),
    ((72, 37, 320, 8), torch.float16, ()),
    ((72, 37, 320, 16), torch.bfloat16, ()),
    ((72, 37, 320, 32), torch.float32, ()),
    ((72, 37, 320, 64), torch.bfloat16, ()),
]


def test_every_block_shape_is_tried_on_the_gpu() -> None:
    tried = [(b, L, E, N) for (b, L, E, N), _, _ in GPU]
    shapes = {plan.forward_shape(b, E, N, 2) for b, _, E, N in tried}
    assert shapes >= {plan.forward_shape(b, 3072, N, 2) for b in (1, 4, 8) for N in STATE_SIZES}
    backward = {(N, plan.backward_shape(b, E, N)) for b, _, E, N in tried}
    assert backward >= {(N, plan.backward_shape(b, 3072, N)) for b in (1, 8) for N in STATE_SIZES}
    for reverse in (False, True):
        assert any(plan.segments_of(b, L, E, reverse=reverse) > 1 for b, L, E, _ in tried)


def leaves(given: dict[str, Any]) -> dict[str, Any]:
    return {n: t if t is None or n not in INPUTS else t.detach().requires_grad_() for n, t in given.items()}


@pytest.mark.gpu
@pytest.mark.parametrize(("size", "dtype", "without"), GPU)
def test_agrees_on_the_gpu(size: tuple[int, int, int, int], dtype: torch.dtype, without: tuple[str, ...]) -> None:
    b, L, E, N = size
    given = inputs(b, L, E, N, dtype, "cuda", without)
    dy, dfinal = torch.randn(b, L, E, device="cuda").to(dtype), torch.randn(b, E, N, device="cuda")
    expected = truth(given, dy, dfinal)
    own = leaves(given)
    used = [name for name in INPUTS if own[name] is not None]

    def once() -> dict[str, torch.Tensor]:
        y, final = scan.scan_cuda(**own)
        grads = torch.autograd.grad((y, final), [own[name] for name in used], (dy, dfinal))
        return {"y": y.detach(), "final": final.detach(), **dict(zip(used, grads, strict=True))}

    found = once()
    for name, value in expected.items():
        close(found[name], value, name)
    for name, value in once().items():
        assert torch.equal(found[name], value), f"{name} differs from run to run"


@pytest.mark.gpu
def test_one_compiled_graph_for_any_length() -> None:
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: list) -> Any:
        graphs.append(graph)
        return graph.forward

    def block(given: dict[str, Any]) -> torch.Tensor:
        y, final = scan.scan_cuda(**given)
        return (y * 2).float().sum() + final.sum()

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=keep)
    for L in (40, 64, 71):
        own = leaves(inputs(2, L, 64, 16, torch.bfloat16, "cuda", ("lengths", "resets")))
        plain = leaves({n: t if t is None else t.detach() for n, t in own.items()})
        compiled(own).backward()
        block(plain).backward()
        assert torch.equal(own["delta"].grad, plain["delta"].grad)
    assert len(graphs) == 1

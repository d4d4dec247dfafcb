"""Linear cross-entropy against PyTorch's in fp64: loss and both gradients, in chunks, with ignored tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernels import DEVICE, needs_triton
from tolerances import TOLERANCE, assert_close

from samba_lm.errors import UserError
from samba_lm.ops.backend import HAS_TRITON
from samba_lm.ops.linear_cross_entropy import cpu, linear_cross_entropy

if HAS_TRITON:
    from samba_lm.ops.linear_cross_entropy import triton as kernels

IGNORED = -100
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(
    shape: tuple[int, ...], D: int, V: int, dtype: torch.dtype, device: str = DEVICE
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states and a weight whose logits are a few units wide, targets of which a third is ignored."""
    hidden = torch.randn(*shape, D).to(dtype).to(device).requires_grad_()
    weight = (2 * D**-0.5 * torch.randn(V, D)).to(dtype).to(device).requires_grad_()
    targets = torch.randint(0, V, shape)
    targets[torch.rand(shape) < 0.33] = IGNORED
    return hidden, weight, targets.to(device)


def truth(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, factor: float = 1.0) -> list[torch.Tensor]:
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight.to(hidden.dtype)))
    loss = F.cross_entropy((h @ w.T).flatten(0, -2), targets.flatten(), reduction="sum", ignore_index=IGNORED)
    return [loss.detach(), *torch.autograd.grad(loss * factor, [h, w])]


def check(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, factor: float, backend: Any) -> None:
    loss = linear_cross_entropy(hidden, weight, targets, backend=backend)
    d_hidden, d_weight = torch.autograd.grad(loss * factor, [hidden, weight])
    want = truth(hidden, weight, targets, factor)
    assert loss.dtype == (torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    assert (d_hidden.dtype, d_weight.dtype) == (hidden.dtype, weight.dtype)
    # PyTorch's own product rounds the logits to bf16.
    assert_close(loss, want[0], "loss", hidden.dtype if backend == "cpu" else loss.dtype)
    dtype = torch.bfloat16 if hidden.dtype == torch.float16 else hidden.dtype
    assert_close(d_hidden, want[1], "gradient of hidden", dtype)
    assert_close(d_weight, want[2], "gradient of weight", dtype)
    assert not d_hidden[targets == IGNORED].any(), "an ignored token has a gradient"


@pytest.mark.parametrize("tokens_at_once", [1, 5, 33, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_plain_in_chunks(tokens_at_once: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "LOGITS_BUDGET", 37 * tokens_at_once)
    check(*inputs((3, 11), 8, 37, dtype, "cpu"), 0.25, "cpu")


def test_plain_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    whole = cpu.loss_sum

    def counted(hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(hidden.shape[0])
        return whole(hidden, *rest)

    monkeypatch.setattr(cpu, "LOGITS_BUDGET", 37 * 10)
    monkeypatch.setattr(cpu, "loss_sum", counted)
    hidden, weight, targets = inputs((3, 11), 8, 37, torch.float32, "cpu")
    linear_cross_entropy(hidden, weight, targets, backend="cpu").backward()
    assert max(seen) == 10
    assert len(seen) == 8, "four chunks, each computed again in backward"


def test_chunk_tokens() -> None:
    assert cpu.chunk_tokens(32_000) == 2097
    assert cpu.chunk_tokens(1 << 40) == 1


def test_fp32_weights_serve_bf16_activations() -> None:
    hidden, _, targets = inputs((7,), 8, 37, torch.bfloat16, "cpu")
    weight = torch.randn(37, 8, requires_grad=True)
    linear_cross_entropy(hidden, weight, targets).backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_shapes_are_checked() -> None:
    hidden, weight, targets = inputs((2, 3), 4, 5, torch.float32, "cpu")
    with pytest.raises(UserError, match=r"targets \[2, 3\] and a weight \[V, 4\], not \[3, 2\] and \[5, 4\]"):
        linear_cross_entropy(hidden, weight, targets.T)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "D", "V"), [((1,), 8, 1), ((2, 19), 24, 37), ((3, 5, 2), 16, 1000), ((9,), 8, 4999), ((5,), 8, 33001)]
)
def test_kernel(shape: tuple[int, ...], D: int, V: int, dtype: torch.dtype) -> None:
    check(*inputs(shape, D, V, dtype), 0.25, "triton")


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_in_chunks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "LOGITS_BYTES", 4 * 333 * 7)
    assert kernels.chunk_rows(31, 333) == 7
    check(*inputs((31,), 16, 333, dtype), 1 / 3, "triton")


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kernel_gives_an_fp32_weight_its_fp32_gradient(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "LOGITS_BYTES", 4 * 40 * 16)
    hidden, weight, targets = inputs((100,), 16, 40, torch.float32)
    half = hidden.detach().to(dtype).requires_grad_()
    check(half, weight, targets, 1.0, "triton")
    grad = torch.autograd.grad(linear_cross_entropy(half, weight, targets, backend="triton"), weight)[0]
    assert (grad - grad.to(dtype)).any(), "the gradient was rounded"


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [1, 37, 1000, 5000])
def test_gradients_in_the_memory_of_the_logits_are_the_same(V: int, dtype: torch.dtype) -> None:
    width, rows = -(-V // kernels.ALIGN) * kernels.ALIGN, 7
    memory = torch.randn(rows, width, device=DEVICE) * 3
    logits, apart = memory[:, :V], torch.empty(rows, width, dtype=dtype, device=DEVICE)[:, :V]
    targets = torch.randint(0, V, (rows,), device=DEVICE)
    targets[2] = IGNORED
    losses = torch.empty(2, rows, device=DEVICE)
    kernels.softmax_loss(logits, targets, losses[0], apart, IGNORED)
    inside = memory.view(dtype)[:, :V]
    kernels.softmax_loss(logits, targets, losses[1], inside, IGNORED)
    assert inside.data_ptr() == logits.data_ptr()
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(inside, apart)


@needs_triton
def test_kernel_without_gradients_and_with_one() -> None:
    hidden, weight, targets = inputs((13,), 8, 70, torch.float32)
    want = truth(hidden, weight, targets)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets, backend="triton")
    assert not loss.requires_grad
    assert_close(loss, want[0], "loss", torch.float32)
    for at, leaf in ((1, hidden), (2, weight)):
        others = [t if t is leaf else t.detach() for t in (hidden, weight)]
        loss = linear_cross_entropy(*others, targets, backend="triton")
        assert_close(torch.autograd.grad(loss, leaf)[0], want[at], "gradient", torch.float32)


@needs_triton
@pytest.mark.parametrize("rows", [0, 6])
def test_kernel_of_nothing_valid_is_zero(rows: int) -> None:
    hidden, weight, targets = inputs((rows,), 8, 50, torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORED), backend="triton")
    grads = torch.autograd.grad(loss, [hidden, weight])
    assert loss.item() == 0.0
    assert not any(grad.any() for grad in grads)


@needs_triton
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's numpy on infinity
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # and of Triton 3.6 on a row of NaN
@pytest.mark.parametrize("V", [300, 33000])
def test_kernel_at_the_edges_of_fp32(V: int) -> None:
    hidden, weight, targets = inputs((6,), 8, V, torch.float32)
    big = (100 * hidden).detach().requires_grad_()
    check(big, (10 * weight).detach().requires_grad_(), targets, 1.0, "triton")
    for bad in (float("nan"), float("inf")):
        spoiled = hidden.detach().clone()
        spoiled[:, 3] = bad
        assert not linear_cross_entropy(spoiled, weight, targets.clamp(min=0), backend="triton").isfinite()
    for outside in (-1, V):
        assert linear_cross_entropy(hidden, weight, torch.full_like(targets, outside), backend="triton").isnan()


@needs_triton
def test_kernel_takes_strided_inputs_and_an_ignore_index() -> None:
    hidden = torch.randn(5, 3, 20, device=DEVICE).transpose(0, 1)[..., 4:12]
    weight = torch.randn(16, 9, device=DEVICE)[:, 1:]
    targets = torch.randint(0, 9, (3, 5), device=DEVICE)
    got, want = (linear_cross_entropy(hidden, weight, targets, ignore_index=4, backend=b) for b in ("triton", "cpu"))
    assert_close(got, want, "loss")


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernel_is_a_well_formed_operator(dtype: torch.dtype) -> None:
    hidden, weight, targets = inputs((9,), 8, 20, dtype)
    for flags in ((True, True), (True, False), (False, True)):
        leaves = [t.detach().requires_grad_(flag) for t, flag in zip((hidden, weight), flags, strict=True)]
        torch.library.opcheck(kernels._linear_cross_entropy, (*leaves, targets, IGNORED, *flags))
    torch.library.opcheck(kernels._scale, (hidden.detach(), torch.tensor(0.3, device=DEVICE)))


@needs_triton
def test_kernel_keeps_the_scalar_in_fp32() -> None:
    x = torch.ones(4, dtype=torch.bfloat16, device=DEVICE) * 3
    factor = torch.tensor(1 / 3 + 1 / 600, device=DEVICE)
    assert torch.equal(kernels._scale(x, factor), (x.float() * factor).to(torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize(("N", "D", "V"), [(3000, 768, 32000), (2050, 512, 50257), (70, 64, 151936), (5000, 256, 260)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_the_gpu(N: int, D: int, V: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "LOGITS_BYTES", 1 << 27)
    hidden, weight, targets = inputs((N,), D, V, dtype)
    check(hidden, weight, targets, 1.0, "auto")
    loss = linear_cross_entropy(hidden, weight, targets)
    got = torch.autograd.grad(loss / N * 300, [hidden, weight])
    want = truth(hidden, weight, targets, 300 / N)[1:]
    bound = 1e-5 if dtype == torch.float32 else TOLERANCE[torch.bfloat16][0] / 4
    for g, w in zip(got, want, strict=True):
        assert (g.double() - w).norm() <= bound * w.norm()


@pytest.mark.gpu
def test_same_bits_every_time() -> None:
    hidden, weight, targets = inputs((9000,), 512, 32000, torch.bfloat16)
    first, *others = (
        [loss, *torch.autograd.grad(loss, [hidden, weight])]
        for loss in (linear_cross_entropy(hidden, weight, targets) for _ in range(3))
    )
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def compiled_without_recompiling(backend: str) -> None:
    hidden, weight, targets = inputs((30,), 16, 100, torch.bfloat16)

    def run(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(h * 2, w, t, backend="triton") / 7

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=backend)
    for rows in (30, 29, 12):
        h = hidden.detach()[:rows].clone().requires_grad_()
        args = (h, weight, targets[:rows].clone())
        with torch._dynamo.config.patch(error_on_recompile=rows < 30):
            got, want = (torch.autograd.grad(f(*args), [h, weight]) for f in (compiled, run))
        for a, b in zip(got, want, strict=True):
            assert_close(a, b, "gradient")
    torch.compiler.reset()


@needs_triton
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own look
def test_traces_whole() -> None:
    compiled_without_recompiling("aot_eager")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own look
def test_compiles_whole() -> None:
    compiled_without_recompiling("inductor")

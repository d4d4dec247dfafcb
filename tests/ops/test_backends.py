"""Every fast path equals its definition: outputs, final state and all gradients, at odd sizes, in three dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from products import products
from tolerances import assert_close

from samba_lm.errors import UserError
from samba_lm.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from samba_lm.ops.gla import gated_linear_attention
from samba_lm.ops.linear import _halves, linear, linear_halves
from samba_lm.ops.selective_scan import cpu, selective_scan, selective_scan_step
from samba_lm.ops.sliding_attention import attend_one, attend_one_lse, sliding_attention, sliding_attention_lse

Inputs = dict[str, torch.Tensor]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def compare(op: Callable[..., Any], inputs: Inputs, fast: str, dtype: torch.dtype, **fixed: Any) -> None:
    """Run ``op`` with backend ``reference`` and ``fast`` on the same inputs; compare outputs and gradients.

    The reference runs on the same rounded numbers in fp64 (fp32 inputs and lower), so it is the truth.
    """
    results = []
    for backend in ("reference", fast):
        wide = torch.float64 if backend == "reference" else dtype
        given = {k: t.to(dtype).to(wide).requires_grad_() for k, t in inputs.items()}
        out = op(**given, **fixed, backend=backend)
        outs = list(out) if isinstance(out, tuple) else [out]
        generator = torch.Generator().manual_seed(3)
        weights = [torch.randn(o.shape, generator=generator).to(dtype).to(wide) for o in outs]
        total = sum((o.double() * w.double()).sum() for o, w in zip(outs, weights, strict=True))
        grads = torch.autograd.grad(total, list(given.values()))
        results.append([*outs, *grads])
    names = ["y", "state"][: len(outs)] + [f"gradient of {k}" for k in inputs]
    for name, actual, expected in zip(names, results[1], results[0], strict=True):
        assert_close(actual, expected, name, dtype, scale=5.0 if "gradient" in name else 1.0)


def scan_inputs(B: int, L: int, E: int, N: int) -> Inputs:
    r = torch.randn
    return {
        "u": r(B, L, E),
        "delta": r(B, L, E),
        "A": -torch.rand(E, N) * 4,
        "B": r(B, L, N),
        "C": r(B, L, N),
        "D": r(E),
        "z": r(B, L, E),
        "delta_bias": r(E),
        "state": r(B, E, N),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("B", "L", "E", "N"), [(1, 1, 1, 1), (2, 37, 12, 16), (1, 130, 5, 8), (3, 64, 7, 3), (2, 65, 16, 64)]
)
def test_selective_scan(B: int, L: int, E: int, N: int, dtype: torch.dtype) -> None:
    compare(selective_scan, scan_inputs(B, L, E, N), "cpu", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_selective_scan_with_resets_and_padding(dtype: torch.dtype) -> None:
    resets = torch.rand(3, 70) < 0.1
    lengths = torch.tensor([70, 0, 33])
    compare(selective_scan, scan_inputs(3, 70, 6, 16), "cpu", dtype, resets=resets, lengths=lengths)


@pytest.mark.parametrize("elements", [1, 100, 1 << 12])
def test_selective_scan_at_every_block_size(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "BLOCK_ELEMENTS", elements)
    compare(selective_scan, scan_inputs(2, 67, 5, 4), "cpu", torch.float64)


def test_selective_scan_gradcheck() -> None:
    inputs = {k: t.double().requires_grad_() for k, t in scan_inputs(2, 9, 3, 2).items()}
    resets = torch.zeros(2, 9, dtype=torch.bool)
    resets[0, 4] = True

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return selective_scan(**dict(zip(inputs, tensors, strict=True)), resets=resets, backend="cpu")

    assert torch.autograd.gradcheck(run, tuple(inputs.values()))


def test_selective_scan_keeps_its_state_in_fp32() -> None:
    inputs = {k: t.to(torch.bfloat16) for k, t in scan_inputs(1, 5, 3, 2).items()}
    y, state = selective_scan(**inputs)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)


def test_scan_step_is_the_scan_at_length_one() -> None:
    i = {k: t.double() for k, t in scan_inputs(2, 1, 5, 4).items()}
    y, state = selective_scan(**i, backend="reference")
    one = {key: t[:, 0] for key, t in i.items() if key in ("u", "delta", "B", "C", "z")}
    first, second = selective_scan_step(**{**i, **one})
    assert_close(first, y[:, 0], "y")
    assert_close(second, state, "state")


def test_fast_decay_does_not_overflow() -> None:
    i = scan_inputs(1, 50, 4, 4)
    i["A"] = i["A"] * 1e4
    y, state = selective_scan(**i)
    assert torch.isfinite(y).all()
    assert torch.isfinite(state).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("L", "P", "H", "G", "window"),
    [(37, 0, 4, 2, 5), (37, 4, 4, 2, 5), (70, 31, 2, 1, 32), (1, 9, 2, 2, 4), (300, 0, 2, 2, 270), (50, 80, 2, 1, 9),
     (33, 0, 2, 2, None), (20, 30, 4, 1, None), (40, 3, 2, 2, 1), (10, 2, 1, 1, 100)],
)  # fmt: skip
@pytest.mark.parametrize("documents", [False, True])
def test_sliding_attention(
    L: int, P: int, H: int, G: int, window: int | None, documents: bool, dtype: torch.dtype
) -> None:
    r = torch.randn
    inputs = {"q": r(2, L, H, 8), "k": r(2, P + L, G, 8), "v": r(2, P + L, G, 6)}
    docs = (torch.rand(2, P + L) < 0.1).long().cumsum(1) if documents else None
    q_docs = docs[:, P:] if docs is not None else None
    names = {"window": window, "q_documents": q_docs, "k_documents": docs}
    compare(sliding_attention, inputs, "cpu", dtype, **names)
    compare(sliding_attention_lse, inputs, "cpu", dtype, **names)


def test_attend_one_is_attention_of_the_last_query() -> None:
    q, k, v = (torch.randn(2, s, h, 8, dtype=torch.float64) for s, h in ((1, 4), (9, 2), (9, 2)))
    expected = sliding_attention(q, k, v, window=None, backend="reference")[:, 0]
    order = torch.randperm(9)
    assert_close(attend_one(q[:, 0], k[:, order], v[:, order], None), expected, "any order")
    more = torch.cat((k, 100 * torch.ones_like(k[:, :2])), 1), torch.cat((v, v[:, :2]), 1)
    filled = torch.arange(11) < 9
    filled = filled.expand(2, -1)
    assert_close(attend_one(q[:, 0], *more, filled), expected, "unfilled slots are not seen")
    _, sums = sliding_attention_lse(q, k, v, window=None, backend="reference")
    for actual, lse in (attend_one_lse(q[:, 0], k, v, None), attend_one_lse(q[:, 0], *more, filled)):
        assert_close(actual, expected, "with the log-sum-exp")
        assert_close(lse, sums[:, 0], "log-sum-exp")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("L", [1, 16, 37])
def test_gated_linear_attention(L: int, per_channel: bool, dtype: torch.dtype) -> None:
    r = torch.randn
    inputs = {"q": r(2, L, 3, 4), "k": r(2, L, 3, 4), "v": r(2, L, 3, 5), "state": r(2, 3, 4, 5)}
    inputs["log_decay"] = -torch.rand(2, L, 3, 4 if per_channel else 1)
    documents = (torch.rand(2, L) < 0.1).long().cumsum(1)
    lengths = torch.tensor([L, L // 2])
    compare(gated_linear_attention, inputs, "cpu", dtype)
    compare(gated_linear_attention, inputs, "cpu", dtype, documents=documents, lengths=lengths)


def test_gla_with_gates_shut_does_not_overflow() -> None:
    q, k, v = (torch.randn(1, 64, 1, 4) for _ in range(3))
    out, state = gated_linear_attention(q, k, v, torch.full((1, 64, 1, 4), -200.0))
    assert torch.isfinite(out).all()
    assert_close(state[0, 0], k[0, -1, 0, :, None] * v[0, -1, 0], "only the last token is left")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv_step_is_the_convolution_at_length_one(dtype: torch.dtype) -> None:
    """To the bit in bf16 but for the order of four additions in fp32: both round once, at the end."""
    x, state, weight, bias = (torch.randn(s).to(dtype) for s in ((2, 1, 5), (2, 3, 5), (5, 4), (5,)))
    y, after = causal_conv1d(x, weight, bias, state=state)
    first, second = causal_conv1d_step(x[:, 0], weight, bias, state)
    assert_close(first, y[:, 0], "y", dtype, scale=0.2 if dtype == torch.bfloat16 else 1.0)
    assert torch.equal(second, after)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "L", "E", "k"), [(1, 1, 1, 1), (2, 37, 5, 4), (4, 2, 3, 8)])
def test_causal_conv1d(B: int, L: int, E: int, k: int, dtype: torch.dtype) -> None:
    r = torch.randn
    inputs = {"x": r(B, L, E), "weight": r(E, k), "bias": r(E), "state": r(B, k - 1, E)}
    steps = torch.arange(L).expand(B, L)
    first = torch.where(torch.rand(B, L) < 0.2, steps, -1).cummax(1).values
    positions = torch.where(first >= 0, steps - first, steps + 2)
    lengths = torch.tensor([L, L // 2, 0, 1])[:B]
    compare(causal_conv1d, inputs, "cpu", dtype)
    compare(causal_conv1d, inputs, "cpu", dtype, positions=positions, lengths=lengths)
    compare(causal_conv1d, inputs, "cpu", dtype, positions=positions[:1], lengths=lengths)


@pytest.mark.parametrize("kernel", [1, 2, 4])
def test_causal_conv1d_is_torchs_convolution(kernel: int) -> None:
    x, weight, bias = torch.randn(2, 11, 3), torch.randn(3, kernel), torch.randn(3)
    y, state = causal_conv1d(x, weight, bias)
    padded = torch.nn.functional.pad(x.transpose(1, 2), (kernel - 1, 0))
    expected = torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=3).transpose(1, 2)
    assert_close(y, torch.nn.functional.silu(expected), "y")
    assert torch.equal(state, x[:, 11 - (kernel - 1) :])


@pytest.mark.parametrize(("shape", "n_out"), [((1, 24), 8), ((3, 37, 24), 40), ((2, 5, 7, 3), 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(shape: tuple[int, ...], n_out: int, bias: bool, dtype: torch.dtype) -> None:
    inputs = {"x": torch.randn(shape), "weight": torch.randn(n_out, shape[-1])}
    compare(linear, {**inputs, "bias": torch.randn(n_out)} if bias else inputs, "cpu", dtype)


def test_linear_of_a_strided_view() -> None:
    x = torch.randn(4, 20, 12)[:, ::2, 3:9]
    weight = torch.randn(5, 6)
    assert_close(linear(x, weight, backend="cpu"), linear(x, weight, backend="reference"), "y")


def test_halves_of_a_product_and_their_gradients() -> None:
    """What a GPU runs, on the CPU: two products for the halves, one sum for their gradients."""
    x, weight = torch.randn(7, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    both = [t.requires_grad_() for t in (x, weight)]
    expected, actual = linear_halves(x, weight), _halves(x, weight)
    for one, other in zip(expected, actual, strict=True):
        assert_close(other, one, "half")
    down = [torch.randn(7, 3, dtype=torch.float64) for _ in range(2)]
    for one, other in zip(*(torch.autograd.grad(y, both, down) for y in (expected, actual)), strict=True):
        assert_close(other, one, "gradient")
    torch.library.opcheck(_halves, (x, weight))


@pytest.mark.parametrize("compiled", [False, True])
def test_of_a_frozen_weight_no_gradient_of_halves_is_computed(compiled: bool) -> None:
    x, weight = torch.randn(7, 5).requires_grad_(), torch.randn(6, 5).requires_grad_()
    down = [torch.randn(7, 3) for _ in range(2)]
    halves = torch.compile(lambda *given: _halves(*given), backend="aot_eager") if compiled else _halves
    (wanted,) = torch.autograd.grad(_halves(x, weight), x, down)

    def backward(weight: torch.Tensor) -> None:
        x.grad = None
        torch.autograd.backward(halves(x, weight), down)
        assert x.grad is not None
        assert torch.equal(x.grad, wanted)

    assert products(lambda: backward(weight)) == 6
    assert products(lambda: backward(weight.detach())) == 4


def test_linear_is_deterministic() -> None:
    x, weight = torch.randn(100, 64), torch.randn(48, 64)
    assert all(torch.equal(linear(x, weight, backend="cpu"), linear(x, weight, backend="cpu")) for _ in range(5))


def test_an_unknown_backend_is_named() -> None:
    x, weight = torch.randn(1, 2, 3), torch.randn(3, 4)
    with pytest.raises(
        UserError, match=r"causal_conv1d has no backend 'cuda'; choose one of: auto, reference, cpu, tr"
    ):
        causal_conv1d(x, weight, backend="cuda")
    with pytest.raises(UserError, match=r"causal_conv1d_step has no backend 'reference'; choose one of: auto, cpu, tr"):
        causal_conv1d_step(x[0], weight, weight[:, 0], torch.randn(2, 3, 3), backend="reference")
    with pytest.raises(UserError, match=r"selective_scan has no backend 'fla'; choose one of: auto, reference, cpu"):
        selective_scan(*(t for k, t in scan_inputs(1, 2, 2, 2).items() if k in "udeltaABC"), backend="fla")


def test_a_batch_beyond_the_grid_is_named() -> None:
    x, weight = torch.zeros(70_000, 1, 1), torch.ones(1, 2)
    y, _ = causal_conv1d(x, weight)
    assert y.shape == x.shape
    with pytest.raises(UserError, match="the triton backend takes batches of at most 65535, and this is 70000"):
        causal_conv1d(x, weight, backend="triton")

"""The attention kernels equal the definition: outputs and gradients, at odd sizes, over several blocks."""

from __future__ import annotations

import pytest
import torch
from kernels import DEVICE, needs_triton
from tolerances import assert_close

from samba_lm.errors import UserError
from samba_lm.ops.sliding_attention import attend_one, attend_one_lse, sliding_attention, sliding_attention_lse
from samba_lm.ops.sliding_attention.reference import attention_reference

pytestmark = needs_triton

# fp16's 11 bits lie between bf16's 8 and fp32's 24.
SCALE = {torch.float32: 1.0, torch.float16: 0.2, torch.bfloat16: 1.0}
KIND = {torch.float32: torch.float32, torch.float16: torch.bfloat16, torch.bfloat16: torch.bfloat16}


def make(
    B: int, L: int, P: int, H: int, G: int, K: int, dtype: torch.dtype, strided: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v on DEVICE; strided: k and v are halves of one tensor, as a projection gives them."""
    q = torch.randn(B, L, H, K).to(DEVICE, dtype)
    if strided:
        k, v = torch.randn(B, P + L, 2 * G, K).to(DEVICE, dtype).split(G, dim=2)
        return q, k, v
    k, v = (torch.randn(B, P + L, G, K).to(DEVICE, dtype) for _ in "kv")
    return q, k, v


def packed(B: int, L: int, P: int, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Documents as the cache gives them: -1 in front where a row's past is shorter than P."""
    documents = (torch.rand(B, P + L) < rate).long().cumsum(1)
    for row in range(B):
        documents[row, : (row * P) // B] = -1
    documents = documents.to(DEVICE)
    return documents[:, P:], documents


def truth(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    window: int | None,
    documents: tuple[torch.Tensor, torch.Tensor] | None,
    scale: float,
) -> list[torch.Tensor]:
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    out = attention_reference(*wide, window, *(documents or (None, None)), scale)
    return [out.detach(), *torch.autograd.grad(out, wide, dout.double())]


def check(actual: list[torch.Tensor], expected: list[torch.Tensor], dtype: torch.dtype) -> None:
    for name, a, e in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        assert a.dtype == dtype
        assert a.is_contiguous(), name
        assert_close(a, e, name, KIND[dtype], SCALE[dtype] * (1.0 if name == "out" else 2.0))


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    window: int | None,
    documents: tuple[torch.Tensor, torch.Tensor] | None,
    scale: float,
    blocks: tuple[int, int],
    tma: bool,
) -> list[torch.Tensor]:
    """The kernels with blocks of so many queries and keys."""
    from samba_lm.ops.sliding_attention.triton import Blocks, backward, first_keys, forward

    first = None if documents is None else first_keys(window, *documents)
    cut = Blocks(*blocks, warps=4, stages=2)
    out, lse = forward(q, k, v, first, window or 0, scale, cut, tma)
    return [out, *backward(dout, q, k, v, out, lse, first, window or 0, scale, cut, cut, tma)]


@pytest.mark.parametrize(("documents", "tma"), [(False, True), (True, False)])
@pytest.mark.parametrize(
    ("L", "P", "H", "G", "window", "blocks"),
    [(67, 0, 2, 1, 40, (32, 16)), (70, 31, 1, 1, 32, (32, 32)), (30, 50, 2, 2, 9, (32, 16)),
     (65, 0, 1, 1, None, (32, 32)), (40, 30, 4, 1, None, (32, 16)), (40, 3, 1, 1, 1, (32, 16)),
     (1, 9, 2, 2, 4, (32, 16)), (120, 5, 1, 1, 64, (32, 16)), (64, 0, 1, 1, 500, (64, 16))],
)  # fmt: skip
def test_several_blocks(
    L: int, P: int, H: int, G: int, window: int | None, blocks: tuple[int, int], documents: bool, tma: bool
) -> None:
    q, k, v = make(2, L, P, H, G, 16, torch.float16)
    dout = torch.randn(q.shape).to(DEVICE, torch.float16)
    docs = packed(2, L, P, 0.05) if documents else None
    expected = truth(q, k, v, dout, window, docs, 0.3)
    check(run(q, k, v, dout, window, docs, 0.3, blocks, tma), expected, torch.float16)


@pytest.mark.parametrize(
    ("K", "dtype"),
    [(8, torch.bfloat16), (20, torch.float16), (20, torch.float32), (24, torch.bfloat16), (64, torch.bfloat16),
     (64, torch.float32), (128, torch.float16), (256, torch.bfloat16), (256, torch.float32)],
)  # fmt: skip
def test_head_dims_through_the_public_function(K: int, dtype: torch.dtype) -> None:
    q, k, v = (t.requires_grad_() for t in make(1, 45, 11, 2, 1, K, dtype, strided=True))
    dout = torch.randn(q.shape).to(DEVICE, dtype)
    docs = packed(1, 45, 11, 0.03)
    out = sliding_attention(q, k, v, window=17, q_documents=docs[0], k_documents=docs[1], backend="triton")
    actual = [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]
    check(actual, truth(q, k, v, dout, 17, docs, K**-0.5), dtype)


@pytest.mark.parametrize(("L", "P", "window"), [(45, 11, 17), (33, 0, None)])
def test_log_sum_exp(L: int, P: int, window: int | None) -> None:
    q, k, v = make(2, L, P, 4, 2, 16, torch.bfloat16)
    docs = packed(2, L, P, 0.05)
    names = {"window": window, "q_documents": docs[0], "k_documents": docs[1]}
    wide = (t.double() for t in (q, k, v))
    expected = sliding_attention_lse(*wide, **names, backend="reference")
    out, lse = sliding_attention_lse(q, k, v, **names, backend="triton")
    assert_close(out, expected[0], "out", torch.bfloat16)
    assert_close(lse, expected[1], "lse", torch.float32, 2.0)
    with pytest.raises(UserError, match="they need gradients"):
        sliding_attention_lse(q.requires_grad_(), k, v, **names, backend="triton")
    assert sliding_attention_lse(q, k, v, **names)[1].requires_grad


def test_strided_gradient_and_query() -> None:
    q = torch.randn(1, 40, 6, 16).to(DEVICE).transpose(2, 3)[..., ::2].transpose(2, 3)
    k, v = make(1, 40, 0, 1, 1, 16, torch.float32)[1:]
    dout = torch.randn(1, 40, 16, 3).to(DEVICE).transpose(2, 3)
    check(run(q, k, v, dout, 9, None, 0.25, (16, 16), False), truth(q, k, v, dout, 9, None, 0.25), torch.float32)


def test_what_the_kernels_cannot_take_is_told() -> None:
    q, k, v = make(1, 5, 0, 1, 1, 16, torch.float32)
    with pytest.raises(UserError, match="one head dim of at most 256, not 16 and 8"):
        sliding_attention(q, k, v[..., :8], window=3, backend="triton")
    with pytest.raises(UserError, match="must share one of"):
        sliding_attention(q, k, v.half(), window=3, backend="triton")
    with pytest.raises(UserError, match="scale must not be negative"):
        sliding_attention(q, k, v, window=3, scale=-1.0, backend="triton")


def test_registration() -> None:
    from samba_lm.ops.sliding_attention.triton import first_keys, sliding_attention_forward

    q, k, v = (t.requires_grad_() for t in make(1, 20, 3, 2, 1, 16, torch.float32))
    first = first_keys(7, *packed(1, 20, 3, 0.1))
    for given in (None, first):
        torch.library.opcheck(sliding_attention_forward, (q, k, v, given, 7, 0.25))


def one_truth(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, filled: torch.Tensor | None) -> torch.Tensor:
    share = q.shape[1] // k.shape[2]
    q, k, v = q.double(), k.double().repeat_interleave(share, 2), v.double().repeat_interleave(share, 2)
    scores = torch.einsum("bhk,bchk->bhc", q, k) * q.shape[-1] ** -0.5
    if filled is not None:
        scores = scores.masked_fill(~filled[:, None], float("-inf"))
    return torch.einsum("bhc,bchk->bhk", scores.softmax(-1), v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("C", "H", "G", "K", "some"), [(1, 1, 1, 16, False), (300, 4, 2, 20, True), (130, 6, 1, 64, True)]
)
def test_attend_one(C: int, H: int, G: int, K: int, some: bool, dtype: torch.dtype) -> None:
    q, k, v = make(2, C, 0, H, G, K, dtype, strided=True)
    q = q[:, 0]
    filled = (torch.arange(C) < torch.tensor([C // 3, 1])[:, None]).to(DEVICE) if some else None
    expected = one_truth(q, k, v, filled)
    if filled is not None:  # what lies in the other slots is not read
        k, v = (t.masked_fill(~filled[:, :, None, None], float("nan")) for t in (k, v))
    out, lse = attend_one_lse(q, k, v, filled, backend="triton")
    assert out.dtype == dtype
    assert_close(out, expected, "out", KIND[dtype], SCALE[dtype])
    assert torch.equal(out, attend_one(q, k, v, filled, backend="triton"))
    sums = attend_one_lse(q.double(), k.double().nan_to_num(), v.double().nan_to_num(), filled)[1]
    assert_close(lse, sums, "log-sum-exp", torch.float32)


def test_every_slot_is_in_one_split() -> None:
    from samba_lm.ops.sliding_attention.triton_step import cut

    for slots in (1, 63, 64, 65, 2048, 131072, 100001):
        for programs in (1, 4, 192, 5000):
            splits, chunk = cut(slots, programs, 128, 64)
            assert (splits - 1) * chunk < slots <= splits * chunk
            assert chunk % 64 == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    ("B", "L", "P", "H", "G", "K", "window"),
    [(1, 3000, 0, 4, 4, 128, 700), (2, 1500, 333, 8, 2, 64, 512), (2, 777, 100, 4, 1, 128, None),
     (1, 500, 20, 2, 2, 256, 300), (1, 1000, 0, 2, 1, 80, 128), (3, 513, 2047, 2, 2, 64, 2048),
     (1, 600, 7, 2, 2, 16, 100), (1, 600, 7, 2, 2, 32, 100)],
)  # fmt: skip
def test_bigger(
    B: int, L: int, P: int, H: int, G: int, K: int, window: int | None, documents: bool, dtype: torch.dtype
) -> None:
    q, k, v = (t.requires_grad_() for t in make(B, L, P, H, G, K, dtype, strided=True))
    dout = torch.randn(q.shape).to(DEVICE, dtype)
    docs = packed(B, L, P, 0.004) if documents else None
    names = {} if docs is None else {"q_documents": docs[0], "k_documents": docs[1]}
    results = []
    for _ in range(2):
        out = sliding_attention(q, k, v, window=window, **names, backend="triton")
        results.append([out.detach(), *torch.autograd.grad(out, (q, k, v), dout)])
    check(results[0], truth(q, k, v, dout, window, docs, K**-0.5), dtype)
    for name, one, two in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        assert torch.equal(one, two), f"{name} differs from run to run"


@pytest.mark.gpu
def test_compiled_whole_and_for_any_length() -> None:
    counter = 0

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        nonlocal counter
        counter += 1
        return graph

    compiled = torch.compile(
        lambda q, k, v: sliding_attention(q, k, v, window=50, backend="triton") * 2,
        fullgraph=True, dynamic=True, backend=backend,
    )  # fmt: skip
    for length in (100, 130, 257):
        q, k, v = make(1, length, 0, 2, 1, 64, torch.bfloat16)
        expected = sliding_attention(q, k, v, window=50, backend="triton") * 2
        assert torch.equal(compiled(q, k, v), expected)
    assert counter == 1


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("C", "H", "G", "K"), [(2048, 12, 12, 128), (131072, 32, 4, 64), (3000, 24, 8, 96), (500, 2, 1, 256)]
)
def test_attend_one_in_a_graph(C: int, H: int, G: int, K: int) -> None:
    _, k, v = make(2, C, 0, 1, G, K, torch.bfloat16)
    q = torch.randn(2, H, K).to(DEVICE, torch.bfloat16)
    filled = torch.rand(2, C, device=DEVICE) < 0.7
    assert_close(attend_one(q, k, v, filled, backend="triton"), one_truth(q, k, v, filled), "out", torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend_one(q, k, v, filled, backend="triton")
    q.normal_()
    filled.logical_not_()
    graph.replay()
    assert_close(out, one_truth(q, k, v, filled), "replayed", torch.bfloat16)

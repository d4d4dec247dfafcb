"""torch.compile of a whole Samba block on the kernels: without a break, and once for every length."""

from __future__ import annotations

import pytest
import torch
from kernels import DEVICE, needs_triton
from tolerances import assert_close
from torch._dynamo.testing import CompileCounterWithBackend

from samba_lm.checkpoint import create
from samba_lm.ops.backend import preferring
from samba_lm.ops.selective_scan import selective_scan
from samba_lm.span import Span


@needs_triton
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)]
)  # inductor would generate code for the CPU here, where there is nothing left to fuse
def test_a_whole_block_at_any_length(backend: str) -> None:
    """Mamba, MLP, attention and MLP, forward and backward, with the kernels as the only operators of their own."""
    model = create("samba-micro", device=DEVICE)
    layers = list(model.layers)[:4]
    assert [type(layer.mixer).__name__ for layer in layers] == [
        "MambaMixer",
        "SwiGLUMLP",
        "AttentionMixer",
        "SwiGLUMLP",
    ]

    def block(x: torch.Tensor, span: Span) -> torch.Tensor:
        branch = None
        for layer in layers:
            tensors = layer.mixer.init_tensors(x.shape[0], x.device, x.dtype)
            x, branch, _ = layer(x, branch, tensors, span, x.dtype)
        return x + branch

    counter, counts = CompileCounterWithBackend(backend), []
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    with preferring("triton" if DEVICE == "cpu" else None):
        for length in (19, 22):
            x = torch.randn(1, length, model.config.d_model, device=DEVICE)
            span = Span.of(1, length, x.device, None, None, keep=False)
            results = []
            for run in (block, compiled):
                model.zero_grad(set_to_none=True)
                y = run(x, span)
                y.square().mean().backward()
                results.append([y, *(p.grad for layer in layers for p in layer.parameters())])
            for i, (expected, actual) in enumerate(zip(*results, strict=True)):
                assert_close(actual, expected, f"{length} tokens, result {i}", scale=5.0)
            counts.append(counter.frame_count)
    assert counts[0] == counts[-1], "a new length was compiled anew"


def test_the_scan_of_a_cpu_is_not_traced() -> None:
    """Its walk over time is Python: a graph of it would have every token's operations."""
    torch.manual_seed(0)
    operations = []
    for length in (5, 50):
        u, delta = torch.randn(2, 1, length, 8)
        A, B, C = -torch.rand(8, 4), torch.randn(1, length, 4), torch.randn(1, length, 4)
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        y, _ = torch.compile(selective_scan, backend=counter)(u, delta, A, B, C)
        assert_close(y, selective_scan(u, delta, A, B, C)[0], f"{length} tokens")
        operations.append(counter.op_count)
    assert operations[0] == operations[1]

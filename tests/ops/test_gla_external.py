"""GLA and retention by flash-linear-attention: how documents are handed to it, and on a GPU with it, its numbers."""

from __future__ import annotations

import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from tolerances import assert_close

from samba_lm.errors import UserError
from samba_lm.ops import backend as backends
from samba_lm.ops.backend import HAS_FLA
from samba_lm.ops.gla import external, gated_linear_attention
from samba_lm.ops.gla.reference import gla_reference

Inputs = dict[str, torch.Tensor]


def inputs(B: int, L: int, H: int, K: int, V: int, scalar: bool) -> Inputs:
    r = torch.randn
    decay = -torch.rand(B, L, H, 1 if scalar else K) / 4
    return {
        "q": r(B, L, H, K) * K**-0.5,
        "k": r(B, L, H, K),
        "v": r(B, L, H, V),
        "log_decay": decay,
        "state": r(B, H, K, V),
    }


def documents(B: int, L: int) -> torch.Tensor:
    ids = (torch.rand(B, L) < 0.1).long().cumsum(1)
    ids[0] += 1 - ids[0, 0]  # the first row begins a document of its own
    return ids


def stand_in(*decays: str) -> Any:
    """What the package's functions promise, by the reference, with their check of cu_seqlens."""

    def run(q: Any, k: Any, v: Any, *, scale: float, initial_state: Any, output_final_state: bool, **rest: Any) -> Any:
        assert (scale, output_final_state) == (1.0, True)
        ends = rest.pop("cu_seqlens")
        (name,) = rest
        assert name in decays
        g = rest[name][..., None] if rest[name].dim() == 3 else rest[name]
        if ends is None:
            return gla_reference(q, k, v, g, initial_state, None)
        assert (q.shape[0], initial_state.shape[0]) == (1, len(ends) - 1)
        pieces = [slice(int(a), int(b)) for a, b in pairwise(ends)]
        done = [
            gla_reference(q[:, p], k[:, p], v[:, p], g[:, p], initial_state[i : i + 1], None)
            for i, p in enumerate(pieces)
        ]
        return torch.cat([o for o, _ in done], 1), torch.cat([s for _, s in done])

    return run


@pytest.fixture
def fla(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = {"gla": {"chunk_gla": "g", "fused_recurrent_gla": "gk"}}
    functions["simple_gla"] = {"chunk_simple_gla": "g", "fused_recurrent_simple_gla": "g"}
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, members in functions.items():
        module = ModuleType(f"fla.ops.{name}")
        vars(module).update({function: stand_in(decay) for function, decay in members.items()})
        monkeypatch.setitem(sys.modules, f"fla.ops.{name}", module)


@pytest.mark.usefixtures("fla")
@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("L", [1, 9, 37])
@pytest.mark.parametrize("packed", [False, True])
def test_documents_become_pieces(L: int, scalar: bool, packed: bool) -> None:
    given = {name: t.double().requires_grad_() for name, t in inputs(3, L, 2, 4, 5, scalar).items()}
    ids = documents(3, L) if packed else None
    results = []
    for run in (gla_reference, external.gla_fla):
        out, state = run(*given.values(), ids)
        total = (out * torch.arange(5.0)).sum() + (state.double() * 0.3).sum()
        results.append([out, state, *torch.autograd.grad(total, list(given.values()))])
    for got, want in zip(results[1], results[0], strict=True):
        assert_close(got, want, "a result or gradient", torch.float32)


def test_what_it_cannot_do_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    i = inputs(1, 4, 1, 16, 16, False)
    monkeypatch.setattr(backends, "HAS_FLA", False)
    with pytest.raises(UserError, match=r"the fla backend needs flash-linear-attention: pip install 'samba-lm\[fla\]'"):
        gated_linear_attention(**i, backend="fla")
    monkeypatch.setattr(backends, "HAS_FLA", True)
    with pytest.raises(UserError, match=r"needs tensors of 32 bits or fewer on a CUDA GPU, these are torch.float32 on"):
        gated_linear_attention(**i, backend="fla")


def test_auto_takes_it_only_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("samba_lm.ops.gla.HAS_FLA", True)
    i = {name: t.bfloat16() for name, t in inputs(1, 4, 1, 16, 16, False).items()}
    out, _ = gated_linear_attention(**i)  # not on a CPU
    assert out.dtype == torch.bfloat16
    assert external.supported(i["q"], i["k"], i["v"])
    assert not external.supported(i["q"].float(), i["k"], i["v"])
    assert not external.supported(i["q"], i["k"], i["v"][..., :5])


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_FLA, reason="needs flash-linear-attention")
@pytest.mark.filterwarnings("ignore")  # of the package, on import
@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize(("L", "K", "V"), [(1, 64, 128), (13, 32, 64), (200, 64, 128), (333, 384, 768)])
@pytest.mark.parametrize("packed", [False, True])
def test_on_the_gpu(L: int, K: int, V: int, scalar: bool, packed: bool) -> None:
    half = {name: t.cuda().bfloat16() for name, t in inputs(3, L, 2, K, V, scalar).items()}
    fixed = {"documents": documents(3, L).cuda(), "lengths": torch.tensor([L, L // 2, 0]).cuda()} if packed else {}
    results = []
    for backend in ("cpu", "fla"):
        wide = torch.float64 if backend == "cpu" else torch.float32
        given = {n: (t if backend == "fla" and n in "qkv" else t.to(wide)).requires_grad_() for n, t in half.items()}
        out, state = gated_linear_attention(**given, **fixed, backend=backend)
        read = torch.ones(3, L, 1, 1, device="cuda")
        if fixed:
            read = (torch.arange(L, device="cuda") < fixed["lengths"][:, None])[..., None, None]
        generator = torch.Generator("cuda").manual_seed(3)
        weights = [torch.randn(t.shape, generator=generator, device="cuda") for t in (out, state)]
        total = (out.double() * read * weights[0]).sum() + (state.double() * weights[1]).sum()
        results.append([out * read, state, *torch.autograd.grad(total, list(given.values()))])
    for name, got, want in zip(["o", "final", *half], results[1], results[0], strict=True):
        assert_close(got, want, name, torch.bfloat16, scale=1.0 if name in ("o", "final") else 3.0)
    assert gated_linear_attention(**half)[0].dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_FLA, reason="needs flash-linear-attention")
@pytest.mark.filterwarnings("ignore")
def test_auto_takes_it_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: torch.Tensor) -> object:
        calls.append(1)
        return gla_reference(q.float(), k.float(), v.float(), *rest)

    monkeypatch.setattr(external, "gla_fla", counted)
    i = {name: t.cuda().bfloat16() for name, t in inputs(1, 40, 2, 32, 32, False).items()}
    gated_linear_attention(**i)
    assert calls == [1]
    gated_linear_attention(**{name: t.float() for name, t in i.items()})
    assert calls == [1]

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from ranks import on_ranks
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from samba_lm import checkpoint, zoo
from samba_lm.config import Attention, Mamba, MegaS6, SwiGLU
from samba_lm.data.loader import Batch
from samba_lm.model import SambaLM
from samba_lm.train.finite import NonFiniteError
from samba_lm.train.optim import build_optimizer, load_optimizer_tensors, optimizer_tensors
from samba_lm.train.optim.matrices import matrices
from samba_lm.train.optim.muon import Muon, orthogonal
from samba_lm.train.parallel import connect
from samba_lm.train.prepare import make_optimizer
from samba_lm.train.recipe import ParallelSection, TrainSection
from samba_lm.train.step import train_step

LAYERS = (Mamba(), SwiGLU(width=40), Attention(heads=4, kv_heads=2, window=16, short_conv=4), MegaS6(z_dim=8, chunk=16))
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "momentum": 0.95}


def small(dtype: torch.dtype = torch.float32) -> SambaLM:
    config = zoo.get("samba-micro").with_overrides(
        d_model=32, vocab_size=64, tie_embeddings=False, layers=[layer.model_dump() for layer in LAYERS]
    )
    return checkpoint.create(config, seed=0).to(dtype)


def test_every_map_of_the_layers_is_a_matrix_and_nothing_else() -> None:
    model = small()
    found = matrices(model)
    others = [name for name, p in model.named_parameters() if p.ndim == 2 and name not in found]
    leaves = {".".join(name.split(".")[-2:]) for name in others}
    assert leaves == {
        *("embedding", "unembedding", "selection.A_log", "conv.weight"),
        *("mixer.conv_weight", "mixer.gamma", "mixer.beta"),
    }
    assert found["layers.0.mixer.in_proj.weight"] == (64, 64)
    assert found["layers.0.mixer.s6.x_proj.weight"] == (2, 16, 16)
    assert found["layers.1.mixer.w12.weight"] == (40, 40)
    assert found["layers.2.mixer.qkv.weight"] == (32, 16, 16)
    assert found["layers.3.mixer.mx_proj.weight"] == (32, 8, 32, 32)
    assert found["layers.2.mixer.out_proj.weight"] == (32,)
    for name, p in model.named_parameters():
        assert name not in found or sum(found[name]) == p.shape[0], name


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_singular_values_come_near_one_and_updates_have_adamws_size(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = orthogonal(matrix, (shape[0],), torch.float64)
    values = torch.linalg.svdvals(found / (0.2 * math.sqrt(40)))
    assert 0.6 < values.min() <= values.max() < 1.3
    assert found.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2)
    U, _, V = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(found.flatten(), (U @ V).flatten(), dim=0) > 0.98


def test_stacked_maps_are_orthogonal_each_by_itself() -> None:
    matrix = torch.randn(48, 32, dtype=torch.float64)
    matrix[:16] *= 100  # as a whole, this part would leave nothing of the others
    parts = orthogonal(matrix, (16, 32), torch.float64).split((16, 32))
    for part, alone in zip(parts, matrix.split((16, 32)), strict=True):
        assert torch.equal(part, orthogonal(alone, (len(alone),), torch.float64))


def test_a_whole_matrix_is_updated_as_torchs_muon_does() -> None:
    theirs, ours = (nn.Parameter(torch.ones(40, 24)) for _ in range(2))
    one = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    two = Muon([ours], lr=0.01, weight_decay=0.1, momentum=0.9)
    for step in range(3):
        grad = torch.randn(40, 24, generator=torch.Generator().manual_seed(step))
        theirs.grad, ours.grad = grad, grad.clone()
        one.step()
        two.step()
        # Theirs computes in bfloat16.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01 * 0.2 * 0.15)
    assert torch.equal(one.state[theirs]["momentum_buffer"], two.state[ours]["momentum_buffer"])


def settings(**fields: object) -> TrainSection:
    shared = {"steps": 4, "batch_size": 4, "length": 32, "device": "cpu", "optimizer": "muon"}
    return TrainSection.model_validate({**shared, **fields})


def batch(seed: int = 0) -> Batch:
    ids = torch.randint(0, 64, (4, 33), generator=torch.Generator().manual_seed(seed))
    return Batch(ids[:, :-1], ids[:, 1:], None)


def test_state_by_name_goes_on_exactly_and_holds_both_kinds() -> None:
    section, cpu = settings(lr=1e-2), connect("cpu")
    one, two = small(), small()
    first, second = make_optimizer(one, section), make_optimizer(two, section)
    for step in range(3):
        train_step(one, first, batch(step), section, cpu, step=step + 1)
    saved = {name: t.clone() for name, t in optimizer_tensors(one, first).items()}
    kept = matrices(one)
    assert set(saved) == {
        f"{key}.{name}"
        for name, _ in one.named_parameters()
        for key in (("momentum_buffer",) if name in kept else ("step", "exp_avg", "exp_avg_sq"))
    }
    two.load_state_dict(one.state_dict())
    load_optimizer_tensors(two, second, saved)
    for model, optimizer in ((one, first), (two, second)):
        train_step(model, optimizer, batch(7), section, cpu, step=4)
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(ValueError, match="is missing"):
        load_optimizer_tensors(two, build_optimizer(two, **{**SETTINGS, "momentum": None}), saved)


def test_a_refused_update_changes_nothing_and_clipping_comes_first() -> None:
    section, cpu = settings(lr=1e-2, clip=0.05), connect("cpu")
    model = small()
    optimizer = make_optimizer(model, section)
    train_step(model, optimizer, batch(), section, cpu, step=1)
    before = {
        n: t.clone() for n, t in {**dict(model.named_parameters()), **optimizer_tensors(model, optimizer)}.items()
    }
    hook = model.layers[1].mixer.w3.weight.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(NonFiniteError, match=r"first bad: layers\.1\.mixer\.w3\.weight"):
        train_step(model, optimizer, batch(1), section, cpu, step=2)
    for name, value in {**dict(model.named_parameters()), **optimizer_tensors(model, optimizer)}.items():
        assert torch.equal(value, before[name]), name
    hook.remove()
    _, norm = train_step(model, optimizer, batch(1), section, cpu, step=2)
    clipped = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert norm > 0.05
    assert clipped.item() == pytest.approx(0.05, rel=1e-4), "both optimizers' gradients are divided"


def updated(world: int, replicate: int) -> dict[str, str]:
    """Weights and state after three updates with known gradients, as hashes of their whole tensors."""
    section = ParallelSection(replicate=replicate)
    parallel = connect("cpu", section) if world > 1 else connect("cpu")
    model = parallel.wrap(small(torch.float64), None)
    optimizer = build_optimizer(model, **SETTINGS)
    generator = torch.Generator().manual_seed(0)
    shared = 0
    for step in range(3):
        for p in model.parameters():
            grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if isinstance(p, DTensor):
                shared += 1
                grad = distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None)
            p.grad = grad
        vars(optimizer)["found_inf"] = torch.tensor(float(step == 1))
        optimizer.step()
    assert (shared > 0) == (world > 1)
    state = optimizer_tensors(model, optimizer)
    whole = {
        n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in [*model.named_parameters(), *state.items()]
    }
    if world > 1:  # whole tensors, as a single process's file has them, are shared out again
        load_optimizer_tensors(model, optimizer, {name: whole[name] for name in state})
        again = optimizer_tensors(model, optimizer)
        assert all(parallel.local(again[n]).equal(parallel.local(state[n])) for n in state)
    return {n: hashlib.sha256(t.detach().contiguous().numpy().tobytes()).hexdigest() for n, t in whole.items()}


@pytest.mark.parametrize(("world", "replicate"), [(3, 1), (4, 2)])
def test_sharded_matrices_are_updated_as_whole_ones(world: int, replicate: int) -> None:
    """Bit for bit; three processes do not divide the rows."""
    alone = updated(1, 1)
    for found in on_ranks(world, updated, world, replicate):
        assert found == alone


@pytest.mark.gpu
def test_on_a_gpu_updates_are_torchs_and_refused_without_waiting() -> None:
    theirs, ours = (nn.Parameter(torch.ones(320, 128, device="cuda")) for _ in range(2))
    one = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    two = Muon([ours], lr=0.01, weight_decay=0.1)
    theirs.grad = torch.randn(320, 128, device="cuda")
    ours.grad = 4 * theirs.grad
    one.step()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        vars(two)["found_inf"] = torch.zeros((), device="cuda")
        vars(two)["grad_scale"] = torch.full((), 4.0, device="cuda")
        two.step()
        ours.grad.fill_(math.nan)
        vars(two)["found_inf"] = torch.ones((), device="cuda")
        two.step()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01 * 0.2 * 0.02)

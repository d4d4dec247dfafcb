from __future__ import annotations

import pytest
import torch
from torch import nn

from samba_lm import checkpoint
from samba_lm.train.optim import build_optimizer, decays, load_optimizer_tensors, optimizer_tensors, set_learning_rate

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}


def names_by_decay(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    by_id = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    return {name: by_id[id(p)] for name, p in model.named_parameters()}


def test_norms_biases_and_state_space_scales_do_not_decay() -> None:
    model = checkpoint.create("samba-micro")
    decay = names_by_decay(model, build_optimizer(model, weight_decay=0.1, **SETTINGS))
    kept = {name for name, value in decay.items() if value == 0.0}
    leaves = {name.rpartition(".")[2] for name in kept}
    assert {"A_log", "D"} <= leaves
    for name, p in model.named_parameters():
        assert (name in kept) == (p.ndim < 2 or name.endswith("A_log")), name
    assert decay["embedding"] == 0.1
    assert any("norm" in name for name in kept)


def test_decay_all_is_the_papers_choice() -> None:
    model = checkpoint.create("samba-micro")
    optimizer = build_optimizer(model, weight_decay=0.1, decay_all=True, **SETTINGS)
    assert set(names_by_decay(model, optimizer).values()) == {0.1}


def test_decays() -> None:
    assert decays("layers.0.mixer.in_proj.weight", torch.zeros(2, 2))
    assert not decays("layers.0.mixer.A_log", torch.zeros(2, 2))
    assert not decays("layers.0.norm.weight", torch.zeros(2))


def linear_run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def test_state_by_name_goes_on_exactly() -> None:
    one = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    optimizer = build_optimizer(one, weight_decay=0.1, **SETTINGS)
    linear_run(one, optimizer, range(3))
    saved = {name: t.clone() for name, t in optimizer_tensors(one, optimizer).items()}
    assert set(saved) == {f"{k}.{n}" for n, _ in one.named_parameters() for k in ("exp_avg", "exp_avg_sq", "step")}

    two = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    two.load_state_dict(one.state_dict())
    other = build_optimizer(two, weight_decay=0.1, **SETTINGS)
    load_optimizer_tensors(two, other, saved)
    linear_run(one, optimizer, range(3, 6))
    linear_run(two, other, range(3, 6))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


BAD = [
    (None, "exp_avg.bias is missing"),
    (torch.zeros(()), "does not fit"),
    (torch.zeros(4), "does not fit"),
    (torch.zeros(5, dtype=torch.float64), "does not fit"),
    (torch.full((5,), torch.nan), "not finite"),
]


@pytest.mark.parametrize(("value", "words"), BAD)
def test_a_damaged_state_is_refused_and_changes_nothing(value: torch.Tensor | None, words: str) -> None:
    model = nn.Linear(3, 5)
    optimizer = build_optimizer(model, weight_decay=0.1, **SETTINGS)
    linear_run(model, optimizer, range(2))
    good = optimizer_tensors(model, optimizer)
    bad = {name: tensor for name, tensor in good.items() if name != "exp_avg.bias"}
    with pytest.raises(ValueError, match=words):
        load_optimizer_tensors(model, optimizer, bad if value is None else {**bad, "exp_avg.bias": value})
    assert optimizer_tensors(model, optimizer) == good
    with pytest.raises(ValueError, match=r"step.other does not fit"):
        load_optimizer_tensors(model, optimizer, {**good, "step.other": torch.zeros(())})
    with pytest.raises(ValueError, match="is missing"):
        load_optimizer_tensors(model, optimizer, {})


def test_a_parameter_without_a_gradient_has_the_state_adamw_begins_with() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 5), "idle": nn.Linear(3, 5)})
    optimizer = build_optimizer(model, weight_decay=0.1, **SETTINGS)
    linear_run(model["used"], optimizer, range(2))
    saved = optimizer_tensors(model, optimizer)
    assert saved["step.idle.weight"] == 0
    load_optimizer_tensors(model, optimizer, saved)
    assert {*optimizer_tensors(model, optimizer)} == {*saved}


def test_set_learning_rate_reaches_both_groups() -> None:
    model = nn.Linear(3, 5)
    optimizer = build_optimizer(model, weight_decay=0.1, **SETTINGS)
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]

"""Adapters compute and learn what the merged weights W + s B A do, whatever way a layer calls its linear maps."""

from __future__ import annotations

import pytest
import torch

import samba_lm
from samba_lm import checkpoint
from samba_lm.config import (
    Attention,
    GatedLinearAttention,
    GatedParallel,
    LayerSpec,
    Mamba,
    MegaS6,
    ModelConfig,
    SwiGLU,
)
from samba_lm.errors import UserError
from samba_lm.model import SambaLM
from samba_lm.nn.cast import cast_once
from samba_lm.nn.linear import Linear
from samba_lm.nn.lora import LoraLinear, LoraSettings, adapters, attach, fold, reset_adapters, settings_of
from samba_lm.ops.linear_cross_entropy import linear_cross_entropy
from samba_lm.train.transforms import checkpoint_activations, compile_layers, remake_cheap_activations

MLP = SwiGLU(width=24)
STACKS: dict[str, tuple[LayerSpec, ...]] = {
    "samba": (Mamba(), MLP, Attention(heads=4, kv_heads=2, window=7), MLP) * 2,
    "gla": (GatedLinearAttention(heads=2), MLP),
    "mega-s6": (MegaS6(z_dim=8, chunk=9), MLP),
    "gated": (GatedParallel(attention=Attention(heads=4, window=7, short_conv=4)), MLP),
}
SETTINGS = LoraSettings(rank=3, alpha=6.0)
IDS = torch.randint(0, 50, (3, 29), generator=torch.Generator().manual_seed(0))
SEGMENTS = (torch.arange(29) >= torch.tensor([[5], [13], [29]])).long()


def make(name: str, settings: LoraSettings | None = SETTINGS, dtype: torch.dtype = torch.float64) -> SambaLM:
    config = ModelConfig(name=name, d_model=32, vocab_size=50, layers=STACKS[name])
    model = checkpoint.create(config, seed=1, dtype=dtype)
    if settings is not None:
        attach(model, settings)
        reset_adapters(model, seed=2)
        for _, module in adapters(model):  # B begins at zero, where A has no gradient
            torch.nn.init.normal_(module.lora_B, std=0.3, generator=torch.Generator().manual_seed(3))
    return model


def loss(model: SambaLM) -> torch.Tensor:
    hidden = model.hidden_states(IDS, SEGMENTS)
    return linear_cross_entropy(hidden, model.head_weight, IDS.roll(-1, 1))


def merged_gradients(model: SambaLM, plain: SambaLM) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss, and the gradients of A and B, through explicit weights in a model without adapters."""
    trained = {name: p.detach().requires_grad_() for name, p in model.named_parameters() if p.requires_grad}
    weights = dict(plain.named_parameters())
    for name, module in adapters(model):
        A, B = trained[f"{name}.lora_A"], trained[f"{name}.lora_B"]
        weights[f"{name}.weight"] = module.weight.detach() + module.settings.scale * (B @ A)

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = plain

        def forward(self) -> torch.Tensor:
            return loss(self.model)

    total = torch.func.functional_call(Loss(), {f"model.{name}": p for name, p in weights.items()}, ())
    return total, dict(zip(trained, torch.autograd.grad(total, list(trained.values())), strict=True))


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("settings", [SETTINGS, LoraSettings(4, 2.0, rslora=True)], ids=["lora", "rslora"])
def test_gradients_are_those_of_merged_weights(name: str, settings: LoraSettings) -> None:
    model = make(name, settings)
    wanted_loss, wanted = merged_gradients(model, make(name, None))
    for prepare in (None, checkpoint_activations, remake_cheap_activations):
        if prepare is not None:
            prepare(model.layers)
        model.zero_grad()
        with cast_once():
            total = loss(model)
            total.backward()
        assert total.item() == pytest.approx(wanted_loss.item(), rel=1e-12)
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert found.keys() == wanted.keys()  # nothing frozen has a gradient
        for each, gradient in wanted.items():
            torch.testing.assert_close(found[each], gradient, rtol=1e-9, atol=1e-12)


def test_bf16_computes_about_what_merged_weights_do() -> None:
    model, plain = make("samba", dtype=torch.float32), make("samba", None, dtype=torch.float32)
    _, wanted = merged_gradients(model, plain)
    model.compute_dtype = torch.bfloat16
    with cast_once():
        loss(model).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert parameter.grad.dtype == torch.float32
            error = (parameter.grad - wanted[name]).norm() / wanted[name].norm()
            assert error < 0.3, name  # bf16 of so narrow a model; a path left out would make it 1


def test_folded_it_is_the_same_model_with_plain_maps(tmp_path) -> None:
    model = make("samba")
    assert settings_of(model) == SETTINGS
    with torch.no_grad():
        before = loss(model)
    samba_lm.save(model, tmp_path / "a")
    loaded, _ = samba_lm.load(tmp_path / "a")
    fold(model)
    for each in (model, loaded):
        assert settings_of(each) is None
        assert {type(m) for m in each.modules() if isinstance(m, Linear)} == {Linear}
        assert all(p.requires_grad for p in each.parameters())
        assert loss(each).item() == pytest.approx(before.item(), rel=1e-12)
    assert model.state_dict().keys() == make("samba", None).state_dict().keys()


def test_new_adapters_change_nothing_and_are_drawn_from_the_seed() -> None:
    plain = make("samba", None)
    with torch.no_grad():
        wanted = loss(plain)
        attach(plain, SETTINGS)
        reset_adapters(plain, seed=5)
        assert torch.equal(loss(plain), wanted)
    drawn = [module.lora_A.detach().clone() for _, module in adapters(plain)]
    reset_adapters(plain, seed=5)
    assert all(torch.equal(a, module.lora_A) for a, (_, module) in zip(drawn, adapters(plain), strict=True))
    reset_adapters(plain, seed=6)
    assert not torch.equal(drawn[0], next(adapters(plain))[1].lora_A)


def test_targets() -> None:
    model = make("samba", LoraSettings(2, 2.0, ("qkv", "x_proj")))
    assert {name.rpartition(".")[2] for name, _ in adapters(model)} == {"qkv", "x_proj"}
    assert {name.rpartition(".")[2] for name, _ in adapters(make("samba"))} == {
        "in_proj",
        "out_proj",
        "qkv",
        "w12",
        "w3",
    }
    assert all(isinstance(module, LoraLinear) for _, module in adapters(model))
    with pytest.raises(UserError, match=r"'q_proj' is no linear map of this model: it has in_proj, out_proj, qkv"):
        make("samba", LoraSettings(2, 2.0, ("q_proj",)))
    with pytest.raises(UserError, match="'dt_proj' is never adapted"):
        make("samba", LoraSettings(2, 2.0, ("dt_proj",)))


@pytest.mark.gpu
def test_on_a_gpu_every_kernel_passes_gradients_to_the_adapters() -> None:
    config = ModelConfig(name="x", d_model=64, vocab_size=64, layers=STACKS["samba"])
    model = checkpoint.create(config, seed=1)
    attach(model, SETTINGS)
    reset_adapters(model, seed=2)
    for _, module in adapters(model):
        torch.nn.init.normal_(module.lora_B, std=0.3)
    plain = checkpoint.create(config, seed=1)
    _, wanted = merged_gradients(model, plain)
    model.cuda()
    for prepare in (None, compile_layers):
        if prepare is not None:
            prepare(model.layers)
        model.zero_grad()
        hidden = model.hidden_states(IDS.cuda(), SEGMENTS)
        linear_cross_entropy(hidden, model.head_weight, IDS.roll(-1, 1).cuda()).backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None
                assert (parameter.grad.cpu() - wanted[name]).norm() < 2e-3 * wanted[name].norm(), name

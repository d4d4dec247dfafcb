"""The zoo: exact parameter counts, state sizes, and the reference's initial statistics."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch

from samba_lm import zoo
from samba_lm.config import ModelConfig
from samba_lm.errors import UserError
from samba_lm.model import SambaLM
from samba_lm.nn.init import RULES

STATS = json.loads((Path(__file__).parent / "golden" / "init_stats.json").read_text())
# Our name -> the reference code's.
OFFICIAL = {
    "samba-421m": "Samba_421M",
    "samba-1.3b": "Samba_1.3B",
    "mamba-swa-mlp-400m": "Mamba_SWA_MLP_400M",
    "mamba-swa-mlp-1.3b": "Mamba_SWA_MLP_1.3B",
    "mamba-370m": "Mamba_370M",
    "mamba-432m": "Mamba_430M",
    "mamba-1.3b": "Mamba_1.3B",
    "llama2-438m": "LLaMA_438M",
    "llama2-1.3b": "LLaMA_1.3B",
    "llama2-swa-438m": "LLaMA_438M_SWA",
    "llama2-swa-1.3b": "LLaMA_1.3B_SWA",
    "sliding-gla-438m": "LLaMA_438M_SWA_gla",
    "sliding-gla-1.2b": "LLaMA_1.2B_SWA_gla",
    "sliding-retnet-446m": "LLaMA_446M_SWA_ret",
    "sliding-retnet-1.4b": "LLaMA_1.4B_SWA_ret",
    "mega-s6-422m": "S6Mega_438M",
    "mega-s6-1.3b": "S6Mega_1.3B",
    "mlp2-swa-mlp-417m": "Samba_421M_abl_mamba",
    "mlp2-swa-mlp-1.3b": "Samba_1.3B_abl_mamba",
    "samba-nope-421m": "Samba_421M_nope",
    "samba-nope-1.3b": "Samba_1.3B_nope",
    "mamba-mlp-449m-full-11": "LLaMA_449M_full_mamba_11",
    "mamba-mlp-449m-full-5": "LLaMA_449M_full_mamba_5",
    "mamba-mlp-449m-full-0": "LLaMA_449M_full_mamba_0",
    "mamba-mlp-443m-full-1-5": "LLaMA_443M_full_mamba_1,5",
    "samba-421m-window-512": "Samba_421M_512_window",
    "samba-421m-window-1024": "Samba_421M_1k_window",
    "samba-421m-heads-12-2": "Samba_421M_gqa2",
    "samba-421m-heads-6-1": "Samba_421M_mqa6",
    "samba-421m-heads-12-1": "Samba_421M_mqa",
    "samba-421m-heads-12-4": "Samba_421M_gqa4",
    "llama2-swa-438m-heads-12-2": "LLaMA_438M_SWA_gqa2",
    "llama2-swa-438m-heads-6-1": "LLaMA_438M_SWA_mqa6",
    "llama2-swa-438m-heads-12-1": "LLaMA_438M_SWA_mqa",
    "llama2-swa-438m-heads-12-4": "LLaMA_438M_SWA_gqa4",
}


def meta(config: ModelConfig) -> SambaLM:
    with torch.device("meta"):
        return SambaLM(config)


@pytest.mark.parametrize("name", zoo.names())
def test_closed_form_count_is_the_models(name: str) -> None:
    config = zoo.get(name)
    assert sum(p.numel() for p in meta(config).parameters()) == config.parameters()
    assert config.name == name


@pytest.mark.parametrize("name", OFFICIAL)
def test_counts_equal_the_reference_code(name: str) -> None:
    expected = STATS["parameter_counts"][OFFICIAL[name]]
    config = zoo.get(name)
    assert sum(p.numel() for p in meta(config).parameters()) == expected["total_unique_parameters"]
    assert config.tie_embeddings == expected["tied_embeddings"]


def _hand(d: int, mlp: int, vocab: int, mambas: int, attentions: int, mlps: int, q: int, kv: int) -> int:
    """Parameters from the paper's equations alone, for the sizes the reference code does not list."""
    e, r, n = 2 * d, math.ceil(d / 16), 16
    mamba = d * 2 * e + (4 * e + e) + e * (r + 2 * n) + (r * e + e) + e * n + e + e * d
    attention = d * d + 2 * d * (d // q) * kv + d * d
    layers = mambas + attentions + mlps
    return vocab * d + mambas * mamba + attentions * attention + mlps * 3 * d * mlp + (layers + 1) * d


@pytest.mark.parametrize(
    ("name", "expected", "layers"),
    [
        ("samba-1.7b", _hand(2048, 8192, 50304, 12, 12, 24, 32, 4), 48),
        ("samba-3.8b", _hand(2816, 9984, 32064, 16, 16, 32, 11, 1), 64),
        ("mamba-swa-mlp-1.6b", _hand(2048, 8192, 50304, 18, 18, 18, 32, 4), 54),
        ("mamba-mlp-1.9b", _hand(2048, 8192, 50304, 24, 0, 24, 32, 4), 48),
        ("mamba-1.8b", _hand(2048, 8192, 50304, 64, 0, 0, 32, 4), 64),
        ("llama3-1.6b", _hand(2048, 8192, 50304, 0, 24, 24, 32, 4), 48),
        ("mistral-1.6b", _hand(2048, 8192, 50304, 0, 24, 24, 32, 4), 48),
        ("self-extend-llama3-1.6b", _hand(2048, 8192, 50304, 0, 24, 24, 32, 4), 48),
    ],
)
def test_sizes_the_reference_code_does_not_list(name: str, expected: int, layers: int) -> None:
    config = zoo.get(name)
    assert sum(p.numel() for p in meta(config).parameters()) == expected
    assert len(config.layers) == layers


@pytest.mark.parametrize(
    ("name", "within"),
    [
        *((entry.name, 0.02) for entry in zoo.ZOO.values() if entry.paper in ("Table 3, small", "Table 5, small")),
        *((entry.name, 0.025) for entry in zoo.ZOO.values() if entry.paper in ("Table 6, small", "Table 10, small")),
    ],
)
def test_the_small_study_compares_equal_sizes(name: str, within: float) -> None:
    target = zoo.get("samba-27m").parameters()
    assert abs(zoo.get(name).parameters() / target - 1) < within


@pytest.mark.parametrize("name", ["swa-7m", "mamba-7m"])
def test_the_7m_twins_are_the_same_size(name: str) -> None:
    assert abs(zoo.get(name).parameters() / zoo.get("samba-7m").parameters() - 1) < 0.03


@pytest.mark.parametrize("size", ["micro", "tiny"])
def test_twins_are_the_same_size(size: str) -> None:
    """Within 2% of samba's parameters, so that the comparison is of architectures."""
    target = zoo.get(f"samba-{size}").parameters()
    for twin in ("llama", "swa", "mamba"):
        assert zoo.get(f"{twin}-{size}").parameters() == pytest.approx(target, rel=0.02)


@pytest.mark.parametrize(
    ("name", "megabytes"),
    [("samba-421m", 77), ("samba-1.3b", 173), ("samba-1.7b", 29), ("samba-3.8b", 40), ("samba-421m-heads-12-1", 7.6)],
)
def test_state_bytes_of_the_paper_sizes(name: str, megabytes: float) -> None:
    assert zoo.get(name).state_bytes() / 1e6 == pytest.approx(megabytes, rel=0.02)


@pytest.mark.parametrize("name", ["samba-tiny", "mamba-tiny", "swa-tiny", "samba-micro"])
def test_state_bytes_are_what_a_state_holds(name: str) -> None:
    config = zoo.get(name)
    model = SambaLM(config)
    model.reset_parameters(0)
    cursor = 2 * 8  # segment and position
    assert model.init_state(1).nbytes() == config.state_bytes(activation_bytes=4) + cursor
    assert config.constant_state


def test_growing_state_is_said_to_grow() -> None:
    config = zoo.get("llama-tiny")
    assert not config.constant_state
    model = SambaLM(config)
    model.reset_parameters(0)
    _, state = model(torch.zeros(1, 50, dtype=torch.int64))
    assert state.nbytes() == config.state_bytes(50, activation_bytes=4) + 16


def test_unknown_name_names_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean 'samba-421m'"):
        zoo.get("samba-421")


def test_flops_of_samba_421m() -> None:
    """6 N_matmul + windowed attention is about 2.7 GFLOP a trained token at 4096 (3 x forward)."""
    assert 3 * zoo.get("samba-421m").flops_per_token(4096) == pytest.approx(2.7e9, rel=0.03)


# The reference's tensors -> our layer kind and name. Fused ones (w12, qkv) are drawn by one rule, so any part will do.
MAMBA_INIT = {
    "A_log": "s6.selection.A_log",
    "D": "s6.selection.D",
    "conv1d.weight": "s6.conv.weight",
    "conv1d.bias": "s6.conv.bias",
    "x_proj.weight": "s6.x_proj.weight",
    "dt_proj.weight": "s6.dt_proj.weight",
    "dt_proj.bias": "s6.selection.dt_bias",
}
LINEAR_ATTENTION_INIT = {
    "q_proj.weight": "q_proj.weight",
    "k_proj.weight": "k_proj.weight",
    "v_proj.weight": "v_proj.weight",
    "g_proj.weight": "g_proj.weight",
    "g_norm_swish_gate.weight": "norm.weight",
    "o_proj.weight": "out_proj.weight",
}
INIT_NAMES: dict[str, dict[str, str]] = {
    "mamba": {**MAMBA_INIT, "in_proj.weight": "in_proj.weight", "out_proj.weight": "out_proj.weight"},
    "attention": {"attn.weight": "qkv.weight", "proj.weight": "out_proj.weight"},
    "retention": LINEAR_ATTENTION_INIT,
    "gla": {
        **LINEAR_ATTENTION_INIT,
        "gk_proj.0.weight": "decay_down.weight",
        "gk_proj.1.weight": "decay_up.weight",
        "gk_proj.1.bias": "decay_up.bias",
    },
    "mega_s6": {
        **{f"move.{official}": ours for official, ours in MAMBA_INIT.items()},
        **{f"{n}.{kind}": f"{n}.{kind}" for n in ("v_proj", "mx_proj", "h_proj") for kind in ("weight", "bias")},
        "gamma": "gamma",
        "beta": "beta",
        "norm.weight": "norm.weight",
        "rel_pos_bias.alpha": "position_alpha",
        "rel_pos_bias.beta": "position_beta",
    },
    "swiglu": {f"swiglu.w{i}.weight": "w3.weight" if i == 3 else "w12.weight" for i in (1, 2, 3)},
}
INIT_CASES = {
    "samba-421m": ["mamba", "attention", "swiglu"],
    "mamba-432m": ["mamba"],
    "llama2-438m": ["attention", "swiglu"],
    "sliding-gla-438m": ["gla", "attention", "swiglu"],
    "sliding-gla-1.2b": ["gla", "attention", "swiglu"],
    "sliding-retnet-446m": ["retention", "attention", "swiglu"],
    "mega-s6-422m": ["mega_s6", "swiglu"],
    "mlp2-swa-mlp-417m": ["attention", "swiglu"],
}


def _initial(config: ModelConfig, kind: str) -> dict[str, torch.Tensor]:
    """One layer of this kind at full width, initialised by the whole model's rules (its depth counts)."""
    spec = next(s for s in reversed(config.layers) if s.kind == kind)
    one = SambaLM(ModelConfig(name="one", d_model=config.d_model, vocab_size=1, layers=(spec,)))
    one.layers[0].mixer.reset_parameters(RULES[config.init](config, torch.Generator().manual_seed(3407)))
    return dict(one.layers[0].mixer.named_parameters())


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kinds in INIT_CASES.items() for kind in kinds])
def test_initial_statistics_equal_the_reference(name: str, kind: str) -> None:
    """Mean, spread and extent of every kind of weight, on the reference's own widths and depth."""
    config = zoo.get(name)
    stats = STATS["init_statistics"][OFFICIAL[name]]["kinds"]
    ours = _initial(config, kind)
    prefix = {"swiglu": "mlp.", "mamba": "mixer." if name.startswith("mamba") else "attn."}.get(kind, "attn.")
    compared = set()
    for official, short in INIT_NAMES[kind].items():
        numbers = stats[f"transformer.h.N.{prefix}{official}"]
        values = ours[short].detach().flatten().double()
        # A spread estimated from n draws is good to about 1 / sqrt(2 n), on both sides.
        error = 0.01 + 5 / math.sqrt(values.numel())
        std, mean = values.std(correction=0).item(), values.mean().item()
        assert std == pytest.approx(numbers["std"], rel=error, abs=1e-9), official
        assert mean == pytest.approx(numbers["mean"], abs=error * numbers["std"] + 1e-9), official
        if values.numel() > 1e5:
            assert values.max().item() == pytest.approx(numbers["max"], rel=0.2), official
        compared.add(short)
    assert compared == ours.keys(), "every parameter of the layer is compared"


@pytest.mark.parametrize("name", ["samba-421m", "llama2-438m"])
def test_initial_embeddings_equal_the_reference(name: str) -> None:
    config = zoo.get(name)
    weight = torch.empty(2000, config.d_model)
    RULES[config.init](config, torch.Generator().manual_seed(0)).embedding(weight)
    expected = STATS["init_statistics"][OFFICIAL[name]]["kinds"]["lm_head.weight"]["std"]
    assert weight.std().item() == pytest.approx(expected, rel=0.01)


def test_same_seed_same_weights() -> None:
    config = zoo.get("samba-micro")
    a, b = SambaLM(config), SambaLM(config)
    seed = random.randrange(1000)
    a.reset_parameters(seed)
    torch.rand(3)  # the global generator must not matter
    b.reset_parameters(seed)
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name

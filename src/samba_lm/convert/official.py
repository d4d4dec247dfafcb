"""Checkpoints of the paper's reference code (microsoft/Samba): its Config fields and state-dict names, into ours."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from samba_lm.config import (
    Attention,
    GatedLinearAttention,
    LayerSpec,
    Mamba,
    MegaS6,
    ModelConfig,
    Retention,
    SwiGLU,
)
from samba_lm.convert.foreign import Layers, Size, Tensors, Weights, read_safetensors, read_torch
from samba_lm.errors import UserError
from samba_lm.validation import explain


class SizeOverrides(BaseModel):
    """Sizes that the reference writes into its code and not into its Config, where they are not the usual ones."""

    model_config = ConfigDict(extra="forbid")

    gla_num_heads: Size | None = None
    """None: n_embd / 384."""
    mega_zdim: Size = 128
    mega_chunk: Size = 2048


class OfficialConfig(BaseModel):
    """The reference's Config with its defaults, checked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    n_layer: Layers = 16
    n_head: Size = 32
    n_embd: Size = 4096
    n_query_groups: Size | None = None
    """None: as many as heads."""
    intermediate_size: Size | None = None
    """None: 4 n_embd."""
    vocab_size: Size = 50254
    padding_multiple: Size = 512
    padded_vocab_size: Size | None = None
    """None: vocab_size rounded up to padding_multiple."""
    norm_eps: float = 1e-5

    mamba: bool = False
    mamba_init: bool = False
    mamba_swa_mlp: bool = False
    use_mega: bool = False
    abl_mamba: bool = False
    sc_attn: bool = False
    nope: bool = False
    local_window: int = -1
    full_per_layer: int = Field(1_000_000, ge=1)
    mb_per_layer: int = -1
    ret_per_layer: int = -1
    gla_per_layer: int = -1
    attn_layer_pos: str | list[int] | None = None

    rotary_percentage: float = 0.25
    condense_ratio: int = 1
    parallel_residual: bool = True
    shared_attention_norm: bool = False
    bias: bool = True
    mlp: bool = True
    norm_class: str = Field("LayerNorm", alias="_norm_class")
    mlp_class: str = Field("GptNeoxMLP", alias="_mlp_class")

    # These name the model, or how it is trained and computed: not what it is.
    name: str = "official"
    org: str = ""
    block_size: int = 4096
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True

    size_overrides: SizeOverrides = SizeOverrides()


# Where the paper's models have one value, and this package has no layer for another: field -> what it may be. Pure
# Mamba does not read these fields.
KNOWN: dict[str, tuple[object, ...]] = {
    "rotary_percentage": (1.0,),
    "condense_ratio": (1,),
    "parallel_residual": (False,),
    "shared_attention_norm": (False,),
    "bias": (False,),
    "mlp": (True,),
    "norm_class": ("RMSNorm", "FusedRMSNorm"),
    "mlp_class": ("LLaMAMLP",),
}


def read_official_config(data: Mapping[str, Any]) -> ModelConfig:
    """Our config of a reference Config, given as a dict of its fields (plus ``size_overrides``).

    Raises UserError for unknown fields, and for values that this package has no layer for.
    """
    try:
        c = OfficialConfig.model_validate(data)
    except ValidationError as error:
        raise UserError(f"Reference config: {explain(error, OfficialConfig)}") from None
    if not c.mamba:
        for field, known in KNOWN.items():
            if getattr(c, field) not in known:
                name = OfficialConfig.model_fields[field].alias or field
                raise UserError(
                    f"Reference config: {name} = {getattr(c, field)!r} is not supported: the paper's models have "
                    f"{' or '.join(map(repr, known))}."
                )
    tied = c.mamba or c.mamba_init
    return ModelConfig.from_dict(
        {
            "name": c.name,
            "d_model": c.n_embd,
            "vocab_size": c.padded_vocab_size or -(-c.vocab_size // c.padding_multiple) * c.padding_multiple,
            "layers": [spec for i in range(c.n_layer) for spec in _block(c, i)],
            "tie_embeddings": tied,
            "init": "samba" if tied else "llama",
            "norm_eps": c.norm_eps,
        }
    )


def _block(c: OfficialConfig, i: int) -> list[LayerSpec]:
    if c.mamba:
        return [Mamba()]
    mlp = SwiGLU(width=c.intermediate_size or 4 * c.n_embd)
    if c.mamba_swa_mlp:
        return [Mamba(), _attention(c, i), mlp]
    return [_mixer(c, i), mlp]


def _mixer(c: OfficialConfig, i: int) -> LayerSpec:
    if c.use_mega:
        return MegaS6(z_dim=c.size_overrides.mega_zdim, chunk=c.size_overrides.mega_chunk)
    if c.attn_layer_pos is not None:
        return _attention(c, i) if i in _positions(c.attn_layer_pos) else Mamba()
    if _every(c.mb_per_layer, i):
        return SwiGLU(width=2 * c.n_embd) if c.abl_mamba else Mamba()
    if _every(c.ret_per_layer, i):
        return Retention(heads=c.n_head // 2)
    if _every(c.gla_per_layer, i):
        heads = c.size_overrides.gla_num_heads
        return GatedLinearAttention(heads=max(1, c.n_embd // 384) if heads is None else heads)
    return _attention(c, i)


def _attention(c: OfficialConfig, i: int) -> Attention:
    local = c.local_window > 0 and i % c.full_per_layer < c.full_per_layer - 1
    return Attention(
        heads=c.n_head,
        kv_heads=c.n_query_groups or c.n_head,
        window=c.local_window if local else None,
        rope=not c.nope,
        short_conv=4 if c.sc_attn else None,
    )


def _every(per_layer: int, i: int) -> bool:
    return per_layer > 0 and i % per_layer == 0


def _positions(given: str | list[int]) -> list[int]:
    """The reference evaluates this string as Python; a list of whole numbers is all it may hold."""
    try:
        value = json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, list) or not all(isinstance(i, int) for i in value):
        shown = repr(given)[:60]
        raise UserError(f"Reference config: attn_layer_pos = {shown} must be a list of block numbers such as [1, 5].")
    return value


def read_official_tensors(path: str | os.PathLike[str]) -> Tensors:
    """The state dict in a .safetensors or .pth/.pt/.ckpt/.bin file (never unpickling anything but tensors).

    Where names carry the prefix ``param.``, only those are kept, without it. Raises UserError for other files.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        found: Any = read_safetensors(path)
    elif path.suffix in (".pth", ".pt", ".ckpt", ".bin"):
        found = read_torch(path)
    else:
        raise UserError(f"{path} must end in .safetensors or .pth.")
    for wrapper in ("model", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    if not isinstance(found, dict) or not any(isinstance(t, torch.Tensor) for t in found.values()):
        raise UserError(f"{path} holds no state dict: it must map names to tensors.")
    tensors = {str(n).removeprefix("_orig_mod."): t for n, t in found.items() if isinstance(t, torch.Tensor)}
    prefixed = {name.removeprefix("param."): t for name, t in tensors.items() if name.startswith("param.")}
    return prefixed or tensors


def rename_official(tensors: Mapping[str, torch.Tensor], config: ModelConfig) -> Tensors:
    """Our names and layouts for the reference's tensors (or for gradients under the same names).

    Raises UserError for a tensor that is missing, of a wrong shape, or left over.
    """
    weights = Weights(dict(tensors))
    V, D = config.vocab_size, config.d_model
    head = weights.take("lm_head.weight", V, D)
    if config.tie_embeddings:
        weights.check_tied(head, weights.pop("transformer.wte.weight"), "transformer.wte.weight")
        ours: Tensors = {"embedding": head}
    else:
        ours = {"embedding": weights.take("transformer.wte.weight", V, D), "unembedding": head}
    ours["norm.weight"] = weights.take("transformer.ln_f.weight", D)
    for n, block in enumerate(_blocks_of(config)):
        for index, role in block:
            spec = config.layers[index]
            prefix, norm = _NAMES[role]
            if spec.pre_norm:
                ours[f"layers.{index}.norm.weight"] = weights.take(f"transformer.h.{n}.{norm}.weight", D)
            renamed = _RENAME[type(spec)](weights.under(f"transformer.h.{n}.{prefix}"), spec, D)
            ours.update({f"layers.{index}.mixer.{name}": t for name, t in renamed.items()})
    weights.check_empty(ignored=lambda name: name.endswith("_float_tensor"))
    return {name: t.contiguous() for name, t in ours.items()}


# Role of a layer in a reference block -> (prefix of its tensors, name of its norm).
_NAMES = {
    "only mixer": ("mixer.", "norm"),
    "mixer": ("attn.", "norm_1"),
    "mlp": ("mlp.", "norm_2"),
    "mb": ("mb.", "norm_m"),
    "attn after mb": ("attn.", "norm_attn"),
}


def _blocks_of(config: ModelConfig) -> list[list[tuple[int, str]]]:
    """The reference's blocks as (index of our layer, role) pairs, told from the pattern of the layers."""
    kinds = [type(spec) for spec in config.layers]
    roles = ["mixer", "mlp"]
    if all(kind is Mamba for kind in kinds):
        roles = ["only mixer"]
    elif kinds[:3] == [Mamba, Attention, SwiGLU]:
        roles = ["mb", "attn after mb", "mlp"]
    step = len(roles)
    return [[(start + j, role) for j, role in enumerate(roles)] for start in range(0, len(kinds), step)]


def _rename_mamba(weights: Weights, spec: Mamba, D: int) -> Tensors:
    E = spec.inner(D)
    return {
        "in_proj.weight": weights.take("in_proj.weight", 2 * E, D),
        "out_proj.weight": weights.take("out_proj.weight", D, E),
        **_rename_s6(weights, E, spec.rank(D), spec.state, spec.conv),
    }


def _rename_s6(weights: Weights, E: int, R: int, N: int, k: int) -> Tensors:
    return {
        "s6.conv.weight": weights.take("conv1d.weight", E, 1, k).squeeze(1),
        "s6.conv.bias": weights.take("conv1d.bias", E),
        "s6.x_proj.weight": weights.take("x_proj.weight", R + 2 * N, E),
        "s6.dt_proj.weight": weights.take("dt_proj.weight", E, R),
        "s6.selection.dt_bias": weights.take("dt_proj.bias", E),
        "s6.selection.A_log": weights.take("A_log", E, N),
        "s6.selection.D": weights.take("D", E),
    }


def _rename_attention(weights: Weights, spec: Attention, D: int) -> Tensors:
    K = spec.head_dim(D)
    # Reference rows are group-major: for each KV head its query heads, then its key, then its value. Ours: Q, K, V.
    packed = weights.take("attn.weight", spec.qkv_width(D), D).unflatten(0, (spec.groups, -1, K))
    q, k, v = packed.split((packed.shape[1] - 2, 1, 1), dim=1)
    ours = {
        "qkv.weight": torch.cat([t.flatten(0, 2) for t in (q, k, v)]),
        "out_proj.weight": weights.take("proj.weight", D, D),
    }
    if spec.short_conv is not None:
        heads = {"q": spec.heads, "k": spec.groups, "v": spec.groups}
        convs = [weights.take(f"{x}_conv1d.weight", H * K, 1, spec.short_conv) for x, H in heads.items()]
        ours["conv_weight"] = torch.cat(convs).squeeze(1)
    return ours


def _rename_swiglu(weights: Weights, spec: SwiGLU, D: int) -> Tensors:
    w1, w2 = (weights.take(f"swiglu.{name}.weight", spec.width, D) for name in ("w1", "w2"))
    return {"w12.weight": torch.cat((w1, w2)), "w3.weight": weights.take("swiglu.w3.weight", D, spec.width)}


def _rename_retention(weights: Weights, spec: Retention | GatedLinearAttention, D: int) -> Tensors:
    key, value = spec.key_dim(D), spec.value_dim(D)
    rows = {"q_proj": key, "k_proj": key, "v_proj": value, "g_proj": value}
    return {
        **{f"{name}.weight": weights.take(f"{name}.weight", n, D) for name, n in rows.items()},
        "norm.weight": weights.take("g_norm_swish_gate.weight", value // spec.heads),
        "out_proj.weight": weights.take("o_proj.weight", D, value),
    }


def _rename_gla(weights: Weights, spec: GatedLinearAttention, D: int) -> Tensors:
    key, rank = spec.key_dim(D), spec.gate_rank
    return {
        **_rename_retention(weights, spec, D),
        "decay_down.weight": weights.take("gk_proj.0.weight", rank, D),
        "decay_up.weight": weights.take("gk_proj.1.weight", key, rank),
        "decay_up.bias": weights.take("gk_proj.1.bias", key),
    }


def _rename_mega(weights: Weights, spec: MegaS6, D: int) -> Tensors:
    Z = spec.z_dim
    ours = {
        "gamma": weights.take("gamma", 2, Z),
        "beta": weights.take("beta", 2, Z),
        "norm.weight": weights.take("norm.weight", D),
        "position_alpha": weights.take("rel_pos_bias.alpha", 1, Z)[0],
        "position_beta": weights.take("rel_pos_bias.beta", 1, Z)[0],
        **_rename_s6(weights.under("move."), D, spec.rank(D), spec.state, spec.conv),
    }
    for name, rows in {"v_proj": D, "mx_proj": 3 * D + Z, "h_proj": D}.items():
        ours[f"{name}.weight"] = weights.take(f"{name}.weight", rows, D)
        ours[f"{name}.bias"] = weights.take(f"{name}.bias", rows)
    return ours


_RENAME: dict[type[LayerSpec], Callable[[Weights, Any, int], Tensors]] = {
    Mamba: _rename_mamba,
    Attention: _rename_attention,
    SwiGLU: _rename_swiglu,
    Retention: _rename_retention,
    GatedLinearAttention: _rename_gla,
    MegaS6: _rename_mega,
}

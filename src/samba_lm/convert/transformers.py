"""Llama, Mistral and Mamba folders of Hugging Face `transformers`, read and written without the library."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from samba_lm.checkpoint import build, check_tokenizer, write_tensors
from samba_lm.config import Attention, LayerSpec, Mamba, ModelConfig, SwiGLU
from samba_lm.convert.foreign import Layers, Size, Tensors, Weights, read_json_object, read_safetensors
from samba_lm.errors import UserError
from samba_lm.files import atomic_folder
from samba_lm.model import SambaLM
from samba_lm.tokenizer import Tokenizer, load_tokenizer
from samba_lm.validation import explain

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"


class Rope(BaseModel):
    """Their rotary positions; ours are the plain ones, unscaled and over the whole head."""

    rope_type: Annotated[Literal["default"], Field(validation_alias=AliasChoices("rope_type", "type"))] = "default"
    rope_theta: float | None = None
    partial_rotary_factor: Literal[1] | None = None


class TheirConfig(BaseModel):
    """The fields of their config.json that decide what a model computes; a Literal is all that our layers can do.

    Fields that are left out take the defaults of `transformers`. Others name training, generation or precision.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    vocab_size: Size
    hidden_size: Size
    num_hidden_layers: Layers
    hidden_act: Literal["silu", "swish"] = "silu"
    quantization_config: None = None


class LlamaConfig(TheirConfig):
    """LlamaForCausalLM."""

    intermediate_size: Size
    num_attention_heads: Size
    num_key_value_heads: Size | None = None
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    layer_types: None = None
    rope_parameters: Rope | None = None  # transformers 5
    rope_scaling: Rope | None = None  # transformers 4, as the next one
    rope_theta: float | None = None

    @property
    def window(self) -> int | None:
        return None

    def to_config(self) -> ModelConfig:
        """Ours. Raises UserError where our attention has no such head dim."""
        if self.head_dim is not None and self.head_dim * self.num_attention_heads != self.hidden_size:
            raise UserError(
                f"head_dim = {self.head_dim} is not supported: it must be hidden_size / num_attention_heads = "
                f"{self.hidden_size} / {self.num_attention_heads}."
            )
        rope = self.rope_parameters or self.rope_scaling or Rope()
        attention = Attention(
            heads=self.num_attention_heads,
            kv_heads=self.num_key_value_heads or self.num_attention_heads,
            window=self.window,
            rope_base=rope.rope_theta or self.rope_theta or 10_000.0,
        )
        layers = [attention, SwiGLU(width=self.intermediate_size)] * self.num_hidden_layers
        return _config(self, layers, self.rms_norm_eps, self.tie_word_embeddings)


class MistralConfig(LlamaConfig):
    """MistralForCausalLM: ``sliding_window`` counts keys as our ``window`` does, the query's own included."""

    num_key_value_heads: Size | None = 8
    sliding_window: int | None = 4096

    @property
    def window(self) -> int | None:
        return self.sliding_window


class MambaConfig(TheirConfig):
    """MambaForCausalLM."""

    state_size: Size = 16
    expand: int = Field(2, ge=1, le=1024)
    conv_kernel: Size = 4
    time_step_rank: Size | Literal["auto"] = "auto"
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True
    use_bias: Literal[False] = False
    use_conv_bias: Literal[True] = True

    def to_config(self) -> ModelConfig:
        """Ours."""
        usual = Mamba(expand=self.expand, state=self.state_size, conv=self.conv_kernel)
        auto = self.time_step_rank in ("auto", usual.rank(self.hidden_size))
        spec = usual if auto else usual.model_copy(update={"dt_rank": self.time_step_rank})
        return _config(self, [spec] * self.num_hidden_layers, self.layer_norm_epsilon, self.tie_word_embeddings)


def _config(theirs: TheirConfig, layers: list[LayerSpec], norm_eps: float, tied: bool) -> ModelConfig:
    return ModelConfig.from_dict(
        {
            "name": "converted",
            "d_model": theirs.hidden_size,
            "vocab_size": theirs.vocab_size,
            "layers": layers,
            "tie_embeddings": tied,
            "init": "samba" if tied else "llama",
            "norm_eps": norm_eps,
        }
    )


ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "mamba": "MambaForCausalLM"}
CONFIGS: dict[str, type[LlamaConfig] | type[MambaConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "mamba": MambaConfig,
}


def read_transformers_config(data: Mapping[str, Any]) -> ModelConfig:
    """Our config of a Llama, Mistral or Mamba config.json, given as a dict.

    Raises UserError for other models, and for settings that our layers cannot express.
    """
    family = data.get("model_type")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise UserError(f"model_type = {family!r} is not supported: {', '.join(ARCHITECTURES)} can be converted.")
    architectures = data.get("architectures")
    if architectures not in (None, [ARCHITECTURES[family]]):
        raise UserError(f"architectures = {architectures!r} is not supported: it must be [{ARCHITECTURES[family]!r}].")
    theirs = CONFIGS[family]
    try:
        return theirs.model_validate(data).to_config()
    except ValidationError as error:
        unsupported = error.errors()[0]["type"] in ("literal_error", "none_required")
        why = "; no layer of samba-lm computes anything else." if unsupported else ""
        raise UserError(explain(error, theirs).removesuffix("." if why else "") + why) from None


def transformers_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of the Llama, Mistral or Mamba that computes the same.

    Raises UserError for a model that none of them can express.
    """
    family, first = _family(config), config.layers[0]
    data: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        # Their defaults name ids of other vocabularies.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if isinstance(first, Mamba):
        return {
            **data,
            "num_hidden_layers": len(config.layers),
            "layer_norm_epsilon": config.norm_eps,
            "expand": first.expand,
            "state_size": first.state,
            "conv_kernel": first.conv,
            "time_step_rank": first.rank(config.d_model),
            "use_bias": False,
            "use_conv_bias": True,
        }
    attention, mlp = config.layers[:2]
    assert isinstance(attention, Attention)
    assert isinstance(mlp, SwiGLU)
    data |= {
        "num_hidden_layers": len(config.layers) // 2,
        "rms_norm_eps": config.norm_eps,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.groups,
        "head_dim": attention.head_dim(config.d_model),
        "intermediate_size": mlp.width,
        "max_position_embeddings": config.max_context,
        "rope_parameters": {"rope_type": "default", "rope_theta": attention.rope_base},
    }
    return data if attention.window is None else {**data, "sliding_window": attention.window}


def _family(config: ModelConfig) -> str:
    """``llama``, ``mistral`` or ``mamba``: whose layers these are. UserError if none's."""
    first, layers = config.layers[0], config.layers
    if type(first) is Mamba and set(layers) == {first}:
        return "mamba"
    pattern = layers[:2] * (len(layers) // 2)
    if layers != pattern or [type(spec) for spec in layers[:2]] != [Attention, SwiGLU]:
        raise UserError(
            f"Model {config.name!r} has no counterpart in transformers: only equal Mamba layers, or attention and "
            "SwiGLU in turn with one window, can be written (a Llama, a Mistral or a Mamba)."
        )
    assert isinstance(first, Attention)
    if not first.rope or first.short_conv is not None:
        extra = "attention without RoPE" if not first.rope else f"short_conv = {first.short_conv}"
        raise UserError(f"Model {config.name!r} has {extra}, which no Llama or Mistral in transformers has.")
    return "llama" if first.window is None else "mistral"


class Part(NamedTuple):
    """One of their tensors: its name and shape. Ours holds its rows."""

    name: str
    shape: tuple[int, ...]


def transformers_parts(config: ModelConfig) -> dict[str, list[Part]]:
    """Our name of each tensor -> theirs, whose rows it holds from top to bottom."""
    V, D = config.vocab_size, config.d_model
    mamba = _family(config) == "mamba"
    root = "backbone" if mamba else "model"
    names = {
        "embedding": [Part(f"{root}.embeddings.weight" if mamba else f"{root}.embed_tokens.weight", (V, D))],
        "norm.weight": [Part(f"{root}.norm_f.weight" if mamba else f"{root}.norm.weight", (D,))],
    }
    if not config.tie_embeddings:
        names["unembedding"] = [Part("lm_head.weight", (V, D))]
    for i, spec in enumerate(config.layers):
        ours, theirs = f"layers.{i}", f"{root}.layers.{i if mamba else i // 2}"
        norm, prefix, parts = _layer_parts(spec, D)
        names[f"{ours}.norm.weight"] = [Part(f"{theirs}.{norm}.weight", (D,))]
        for name, pieces in parts.items():
            names[f"{ours}.mixer.{name}"] = [Part(f"{theirs}.{prefix}.{p.name}", p.shape) for p in pieces]
    return names


def _layer_parts(spec: LayerSpec, D: int) -> tuple[str, str, dict[str, list[Part]]]:
    """Their name of a layer's norm, the prefix of its other tensors, and :func:`transformers_parts` of these."""
    if isinstance(spec, Mamba):
        E, N, R = spec.inner(D), spec.state, spec.rank(D)
        return "norm", "mixer", {
            "in_proj.weight": [Part("in_proj.weight", (2 * E, D))],
            "out_proj.weight": [Part("out_proj.weight", (D, E))],
            "s6.conv.weight": [Part("conv1d.weight", (E, 1, spec.conv))],
            "s6.conv.bias": [Part("conv1d.bias", (E,))],
            "s6.x_proj.weight": [Part("x_proj.weight", (R + 2 * N, E))],
            "s6.dt_proj.weight": [Part("dt_proj.weight", (E, R))],
            "s6.selection.dt_bias": [Part("dt_proj.bias", (E,))],
            "s6.selection.A_log": [Part("A_log", (E, N))],
            "s6.selection.D": [Part("D", (E,))],
        }  # fmt: skip
    if isinstance(spec, Attention):
        kv = spec.groups * spec.head_dim(D)
        qkv = [Part(f"{x}_proj.weight", (rows, D)) for x, rows in (("q", D), ("k", kv), ("v", kv))]
        parts = {"qkv.weight": qkv, "out_proj.weight": [Part("o_proj.weight", (D, D))]}
        return "input_layernorm", "self_attn", parts
    assert isinstance(spec, SwiGLU)
    w12 = [Part("gate_proj.weight", (spec.width, D)), Part("up_proj.weight", (spec.width, D))]
    parts = {"w12.weight": w12, "w3.weight": [Part("down_proj.weight", (D, spec.width))]}
    return "post_attention_layernorm", "mlp", parts


def rename_transformers(tensors: Mapping[str, torch.Tensor], config: ModelConfig) -> Tensors:
    """Our names and layouts for their tensors. Raises UserError for one missing, of a wrong shape, or left over."""
    weights, ours = Weights(dict(tensors)), {}
    for name, parts in transformers_parts(config).items():
        taken = [weights.take(part.name, *part.shape) for part in parts]
        tensor = taken[0] if len(taken) == 1 else torch.cat(taken)
        ours[name] = tensor.squeeze(1) if tensor.dim() == 3 else tensor  # a depthwise kernel: [E, 1, k] -> [E, k]
    if config.tie_embeddings:
        weights.check_tied(ours["embedding"], weights.pop("lm_head.weight"), "lm_head.weight")
    weights.check_empty(ignored=lambda name: name.endswith(".rotary_emb.inv_freq"))  # a table old versions stored
    return ours


def to_transformers_names(tensors: Mapping[str, torch.Tensor], config: ModelConfig) -> Tensors:
    """Their names and layouts for our tensors (a state dict of ``config``): the inverse of `rename_transformers`."""
    theirs: Tensors = {}
    for name, parts in transformers_parts(config).items():
        rows = tensors[name].detach().split([part.shape[0] for part in parts])
        theirs |= {part.name: t.reshape(part.shape) for part, t in zip(parts, rows, strict=True)}
    return theirs


def from_transformers(folder: str | os.PathLike[str], eos: str | None = None) -> tuple[SambaLM, Tokenizer | None]:
    """The model in a `transformers` folder, in the dtype of its files, and its tokenizer if it has a tokenizer.json.

    ``eos``: the token that separates documents, where the folder does not name one. Raises UserError for a folder
    that is missing, incomplete or damaged, and for models that our layers cannot express.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}: give one that `save_pretrained` of transformers has written.")
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is no transformers model: it has no {CONFIG}.")
    data = read_json_object(folder / CONFIG)
    try:
        config = read_transformers_config(data)
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None
    config = config.with_overrides(name=folder.resolve().name)
    tokenizer = load_tokenizer(folder, eos=eos) if (folder / TOKENIZER).is_file() else None
    return build(config, rename_transformers(_read_weights(folder), config)), tokenizer


def to_transformers(model: SambaLM, folder: str | os.PathLike[str], tokenizer: Tokenizer | None = None) -> None:
    """Write a folder that ``AutoModelForCausalLM.from_pretrained`` reads (and ``AutoTokenizer``, with a tokenizer).

    The folder appears when it is complete. Raises UserError if it exists and is not empty, if the tokenizer has more
    ids than the model, or if no Llama, Mistral or Mamba computes what the model does.
    """
    folder = Path(folder)
    config = transformers_config(model.config)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty: choose another folder.")
    config["dtype"] = str(model.embedding.dtype).removeprefix("torch.")
    if tokenizer is not None:
        check_tokenizer(model.config, tokenizer)
        config["eos_token_id"] = tokenizer.eos_id
    # Rows cut from one of our tensors share its memory, which the format does not allow.
    tensors = {name: t.clone().cpu() for name, t in to_transformers_names(model.state_dict(), model.config).items()}
    with atomic_folder(folder) as tmp:
        write_tensors(tensors, tmp / WEIGHTS, {"format": "pt"})
        (tmp / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            (tmp / TOKENIZER).write_text(tokenizer.to_json(), encoding="utf-8")
            # The class that takes tokenizer.json as it is; the default of a Llama would put its own rules in place.
            named = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.describe()}
            (tmp / TOKENIZER_CONFIG).write_text(json.dumps(named, indent=2) + "\n", encoding="utf-8")


def _read_weights(folder: Path) -> Tensors:
    """All tensors of a folder, from one file or from the shards that its index names."""
    if not (folder / INDEX).is_file():
        if not (folder / WEIGHTS).is_file():
            raise UserError(
                f"{folder} has no {WEIGHTS}: only safetensors are read (load the model with transformers and call "
                "save_pretrained, which writes them)."
            )
        return read_safetensors(folder / WEIGHTS)
    shards = read_json_object(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(n, str) and Path(n).name == n for n in shards.values()):
        raise UserError(f"{folder / INDEX} has no weight_map of tensors to files beside it: fetch it again.")
    tensors: Tensors = {}
    for name in sorted(set(shards.values())):
        tensors |= read_safetensors(folder / name)
    return tensors

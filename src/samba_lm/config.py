"""What a model is, as data: a width, a vocabulary and a tuple of layer specs. Imports no torch.

Every mixer and every MLP is one layer, ``x + f(norm(x))``; Samba is ``[Mamba, SwiGLU, Attention, SwiGLU]`` repeated.
Each spec knows its parameters, FLOPs and state in closed form, so tables of models need no tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, SerializeAsAny, ValidationError, field_validator, model_validator
from pydantic_core import PydanticUndefined

from samba_lm.errors import UserError, did_you_mean
from samba_lm.validation import explain

SPECS: dict[str, type[LayerSpec]] = {}
MAX_PARAMETERS = 10**14
MAX_POSITION = 2**62  # positions are int64


class LayerSpec(BaseModel):
    """One residual layer as data. Subclass it (with a ``kind``) for a mixer of your own; see ``register_mixer``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: str
    pre_norm: ClassVar[bool] = True
    """False: the mixer gets the raw residual stream and normalises it itself (Mega)."""
    is_mixer: ClassVar[bool] = True
    """False for layers that look at one token only (MLPs)."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        kind = cls.model_fields["kind"].default
        if kind is PydanticUndefined:  # a base of specs, not one
            return
        taken = SPECS.get(kind)
        # A class may replace itself (a notebook cell run twice), but not take another's name.
        if taken is not None and taken.__qualname__ != cls.__qualname__:
            raise TypeError(f"{cls.__name__}.kind = {kind!r} is taken by {taken.__name__}: choose another kind")
        SPECS[kind] = cls

    def check(self, d_model: int) -> None:
        """Raise ValueError where this layer does not fit a model of this width."""

    def parameters(self, d_model: int) -> int:
        """Number of parameters, without the layer's norm."""
        raise NotImplementedError

    def matmul_flops(self, d_model: int) -> int:
        """Forward FLOPs a token in matrix products with weights (2 a weight)."""
        raise NotImplementedError

    def context_flops(self, d_model: int, context: int) -> int:
        """Forward FLOPs a token spent on other tokens, averaged over a causal sequence of ``context`` tokens."""
        return 0

    def state_elements(self, d_model: int, context: int) -> tuple[int, int]:
        """Numbers kept a sequence after ``context`` tokens: (in the activations' dtype, in fp32)."""
        return 0, 0

    def describe(self) -> str:
        """The settings in a few words, for the drawing of the stack."""
        return ""

    def parts(self) -> tuple[LayerSpec, ...]:
        """The layers that this one is made of; itself, where it is one."""
        return (self,)

    def changed(self, change: Callable[[LayerSpec], LayerSpec]) -> LayerSpec:
        """A copy with ``change`` done to each of its parts."""
        return change(self)


class SwiGLU(LayerSpec):
    """MLP of the paper: W3(SiLU(W1 x) * W2 x), ``width`` = d_p."""

    kind: Literal["swiglu"] = "swiglu"
    width: int
    is_mixer: ClassVar[bool] = False

    def check(self, d_model: int) -> None:
        _positive(self, "width")

    def parameters(self, d_model: int) -> int:
        return 3 * d_model * self.width

    def matmul_flops(self, d_model: int) -> int:
        return 2 * self.parameters(d_model)

    def describe(self) -> str:
        return f"width {self.width}"


class Mamba(LayerSpec):
    """Selective state-space layer S6 (Mamba-1)."""

    kind: Literal["mamba"] = "mamba"
    expand: int = 2
    state: int = 16
    conv: int = 4
    dt_rank: int | None = None
    """Rank of the step projection; None: ceil(d_model / 16)."""

    def check(self, d_model: int) -> None:
        _positive(self, "expand", "state", "conv", "dt_rank")

    def inner(self, d_model: int) -> int:
        return self.expand * d_model

    def rank(self, d_model: int) -> int:
        return self.dt_rank or -(-d_model // 16)

    def parameters(self, d_model: int) -> int:
        E = self.inner(d_model)
        return self.matmul_flops(d_model) // 2 + E * (self.conv + 1) + E + E * self.state + E

    def matmul_flops(self, d_model: int) -> int:
        E, R, N = self.inner(d_model), self.rank(d_model), self.state
        return 2 * (d_model * 2 * E + E * (R + 2 * N) + R * E + E * d_model)

    def state_elements(self, d_model: int, context: int) -> tuple[int, int]:
        E = self.inner(d_model)
        return E * (self.conv - 1), E * self.state

    def describe(self) -> str:
        return f"expand {self.expand}, state {self.state}, conv {self.conv}"


class Attention(LayerSpec):
    """Causal softmax attention with grouped KV heads; ``window`` = w keys including the query's own, None = full."""

    kind: Literal["attention"] = "attention"
    heads: int
    kv_heads: int | None = None
    """None: as many as query heads."""
    window: int | None = None
    rope: bool = True
    rope_base: float = 10_000.0
    short_conv: int | None = None
    """Kernel of a depthwise causal convolution with SiLU on q, k and v (Table 10: 4)."""

    def check(self, d_model: int) -> None:
        _positive(self, "heads", "kv_heads", "window", "short_conv", "rope_base")
        if d_model % self.heads:
            raise ValueError(f"heads={self.heads} does not divide d_model={d_model}")
        if self.heads % self.groups:
            raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")
        if self.rope and (d_model // self.heads) % 2:
            raise ValueError(f"RoPE needs an even head dim, but d_model={d_model} / heads={self.heads} is odd")

    @property
    def groups(self) -> int:
        return self.kv_heads if self.kv_heads is not None else self.heads

    def head_dim(self, d_model: int) -> int:
        return d_model // self.heads

    def qkv_width(self, d_model: int) -> int:
        return (self.heads + 2 * self.groups) * self.head_dim(d_model)

    def parameters(self, d_model: int) -> int:
        return self.matmul_flops(d_model) // 2 + (self.short_conv or 0) * self.qkv_width(d_model)

    def matmul_flops(self, d_model: int) -> int:
        return 2 * (d_model * self.qkv_width(d_model) + d_model * d_model)

    def context_flops(self, d_model: int, context: int) -> int:
        return round(4 * d_model * _mean_keys(context, self.window))

    def state_elements(self, d_model: int, context: int) -> tuple[int, int]:
        keys = context if self.window is None else self.window
        conv = ((self.short_conv or 1) - 1) * self.qkv_width(d_model)
        return 2 * keys * self.groups * self.head_dim(d_model) + conv, 0

    def describe(self) -> str:
        reach = "full" if self.window is None else f"window {self.window}"
        extras = ("" if self.rope else ", no RoPE") + (f", short conv {self.short_conv}" if self.short_conv else "")
        return f"{self.heads}/{self.groups} heads, {reach}{extras}"


class SelfExtend(Attention):
    """Full attention whose far keys are seen at grouped positions (SelfExtend), to read past the trained length."""

    kind: Literal["self_extend"] = "self_extend"  # type: ignore[assignment]
    group: int = 4
    neighbor_window: int = 1024

    def check(self, d_model: int) -> None:
        super().check(d_model)
        _positive(self, "group", "neighbor_window")
        if self.window is not None or not self.rope or self.short_conv is not None:
            raise ValueError(
                "SelfExtend is full attention with RoPE: leave window, rope and short_conv at their defaults"
            )

    def state_elements(self, d_model: int, context: int) -> tuple[int, int]:
        light, heavy = super().state_elements(d_model, context)
        return light + 2 * self.neighbor_window * self.groups * self.head_dim(d_model), heavy

    def describe(self) -> str:
        return f"{super().describe()}, SelfExtend group {self.group} beyond {self.neighbor_window}"


class LinearAttentionSpec(LayerSpec):
    """What GLA and retention share: heads, the widths of keys and values, a state of outer products."""

    heads: int
    expand_k: float
    expand_v: float

    def check(self, d_model: int) -> None:
        _positive(self, "heads", "expand_k", "expand_v")
        key, value = self.key_dim(d_model), self.value_dim(d_model)
        if key < 1 or value < 1 or key % self.heads or value % self.heads:
            raise ValueError(f"heads={self.heads} does not divide the key width {key} and the value width {value}")

    def key_dim(self, d_model: int) -> int:
        return round(d_model * self.expand_k)

    def value_dim(self, d_model: int) -> int:
        return round(d_model * self.expand_v)

    def parameters(self, d_model: int) -> int:
        return self.matmul_flops(d_model) // 2 + self.value_dim(d_model) // self.heads

    def matmul_flops(self, d_model: int) -> int:
        return 2 * (2 * d_model * self.key_dim(d_model) + 3 * d_model * self.value_dim(d_model))

    def context_flops(self, d_model: int, context: int) -> int:
        return 4 * self.key_dim(d_model) * self.value_dim(d_model) // self.heads

    def state_elements(self, d_model: int, context: int) -> tuple[int, int]:
        return 0, self.key_dim(d_model) * self.value_dim(d_model) // self.heads

    def describe(self) -> str:
        return f"{self.heads} heads, key x{self.expand_k:g}, value x{self.expand_v:g}"


class GatedLinearAttention(LinearAttentionSpec):
    """GLA: linear attention with a data-dependent decay for each key channel."""

    kind: Literal["gla"] = "gla"
    expand_k: float = 0.5
    expand_v: float = 1.0
    gate_rank: int = 16
    gate_normalizer: float = 16.0

    def check(self, d_model: int) -> None:
        super().check(d_model)
        _positive(self, "gate_rank", "gate_normalizer")

    def parameters(self, d_model: int) -> int:
        return super().parameters(d_model) + self.key_dim(d_model)

    def matmul_flops(self, d_model: int) -> int:
        return super().matmul_flops(d_model) + 2 * self.gate_rank * (d_model + self.key_dim(d_model))


class Retention(LinearAttentionSpec):
    """RetNet's multi-scale retention: linear attention with RoPE and one fixed decay a head."""

    kind: Literal["retention"] = "retention"
    expand_k: float = 1.0
    expand_v: float = 2.0
    rope_base: float = 10_000.0

    def check(self, d_model: int) -> None:
        super().check(d_model)
        _positive(self, "rope_base")
        if (self.key_dim(d_model) // self.heads) % 2:
            raise ValueError(f"RoPE needs an even key head dim, not {self.key_dim(d_model)} / {self.heads} heads")


class MegaS6(LayerSpec):
    """Mega's gated single-head attention over fixed chunks, its moving average replaced by short conv + S6."""

    kind: Literal["mega_s6"] = "mega_s6"
    z_dim: int = 128
    chunk: int = 2048
    state: int = 16
    conv: int = 4
    pre_norm: ClassVar[bool] = False

    def check(self, d_model: int) -> None:
        _positive(self, "z_dim", "chunk", "state", "conv")
        if self.z_dim % 2:
            raise ValueError(f"z_dim={self.z_dim} must be even (its position bias rotates halves)")

    def rank(self, d_model: int) -> int:
        return -(-d_model // 32)

    def parameters(self, d_model: int) -> int:
        D, Z, N = d_model, self.z_dim, self.state
        s6 = D * (self.conv + 1) + D * (self.rank(D) + 2 * N) + self.rank(D) * D + D + D * N + D
        projections = 2 * (D * D + D) + (D + 1) * (3 * D + Z)
        return s6 + projections + 4 * Z + 2 * Z + D

    def matmul_flops(self, d_model: int) -> int:
        D, R = d_model, self.rank(d_model)
        return 2 * (2 * D * D + D * (3 * D + self.z_dim) + D * (R + 2 * self.state) + R * D)

    def context_flops(self, d_model: int, context: int) -> int:
        return round(2 * (self.z_dim + d_model) * _mean_keys(min(context, self.chunk), None))

    def state_elements(self, d_model: int, context: int) -> tuple[int, int]:
        return self.chunk * (2 * self.z_dim + d_model) + d_model * (self.conv - 1), d_model * self.state

    def describe(self) -> str:
        return f"z {self.z_dim}, chunk {self.chunk}, state {self.state}"


class TwoPaths(LayerSpec):
    """What both ways of running Mamba and attention beside each other share: the same normalised input, the values of
    each path normalised and projected by its own last map, one state beside the other."""

    mamba: Mamba = Mamba()
    attention: Attention

    def check(self, d_model: int) -> None:
        paths: list[tuple[str, LayerSpec, type[LayerSpec]]] = [
            ("mamba", self.mamba, Mamba),
            ("attention", self.attention, Attention),
        ]
        for name, path, known in paths:
            if type(path) is not known:
                raise ValueError(f"{name} is a {type(path).__name__}: give {known.__name__}, no layer made from it")
            try:
                path.check(d_model)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None

    def parameters(self, d_model: int) -> int:
        norms = self.mamba.inner(d_model) + d_model
        return self.mamba.parameters(d_model) + self.attention.parameters(d_model) + norms

    def matmul_flops(self, d_model: int) -> int:
        return self.mamba.matmul_flops(d_model) + self.attention.matmul_flops(d_model)

    def context_flops(self, d_model: int, context: int) -> int:
        return self.mamba.context_flops(d_model, context) + self.attention.context_flops(d_model, context)

    def state_elements(self, d_model: int, context: int) -> tuple[int, int]:
        light, heavy = zip(*(p.state_elements(d_model, context) for p in self.parts()), strict=True)
        return sum(light), sum(heavy)

    def describe(self) -> str:
        return f"{self.mamba.describe()} | {self.attention.describe()}"

    def parts(self) -> tuple[LayerSpec, ...]:
        return self.mamba, self.attention

    def changed(self, change: Callable[[LayerSpec], LayerSpec]) -> LayerSpec:
        return self.model_copy(update={"mamba": change(self.mamba), "attention": change(self.attention)})


class Parallel(TwoPaths):
    """The mean of a Mamba and an attention path."""

    kind: Literal["parallel"] = "parallel"


class GatedParallel(TwoPaths):
    """A mean of the two paths whose weights, one for each channel, are made from the input by a map of low rank."""

    kind: Literal["gated"] = "gated"
    gate_rank: int | None = None
    """None: ceil(d_model / 16), as the rank of Mamba's step."""

    def check(self, d_model: int) -> None:
        super().check(d_model)
        _positive(self, "gate_rank")

    def rank(self, d_model: int) -> int:
        return self.gate_rank or -(-d_model // 16)

    def parameters(self, d_model: int) -> int:
        return super().parameters(d_model) + (2 * self.rank(d_model) + 1) * d_model

    def matmul_flops(self, d_model: int) -> int:
        return super().matmul_flops(d_model) + 4 * self.rank(d_model) * d_model


class ModelConfig(BaseModel):
    """A language model: embedding, ``layers`` (each ``x + f(norm(x))``), final norm, head. Frozen and validated."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    d_model: int
    vocab_size: int
    layers: tuple[SerializeAsAny[LayerSpec], ...]
    tie_embeddings: bool = True
    init: Literal["samba", "llama"] = "samba"
    """Initialisation rules of the reference code: ``samba`` for everything it calls mamba_init, ``llama`` otherwise."""
    norm_eps: float = 1e-5
    max_context: int = 1 << 20
    """How far the caches of full attention may grow, in tokens. Constant-state layers have no such limit."""

    @field_validator("layers", mode="before")
    @classmethod
    def _read_layers(cls, value: Any) -> tuple[LayerSpec, ...]:
        if not isinstance(value, list | tuple):
            raise ValueError("layers must be a list of layer specs")
        return tuple(_read_spec(i, entry) for i, entry in enumerate(value))

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        for field in ("d_model", "vocab_size", "max_context"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1")
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps={self.norm_eps} must be above 0")
        if not self.layers:
            raise ValueError("layers is empty: a model needs at least one layer")
        for i, spec in enumerate(self.layers):
            try:
                spec.check(self.d_model)
            except ValueError as error:
                raise ValueError(f"layers[{i}] ({spec.kind}): {error}") from None
        if self.parameters() > MAX_PARAMETERS:
            raise ValueError(f"this makes {self.parameters():.2g} parameters, more than any machine holds")
        return self

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """Read a config as written by :meth:`to_dict`. Raises UserError naming the bad entry and its value."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise UserError(f"Model config: {explain(error, cls)}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return self.model_dump(mode="json")

    def with_overrides(self, **fields: Any) -> ModelConfig:
        """A validated copy with some fields replaced."""
        return ModelConfig.from_dict({**self.to_dict(), **fields})

    def fingerprint(self) -> str:
        """sha256 (hex) of everything that decides what the weights mean: all fields but the name and max_context."""
        data = self.model_dump(mode="json", exclude={"name", "max_context"})
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    @property
    def n_mixers(self) -> int:
        """Number of token mixers: what the paper's code calls n_layer (its blocks)."""
        return sum(spec.is_mixer for spec in self.layers)

    @property
    def constant_state(self) -> bool:
        """Whether the state stays the same size however much was read."""
        return all(s.state_elements(self.d_model, 1) == s.state_elements(self.d_model, 2) for s in self.layers)

    def parameters(self) -> int:
        """Number of unique parameters."""
        norms = self.d_model * (1 + sum(spec.pre_norm for spec in self.layers))
        embeddings = self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2)
        return embeddings + norms + sum(spec.parameters(self.d_model) for spec in self.layers)

    def flops_per_token(self, context: int) -> int:
        """Forward FLOPs a token: 2 a matmul weight (head included) + attention as windowed, mean over ``context``."""
        layers = sum(s.matmul_flops(self.d_model) + s.context_flops(self.d_model, context) for s in self.layers)
        return layers + 2 * self.vocab_size * self.d_model

    def state_bytes(self, context: int = 1 << 17, activation_bytes: int = 2) -> int:
        """Bytes of state a sequence after ``context`` tokens; matters only for full attention, whose cache grows."""
        light, heavy = zip(*(s.state_elements(self.d_model, context) for s in self.layers), strict=True)
        return activation_bytes * sum(light) + 4 * sum(heavy)


def _read_spec(index: int, entry: Any) -> LayerSpec:
    if isinstance(entry, LayerSpec):
        return entry
    if not isinstance(entry, dict) or not isinstance(entry.get("kind"), str):
        raise ValueError(f"layers[{index}] = {entry!r} needs a 'kind'; known: {', '.join(sorted(SPECS))}")
    kind = entry["kind"]
    if kind not in SPECS:
        hint = "" if did_you_mean(kind, SPECS).startswith(" Did") else " A mixer of your own needs SAMBA_LM_PLUGINS."
        raise ValueError(f"layers[{index}] has unknown kind {kind!r}.{did_you_mean(kind, SPECS)}{hint}")
    try:
        return SPECS[kind].model_validate(entry)
    except ValidationError as error:
        raise ValueError(f"layers[{index}] ({kind}): {explain(error, SPECS[kind])}") from None


def _positive(spec: LayerSpec, *fields: str) -> None:
    for field in fields:
        value = getattr(spec, field)
        if value is not None and value > MAX_POSITION:
            raise ValueError(f"{field}={value:.2g} is more than any model can use")
        if value is not None and value <= 0:
            raise ValueError(f"{field}={value} must be {'at least 1' if isinstance(value, int) else 'above 0'}")


def _mean_keys(context: int, window: int | None) -> float:
    """Keys a causal query sees, averaged over ``context`` positions."""
    w = context if window is None else min(window, context)
    return w - w * (w - 1) / (2 * context)

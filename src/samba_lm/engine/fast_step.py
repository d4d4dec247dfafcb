"""A step of up to 16 sequences in kernels made for it, for the models that they know; ``model.step`` defines it.

Weights are bf16, those of large products whole numbers of 8 or 4 bits too (``samba_lm.quantize``).
Numbers are rounded where ``model.step`` rounds them: what a layer gives to bf16, the residual stream in fp32. A row's
result does not depend on the other rows, nor on how many there are, to the last bit.

A layer is three to five kernels, and a step of samba-1.7b 182. Each begins while the one before it still runs, and
fetches its first weights meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from samba_lm.mixers.attention import AttentionMixer
from samba_lm.mixers.mamba import MambaMixer, Selection
from samba_lm.mixers.mlp import SwiGLUMLP
from samba_lm.mixers.self_extend import SelfExtendMixer
from samba_lm.model import Layer, SambaLM
from samba_lm.nn.linear import Linear
from samba_lm.nn.norm import RMSNorm
from samba_lm.nn.quantized import QuantizedLinear
from samba_lm.ops import nvrtc
from samba_lm.ops.backend import preferred
from samba_lm.ops.decode import plan
from samba_lm.ops.decode.plan import Tuning
from samba_lm.ops.selective_scan import STATE_SIZES
from samba_lm.state import State

MOST_ROWS = plan.ROWS
HEAD_DIMS = (64, 128)
MOST_SHARE = 16
"""Query heads for each key head."""
TAPS = 4


def runs_on(device: torch.device) -> bool:
    """Whether the kernels run here: a GPU of compute capability 9.0 or more, and what compiles them."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= plan.NEEDS and not nvrtc.why_not()


def why_not(model: SambaLM) -> str:
    """What about a model the kernels do not know; "" if they know all of it."""
    config = model.config
    products = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    if any(m.scale.dtype != torch.float32 for m in products):
        return "scales that are not fp32"
    if any(m.quantized.dtype == torch.int8 and m.width % 16 for m in products):
        return "int8 weights of this number of inputs"
    # Those of the recurrence stay in fp32 whatever the rest is.
    read = [p for m in model.modules() if not isinstance(m, Selection) for p in m.parameters(recurse=False)]
    if model.dtype != torch.bfloat16 or not all(p.dtype == torch.bfloat16 and p.is_contiguous() for p in read):
        return "parameters that are not bf16"
    if config.d_model % 8 or config.d_model > plan.COLUMNS * plan.WARPS * plan.MOST_CHUNKS:
        return f"d_model={config.d_model}"
    if config.vocab_size % 2:
        return f"vocab_size={config.vocab_size}"
    rotations = set()
    for layer in model.layers:
        assert isinstance(layer, Layer)
        mixer = layer.mixer
        if not isinstance(layer.norm, RMSNorm):
            return f"{type(mixer).__name__}, which normalises its input itself"
        if isinstance(mixer, SwiGLUMLP):
            width = _inputs(mixer.w3)
            if width % 8:
                return f"SwiGLU of width {width}"
        elif isinstance(mixer, MambaMixer):
            s6 = mixer.s6
            fits = s6.state in STATE_SIZES and s6.conv.weight.shape[1] == TAPS and s6.inner % 8 == 0
            if not fits or s6.rank % 8 or s6.rank > 256 or s6.selection.fixed is None:
                return "this Mamba layer, or its parameters may still change"
        elif isinstance(mixer, AttentionMixer):
            spec = mixer.spec
            if spec.short_conv is not None or mixer.head_dim not in HEAD_DIMS:
                return "a convolution before attention, or this width of heads"
            if spec.heads // spec.groups > MOST_SHARE:
                return f"{spec.heads // spec.groups} query heads for each key head"
            if spec.rope and not isinstance(mixer, SelfExtendMixer):  # that one makes its own angles
                rotations.add((mixer.head_dim, spec.rope_base))
        else:
            return type(mixer).__name__
    return "several kinds of rotation" if len(rotations) > 1 else ""


@dataclass
class FastStep:
    """Steps over the first rows of ``state``, whose tensors and the model's stay where they are."""

    model: SambaLM
    state: State
    tuning: Tuning = field(default_factory=Tuning)

    def __post_init__(self) -> None:
        self._rows = min(MOST_ROWS, self.state.batch)
        self._device = self.model.device
        self._room: dict[str, Tensor] = {}
        self._launches: dict[int, list[nvrtc.Launch]] = {}
        self._angles = self._make_angles()
        self._logits = self._bf16("logits", self.model.config.vocab_size)

    def step(self, token_ids: Tensor) -> Tensor:
        """Read one token of each of the first rows, int64 [n] with n up to 16: logits [n, V], until the next step.

        The state moves on in place.
        """
        rows = token_ids.shape[0]
        token_ids = token_ids.contiguous()
        if rows not in self._launches:
            self._launches[rows] = self._plan(rows)
        nvrtc.launch(self._begin(token_ids, rows), self._device)
        for launch in self._launches[rows]:
            nvrtc.launch(launch, self._device)
        return self._logits[:rows]

    def _begin(self, token_ids: Tensor, rows: int) -> nvrtc.Launch:
        first = self.model.layers[0].norm
        assert isinstance(first, RMSNorm)
        return plan.begin(
            self._stream,
            first.weight,
            self._normed,
            rows,
            first.eps,
            self.state.cursor.position,
            token_ids,
            self.model.embedding,
            self._angles,
            self.tuning,
        )

    def _plan(self, rows: int) -> list[nvrtc.Launch]:
        """All launches but the first."""
        launches: list[nvrtc.Launch] = []
        norms = [*(layer.norm for layer in list(self.model.layers)[1:]), self.model.norm]
        for i, (layer, norm) in enumerate(zip(self.model.layers, norms, strict=True)):
            assert isinstance(layer, Layer)
            assert isinstance(norm, RMSNorm)
            tensors = self.state.layers[i]
            if isinstance(layer.mixer, SwiGLUMLP):
                x, last = self._swiglu(launches, layer.mixer, rows)
            elif isinstance(layer.mixer, MambaMixer):
                x, last = self._mamba(launches, layer.mixer, tensors, rows)
            elif isinstance(layer.mixer, SelfExtendMixer):
                x, last = self._self_extend(launches, layer.mixer, tensors, rows)
            else:
                assert isinstance(layer.mixer, AttentionMixer)
                x, last = self._attention(launches, layer.mixer, tensors, rows)
            parts = plan.slices(_inputs(last))
            branch = self._fp32("branch", parts, self.model.config.d_model)
            launches.append(self._product(x, last, branch, rows, "PARTIAL", parts=parts))
            position = self.state.cursor.position if norm is self.model.norm else None
            where = self._stream, branch, norm.weight, self._normed
            launches.append(plan.norm(*where, rows, norm.eps, parts, self.tuning, position))
        launches.append(plan.linear(self._normed, self.model.head_weight, self._logits, rows, "PLAIN", self.tuning))
        return launches

    def _swiglu(self, launches: list[nvrtc.Launch], mlp: SwiGLUMLP, rows: int) -> tuple[Tensor, nn.Module]:
        """What the last product of the layer reads, and that product."""
        x = self._operand("mlp", _inputs(mlp.w3))
        launches.append(self._product(self._normed, mlp.w12, x, rows, "SWIGLU"))
        return x, mlp.w3

    def _mamba(
        self, launches: list[nvrtc.Launch], mamba: MambaMixer, tensors: dict[str, Tensor], rows: int
    ) -> tuple[Tensor, nn.Module]:
        s6 = mamba.s6
        u, z, y = (self._operand(name, s6.inner) for name in ("u", "z", "y"))
        convolution = plan.Convolution(s6.conv.weight, s6.conv.bias, _checked(tensors["conv"], torch.bfloat16), z)
        launches.append(self._product(self._normed, mamba.in_proj, u, rows, "CONV", convolution=convolution))
        parts = plan.slices(s6.inner, 2)
        low = self._fp32("low", parts, s6.rank + 2 * s6.state)
        launches.append(self._product(u, s6.x_proj, low, rows, "PARTIAL", parts=parts))
        ssm = _checked(tensors["ssm"], torch.float32)
        A, D, bias = s6.selection.for_step(torch.float32)
        launches.append(plan.scan(low, s6.dt_proj.weight, u, z, A, D, bias, ssm, y, rows, parts, self.tuning))
        return y, mamba.out_proj

    def _attention(
        self, launches: list[nvrtc.Launch], attention: AttentionMixer, tensors: dict[str, Tensor], rows: int
    ) -> tuple[Tensor, nn.Module]:
        spec, width = attention.spec, attention.head_dim
        cos, sin = (None, None) if self._angles is None or not spec.rope else self._angles[1:]
        keys, values = (_checked(tensors[name], torch.bfloat16) for name in ("k", "v"))
        position = self.state.cursor.position
        rings = plan.Rings(cos, sin, keys, values, position, spec.heads)
        q, y = self._bf16("q", spec.heads * width), self._operand("attended", spec.heads * width)
        launches.append(self._product(self._normed, attention.qkv, q, rows, "QKV", rings=rings))
        launches.append(self._attend([plan.Cache(q, keys, values)], y, rows))
        return y, attention.out_proj

    def _self_extend(
        self, launches: list[nvrtc.Launch], attention: SelfExtendMixer, tensors: dict[str, Tensor], rows: int
    ) -> tuple[Tensor, nn.Module]:
        spec, width = attention.spec, attention.head_dim
        names = ("near_k", "near_v", "k", "v")
        near_k, near_v, far_k, far_v = (_checked(tensors[name], torch.bfloat16) for name in names)
        q, near_q, far_q = (self._bf16(name, spec.heads * width) for name in ("q", "near q", "far q"))
        y = self._operand("attended", spec.heads * width)
        k, v = (self._bf16(name, spec.groups * width).view(-1, 1, spec.groups, width) for name in ("k", "v"))
        position = self.state.cursor.position
        rings = plan.Rings(None, None, k, v, position, spec.heads)
        launches.append(self._product(self._normed, attention.qkv, q, rows, "QKV", rings=rings))
        near = plan.Cache(near_q, near_k, near_v)
        far = plan.Cache(far_q, far_k, far_v, lag=spec.neighbor_window)
        frequency = self._frequency(width // 2, spec.rope_base)
        shift = spec.neighbor_window - spec.neighbor_window // spec.group
        heads = q.view(-1, spec.heads, width)
        launches.append(plan.turn(heads, k, v, position, frequency, near, far, spec.group, shift, rows, self.tuning))
        launches.append(self._attend([near, far], y, rows))
        return y, attention.out_proj

    def _product(
        self,
        x: Tensor,
        product: nn.Module,
        y: Tensor,
        rows: int,
        epilogue: str,
        *,
        parts: int = 1,
        rings: plan.Rings | None = None,
        convolution: plan.Convolution | None = None,
    ) -> nvrtc.Launch:
        """``plan.linear`` of a Linear, quantised or not."""
        scale = columns = None
        if isinstance(product, QuantizedLinear):
            weight, scale = product.quantized, product.scale
            columns = product.width if weight.dtype == torch.uint8 else None
        else:
            assert isinstance(product, Linear)
            weight = product.weight
        return plan.linear(
            x,
            weight,
            y,
            rows,
            epilogue,
            self.tuning,
            parts=parts,
            scale=scale,
            columns=columns,
            rings=rings,
            convolution=convolution,
        )

    def _attend(self, caches: list[plan.Cache], y: Tensor, rows: int) -> nvrtc.Launch:
        groups, width = caches[0].keys.shape[2:]
        heads = caches[0].q.shape[1] // width
        parts = self._parts(heads, groups, width, sum(plan.runs(cache.keys.shape[1]) for cache in caches))
        return plan.attend(caches, self.state.cursor.position, parts, y, rows, width**-0.5, self.tuning)

    def _parts(self, heads: int, groups: int, width: int, room: int) -> plan.Parts:
        counters = f"counters {groups}"
        if counters not in self._room:
            self._room[counters] = torch.zeros(self._rows, groups, dtype=torch.int32, device=self._device)
        sums, tops = (
            self._make(f"{name} {heads} {room}", (self._rows, heads, room, n), torch.float32)
            for name, n in (("parts", width), ("tops", 2))
        )
        return plan.Parts(sums, tops, self._room[counters])

    def _make_angles(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """The rotations' frequencies, and room for a step's cos and sin."""
        for layer in self.model.layers:
            mixer = layer.mixer
            if isinstance(mixer, AttentionMixer) and mixer.spec.rope and not isinstance(mixer, SelfExtendMixer):
                half = mixer.head_dim // 2
                cos, sin = (self._fp32(name, 1, half)[0] for name in ("cos", "sin"))
                return self._frequency(half, mixer.spec.rope_base), cos, sin
        return None

    def _frequency(self, half: int, base: float) -> Tensor:
        """What positions are multiplied with to be angles, fp64 [half]."""
        name = f"frequency {half} {base}"
        if name not in self._room:
            steps = torch.arange(0, 2 * half, 2, dtype=torch.float64, device=self._device)
            self._room[name] = base ** (steps / -(2 * half))
        return self._room[name]

    @property
    def _stream(self) -> Tensor:
        return self._fp32("stream", 1, self.model.config.d_model)[0]

    @property
    def _normed(self) -> Tensor:
        return self._operand("normed", self.model.config.d_model)

    def _operand(self, name: str, columns: int) -> Tensor:
        """What a product reads."""
        return self._make(f"{name} {columns}", plan.operand_shape(columns), torch.bfloat16)

    def _bf16(self, name: str, width: int) -> Tensor:
        return self._make(name, (self._rows, width), torch.bfloat16)

    def _fp32(self, name: str, parts: int, width: int) -> Tensor:
        return self._make(f"{name} {parts} {width}", (parts, self._rows, width), torch.float32)

    def _make(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Room that kernels pass numbers through; of one name there is one, for all layers."""
        key = f"{name} {shape[-1]}"
        if key not in self._room:
            self._room[key] = torch.empty(shape, dtype=dtype, device=self._device)
        return self._room[key]


def of(model: SambaLM, state: State) -> FastStep | None:
    """Fast steps over ``state``, or None where the kernels do not know the model, or cannot run."""
    if preferred() is not None or not runs_on(model.device) or why_not(model):
        return None
    count = torch.cuda.get_device_properties(model.device).multi_processor_count if model.device.type == "cuda" else 4
    return FastStep(model, state, Tuning(processors=count))


def _inputs(product: nn.Module) -> int:
    """A Linear's, or those of what is in its place in a quantised model."""
    if isinstance(product, QuantizedLinear):
        return product.width
    assert isinstance(product, Linear)
    return product.weight.shape[1]


def _checked(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    return tensor

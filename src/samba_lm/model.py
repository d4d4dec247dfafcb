"""SambaLM: embedding, a stack of pre-norm residual layers, final norm, head. Which layers is data (`ModelConfig`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from samba_lm.config import LayerSpec, ModelConfig
from samba_lm.errors import UserError
from samba_lm.mixers import (  # noqa: F401 - they register
    attention,
    gla,
    mamba,
    mega,
    mlp,
    parallel,
    retention,
    self_extend,
)
from samba_lm.mixers.base import Tensors
from samba_lm.mixers.registry import build_mixer
from samba_lm.neighbours import Neighbours
from samba_lm.nn.init import RULES
from samba_lm.nn.norm import RMSNorm
from samba_lm.ops.linear import linear
from samba_lm.ops.quantized_linear.reference import Kind
from samba_lm.span import Cursor, Span
from samba_lm.state import State


class Layer(nn.Module):
    """x + mixer(norm(x)), the addition left to whoever comes next: with its norm it is one pass over memory.

    So a layer is given the residual stream x, fp32 (fp64 in fp64 models), and the branch still to be added to it: what
    the mixer of the layer before gave, None at the first. It returns x + branch, its own branch
    mixer(norm(x + branch)) and its state. Mixers compute in ``dtype``, which the branches are in.
    """

    def __init__(self, spec: LayerSpec, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps) if spec.pre_norm else nn.Identity()
        self.mixer = build_mixer(spec, config)

    def forward(
        self, x: torch.Tensor, branch: torch.Tensor | None, tensors: Tensors, span: Span, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, Tensors]:
        if isinstance(self.norm, RMSNorm):
            x, inputs = self.norm.add(x, branch, dtype)
        else:
            x = x if branch is None else x + branch
            inputs = x.to(dtype)
        branch, tensors = self.mixer.mix(inputs, tensors, span)
        return x, branch, tensors


class SambaLM(nn.Module):
    """A language model from its config. Build one with ``samba_lm.create`` (initialised) or ``samba_lm.load``.

    ``compute_dtype``: what the layers compute in; None (the default) is the parameters' dtype. Set it to
    ``torch.bfloat16`` to train fp32 parameters in bf16: they are cast where they are used.

    ``quantized``: what ``samba_lm.quantize`` has made of the large weights; None: they are as they were trained.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.quantized: Kind | None = None
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        self.layers = nn.ModuleList(Layer(spec, config) for spec in config.layers)
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.unembedding = (
            None if config.tie_embeddings else nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        )

    @property
    def dtype(self) -> torch.dtype:
        """What the layers compute in."""
        return self.compute_dtype or self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def forward(
        self, input_ids: torch.Tensor, state: State | None = None, segments: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, State]:
        """Read tokens and give the logits of the next one at every position.

        Args:
            input_ids: int64 [B, L], L >= 1.
            state: where to go on from (left as it was); None: nothing read yet.
            segments: int64 [B, L] document ids, non-decreasing, -1 for padding; see ``Mixer.forward``. On the model's
                device or on the CPU, where they are looked at without waiting for a GPU.

        Returns:
            logits [B, L, V] in the compute dtype, and the new state.
        """
        hidden, state = self.features(input_ids, state, segments)
        return self.head(hidden), state

    def features(
        self, input_ids: torch.Tensor, state: State | None = None, segments: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, State]:
        """As ``forward``, but the hidden states [B, L, D] after the final norm, before the head."""
        self._check(input_ids, state)
        batch, length = input_ids.shape
        span = Span.of(batch, length, input_ids.device, None if state is None else state.cursor, segments)
        hidden, state = self.run(span.pack(input_ids), state, span)
        return span.unpack(hidden), state

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        segments: torch.Tensor | None = None,
        start: Cursor | None = None,
        neighbours: Neighbours | None = None,
        times: torch.Tensor | None = None,
        apart: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The hidden states of ``features`` read from nothing, with no state made of what was read: for training.

        With ``neighbours`` the tokens are this process's part of the rows, all parts equally long, and ``start`` says
        where it begins; see ``samba_lm.data.columns``. Each of them must call this, and with gradients go backward.

        ``times`` fp32 [B, L], ``apart`` int64 [B, L]: rows that stand for longer ones, to Mamba's states and to
        attention; see ``samba_lm.train.stretched``.
        """
        self._check(input_ids, None)
        batch, length = input_ids.shape
        if neighbours is not None:
            self.require_parts(length)
        span = Span.of(batch, length, input_ids.device, start, segments, keep=False, neighbours=neighbours)
        if times is not None or apart is not None:
            times, apart = (None if t is None else span.pack(t) for t in (times, apart))
            if apart is not None and span.order is not None:
                apart = apart.cummax(1).values  # padding from within the row is now at its end
            span = replace(span, times=times, apart=apart)
        return span.unpack(self.run(span.pack(input_ids), None, span)[0])

    def require_parts(self, length: int) -> None:
        """Raise UserError unless every layer can read parts of rows, of ``length`` tokens each."""
        if length < 2:
            raise UserError(f"parts of rows hold {length} token: a part needs 2 at least; share rows among fewer")
        for i, layer in enumerate(map(_layer, self.layers)):
            if not layer.mixer.reads_parts:
                raise UserError(
                    f"layer {i} ({type(layer.mixer).__name__}) reads rows only as a whole, so no processes can share "
                    "them: set parallel.context to 1, or let it ask the span for what precedes (docs/extending.md)"
                )

    @torch.no_grad()
    def step(self, token_ids: torch.Tensor, state: State, longest: int | None = None) -> torch.Tensor:
        """Decode: read one token of each sequence, int64 [B]; logits [B, V]. ``state`` is advanced in place.

        ``longest``: the largest of ``state.position``, if known: full attention then need not ask a GPU for it.
        """
        self._check(token_ids[:, None], state)
        span = Span.of(token_ids.shape[0], 1, token_ids.device, state.cursor, None, in_place=True, longest=longest)
        hidden, new = self.run(token_ids[:, None], state, span)
        state.cursor, state.layers = new.cursor, new.layers
        return self.head(hidden[:, 0])

    @property
    def head_weight(self) -> torch.Tensor:
        """[V, D]: what makes logits of hidden states; the embedding, when the two are tied."""
        return self.embedding if self.unembedding is None else self.unembedding

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        return linear(hidden, self.head_weight.to(hidden.dtype))

    def init_state(self, batch: int) -> State:
        """The state of ``batch`` sequences of which nothing was read."""
        layers = [_layer(layer).mixer.init_tensors(batch, self.device, self.dtype) for layer in self.layers]
        return State(Cursor.fresh(batch, self.device), layers)

    def fix_parameters(self, yes: bool = True) -> None:
        """Promise that parameters stay as and where they are (or take it back): what a step makes of them is then made
        once, not every time."""
        for module in self.modules():
            if isinstance(module, mamba.Selection):
                module.fix(yes)

    def reset_parameters(self, seed: int) -> None:
        """Initialise all parameters by the config's rules; the same seed gives the same weights on the same device."""
        init = RULES[self.config.init](self.config, torch.Generator(self.device).manual_seed(seed))
        init.embedding(self.embedding)
        for layer in map(_layer, self.layers):
            if isinstance(layer.norm, RMSNorm):
                nn.init.ones_(layer.norm.weight)
            layer.mixer.reset_parameters(init)
        nn.init.ones_(self.norm.weight)
        if self.unembedding is not None:
            init.embedding(self.unembedding)

    def run(self, input_ids: torch.Tensor, state: State | None, span: Span) -> tuple[torch.Tensor, State]:
        """``features`` of tokens [B, L] whose padding stands at the right, for a span of the caller's own."""
        # A wide residual stream: small updates of late layers survive bf16 (the reference keeps it in fp32 too).
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        x: torch.Tensor = F.embedding(input_ids, self.embedding).to(wide)
        branch: torch.Tensor | None = None
        layers = []
        for i, layer in enumerate(map(_layer, self.layers)):
            if state is None:
                tensors = layer.mixer.init_tensors(input_ids.shape[0], self.device, self.dtype)
            else:
                tensors = state.layers[i]
            x, branch, tensors = layer(x, branch, tensors, span, self.dtype)
            if span.keep:  # else freed here, before the next layer's
                layers.append(tensors)
        return self.norm.add(x, branch, self.dtype)[1], State(span.end, layers)

    def _check(self, input_ids: torch.Tensor, state: State | None) -> None:
        if not isinstance(input_ids, torch.Tensor):
            raise UserError(f"input_ids must be an int64 tensor [batch, length], not {type(input_ids).__name__}")
        if input_ids.dim() != 2 or 0 in input_ids.shape or input_ids.dtype != torch.int64:
            raise UserError(
                f"input_ids must be int64 [batch >= 1, length >= 1], not {input_ids.dtype} {list(input_ids.shape)}"
            )
        if input_ids.device.type == "cpu" and input_ids.numel():  # on a GPU the look-up itself asserts
            low, high = int(input_ids.min()), int(input_ids.max())
            if low < 0 or high >= self.config.vocab_size:
                bad = low if low < 0 else high
                raise UserError(f"token id {bad} is outside the vocabulary of {self.config.vocab_size} (0 .. size - 1)")
        if state is not None and state.batch != input_ids.shape[0]:
            raise UserError(f"the state holds {state.batch} sequences but input_ids has {input_ids.shape[0]} rows")
        if state is not None and len(state.layers) != len(self.layers):
            raise UserError(f"the state is of a model with {len(state.layers)} layers, this one has {len(self.layers)}")


def _layer(module: nn.Module) -> Layer:
    assert isinstance(module, Layer)
    return module


@contextlib.contextmanager
def evaluating(model: SambaLM) -> Iterator[None]:
    """Put a model in evaluation mode and every module's own training flag back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True

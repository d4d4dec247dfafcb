"""How widely a model looks: the entropy of attention and of Mamba's selection, layer by layer (paper, Appendix E).

The mixers know nothing of it. While a text is read, hooks stand at two products that every mixer has which attends or
selects, whatever larger mixer it is part of: queries and keys are made once more of what entered ``qkv``, by the
mixer's own functions, and the steps are what left ``dt_proj``, as the scan takes them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from samba_lm.config import LayerSpec
from samba_lm.errors import UserError
from samba_lm.eval.intervals import mean_interval
from samba_lm.eval.records import Record
from samba_lm.memory import ran_out
from samba_lm.mixers.attention import AttentionMixer
from samba_lm.mixers.base import state_dtype
from samba_lm.mixers.linear_attention import LinearAttentionMixer
from samba_lm.mixers.mamba import S6
from samba_lm.mixers.mega import MegaS6Mixer
from samba_lm.mixers.self_extend import SelfExtendMixer
from samba_lm.model import SambaLM, evaluating
from samba_lm.span import Span
from samba_lm.tokenizer import Tokenizer

Kind = Literal["attention", "selection"]
KINDS: tuple[Kind, ...] = ("attention", "selection")
Where = tuple[int, Kind]
"""A block and what is measured in it."""

SCORES_AT_ONCE = 1 << 22
"""Numbers of the largest matrix made at once: attention is seen some queries at a time, steps some channels."""
BEFORE, AFTER = "Question: {question}\nAnswer:", " {answer}"
"""The two halves of a text."""
MEANING = (
    "attention: -(1/(l h)) sum over heads, the l positions of the answer and keys of A log A. selection: of the steps "
    "Delta' = Delta / (sum of Delta over the text), -(1/d_e) sum over channels and positions of Delta' log Delta'. "
    "In nats; share is of the largest value possible, log of the keys in sight or of the tokens."
)


@dataclass(frozen=True)
class Entropy:
    """An entropy in nats, and the largest that could have been."""

    nats: float
    most: float

    @property
    def share(self) -> float:
        """Of the largest; NaN where nothing could be chosen."""
        return self.nats / self.most if self.most > 0 else math.nan


@dataclass(frozen=True)
class Sample:
    """A text: ``tokens`` int64 [L], of which the last ``decoded`` are the answer's; ``row`` of the data, from 0."""

    row: int
    tokens: np.ndarray
    decoded: int


@dataclass(frozen=True)
class Reading:
    """The entropies of one sample, or why there are none."""

    row: int
    tokens: int
    decoded: int
    entropies: Mapping[Where, Entropy] = field(default_factory=dict)
    skipped: str = ""


@dataclass(frozen=True)
class Block:
    """What was found in a block: means over the samples, with the ends of their 95% intervals (NaN for one sample).

    Attributes:
        block: its number, from 0. kind: what was measured.
        samples: how many.
        nats, low, high: the entropy. most: the mean of the largest possible.
        share, share_low, share_high: of the largest possible.
    """

    block: int
    kind: Kind
    samples: int
    nats: float
    low: float
    high: float
    most: float
    share: float
    share_low: float
    share_high: float


def by_block(readings: Sequence[Reading]) -> list[Block]:
    """The means over the readings, block by block, attention before selection."""
    found = []
    for block, kind in sorted({where for reading in readings for where in reading.entropies}):
        values = [reading.entropies[block, kind] for reading in readings if (block, kind) in reading.entropies]
        nats = mean_interval([value.nats for value in values])
        share = mean_interval([value.share for value in values if value.most > 0])
        most = mean_interval([value.most for value in values]).mean
        found.append(
            Block(block, kind, nats.count, nats.mean, nats.low, nats.high, most, share.mean, share.low, share.high)
        )
    return found


_MEASURED: dict[Kind, tuple[type[nn.Module], ...]] = {"attention": (AttentionMixer, MegaS6Mixer), "selection": (S6,)}


def places(model: SambaLM) -> list[Where]:
    """Where the model has an entropy. A block is a mixer, counted from 0, and the MLP after it; it may have both."""
    found: list[Where] = []
    for block, _, module in _mixers(model):
        parts = list(module.modules())
        found += [(block, kind) for kind in KINDS if any(isinstance(part, _MEASURED[kind]) for part in parts)]
    return found


def left_out(model: SambaLM) -> dict[int, str]:
    """Blocks with a mixer that has no entropy, and why."""
    found = {}
    for block, spec, module in _mixers(model):
        parts = list(module.modules())
        if any(isinstance(part, LinearAttentionMixer) for part in parts):
            found[block] = f"{spec.kind}: linear attention has no weights that sum to one"
        elif not any(isinstance(part, kind) for kind in _MEASURED.values() for part in parts):
            found[block] = f"{spec.kind}: it neither attends nor selects"
    return found


def _mixers(model: SambaLM) -> Iterator[tuple[int, LayerSpec, nn.Module]]:
    """The blocks: their number, their mixer's spec and their layer."""
    both = zip(model.config.layers, model.layers, strict=True)
    mixers = ((spec, layer) for spec, layer in both if spec.is_mixer)
    for block, (spec, layer) in enumerate(mixers):
        yield block, spec, layer


def samples(records: Sequence[Record], tokenizer: Tokenizer, question: str, answer: str) -> list[Sample]:
    """The records' texts in tokens; ``question``, ``answer``: the fields' names.

    The two halves are encoded apart, so that where the answer begins is no matter of the tokenizer. Raises UserError
    for an empty answer.
    """
    found = []
    for record in records:
        before = tokenizer.encode(BEFORE.format(question=record.text(question)))
        after = tokenizer.encode(AFTER.format(answer=record.text(answer).strip()))
        if not record.text(answer).strip():
            raise UserError(f"{record.where}: field {answer!r} is empty, so nothing is decoded: leave the line out.")
        found.append(Sample(record.row, np.concatenate((before, after)), after.size))
    return found


def measure(
    model: SambaLM, texts: Sequence[Sample], *, progress: Callable[[float], None] | None = None
) -> Iterator[Reading]:
    """Yield what is found in each text, read on its own from nothing.

    A text that full attention cannot hold, or that does not fit into memory, is skipped and says so. ``progress`` is
    told the share of the tokens that were read. Raises UserError where an entropy is not finite.
    """
    whole, done = sum(text.tokens.size for text in texts), 0
    for text in texts:
        yield _reading(model, text)
        done += text.tokens.size
        if progress is not None:
            progress(done / whole)


def _reading(model: SambaLM, text: Sample) -> Reading:
    facts = text.row, text.tokens.size, text.decoded
    if not 0 < text.decoded <= text.tokens.size:
        raise ValueError(f"{text.decoded} of {text.tokens.size} tokens cannot be the answer's")
    most, far = model.config.max_context, 1 << 30
    grows = model.config.state_bytes(far) != model.config.state_bytes(2 * far)
    if grows and text.tokens.size > most:
        return Reading(*facts, skipped=f"full attention would have to hold more tokens than max_context = {most:,}")
    try:
        found = entropies(model, torch.from_numpy(text.tokens)[None].to(model.device), text.decoded)
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        return Reading(*facts, skipped="out of memory")
    if not all(math.isfinite(value.nats) for value in found.values()):
        raise UserError(
            f"An entropy is not finite: the model's numbers are not either in row {text.row} (do its weights hold NaN, "
            "or does its dtype overflow?)."
        )
    return Reading(*facts, found)


@torch.no_grad()
def entropies(model: SambaLM, input_ids: torch.Tensor, decoded: int) -> dict[Where, Entropy]:
    """The entropies of one text: input_ids int64 [1, L], of which the last ``decoded`` are the answer's."""
    span = Span.of(1, input_ids.shape[1], input_ids.device, None, None, keep=False)
    found: dict[Where, Entropy] = {}

    def looked(block: int, heads: Heads) -> None:
        found[block, "attention"] = attention_entropy(heads, decoded)

    def selected(block: int, steps: torch.Tensor) -> None:
        found[block, "selection"] = selection_entropy(steps)

    with evaluating(model), watching(model, span, looked, selected):
        model.run(input_ids, None, span)
    return found


@dataclass(frozen=True)
class Heads:
    """The queries and keys of one attention over one text from its beginning, as its scores are made of them.

    Attributes:
        q: [L, H, K]. k: [L, G, K], H a multiple of G.
        scale: of the scores.
        window: keys that a query sees, its own included; None: all.
        chunk: a query sees the keys of its own chunk of so many positions; None: there are no chunks.
        far: q and k for keys at a distance of ``neighbor`` or more (SelfExtend); None: there are no others.
    """

    q: torch.Tensor
    k: torch.Tensor
    scale: float
    window: int | None = None
    chunk: int | None = None
    far: tuple[torch.Tensor, torch.Tensor] | None = None
    neighbor: int = 0

    def weights(self, start: int, stop: int) -> tuple[torch.Tensor, int]:
        """The weights of queries ``start .. stop - 1``, [H, stop - start, keys], and the first of these keys.

        In fp32 at least, as the mixers compute them; 0 where a query does not see a key.
        """
        device = self.q.device
        i = torch.arange(start, stop, device=device)[:, None]
        oldest = i + 1 - self.in_sight(i)
        first = max(0, start + 1 - int(self.in_sight(torch.tensor(start))))
        j = torch.arange(first, stop, device=device)
        scores = self._scores(self.q[start:stop], self.k[first:stop])
        if self.far is not None:
            q, k = self.far
            scores = torch.where(i - j < self.neighbor, scores, self._scores(q[start:stop], k[first:stop]))
        return scores.masked_fill((j > i) | (j < oldest), -math.inf).softmax(dim=-1), first

    def in_sight(self, i: torch.Tensor) -> torch.Tensor:
        """How many keys the queries at positions ``i`` see, their own included."""
        seen = i + 1 if self.chunk is None else i % self.chunk + 1
        return seen if self.window is None else seen.clamp(max=self.window)

    def _scores(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """[H, queries, keys] of q [queries, H, K] and k [keys, G, K]."""
        dtype, groups = state_dtype(q.dtype), k.shape[1]
        grouped = q.to(dtype).unflatten(1, (groups, -1))
        return torch.einsum("ighk,jgk->ghij", grouped, k.to(dtype)).flatten(0, 1) * self.scale


def attention_entropy(heads: Heads, last: int) -> Entropy:
    """H_a of the last ``last`` queries: the mean over them and the heads of -sum_k A_k log A_k. The most it could be is
    the mean logarithm of the number of keys in sight."""
    length, count = heads.q.shape[:2]
    sizes = heads.in_sight(torch.arange(length - last, length))
    reach = int(sizes.max())
    rows = min(reach, max(1, SCORES_AT_ONCE // (count * 2 * reach)))  # so many queries see less than 2 reach keys
    total = 0.0
    for start in range(length - last, length, rows):
        weights, _ = heads.weights(start, min(start + rows, length))
        total += float(torch.special.entr(weights).sum(dtype=torch.float64))
    return Entropy(total / (count * last), float(sizes.double().log().mean()))


def selection_entropy(steps: torch.Tensor) -> Entropy:
    """H_s of steps Delta [L, E], not negative: the mean over the E channels of -sum_i p_i log p_i, where p_i is Delta_i
    over its sum in that channel (0 for a channel whose steps are all 0). The most it could be is log L."""
    length, channels = steps.shape
    at_once = max(1, SCORES_AT_ONCE // length)
    total = 0.0
    for some in steps.split(at_once, dim=1):
        wide = some.to(torch.float64)
        shares = wide / wide.sum(dim=0).clamp(min=torch.finfo(torch.float64).tiny)
        total += float(torch.special.entr(shares).sum())
    return Entropy(total / channels, math.log(length))


@contextlib.contextmanager
def watching(
    model: SambaLM, span: Span, looked: Callable[[int, Heads], None], selected: Callable[[int, torch.Tensor], None]
) -> Iterator[None]:
    """While the model runs over ``span``, one text from its beginning, call ``looked`` with each attention's block and
    heads, and ``selected`` with each selection's block and steps [L, E]."""
    hooks = []
    busy = False

    def attends(block: int, mixer: AttentionMixer) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor], qkv: torch.Tensor) -> None:
            nonlocal busy
            if not busy:  # queries and keys are made by calling the product once more
                busy = True
                heads = _heads(mixer, inputs[0], qkv, span)
                busy = False
                looked(block, heads)

        return hook

    def selects(block: int, s6: S6) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, step: torch.Tensor) -> None:
            dtype = state_dtype(step.dtype)
            selected(block, F.softplus(step[0].to(dtype) + s6.selection.dt_bias.to(dtype)))

        return hook

    def attends_in_chunks(block: int, mixer: MegaS6Mixer) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, projected: torch.Tensor) -> None:
            z = F.silu(projected[..., mixer.width : mixer.width + mixer.spec.z_dim])
            q, k = mixer.queries_keys(z, span.in_chunks(mixer.spec.chunk))
            looked(block, Heads(q[0], k[0], 1.0, chunk=mixer.spec.chunk))

        return hook

    for block, _, layer in _mixers(model):
        for part in layer.modules():
            if isinstance(part, AttentionMixer):
                hooks.append(part.qkv.register_forward_hook(attends(block, part)))
            elif isinstance(part, MegaS6Mixer):
                hooks.append(part.mx_proj.register_forward_hook(attends_in_chunks(block, part)))
            elif isinstance(part, S6):
                hooks.append(part.dt_proj.register_forward_hook(selects(block, part)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _heads(mixer: AttentionMixer, x: torch.Tensor, qkv: torch.Tensor, span: Span) -> Heads:
    """Of what enters the mixer, x [1, L, D], and its projection."""
    scale = mixer.head_dim**-0.5
    if isinstance(mixer, SelfExtendMixer):
        (q, k, _), (far_q, far_k, _) = mixer.rotated(qkv, span)
        return Heads(q[0], k[0], scale, far=(far_q[0], far_k[0]), neighbor=mixer.spec.neighbor_window)
    nothing_read = mixer.init_tensors(1, x.device, x.dtype)
    (q, k, _), _ = mixer.project(x, nothing_read, span, mixer.spec.rope)
    return Heads(q[0], k[0], scale, mixer.spec.window)

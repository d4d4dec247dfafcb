"""Memory of one GPU at the peak of a step: what stays, what a micro-batch keeps, and what comes on top."""

from __future__ import annotations

from dataclasses import dataclass, fields

from samba_lm.config import LayerSpec, ModelConfig
from samba_lm.train.estimate.activations import kept, rotation
from samba_lm.train.estimate.layout import Layout
from samba_lm.train.recipe import TrainSection

LOGITS_BYTES = 1 << 29
"""Logits that the loss holds at once (ops/linear_cross_entropy/triton.py)."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU."""

    parameters: int
    """fp32, this GPU's share."""
    gradients: int
    """fp32, this GPU's share; none where a step is one micro-batch, whose activations go as they come."""
    optimizer: int
    """fp32: two moments for AdamW, one for the matrices that Muon moves."""
    casts: int
    """Weights in what the layers compute in, cast once a step; where they are sharded they are gathered instead, and
    only float8 ones, which are made of the gathered, are kept."""
    gathered: int
    """Where weights are sharded: layers gathered for their turn, their gradients before they are shared out, and
    embedding and head whole."""
    activations: int
    """What a micro-batch keeps for its backward."""
    working: int
    """The head's gradient, and whichever is more: a chunk of logits, or gradients on their way through a layer."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.record().values())

    def record(self) -> dict[str, int]:
        """The parts, bytes."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def matrices(spec: LayerSpec, d_model: int) -> int:
    """Weights of a layer's linear maps: what is sharded, cast, and moved by Muon."""
    return spec.matmul_flops(d_model) // 2


def memory(config: ModelConfig, train: TrainSection, layout: Layout, micro_batch: int) -> Memory:
    """Memory of one of ``layout``'s GPUs with ``micro_batch`` rows at once on each.

    Compiled layers and float8 products are taken for what neither is, but for float8's weights: they keep somewhat
    less.
    """
    D, size = config.d_model, 2 if train.dtype == "bfloat16" else 4
    everything, large = config.parameters(), [matrices(spec, D) for spec in config.layers]
    head = config.vocab_size * D
    embeddings = head if config.tie_embeddings else 2 * head
    sharded = sum(large) + embeddings
    own = everything - sharded + -(-sharded // layout.holders)  # the rest lies on each GPU
    moved = sum(large) // layout.holders if train.optimizer == "muon" else 0

    alone = layout.gpus == 1
    gathered, last = 0, 0
    if not alone:
        # Of layers: two gathered, the flat buffer of one on its way, the gradients of one with their fp32 copy and that
        # of the one before. Embedding and head stay gathered in fp32; their gradient and its copy come last.
        gathered = (3 * size + size + 4 + 4) * max(large) + 4 * embeddings
        last = 8 * embeddings
    tokens = micro_batch * train.length // layout.context
    stack, working = _moments(config, train, size)
    activations = tokens * stack + train.length // layout.context * rotation(config)
    accumulated = train.batch_size // layout.readers > micro_batch or activations < 4 * own
    if alone:
        casts = size * everything if size < 4 else 0
    else:
        casts = size * head + (2 * sum(large) if train.float8 else 0)  # float8: as they are, and transposed
    logits = min(LOGITS_BYTES, 4 * tokens * config.vocab_size)
    return Memory(
        parameters=4 * own,
        gradients=4 * own if accumulated else 0,
        optimizer=8 * own - 4 * moved,
        casts=casts,
        gathered=gathered,
        activations=activations,
        working=4 * head + max(tokens * working, logits + 3 * size * D * tokens, last),
    )


def _moments(config: ModelConfig, train: TrainSection, size: int) -> tuple[int, int]:
    """Bytes a token that the whole stack keeps, and by how much they and what a layer's backward adds are more at the
    worst moment of the way back, on which a layer's are gone once it is passed."""
    mode = train.activation_checkpointing
    held, worst = 8, 0  # the token and its target
    for spec in config.layers:
        each = kept(spec, config.d_model, size)
        if mode == "full":
            held += each.inputs
            worst = max(worst, held + each.layer + each.backward)
        else:
            held += each.layer - (each.remade if mode == "selective" else 0)
            worst = max(worst, held + each.backward + (each.remade if mode == "selective" else 0))
    return held, worst - held

"""Rows that several processes share train as rows that one process has: fp64, real processes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from ranks import RanksError, on_ranks

from samba_lm import checkpoint
from samba_lm.config import (
    Attention,
    GatedLinearAttention,
    GatedParallel,
    LayerSpec,
    Mamba,
    MegaS6,
    ModelConfig,
    Parallel,
    Retention,
    SelfExtend,
    SwiGLU,
)
from samba_lm.data.columns import part_of
from samba_lm.data.loader import Batch
from samba_lm.mixers.mlp import SwiGLUMLP
from samba_lm.mixers.registry import register_mixer
from samba_lm.model import SambaLM
from samba_lm.neighbours import Neighbours
from samba_lm.ops.linear_cross_entropy import linear_cross_entropy
from samba_lm.span import Cursor
from samba_lm.train.loop import fit
from samba_lm.train.parallel import connect
from samba_lm.train.prepare import make_optimizer
from samba_lm.train.recipe import ParallelSection, Recipe, TrainSection
from samba_lm.train.run import train
from samba_lm.train.step import evaluate, train_step
from samba_lm.train.stretched import stretched
from samba_lm.train.transforms import checkpoint_activations, compile_layers, remake_cheap_activations

LENGTH, VOCABULARY = 32, 50
MLP = SwiGLU(width=12)
SLIDING = Attention(heads=4, kv_heads=2, window=6)
MODELS: dict[str, tuple[LayerSpec, ...]] = {
    "samba": (Mamba(state=4), MLP, SLIDING, MLP, Mamba(state=4), MLP, SLIDING, MLP),
    "mamba": (Mamba(state=4), Mamba(state=4)),
    "mamba-swa-mlp": (Mamba(state=4), SLIDING, MLP),
    "short-conv": (Attention(heads=2, window=6, short_conv=4), MLP),
    "parallel": (Parallel(mamba=Mamba(state=4), attention=SLIDING), MLP),
    "gated": (GatedParallel(mamba=Mamba(state=4), attention=SLIDING), MLP),
    # What a part needs may lie further left than the next part.
    "far": (Mamba(state=4, conv=12), Attention(heads=2, window=20, short_conv=11), Attention(heads=2, window=1)),
    "full": (Attention(heads=2), Mamba(state=4), Attention(heads=2, short_conv=4)),
    "gla": (GatedLinearAttention(heads=2), SLIDING),
    "retention": (Retention(heads=2), SLIDING),
    "mega": (MegaS6(z_dim=4, chunk=5, state=4), MegaS6(z_dim=4, chunk=12, state=4), MLP),
    "self-extend": (SelfExtend(heads=2, group=3, neighbor_window=7), Mamba(state=4)),
}
DOCUMENTS: dict[str, list[list[int]]] = {
    # Begins in document 3. Cuts (8, 16, 24): a document begins at one, one ends just before it and one just after; a
    # document of one token stands at the next, one of two reaches over the last.
    "short": [[3] * 8 + [4] * 7 + [5] + [6] + [7] * 6 + [8] * 2 + [9] * 7, [0] * 5 + [1] * 27],
    "padded": [[0] * 11 + [1] * 3 + [-1] * 18, [-1] * 2 + [2] * 13 + [-1] + [3] * 16],
}

STRETCHED = ("stretched", "padded")
"""Cases in which 9 of every 13 tokens, one after another, stand for 5 each, and rows are in two parts besides."""

CASES = [None, *DOCUMENTS, "stretched"]


def config(*layers: LayerSpec) -> ModelConfig:
    return ModelConfig(name="context-test", vocab_size=VOCABULARY, d_model=16, layers=layers)


def rows(case: str | None, count: int = 2) -> Batch:
    torch.manual_seed(7)
    ids, targets = torch.randint(0, VOCABULARY, (2, count, LENGTH))
    targets[:, 16:24] = -100  # nothing for the third of four processes to learn
    segments = None
    if case in DOCUMENTS:
        segments = torch.tensor(DOCUMENTS[case]).repeat(count // 2, 1)
        targets[segments < 0] = -100
    if case not in STRETCHED:
        return Batch(ids, targets, segments)
    column = torch.arange(LENGTH).expand(count, -1)
    return Batch(ids, targets, segments, 1.0 + 4.0 * (column % 13 > 3), (column > 13).long())


def loss_of(model: SambaLM, batch: Batch, us: Neighbours | None) -> tuple[torch.Tensor, torch.Tensor]:
    start = None if batch.before is None else Cursor(*batch.before)
    hidden = model.hidden_states(batch.input_ids, batch.segments, start, us, batch.stretch, batch.apart)
    loss = linear_cross_entropy(hidden, model.head_weight, batch.targets)
    loss.backward()
    return hidden.detach(), loss.detach()


def model_errors(names: list[str], cases: list[str | None], changed: str | None) -> dict[str, float]:
    """The largest relative difference of hidden states, loss and every gradient from one process's, by case."""
    dist.init_process_group("gloo")
    us, errors = Neighbours(dist.group.WORLD), {}
    torch.set_num_threads(1)
    for name in names:
        for kind in cases:
            model = checkpoint.create(config(*MODELS[name]), seed=1).double()
            batch = stretched(rows(kind), model)
            assert name != "samba" or (batch.apart is not None) == (kind in STRETCHED)
            hidden, loss = loss_of(model, batch, None)
            wanted = {key: p.grad for key, p in model.named_parameters()}
            model.zero_grad(set_to_none=True)
            if changed == "full":
                checkpoint_activations(model.layers)
            elif changed == "selective":
                remake_cheap_activations(model.layers)
            elif changed == "compile":
                warnings.simplefilter("ignore")  # of the compiler, of itself
                compile_layers(model.layers)
            found, part_loss = loss_of(model, part_of(batch, us.index, us.count), us)
            gathered = torch.cat(list(us.from_all(found)), dim=1)
            if batch.segments is not None:  # padding has moved, and its hidden states are anything
                order = (batch.segments < 0).to(torch.int8).argsort(dim=1, stable=True)
                read = batch.segments.gather(1, order)[..., None] >= 0
                hidden = hidden.gather(1, order[..., None].expand_as(hidden)) * read
                gathered = gathered * read
            dist.all_reduce(part_loss)
            case = f"{name}, {kind}"
            errors[f"{case}: hidden states"] = relative(gathered, hidden)
            errors[f"{case}: loss"] = relative(part_loss, loss)
            for key, parameter in model.named_parameters():
                gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
                dist.all_reduce(gradient)
                errors[f"{case}: {key}"] = relative(gradient, wanted[key])
    return errors


def relative(found: torch.Tensor, wanted: torch.Tensor | None) -> float:
    assert wanted is not None
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


def assert_equal(results: list[dict[str, float]]) -> None:
    for errors in results:
        name, error = max(errors.items(), key=lambda item: item[1])
        assert error < 1e-10, name


def test_parts_are_the_whole_on_two() -> None:
    assert_equal(on_ranks(2, model_errors, list(MODELS), CASES, None, timeout=100))


def test_parts_are_the_whole_on_four_with_activations_made_again() -> None:
    assert_equal(on_ranks(4, model_errors, ["samba", "short-conv", "gated", "far"], CASES, "full", timeout=100))


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["selective", "compile"])
def test_parts_of_changed_layers(changed: str) -> None:
    assert_equal(on_ranks(2, model_errors, ["mamba-swa-mlp"], ["short"], changed, timeout=500))


def trained(parallel: dict[str, int], settings: dict[str, Any]) -> dict[str, Any]:
    """Losses, gradient norms and weights of some steps, and a validation's loss."""
    from torch.distributed.tensor import DTensor

    us = connect("cpu", ParallelSection.model_validate(parallel))
    train = TrainSection(steps=2, batch_size=4, length=LENGTH, lr=0.01, clip=0.5, **settings)
    model = checkpoint.create(config(*MODELS["samba"]), seed=1).double()
    if train.activation_checkpointing == "full":
        checkpoint_activations(model.layers)
    us.wrap(model)
    model.train()
    optimizer = make_optimizer(model, train)
    share = 4 // us.data_world
    steps, mine = [], slice(us.data_rank * share, (us.data_rank + 1) * share)
    for step, documents in enumerate((None, "short")):
        whole = rows(documents, 4)
        segments = None if whole.segments is None else whole.segments[mine]
        stretch = 1.0 + step * 9.0 * (whole.input_ids[mine] % 8 > 0)
        batch = Batch(whole.input_ids[mine], whole.targets[mine], segments, stretch)
        steps.append(train_step(model, optimizer, batch, train, us, step=step))
    # Rows for some processes only: all take part.
    held_out = [rows("short")] if us.data_rank == 0 else []
    whole_weights = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).tolist() for name, p in model.named_parameters()
    }
    return {"steps": steps, "validation": evaluate(model, held_out, us), "weights": whole_weights}


@pytest.mark.parametrize(
    ("world", "parallel", "settings"),
    [
        (2, {"context": 2}, {"micro_batch": 2}),
        (4, {"context": 4}, {"micro_batch": 1, "activation_checkpointing": "full"}),
        (4, {"shard": 2, "context": 2}, {"micro_batch": 1, "activation_checkpointing": "full"}),
        (4, {"replicate": 2, "context": 2}, {}),
    ],
)
def test_training_is_that_of_one_process(world: int, parallel: dict[str, int], settings: dict[str, Any]) -> None:
    want = trained({}, {})
    for got in on_ranks(world, trained, parallel, settings, timeout=100):
        for kind in ("steps", "validation"):
            found, wanted = (torch.tensor(x[kind], dtype=torch.float64) for x in (got, want))
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=0)
        for name, value in want["weights"].items():
            found, wanted = (torch.tensor(x, dtype=torch.float64) for x in (got["weights"][name], value))
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12, msg=name)


class Alone(LayerSpec):
    """A mixer of a user's own, which knows nothing of parts."""

    kind: Literal["alone"] = "alone"
    width: int = 4

    def parameters(self, d_model: int) -> int:
        return 3 * d_model * self.width

    def matmul_flops(self, d_model: int) -> int:
        return 2 * self.parameters(d_model)


@register_mixer(Alone)  # type: ignore[arg-type]
class AloneMixer(SwiGLUMLP):
    reads_parts = False


class Rows:
    """Batches that are never read."""

    def __init__(self, length: int) -> None:
        self.batch_size, self.length = 2, length

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        raise AssertionError("training began")

    def fingerprint(self) -> str:
        return ""


def refused(length: int) -> None:
    us = connect("cpu", ParallelSection(context=2))
    layers = (MLP, Alone()) if length % 2 == 0 else (MLP, Mamba())
    fit(
        checkpoint.create(config(*layers)),
        Rows(length),
        TrainSection(steps=1, batch_size=2, length=length),
        parallel=us,
    )


@pytest.mark.parametrize(
    ("length", "words"),
    [(33, "Rows of 33 tokens do not divide among 2 processes"), (32, r"layer 1 \(AloneMixer\) reads rows only as a w")],
)
def test_what_cannot_be_shared_is_refused_before_training(length: int, words: str) -> None:
    with pytest.raises(RanksError, match=words) as raised:
        on_ranks(2, refused, length, timeout=60)
    assert "training began" not in str(raised.value)


def odd_lengths(out: str) -> None:
    settings = {"out": out, "steps": 4, "batch_size": 2, "length": 642, "device": "cpu"}
    data = {"tokenizer": "byte", "passkey": {"lengths": [642, 321]}}
    model = {"name": "samba-micro", "overrides": {"d_model": 16}}
    train(Recipe.from_dict({"model": model, "data": data, "train": settings, "parallel": {"context": 2}}))


def test_a_length_that_comes_later_and_cannot_be_shared_is_refused_before_training(tmp_path: Path) -> None:
    words = "data.passkey.lengths: Rows of 321 tokens do not divide among 2 processes"
    with pytest.raises(RanksError, match=words):
        on_ranks(2, odd_lengths, str(tmp_path / "run"), timeout=60)
    assert not (tmp_path / "run").exists()

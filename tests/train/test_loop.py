from __future__ import annotations

import functools
import math
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from kernels import DEVICE, needs_triton
from torch._dynamo.utils import counters

from samba_lm import checkpoint, zoo
from samba_lm.data.ahead import Ahead
from samba_lm.data.loader import Batch, Loader
from samba_lm.data.shards import TokenDataset
from samba_lm.errors import UserError
from samba_lm.mixers import mamba
from samba_lm.model import SambaLM
from samba_lm.nn import recompute
from samba_lm.nn.cast import cast_once
from samba_lm.ops.selective_scan import selective_scan
from samba_lm.train.finite import NonFiniteError
from samba_lm.train.loop import Progress, fit
from samba_lm.train.observer import Observer, Plan, StepRecord
from samba_lm.train.optim import optimizer_tensors
from samba_lm.train.parallel import connect
from samba_lm.train.prepare import make_optimizer, prepare_model
from samba_lm.train.recipe import Recipe, TrainSection
from samba_lm.train.step import batch_loss, evaluate, on_device, train_step
from samba_lm.train.transforms import checkpoint_activations, compile_layers, remake_cheap_activations
from samba_lm.train.validation import ValidationWindows

CPU = connect("cpu")
MakeRecipe = Callable[..., Recipe]


def nano(seed: int = 0) -> SambaLM:
    return checkpoint.create(zoo.get("samba-micro").with_overrides(vocab_size=320), seed=seed)


def settings(**fields: object) -> TrainSection:
    return TrainSection(
        **{"steps": 4, "batch_size": 4, "length": 32, "device": "cpu", "warmup_fraction": 0.0, **fields}
    )


def padded_batch() -> Batch:
    """Rows with very different numbers of valid tokens: a mean of means would be wrong."""
    ids = torch.randint(0, 257, (4, 32))
    targets = torch.randint(0, 257, (4, 32))
    targets[0, 3:] = -100
    targets[2] = -100
    return Batch(ids, targets, None)


def gradients(model: SambaLM, batch: Batch, **fields: object) -> tuple[float, dict[str, torch.Tensor]]:
    section = settings(lr=1e-12, clip=0.0, **fields)
    optimizer = make_optimizer(model, section)
    loss, _ = train_step(model, optimizer, batch, section, CPU, step=1)
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("micro", [1, 2])
def test_accumulation_equals_the_big_batch(micro: int) -> None:
    batch = padded_batch()
    loss, whole = gradients(nano().double(), batch)
    same, parts = gradients(nano().double(), batch, micro_batch=micro)
    assert same == pytest.approx(loss, rel=1e-6)
    assert set(whole) == {name for name, _ in nano().named_parameters()}
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-9, atol=1e-12, msg=name)


def test_loss_is_the_mean_over_valid_tokens() -> None:
    batch = padded_batch()
    model = nano()
    loss, _ = gradients(model, batch)
    logits, _ = model(batch.input_ids)
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100)
    assert loss == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize("how", ["selective", "full"])
def test_activation_checkpointing_changes_no_gradient(data: Path, how: str) -> None:
    loader = Loader(TokenDataset.open(data / "train"), 4, 32, 0, documents=True)
    plain, recomputed = nano(), nano()
    fit(plain, loader, settings(steps=2))
    fit(recomputed, loader, settings(steps=2, activation_checkpointing=how))
    assert list(plain.state_dict()) == list(recomputed.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(value, recomputed.state_dict()[name]), name


def test_activation_checkpointing_computes_again_in_backward() -> None:
    model = nano()
    calls = []
    mixer = model.layers[0].mixer
    original = mixer.mix
    mixer.mix = lambda *a: (calls.append(1), original(*a))[1]
    checkpoint_activations(model.layers)
    total, _ = batch_loss(model, padded_batch(), CPU.device)
    assert len(calls) == 1
    total.backward()
    assert len(calls) == 2


class Counted(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that are kept for backward, each tensor's once."""

    kept: ClassVar[dict[tuple[int, torch.Size], torch.Tensor]] = {}

    def __init__(self, pack: Callable[..., Any] = lambda t: t, unpack: Callable[..., Any] = lambda t: t) -> None:
        def counted(tensor: torch.Tensor) -> Any:
            packed = pack(tensor)
            if packed is not None:
                self.kept[packed.data_ptr(), packed.shape] = packed
            return packed

        super().__init__(counted, unpack)

    @classmethod
    def total(cls) -> int:
        """Bytes since the last call."""
        total = sum(tensor.nbytes for tensor in cls.kept.values())
        cls.kept.clear()
        return total


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "once"),
    [
        (torch.bfloat16, True),
        pytest.param(torch.bfloat16, False, marks=pytest.mark.slow),
        pytest.param(torch.float32, True, marks=pytest.mark.slow),
        pytest.param(torch.float32, False, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_selective_checkpointing_keeps_no_steps(
    dtype: torch.dtype, once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mamba, "selective_scan", functools.partial(selective_scan, backend="triton"))
    monkeypatch.setattr(recompute, "saved_tensors_hooks", Counted)
    whole = padded_batch()
    batch = on_device(Batch(whole.input_ids[:2], whole.targets[:2], None), torch.device(DEVICE))
    found = []
    for selective in (False, True):
        model = nano().to(DEVICE)
        model.compute_dtype = dtype
        if selective:
            remake_cheap_activations(model.layers)
        with cast_once() if once else nullcontext():
            with Counted():
                total, _ = batch_loss(model, batch, torch.device(DEVICE))
            kept = Counted.total()
            total.backward()
        found.append((kept, [p.grad for p in model.parameters()]))
    (all_of_it, plain), (less, remade) = found
    steps = [m for m in model.modules() if isinstance(m, mamba.S6)]
    assert all_of_it - less == sum(batch.input_ids.numel() * s6.inner * dtype.itemsize for s6 in steps) > 0
    for a, b in zip(plain, remade, strict=True):
        assert torch.equal(a, b)  # type: ignore[arg-type]


def test_both_kinds_of_checkpointing_together() -> None:
    batch, plain, both = padded_batch(), nano(), nano()
    remake_cheap_activations(both.layers)
    checkpoint_activations(both.layers)
    loss, want = gradients(plain, batch)
    same, got = gradients(both, batch)
    assert same == loss
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_bf16_keeps_fp32_parameters_and_learns(data: Path) -> None:
    loader = Loader(TokenDataset.open(data / "train"), 4, 32, 0)
    model = nano()
    seen = Recorder()
    section = settings(steps=12, lr=3e-3, dtype="bfloat16")
    fit(model, loader, section, observer=seen)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.compute_dtype == torch.bfloat16
    assert seen.records[-1].loss < seen.records[0].loss - 0.5


class Recorder(Observer):
    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.records: list[StepRecord] = []
        self.stops = 0

    def started(self, plan: Plan) -> None:
        self.plan = plan

    def step(self, record: StepRecord) -> None:
        self.records.append(record)

    def stopped(self) -> None:
        self.stops += 1


def test_in_memory_training_reports_and_learns(data: Path) -> None:
    train = Loader(TokenDataset.open(data / "train"), 4, 32, 0)
    val = ValidationWindows(TokenDataset.open(data / "val"), 8, 4, 32)
    seen = Recorder()
    model = nano()
    progress = fit(model, train, settings(steps=20, lr=3e-3, eval_every=8), val={"": val}, observer=seen)
    assert [r.step for r in seen.records] == list(range(1, 21))
    assert [r.step for r in seen.records if r.val_loss is not None] == [8, 16, 20]
    assert [r.tokens for r in seen.records][:2] == [128, 256]
    assert seen.records[0].loss == pytest.approx(math.log(320), rel=0.1)
    assert seen.records[-1].loss < 4.0
    assert all(math.isfinite(r.grad_norm) and r.grad_norm > 0 for r in seen.records)
    assert all(r.tokens_per_s > 0 and r.mfu is None for r in seen.records)
    assert seen.plan is not None
    assert (seen.plan.steps, seen.plan.first_step, seen.plan.tokens_per_step) == (20, 0, 128)
    assert seen.plan.parameters == sum(p.numel() for p in model.parameters())
    assert seen.stops == 1
    assert not model.training
    assert progress.val_loss == pytest.approx(evaluate(model, val, CPU))
    assert progress.best_val_loss == min(r.val_loss for r in seen.records if r.val_loss is not None)


def test_validation_is_the_mean_over_all_tokens(data: Path) -> None:
    model = nano()
    dataset = TokenDataset.open(data / "val")
    small = ValidationWindows(dataset, 7, 2, 32, documents=True)
    batches = list(small)
    assert [b.input_ids.shape[0] for b in batches] == [2, 2, 2, 1]
    assert torch.equal(batches[1].input_ids[0], torch.from_numpy(dataset.tokens(64, 96)))
    big = ValidationWindows(dataset, 7, 7, 32, documents=True)
    assert evaluate(model, small, CPU) == pytest.approx(evaluate(model, big, CPU), rel=1e-6)
    assert not any(p.grad is not None for p in model.parameters())
    everything = ValidationWindows(dataset, 10**6, 7, 32)
    assert everything.sequences == (dataset.num_tokens - 1) // 32


def test_clipping_bounds_the_gradient() -> None:
    model, batch = nano(), padded_batch()
    section = settings(lr=1e-12, clip=0.25)
    _, norm = train_step(model, make_optimizer(model, section), batch, section, CPU, step=1)
    assert norm > 0.25
    clipped = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert clipped.item() == pytest.approx(0.25, rel=1e-4)


def test_a_bad_loss_stops_before_the_update() -> None:
    model = nano()
    with torch.no_grad():
        model.norm.weight[0] = math.inf
    before = {name: t.clone() for name, t in model.state_dict().items()}
    section = settings()
    with pytest.raises(NonFiniteError, match=r"Step 7: the loss is nan.*lower train\.lr") as error:
        train_step(model, make_optimizer(model, section), padded_batch(), section, CPU, step=7)
    assert "\n" not in str(error.value)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("fused", [True, False])
def test_a_refused_update_leaves_the_optimizer_as_it_was(fused: bool) -> None:
    model, batch, section = nano(), padded_batch(), settings(clip=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    train_step(model, optimizer, batch, section, CPU, step=1)

    def everything() -> dict[str, torch.Tensor]:
        return {**dict(model.named_parameters()), **optimizer_tensors(model, optimizer)}

    before = {name: value.clone() for name, value in everything().items()}
    hook = model.embedding.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(NonFiniteError, match=r"the gradient's norm is nan \(first bad: embedding\)"):
        train_step(model, optimizer, batch, section, CPU, step=2)
    for name, value in everything().items():
        assert torch.equal(value, before[name]), name
    hook.remove()
    train_step(model, optimizer, batch, section, CPU, step=2)
    assert not torch.equal(model.embedding, before["embedding"])


def test_a_bad_gradient_is_named() -> None:
    model = nano()
    parameter = next(iter(model.layers[1].parameters()))
    name = next(n for n, p in model.named_parameters() if p is parameter)
    parameter.register_hook(lambda grad: grad * math.inf)
    before = parameter.detach().clone()
    section = settings()
    with pytest.raises(NonFiniteError) as error:
        train_step(model, make_optimizer(model, section), padded_batch(), section, CPU, step=3)
    assert f"first bad: {name}" in str(error.value)
    assert torch.equal(parameter, before)


def test_stop_is_asked_after_every_step(data: Path) -> None:
    loader = Loader(TokenDataset.open(data / "train"), 4, 32, 0)
    saved: list[int] = []
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) == 3

    def save(progress: Progress) -> None:
        saved.append(progress.step)

    progress = fit(nano(), loader, settings(steps=9, save_every=2), save=save, stop=stop)
    assert progress.step == 3
    assert saved == [2, 3], "the one that was due, and one because it stops"


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compile_is_applied_layer_by_layer() -> None:
    model = nano()
    names = list(model.state_dict())
    compile_layers(model.layers)
    assert list(model.state_dict()) == names
    assert all(layer._compiled_call_impl is not None for layer in model.layers)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own look
def test_a_compiled_step_equals_an_eager_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    batch, eager, compiled = padded_batch(), nano(), nano()
    section = settings(lr=1e-3)
    prepare_model(compiled, settings(compile=True), CPU)
    counters["stats"].clear()
    results = [train_step(m, make_optimizer(m, section), batch, section, CPU, step=1) for m in (eager, compiled)]
    torch.compiler.reset()
    assert counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert results[1] == pytest.approx(results[0], rel=1e-5)
    for (name, a), b in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_layers_take_rows_of_several_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And tokens that stand for many, each step by a factor of its own."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    section, eager, compiled = settings(lr=1e-3), nano(), nano()
    prepare_model(compiled, settings(compile=True), CPU)
    optimizers = [make_optimizer(model, section) for model in (eager, compiled)]
    for step, (rows, length, stretch) in enumerate(((2, 32, 1.0), (4, 16, 5.0), (8, 8, 3.0)), 1):
        ids = torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(step))
        batch = Batch(ids, ids.roll(-1, 1), None, torch.where(ids % 2 == 0, stretch, 1.0) if stretch > 1 else None)
        found = [
            train_step(model, optimizer, batch, section, CPU, step=step)
            for model, optimizer in zip((eager, compiled), optimizers, strict=True)
        ]
        assert found[1] == pytest.approx(found[0], rel=1e-5)
    torch.compiler.reset()


def test_batches_are_made_ahead_in_order_and_errors_come_through() -> None:
    class Counting:
        batch_size, length = 1, 2

        def __init__(self) -> None:
            self.made: list[int] = []

        def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
            self.made.append(step)
            if step == 3:
                raise UserError("the disk is gone")
            ids = torch.full((1, 2), step)
            return Batch(ids, ids, None)

        def fingerprint(self) -> str:
            return ""

    source = Counting()
    with Ahead(source, 0, 1, 5) as batches:
        assert [int(batches.batch(step).input_ids[0, 0]) for step in (0, 1, 2)] == [0, 1, 2]
        with pytest.raises(UserError, match="the disk is gone"):
            batches.batch(3)
    assert source.made == [0, 1, 2, 3]
    source = Counting()
    with Ahead(source, 0, 1, 2) as batches:
        batches.batch(0), batches.batch(1)
    assert source.made == [0, 1]

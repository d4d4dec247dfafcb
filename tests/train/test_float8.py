"""Float8 training as the recipe switches it on: which maps, what they change, and where it is refused."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from kernels import needs_triton
from ranks import on_ranks
from torch.distributed.tensor import DTensor

from samba_lm import zoo
from samba_lm.bench import training as bench
from samba_lm.checkpoint import create
from samba_lm.config import ModelConfig
from samba_lm.data.loader import Batch
from samba_lm.errors import UserError
from samba_lm.model import SambaLM
from samba_lm.nn.linear import Linear
from samba_lm.ops.linear import float8
from samba_lm.train import transforms
from samba_lm.train.parallel import connect
from samba_lm.train.prepare import make_optimizer, prepare_model
from samba_lm.train.recipe import ParallelSection, Recipe, TrainSection
from samba_lm.train.step import batch_loss, train_step
from samba_lm.train.transforms import use_float8

CPU = connect("cpu")
LEAST = 20.0
"""Takes the maps of a small model that would be taken of a large one."""


def config() -> ModelConfig:
    layers = [{"kind": "mamba"}, {"kind": "swiglu", "width": 160}, {"kind": "attention", "heads": 2, "window": 40}]
    return zoo.get("samba-tiny").with_overrides(d_model=96, vocab_size=256, layers=layers)


def batch(rows: int = 4, length: int = 50) -> Batch:
    ids = torch.randint(0, 256, (rows, length + 1)) // 8 * 8
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None)


def section(**changes: object) -> TrainSection:
    return TrainSection.model_validate({"steps": 40, "batch_size": 4, "dtype": "bfloat16", "lr": 3e-3, **changes})


def maps(model: SambaLM) -> set[str]:
    return {name for name, module in model.named_modules() if "halves" in vars(module)}


def test_which_maps() -> None:
    with torch.device("meta"):
        model = SambaLM(zoo.get("samba-421m"))
    count = use_float8(model.layers)
    assert count == len(maps(model)) == 6 * 8
    kinds = Counter(name.split(".")[-1] for name in maps(model))
    assert kinds == {"in_proj": 6, "out_proj": 12, "qkv": 6, "w12": 12, "w3": 12}
    assert sum("mix" in vars(module) for module in model.modules()) == 12
    assert use_float8(create("samba-tiny").layers) == 0


def test_gradients_are_near_and_parameters_stay() -> None:
    plain, low = create(config()), create(config())
    names = [name for name, _ in low.named_parameters()]
    assert use_float8(low.layers, LEAST) == 6
    assert [name for name, _ in low.named_parameters()] == names
    found, data = [], batch()
    for model in (plain, low):
        prepare_model(model, section(), CPU)
        loss, _ = batch_loss(model, data, CPU.device)
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in found[0].items():
        actual = found[1][name]
        assert expected is not None
        assert actual is not None
        assert actual.dtype == torch.float32
        off = (actual - expected).norm() / expected.norm()
        assert 1e-4 < off < 0.25, f"{name}: {off:.3f}"


def test_without_gradients_nothing_changes() -> None:
    plain, low = create(config()), create(config())
    use_float8(low.layers, LEAST)
    ids = batch().input_ids
    with torch.no_grad():
        assert torch.equal(plain(ids)[0], low(ids)[0])
    assert not torch.equal(plain(ids)[0], low(ids)[0])


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_it_learns_as_fast(checkpointing: str) -> None:
    data, losses = batch(), []
    for low in (False, True):
        settings = section(activation_checkpointing=checkpointing, micro_batch=2)
        model = create(config())
        if low:
            use_float8(model.layers, LEAST)
        prepare_model(model, settings, CPU)
        optimizer = make_optimizer(model, settings)
        losses.append([train_step(model, optimizer, data, settings, CPU, step=i + 1)[0] for i in range(25)])
    assert losses[0] != losses[1]
    assert losses[0][-1] < 0.8 * losses[0][0]
    assert all(abs(a - b) < 0.05 for a, b in zip(*losses, strict=True))


def test_a_step_casts_each_weight_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(weight: torch.Tensor) -> float8.Float8Weight:
        calls.append(weight)
        return float8.float8_weight(weight)

    monkeypatch.setattr(transforms, "float8_weight", counted)
    settings = section(micro_batch=1)
    model = create(config())
    use_float8(model.layers, LEAST)
    optimizer = make_optimizer(prepare_model(model, settings, CPU), settings)
    for step in (1, 2):
        train_step(model, optimizer, batch(), settings, CPU, step=step)
        assert len(calls) == 6 * step


def step_among_processes(rounded: bool) -> dict[str, Any]:
    """Loss and gradients of one step by float8; ``rounded``: of linear maps whose weights are bf16 numbers."""
    us, settings = connect("cpu", ParallelSection()), section()
    model = create(config())
    if rounded:
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, Linear):
                    module.weight.copy_(module.weight.bfloat16())
    use_float8(model.layers, LEAST)
    optimizer = make_optimizer(prepare_model(model, settings, us), settings)
    torch.manual_seed(0)
    data, share = batch(), 4 // us.data_world
    mine = slice(us.data_rank * share, (us.data_rank + 1) * share)
    part = Batch(data.input_ids[mine], data.targets[mine], None)
    loss, _ = train_step(model, optimizer, part, settings, us, step=1)
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss, **{n: (g.full_tensor() if isinstance(g, DTensor) else g).tolist() for n, g in named.items()}}


def test_processes_multiply_weights_that_were_rounded_to_bf16() -> None:
    """And else train as one does, within what float8 is off."""
    rounded, exact = step_among_processes(True), step_among_processes(False)
    for found in on_ranks(2, step_among_processes, False):
        assert found["loss"] == pytest.approx(rounded["loss"], rel=1e-6) != exact["loss"]
        for name in exact.keys() - {"loss"}:
            wanted = torch.tensor(exact[name])
            assert (torch.tensor(found[name]) - wanted).norm() < 0.25 * wanted.norm(), name


def test_where_it_is_refused() -> None:
    with pytest.raises(UserError, match="float8 = true needs dtype"):
        Recipe.from_dict({"train": {"float8": True}})
    with pytest.raises(UserError, match=r"train\.float8 runs on a CUDA GPU, and this is cpu: leave it out"):
        prepare_model(create(config()), section(float8=True), CPU)


@pytest.mark.parametrize(("capability", "works"), [((8, 0), False), ((8, 9), True), ((9, 0), True)])
def test_which_gpus(capability: tuple[int, int], works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(float8, "HAS_TRITON", True)
    problem = float8.why_not(torch.device("cuda", 0))
    assert (problem is None) == works
    assert works or "compute capability 8.9 or higher, and cuda:0 has 8.0" in str(problem)


def test_parity_before_a_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "require_float8", lambda device: None)
    monkeypatch.setattr(bench, "PARITY_LENGTH", 40)
    figures = bench.check(zoo.get("samba-421m"), section(float8=True, clip=0.0), CPU.device)
    assert all(figure.value is not None for figure in figures)
    assert "float8" in figures[-1].name
    assert figures[-1].value is not None
    assert 0.02 < figures[-1].value < 0.5


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_on_the_gpu(compiled: bool) -> None:
    gpu, data, losses = connect("cuda"), batch(4, 500), []
    wide = zoo.get("samba-421m")
    wide = wide.with_overrides(vocab_size=256, layers=[spec.model_dump() for spec in wide.layers[:4]])
    for low in (False, True):
        settings = section(float8=low, micro_batch=2, device="cuda", lr=3e-4, compile=compiled)
        model = prepare_model(create(wide), settings, gpu)
        optimizer = make_optimizer(model, settings)
        losses.append([train_step(model, optimizer, data, settings, gpu, step=i + 1)[0] for i in range(20)])
    assert math.isfinite(losses[1][-1])
    assert losses[0] != losses[1]
    fell = [one[0] - one[-1] for one in losses]  # not step by step: what rounding does to the first steps is larger
    assert fell[0] > 1
    assert fell[1] > 0.8 * fell[0], losses

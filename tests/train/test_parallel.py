"""Several processes train as one does, to rounding; and end together, whatever ends one of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks, run_ranks
from torch.distributed.tensor import DTensor

from samba_lm import checkpoint
from samba_lm.config import Attention, Mamba, ModelConfig, SwiGLU
from samba_lm.data.loader import Batch
from samba_lm.errors import UserError
from samba_lm.mixers.mamba import Selection
from samba_lm.model import SambaLM
from samba_lm.train.finite import NonFiniteError, check_finite
from samba_lm.train.parallel import Parallel, connect
from samba_lm.train.parallel.connect import layout
from samba_lm.train.prepare import make_optimizer, prepare_model
from samba_lm.train.recipe import ParallelSection, Recipe, TrainSection
from samba_lm.train.run import train
from samba_lm.train.step import evaluate, train_step
from samba_lm.train.transforms import checkpoint_activations, remake_cheap_activations

CONFIG = ModelConfig(
    name="parallel-test",
    vocab_size=50,
    d_model=16,
    layers=(Mamba(state=4), SwiGLU(width=24), Attention(heads=2, window=8), SwiGLU(width=24)),
)
STEPS = 3


def stretch(ids: torch.Tensor, step: int) -> torch.Tensor:
    """For how many each token stands: one, or as many as the step's number says."""
    return 1.0 + step * 3.0 * (ids % 8 > 0)


def batch(step: int, rank: int = 0, world: int = 1, rows: int = 8, length: int = 16) -> Batch:
    """Rows of documents with very different numbers of valid tokens, two rows none; they depend on the step alone."""
    draw = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 50, (rows, length), generator=draw)
    targets = torch.randint(0, 50, (rows, length), generator=draw)
    targets[0, 3:] = -100
    targets[4:6] = -100
    segments = torch.randint(0, 2, (rows, length), generator=draw).cumsum(1) // 5
    mine = slice(rank * rows // world, (rank + 1) * rows // world)
    return Batch(ids[mine], targets[mine], segments[mine], stretch(ids[mine], step))


def settings(**fields: Any) -> TrainSection:
    return TrainSection(**{"steps": STEPS, "batch_size": 8, "length": 16, "lr": 0.01, "clip": 0.5, **fields})


def joined(**fields: Any) -> Parallel:
    return connect("cpu", ParallelSection(**fields))


def whole(tensor: torch.Tensor) -> Any:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).tolist()


def trained(parallel: Parallel, remake: str = "none", **fields: Any) -> dict[str, Any]:
    """Some fp64 steps and a validation: losses, gradient norms, last gradients and weights, as plain lists."""
    section = settings(**fields)
    model = checkpoint.create(CONFIG, seed=1).double()
    {"none": list, "full": checkpoint_activations, "selective": remake_cheap_activations}[remake](model.layers)
    parallel.wrap(model)
    optimizer = make_optimizer(model, section)
    found: dict[str, Any] = {"steps": []}
    for step in range(STEPS):
        rows = batch(step, parallel.data_rank, parallel.data_world)
        found["steps"].append(train_step(model, optimizer, rows, section, parallel, step=step))
        if step == 0:
            # Of five batches some processes have more than others, which must not wait for ever.
            held_out = [batch(100 + i, rows=2) for i in range(5)][parallel.data_rank :: parallel.data_world]
            found["validation"] = evaluate(model, held_out, parallel)
    named = dict(model.named_parameters())
    found["gradients"] = {name: whole(p.grad) for name, p in named.items() if p.grad is not None}
    found["weights"] = {name: whole(p) for name, p in named.items()}
    return found


def layouts(cases: list[dict[str, Any]]) -> list[Any]:
    return [trained(joined(**case.pop("parallel")), **case) for case in cases]


def check(got: dict[str, Any], want: dict[str, Any]) -> None:
    for kind in ("steps", "validation"):
        numbers = (torch.tensor(each[kind], dtype=torch.float64) for each in (got, want))
        torch.testing.assert_close(*numbers, rtol=1e-10, atol=0, msg=kind)
    for kind in ("gradients", "weights"):
        assert got[kind].keys() == want[kind].keys()
        for name, value in want[kind].items():
            a, b = (torch.tensor(v, dtype=torch.float64) for v in (got[kind][name], value))
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13, msg=f"{kind} of {name}")


def test_every_layout_trains_as_one_process() -> None:
    want = trained(joined())
    muon = trained(joined(), optimizer="muon")
    assert set(want["gradients"]) == set(want["weights"])
    cases: dict[int, list[dict[str, Any]]] = {
        2: [{"parallel": {}}, {"parallel": {}, "remake": "full"}, {"parallel": {"replicate": 2}}],
        4: [
            {"parallel": {}},
            {"parallel": {}, "micro_batch": 1, "remake": "selective"},
            {"parallel": {"replicate": 2, "shard": 1, "context": 2}, "micro_batch": 2},
            {"parallel": {"replicate": 2}, "micro_batch": 1},
            {"parallel": {"replicate": 2}, "optimizer": "muon"},
        ],
    }
    for world, some in cases.items():
        for results in on_ranks(world, layouts, some):
            for case, result in zip(some, results, strict=True):
                check(result, muon if "optimizer" in case else want)


def in_bf16(micro_batch: int) -> dict[str, Any]:
    parallel, section = joined(), settings(dtype="bfloat16", micro_batch=micro_batch)
    model = prepare_model(checkpoint.create(CONFIG, seed=1), section, parallel)
    optimizer = make_optimizer(model, section)
    read: list[str] = []
    mamba = model.layers[0].mixer.s6  # type: ignore[union-attr]
    mamba.x_proj.register_forward_pre_hook(lambda module, x: read.append(str(module.weight.dtype)))
    steps = [
        train_step(model, optimizer, batch(i, parallel.data_rank, parallel.data_world), section, parallel, step=i)
        for i in range(STEPS)
    ]
    selections = [module for module in model.modules() if isinstance(module, Selection)]
    return {
        "steps": steps,
        "gathered": sorted(set(read)),
        "kept": sorted({str(p.dtype) for p in model.parameters()}),
        "selection": sorted({f"{type(p).__name__} {p.dtype}" for s in selections for p in s.parameters()}),
    }


def test_bf16_rounds_where_one_process_does() -> None:
    """Rows that are multiplied together are the same, so that only the order of sums in fp32 differs."""
    want = in_bf16(micro_batch=2)
    for got in on_ranks(4, in_bf16, 2):
        assert got["steps"] == [pytest.approx(step, rel=1e-6) for step in want["steps"]]
        assert got["gathered"] == ["torch.bfloat16"]
        assert got["kept"] == ["torch.float32"]
        assert got["selection"] == ["Parameter torch.float32"]


def unlucky() -> list[str]:
    """What a process says of numbers that another one alone has spoiled."""
    parallel, said = joined(), []
    for spoil in ("loss", "weight"):
        model = prepare_model(checkpoint.create(CONFIG, seed=1), settings(), parallel)
        optimizer = make_optimizer(model, settings())
        rows = batch(0, parallel.data_rank, parallel.data_world)
        if spoil == "loss":
            with torch.no_grad():
                parallel.local(model.norm.weight).fill_(float("nan") if parallel.rank == 1 else 1.0)
        before = [whole(p) for p in model.parameters()]
        try:
            train_step(model, optimizer, rows, settings(), parallel, step=5)
            with torch.no_grad():
                if parallel.rank == 1:
                    parallel.local(model.layers[1].mixer.w3.weight)[0] = float("inf")  # type: ignore[union-attr]
            check_finite(model, optimizer, 5, parallel)
        except NonFiniteError as error:
            said.append(str(error))
        if spoil == "loss" and parallel.rank != 1:
            assert before == [whole(p) for p in model.parameters()]
        else:
            [whole(p) for p in model.parameters()]  # asked by all
    return said


def test_numbers_that_are_not_finite_end_all_processes_alike() -> None:
    said = on_ranks(2, unlucky)
    assert said[0] == said[1]
    assert "Step 5: the loss is nan" in said[0][0]
    assert "the update left layers.1.mixer.w3.weight not finite" in said[0][1]


@pytest.mark.parametrize(
    ("fields", "world", "sizes"),
    [
        ({}, 1, (1, 1, 1)),
        ({}, 8, (1, 8, 1)),
        ({"replicate": 2}, 8, (2, 4, 1)),
        ({"replicate": 2, "context": 2}, 8, (2, 2, 2)),
        ({"shard": 1, "replicate": 4}, 4, (4, 1, 1)),
    ],
)
def test_processes_are_arranged(fields: dict[str, int], world: int, sizes: tuple[int, int, int]) -> None:
    assert layout(ParallelSection(**fields), world) == sizes


@pytest.mark.parametrize(
    ("fields", "world", "says"),
    [
        ({"replicate": 3}, 4, "replicate 3 x shard auto x context 1 needs a multiple of 3 processes, but there are 4"),
        ({"shard": 4, "context": 2}, 4, "replicate 1 x shard 4 x context 2 needs 8 processes, but there are 4"),
        ({"shard": 2}, 1, "needs 2 processes, but there is one process"),
        ({"context": 2}, 1, "needs a multiple of 2 processes, but there is one process"),
    ],
)
def test_a_mesh_that_does_not_fit_is_told(fields: dict[str, int], world: int, says: str) -> None:
    with pytest.raises(UserError, match=says):
        layout(ParallelSection(**fields), world)


def test_too_few_gpus_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 4, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="4 processes on this machine, but 2 CUDA GPUs"):
        connect("auto")
    with pytest.raises(UserError, match="'cuda:1' is one GPU, and there are several processes"):
        connect("cuda:1")


def test_variables_that_torchrun_did_not_set_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="WORLD_SIZE is 'two'"):
        connect("cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match=r"Process 0 of 2 did not meet the others .* Start all with torchrun\."):
        connect("cpu")


def rows_among(data: str, out: str, batch_size: int, micro_batch: int) -> str:
    with pytest.raises(UserError) as caught:
        train(recipe_of(data, out, batch_size=batch_size, micro_batch=micro_batch))
    return str(caught.value)


def parts_among(data: str, out: str, length: int) -> str:
    recipe = recipe_of(data, out, length=length)
    with pytest.raises(UserError) as caught:
        train(recipe.model_copy(update={"parallel": ParallelSection(context=2)}))
    return str(caught.value)


def recipe_of(data: str, out: str, timeout: float = 60, **fields: Any) -> Recipe:
    return Recipe.from_dict(
        {
            "model": {"name": "samba-micro"},
            "data": {"train": f"{data}/train", "val": f"{data}/val", "documents": True},
            "train": {"out": out, "steps": 6, "batch_size": 6, "length": 32, "device": "cpu", **fields},
            "parallel": {"timeout": timeout},
        }
    )


def test_rows_that_do_not_divide_are_told(data: Path, tmp_path: Path) -> None:
    for said in on_ranks(2, rows_among, str(data), str(tmp_path / "a"), 3, 3):
        assert "train.batch_size = 3 rows do not divide among 2 processes" in said
    for said in on_ranks(2, rows_among, str(data), str(tmp_path / "b"), 12, 4):
        assert "train.micro_batch = 4 does not divide the 6 rows" in said
    for said in on_ranks(2, parts_among, str(data), str(tmp_path / "a"), 31):
        assert "Rows of 31 tokens do not divide among 2 processes" in said
    assert not (tmp_path / "a").exists()


def ends(data: str, out: str, how: str) -> dict[str, Any]:
    """Train until the second process, after its third step, is gone or silent, or in the fourth gets a signal."""
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        if asked == 3 and os.environ["RANK"] == "1":
            if how == "dies":
                os._exit(7)
            if how == "is silent":
                time.sleep(7)
            if how == "is interrupted":
                os.kill(os.getpid(), signal.SIGINT)
        return False

    began = time.monotonic()
    try:
        result = train(recipe_of(data, out, timeout=3 if how == "is silent" else 60), stop=stop)
    except UserError as error:
        os._exit(0) if os.environ["RANK"] == "1" else None
        return {"error": str(error), "topic": error.topic, "seconds": time.monotonic() - began}
    return {"steps": result.steps, "interrupted": result.interrupted, "folder": result.folder.name}


@pytest.mark.parametrize(("how", "code"), [("dies", 7), ("is silent", 0)])
def test_a_lost_process_ends_the_others(data: Path, tmp_path: Path, how: str, code: int) -> None:
    ended = run_ranks(3, ends, str(data), str(tmp_path / "run"), how)
    assert [each[0] for each in ended] == [0, code, 0]
    told = [ended[0][1], ended[2][1]]
    for each in told:
        assert "lost another one, which ended or did not answer within parallel.timeout" in each["error"]
        assert "\n" not in each["error"]
        assert len(each["error"]) < 300
        assert each["topic"] == "a lost process"  # of which one tells, whichever it is
        assert each["seconds"] < 15


def test_a_signal_to_one_process_stops_all_after_the_same_step(data: Path, tmp_path: Path) -> None:
    for ended in on_ranks(2, ends, str(data), str(tmp_path / "run"), "is interrupted"):
        assert ended == {"steps": 4, "interrupted": signal.SIGINT, "folder": "step-00000004"}


def steps_of(device: str, cases: list[dict[str, Any]]) -> list[Any]:
    """Losses and gradient norms of each case's steps with samba-tiny."""
    found = []
    for case in cases:
        parallel = connect(device, ParallelSection(**case.get("parallel", {})))
        section = TrainSection(steps=STEPS, batch_size=8, length=256, lr=1e-3, **case["train"])
        model = prepare_model(checkpoint.create("samba-tiny", seed=1), section, parallel)
        optimizer = make_optimizer(model, section)
        rows = [batch(i, parallel.data_rank, parallel.data_world, length=256) for i in range(STEPS)]
        steps = [train_step(model, optimizer, rows[i], section, parallel, step=i) for i in range(STEPS)]
        found.append([*steps, [evaluate(model, rows[:1], parallel), 0.0]])
    return found


def meets(times: int) -> list[list[float]]:
    """Whoever joins, sums and leaves several times; besides, a norm of what replicas do not agree on."""
    found = []
    for _ in range(times):
        parallel = joined(replicate=2, timeout=20)
        with parallel.joined():
            model = parallel.wrap(checkpoint.create(CONFIG, seed=1))
            with torch.no_grad():
                parallel.local(model.embedding).fill_(1.0 + parallel.rank)
            norm = float(parallel.norm([model.embedding]))
            found.append([norm, float(parallel.sum(torch.tensor(1.0)))])
    return found


def test_processes_meet_again_after_they_parted_and_replicas_have_one_norm() -> None:
    # As under torchrun, whose store remembers where they met before.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agent = {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    first, second = on_ranks(2, meets, 3, timeout=60, **agent)
    assert first == second == [[pytest.approx((50 * 16 * (1 + 4) / 2) ** 0.5), 2.0]] * 3


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_gpus_train_as_one() -> None:
    world = min(4, torch.cuda.device_count())
    plain: list[dict[str, Any]] = [
        {},
        {"micro_batch": 1},
        {"activation_checkpointing": "selective"},
        {"activation_checkpointing": "full"},
        {"compile": True},
        {"optimizer": "muon"},
        {"dtype": "bfloat16", "micro_batch": 8 // world},
        {"dtype": "bfloat16", "micro_batch": 8 // world, "activation_checkpointing": "selective", "compile": True},
    ]
    cases = [{"train": train} for train in plain]
    (want,) = on_ranks(1, steps_of, "cuda", cases, timeout=500)
    got = on_ranks(world, steps_of, "cuda", cases, timeout=500)
    got += on_ranks(
        world, steps_of, "cuda", [case | {"parallel": {"replicate": world // 2}} for case in cases], timeout=500
    )
    for each in got:
        for case, a, b in zip(plain, each, want, strict=True):
            rel = 2e-3 if "bfloat16" in case.values() or "optimizer" in case else 2e-5
            torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=rel, atol=0, msg=f"{case}: {a}, not {b}")


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "samba_lm", "train"]


@pytest.mark.slow
def test_torchrun_trains_and_one_process_speaks(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    def run(*options: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [*TORCHRUN, str(file), *options], env=env, capture_output=True, text=True, timeout=200, check=False
        )

    made = recipe("torchrun")
    file = tmp_path / "recipe.toml"
    file.write_text(
        f'[model]\nname = "samba-micro"\n[data]\ntrain = "{made.data.train}"\n[train]\nout = "{made.train.out}"\n'
        'steps = 4\nbatch_size = 4\nlength = 32\ndevice = "cpu"\n'
    )
    done = run("--json", str(tmp_path / "result.json"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Training samba-micro") == 1
    assert done.stdout.count("4 steps, 512 tokens") == 1
    assert (tmp_path / "result.json").exists()
    model, _ = checkpoint.load(Path(made.train.out) / "step-00000004")
    assert isinstance(model, SambaLM)
    wrong = run("--parallel.replicate", "3")
    assert wrong.returncode != 0
    assert wrong.stderr.count("samba-lm: error: [parallel] replicate 3") == 1

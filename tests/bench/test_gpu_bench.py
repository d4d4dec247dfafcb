"""The GPU's benchmarks: what shows without one (parity, tables, options, failures), and a smoke test with one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernels import needs_triton

from samba_lm.bench import cases, cases_rows, peers, training
from samba_lm.bench.bars import OPS, PREFILL, TRAIN
from samba_lm.bench.ceilings import Ceilings, measure_ceilings
from samba_lm.bench.environment import environment
from samba_lm.bench.figure import Figure
from samba_lm.bench.gpu import Clock, NotMeasured, attempt
from samba_lm.bench.operation import Case, Implementation, Inputs, Operation, Outputs, bound, compare
from samba_lm.bench.ops import OPERATIONS, run_ops
from samba_lm.bench.parity import ParityError, require_noise
from samba_lm.bench.peers import PEERS, Peer, window_blocks
from samba_lm.bench.prefill import run_prefill
from samba_lm.bench.training import run_train
from samba_lm.cli import bench_gpu
from samba_lm.cli.bench_table import compared_table
from samba_lm.cli.main import main
from samba_lm.ops.backend import INTERPRETED
from samba_lm.zoo import get

CPU = torch.device("cpu")
CEILINGS = Ceilings(copy=1e10, matmul=1e11)
TINY: dict[str, Callable[[], Case]] = {
    "scan": lambda: cases._scan_case(1, 20, 8),
    "conv": lambda: cases._conv_case(1, 20, 8),
    "attention": lambda: cases._attention_case(1, 20, 4, 2, 8, 6, backward=True),
    "norm": lambda: cases_rows._norm_case(20, 16),
    "swiglu": lambda: cases_rows._swiglu_case(20, 16, 24),
    "rope": lambda: cases_rows._rope_case(2, 10, 4, 2, 8),
    "cross-entropy": lambda: cases_rows._cross_entropy_case(20, 16, 40),
    "gla": lambda: cases._gla_case(1, 20, 2, 8, 8),
}


def tiny(name: str) -> Operation:
    return replace(OPERATIONS[name](), cases=(TINY[name](),), worth=lambda: True)


def run(operations: list[Operation], *others: Peer) -> list[Figure]:
    return run_ops(operations, Clock(CPU), CEILINGS, repeats=2, peers=others)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_compared_and_timed(name: str) -> None:
    figures = run([tiny(name)])
    checks = [figure for figure in figures if figure.check]
    assert len(checks) >= 2
    assert all(figure.met for figure in checks), checks
    errors = checks[0].facts["errors"]
    assert isinstance(errors, dict)
    assert {f"gradient of {g}" for g in tiny(name).gradients if g != "state"} < errors.keys()
    times = [figure for figure in figures if not figure.check]
    assert [figure.name for figure in times] == [f"{name} {TINY[name]().shape} {d}" for d in TINY[name]().work]
    for figure in times:
        assert figure.value is not None
        assert figure.value > 0
        assert figure.facts["bytes"] > 0  # type: ignore[operator]
        assert figure.facts["of_copy"] > 0  # type: ignore[operator]
        assert not figure.failed


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_input_with_a_state_or_documents_is_driven(name: str) -> None:
    operation = OPERATIONS[name]()
    for label, inputs in operation.small(CPU, torch.float32).items():
        errors = compare(operation, Implementation(operation.run), inputs)
        assert all(largest <= bound(torch.float32) for largest, _ in errors.values()), label
        floats = {k for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
        assert floats - {"cos", "sin"} == {e.removeprefix("gradient of ") for e in errors if e.startswith("gradient")}


@needs_triton
@pytest.mark.skipif(not INTERPRETED, reason="runs where kernels are interpreted")
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "gla"])
def test_kernels_are_compared(name: str) -> None:
    operation = tiny(name)
    kernels = Implementation(lambda inputs: operation.run({**inputs, "backend": "triton"}))
    errors = compare(operation, kernels, operation.cases[0].make(CPU))
    assert all(largest <= bound(torch.bfloat16) for largest, _ in errors.values()), errors
    assert max(relative for _, relative in errors.values()) > 0


def test_bars_belong_to_cases() -> None:
    shapes = {(name, case.shape, d) for name in OPERATIONS for case in OPERATIONS[name]().cases for d in case.work}
    assert {key for key, bar in OPS.items() if bar.bar is not None} <= shapes
    for bar in OPS.values():
        assert bar.bar is None or bar.stretch is None or bar.stretch < bar.bar
    assert {"samba-421m", "samba-1.3b"} == TRAIN.keys()
    assert {"samba-1.7b"} == PREFILL.keys()


def test_the_quoted_work_is_what_was_counted() -> None:
    case = cases.attention_operation().cases[0]
    assert case.work["forward"].flops == pytest.approx(309e9, rel=0.01)
    assert case.work["backward"].flops == pytest.approx(773e9, rel=0.01)


def test_peers_belong_to_operations_and_absent_ones_are_told() -> None:
    assert {peer.operation for peer in PEERS} <= OPERATIONS.keys()
    absent = Peer("conv", "gone", "no-such-package", lambda: __import__("no_such_package"))
    figures = run([tiny("conv")], absent)
    (told,) = [figure for figure in figures if figure.by == "gone"]
    assert told.value is None
    assert told.note == "not installed (no_such_package)"
    assert not told.failed


def _conv_peer(change: Callable[[Outputs], Outputs]) -> Peer:
    operation = cases.conv_operation()
    return Peer(
        "conv", "other", "no-such-package", lambda: Implementation(lambda inputs: change(operation.run(inputs)))
    )


def test_a_peer_stands_between_ours_and_the_quoted() -> None:
    shape = "(8, 4096, 3072) k 4"
    small = replace(TINY["conv"](), shape=shape)
    figures = run([replace(tiny("conv"), cases=(small,))], _conv_peer(lambda out: out))
    forward = [figure for figure in figures if figure.name == f"conv {shape} forward"]
    assert [figure.by for figure in forward] == ["samba-lm", "other", "causal-conv1d 1.7"]
    assert forward[0].bar == 0.15
    assert forward[1].bar is None
    assert forward[2].note == "quoted"
    assert compared_table(figures).row_count == len(figures)


def test_a_wrong_peer_gets_no_speed() -> None:
    figures = run([tiny("conv")], _conv_peer(lambda out: {"y": out["y"] * 1.1}))
    (told,) = [figure for figure in figures if figure.by == "other"]
    assert told.check
    assert told.met is False


def test_a_crashing_peer_leaves_the_rest() -> None:
    def crash(out: Outputs) -> Outputs:
        raise LookupError("its kernel\nbroke")

    figures = run([tiny("conv"), tiny("rope")], _conv_peer(crash))
    assert [f.note for f in figures if f.by == "other"] == ["LookupError: its kernel broke"]
    assert all(figure.value is not None for figure in figures if figure.by == "samba-lm")


def test_ours_gets_no_speed_without_parity() -> None:
    right = tiny("conv")
    wrong = replace(right, run=lambda inputs: {"y": right.run(inputs)["y"] * math.nan})
    figures = run([wrong])
    assert all(figure.value is None or math.isnan(figure.value) for figure in figures)
    assert all(figure.failed for figure in figures)


def test_memory_that_runs_out_is_told() -> None:
    def exhausted(device: torch.device) -> Inputs:
        raise torch.OutOfMemoryError("no")

    full = replace(tiny("conv"), cases=(replace(TINY["conv"](), make=exhausted),))
    assert {figure.note for figure in run([full]) if not figure.check} == {"out of memory"}


def test_peers_are_not_begun_after_the_time_is_up() -> None:
    figures = run_ops([tiny("conv")], Clock(CPU), CEILINGS, repeats=2, seconds=0, peers=[_conv_peer(lambda out: out)])
    assert [f.note for f in figures if f.by == "other"] == ["skipped: the time was up"]


def test_failures_have_one_line() -> None:
    def fail() -> None:
        raise ParityError("y: off")

    with pytest.raises(NotMeasured, match=r"^parity: y: off$"):
        attempt(fail)


def test_the_window_of_flex_attention() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    for length, window, size in ((300, 90, 32), (256, 64, 32), (100, 1, 32), (64, 1000, 32)):
        ours = window_blocks(length, window, CPU, size)
        theirs = create_block_mask(
            lambda b, h, i, j, w=window: (j <= i) & (i - j < w),  # type: ignore[misc]
            None, None, length, length, device="cpu", BLOCK_SIZE=size,
        )  # fmt: skip
        assert torch.equal(ours.to_dense(), theirs.to_dense())
        assert ours.shape == theirs.shape


@pytest.mark.parametrize("load", [peers._sdpa])
def test_peers_of_pytorch_agree(load: Callable[[], Implementation]) -> None:
    operation = cases.attention_operation()
    for label in ("plain", "grouped heads"):
        errors = compare(operation, load(), operation.small(CPU, torch.float32)[label])
        assert all(largest <= bound(torch.float32) for largest, _ in errors.values())


def test_noise_is_what_plain_rounding_makes() -> None:
    exact = {"w": torch.ones(4, dtype=torch.float64)}
    assert require_noise({"w": torch.full((4,), 1.02)}, exact, {"w": torch.full((4,), 1.01)})["w"][0] > 0.01
    with pytest.raises(ParityError, match="rounding alone"):
        require_noise({"w": torch.full((4,), 1.2)}, exact, {"w": torch.full((4,), 1.01)})
    with pytest.raises(ParityError, match="only one of the two has v"):
        require_noise({"w": exact["w"], "v": exact["w"]}, exact, exact)
    with pytest.raises(ParityError):
        require_noise({"w": torch.full((4,), math.nan)}, exact, exact)


@pytest.mark.parametrize("name", ["samba-421m", "samba-1.7b", "llama3-1.6b", "mamba-370m"])
def test_the_narrow_twin_keeps_what_kernels_see(name: str) -> None:
    config, small = get(name), training.narrow(get(name))
    assert small.parameters() < 5e6
    assert [spec.kind for spec in small.layers] == [spec.kind for spec in config.layers[:4]]
    for spec, big in zip(small.layers, config.layers, strict=False):
        if spec.kind == "attention":
            assert spec.head_dim(small.d_model) == big.head_dim(config.d_model)  # type: ignore[attr-defined]
            assert spec.heads // spec.groups == big.heads // big.groups  # type: ignore[attr-defined]


def test_training_steps_are_measured() -> None:
    figures, kernels = run_train(
        "samba-micro", CEILINGS, CPU, batch=4, length=32, micro_batches=(2, 4), steps=2, profile=True
    )
    speeds = [figure for figure in figures if figure.unit == "thousand tokens/s"]
    assert [figure.facts["micro_batch"] for figure in speeds] == [2, 4]
    for speed in speeds:
        assert speed.value == pytest.approx(4 * 32 / speed.facts["ms a step"])  # type: ignore[operator]
    assert not any(figure.failed for figure in figures)
    assert kernels[0].keys() == {"kernel", "calls", "ms", "share"}
    assert sum(row["share"] for row in kernels) <= 1 + 1e-9  # type: ignore[misc]


def test_no_training_speed_without_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    right = training.train_step

    def wrong(model, *args, **kwargs):  # type: ignore[no-untyped-def]
        result = right(model, *args, **kwargs)
        if model.compute_dtype is not None and kwargs["step"] == 1:
            model.embedding.grad *= 1.5
        return result

    monkeypatch.setattr(training, "train_step", wrong)
    monkeypatch.setattr(training, "require_noise", lambda ours, exact, noise: require_noise(ours, exact, exact))
    (figure,), _ = run_train("samba-micro", CEILINGS, CPU, batch=2, length=16, steps=2)
    assert figure.failed
    assert figure.note.startswith("parity: embedding: relative error 5.")


def test_prefill_is_measured() -> None:
    figures = run_prefill("samba-micro", CEILINGS, CPU, tokens=300, chunks=(300, 50), repeats=1)
    assert not any(figure.failed for figure in figures)
    titles = [figure.name for figure in figures if figure.unit == "ms"]
    assert titles == ["samba-micro, 300 tokens, all at once", "samba-micro, 300 tokens, 50 at once"]
    (agreement,) = [figure for figure in figures if figure.check]
    assert agreement.met  # exactly equal at times: bf16 logits of a small model


def test_verdicts_and_records() -> None:
    figure = Figure("a", 4.0, "ms", 5.0, stretch=4.5, goal=3.0, by="x", note="n", facts={"bytes": 1})
    assert figure.verdict == "stretch"
    assert replace(figure, value=6.0).verdict == "MISSED"
    assert replace(figure, value=None).met is False
    assert Figure("a", 9.0, "x", 8.0, low_is_good=False).verdict == "met"
    record = figure.record()
    assert record["by"] == "x"
    assert record["facts"] == {"bytes": 1}
    assert "goal" in record
    assert Figure("a", 1.0, "").record().keys() == {"name", "value", "unit", "bar", "low_is_good", "met"}
    assert not replace(figure, value=None).failed  # a peer's
    assert Figure("a", None, "ms").failed
    assert Figure("a", 2.0, "", 1.0, check=True).failed
    assert not Figure("a", 2.0, "ms", 1.0).failed


def test_ceilings_and_environment() -> None:
    ceilings = measure_ceilings(Clock(CPU), repeats=1, copy_bytes=1 << 12, size=16)
    assert ceilings.copy > 0
    assert ceilings.matmul > 0
    shares = ceilings.shares(1.0, 1000, 2000, matmul=False)
    assert shares["GB/s"] == pytest.approx(1e-3)
    assert "of_matmul" not in shares
    facts = environment(CPU)
    assert facts["device"] == "cpu"
    assert "triton" in facts["packages"]  # type: ignore[operator]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["ops", "train", "prefill"])
def test_a_missing_gpu_is_one_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", command]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"`samba-lm bench {command}` needs a CUDA GPU" in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["ops", "--repeats", "5"], "--repeats 5 must be from 20 to 10000"),
        (["ops", "sca"], "Did you mean 'scan'"),
        (["ops", "--seconds", "-1"], "--seconds -1 must be from 0"),
        (["train", "--micro-batch", "3"], "--micro-batch 3 does not divide a batch of 16"),
        (["train", "samba-421"], "Did you mean 'samba-421m'"),
        (["train", "--steps", "7"], "--steps 7 must be from 8"),
        (["train", "--batch", "0"], "--batch 0 must be from 1"),
        (["prefill", "--chunk", "0"], "--chunk 0 must be from 1 to 16777216"),
        (["prefill", "--tokens", "x"], "expected a whole number"),
        (["prefill", "nothing"], "Unknown model"),
        (["scan", "ops"], "`samba-lm bench ops`"),
    ],
)
def test_mistakes_are_one_line(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert told in error


def test_the_names_of_the_operations() -> None:
    from typing import get_args

    assert get_args(bench_gpu.Operation) == tuple(OPERATIONS)


def test_the_command_writes_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from samba_lm.bench import ceilings, gpu, ops

    monkeypatch.setattr(gpu, "require_gpu", lambda command: CPU)
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda clock: CEILINGS)
    monkeypatch.setattr(ops, "OPERATIONS", {"conv": lambda: tiny("conv")})
    file = tmp_path / "b.json"
    assert main(["bench", "ops", "conv", "--no-peers", "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    assert record["ceilings"] == {"copy_bytes_per_s": 1e10, "matmul_flops_per_s": 1e11}
    assert record["figures"]["ops"][-1]["facts"]["repeats"] == 20
    assert "conv (1, 20, 8) k 4 backward" in capsys.readouterr().out
    args = ["bench", "train", "samba-micro", "--batch", "2", "--length", "16", "--profile", "--json", str(file)]
    assert main(args) == 0
    record = json.loads(file.read_text())
    assert len(record["kernels"]["samba-micro"]) > 5
    wrong = replace(tiny("conv"), reference=lambda inputs: {"y": inputs["x"]})
    monkeypatch.setattr(ops, "OPERATIONS", {"conv": lambda: wrong})
    with pytest.raises(SystemExit) as stop:
        main(["bench", "ops", "conv", "--no-peers", "--json", str(file)])
    assert stop.value.code == 1
    assert json.loads(file.read_text())["figures"]["ops"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPERATIONS)
def test_on_the_gpu(name: str) -> None:
    device = torch.device("cuda")
    quick = [peer for peer in PEERS if "compiled" not in peer.name]
    figures = run_ops([tiny(name)], Clock(device), CEILINGS, repeats=2, peers=quick)
    assert not any(figure.failed for figure in figures), [f for f in figures if f.failed]


@pytest.mark.gpu
def test_models_on_the_gpu() -> None:
    device = torch.device("cuda")
    ceilings = measure_ceilings(Clock(device), repeats=2, copy_bytes=1 << 20, size=256)
    figures, kernels = run_train("samba-tiny", ceilings, device, batch=4, length=256, steps=2, profile=True)
    assert not any(figure.failed for figure in figures), [f for f in figures if f.failed]
    assert kernels
    figures = run_prefill("samba-tiny", ceilings, device, tokens=3000, repeats=1)
    assert not any(figure.failed for figure in figures), [f for f in figures if f.failed]

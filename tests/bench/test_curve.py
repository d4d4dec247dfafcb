"""``bench curve``: the ways share weights and batches, the verdict, and both parts with the CPU in the GPU's place."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from samba_lm.bench import curve, gpu
from samba_lm.bench.curve import WAYS, Run, compare, cut, distance, follow, initial_model, run_curve
from samba_lm.cli.main import main
from samba_lm.data.loader import Loader
from samba_lm.data.shards import ShardWriter, TokenDataset
from samba_lm.errors import UserError
from samba_lm.ops.backend import choose, preferring
from samba_lm.ops.linear import linear
from samba_lm.tokenizer import ByteTokenizer
from samba_lm.train.recipe import TrainSection
from samba_lm.zoo import get

CPU = torch.device("cpu")
SMALL = {"layers": 4, "d_model": 16, "head_dim": 8, "mlp": 24, "window": 7}
OPTIONS = [word for key, value in SMALL.items() for word in (f"--{key.replace('_', '-')}", str(value))]
OPTIONS += ["--steps", "6", "--batch", "2", "--length", "20"]


def write_data(folder: Path, seed: int) -> Path:
    words, tokenizer = random.Random(seed), ByteTokenizer()
    folder.mkdir()
    with ShardWriter(folder, tokenizer) as writer:
        text = " ".join(words.choice(["one", "two", "three", "four"]) for _ in range(200))
        writer.append(tokenizer.encode(text), end=True, text_bytes=len(text))
        writer.close()
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("curve") / "data", 1)


def make_run(data: Path, seed: int = 0) -> Run:
    config = cut(get("samba-421m"), **SMALL, vocab_size=320)
    loader = Loader(TokenDataset.open(data), 2, 20, seed)
    return Run(initial_model(config, seed, None), loader, TrainSection(steps=6, batch_size=2, length=20, seed=seed))


def test_a_preferred_backend_stands_for_auto() -> None:
    x = torch.randn(20, 8)
    every = ("reference", "cpu", "triton")
    with preferring("reference"):
        assert choose("auto", every, "op", x) == "reference"
        assert choose("auto", ("cpu", "triton"), "op", x) == "cpu"  # which lacks it
        assert choose("cpu", every, "op", x) == "cpu"
        with preferring("cpu"):
            assert choose("auto", every, "op", x) == "cpu"
            assert choose("auto", ("reference", "triton"), "op", x) == "reference"
        assert choose("auto", every, "op", x) == "reference"
        assert torch.equal(linear(x, x[:3]), torch.nn.functional.linear(x, x[:3]))
        with preferring(None):
            assert choose("auto", every, "op", x) == "cpu"
    assert choose("auto", every, "op", x) == "cpu"


def test_the_model_is_cut() -> None:
    config = cut(get("samba-421m"), layers=8, d_model=256, head_dim=64, mlp=688, window=256, vocab_size=4096)
    assert config.parameters() == 4_564_224
    assert [spec.kind for spec in config.layers] == [spec.kind for spec in get("samba-421m").layers[:8]]
    grouped = cut(get("samba-1.7b"), layers=4, d_model=512, head_dim=64, mlp=64, window=9, vocab_size=64)
    assert (grouped.layers[2].heads, grouped.layers[2].kv_heads) == (8, 1)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="--head-dim 60 does not divide"):
        cut(get("samba-421m"), layers=8, d_model=256, head_dim=60, mlp=8, window=8, vocab_size=64)


def test_runs_are_told_apart(data: Path, tmp_path: Path) -> None:
    one, again, other = make_run(data), make_run(data), make_run(data, seed=1)
    assert one.identity() == again.identity()
    assert {key for key, value in one.identity().items() if other.identity()[key] != value} == {
        "seed", "weights", "batches",
    }  # fmt: skip
    elsewhere = make_run(write_data(tmp_path / "other", 2))
    assert {k for k, v in one.identity().items() if elsewhere.identity()[k] != v} == {"batches"}


def test_a_way_starts_from_the_shared_weights_and_leaves_them(data: Path) -> None:
    run = make_run(data)
    before = run.identity()
    fast, definition = follow(run, WAYS["cpu"], CPU), follow(run, WAYS["definition"], CPU)
    assert run.identity() == before
    assert follow(run, WAYS["cpu"], CPU).losses == fast.losses
    assert (len(fast.losses), len(definition.losses)) == (6, 3)
    assert definition.losses == pytest.approx(fast.losses[:3], abs=1e-5)
    assert definition.grad_norms != fast.grad_norms[:3]  # other operations made them
    assert follow(run, WAYS["gpu bf16"], CPU).losses != fast.losses
    assert len(fast.grad_norms) == 6


def noisy(seed: int, scale: float, shift: float = 0.0, steps: int = 300) -> list[float]:
    noise = random.Random(seed)
    return [8 * math.exp(-t / 100) + 2 + shift + scale * noise.gauss(0, 1) for t in range(steps)]


def same(scale: float = 0.01) -> dict[str, list[float]]:
    curves = {name: noisy(seed, scale) for seed, name in enumerate(WAYS) if name != "definition"}
    return curves | {"cpu": noisy(9, scale / 10), "definition": noisy(9, scale / 10)[:3]}


def test_noise_passes() -> None:
    figures = compare(same())
    assert not any(figure.failed for figure in figures), [f for f in figures if f.failed]
    assert sum(figure.check for figure in figures) == 1 + 1 + 3 * 3
    (mean,) = [f for f in figures if f.name == "gpu bf16 against cpu: mean |difference|, last 100"]
    assert mean.bar == pytest.approx(3 * 0.01 * math.sqrt(2 / math.pi), rel=0.2)


@pytest.mark.parametrize(
    ("name", "losses", "told"),
    [
        ("gpu bf16", noisy(1, 0.01, 0.012), "gpu bf16 against cpu: |mean difference|"),
        ("gpu bf16", noisy(1, 0.01, 1.0), "gpu bf16 against gpu fp32: mean |difference|"),
        ("gpu bf16 plain", noisy(1, 0.01, 0.03), "gpu bf16 plain against cpu, which is noise: mean"),
        ("gpu fp32", noisy(1, 0.1), "gpu fp32 against cpu: mean |difference|"),
        ("gpu fp32", [math.nan, *noisy(1, 0.01)[1:]], "gpu fp32 against cpu: largest |difference|"),
        ("gpu fp32", [20.0, *noisy(1, 0.01)[1:]], "gpu fp32 against cpu: largest |difference|"),
        ("definition", [10.0 + 2e-3] * 3, "cpu against the definitions"),
    ],
)
def test_more_than_noise_fails(name: str, losses: list[float], told: str) -> None:
    failed = [figure.name for figure in compare({**same(), name: losses}) if figure.failed]
    assert any(each.startswith(told) for each in failed), failed


def test_no_bound_without_plain_bf16() -> None:
    curves = {name: losses for name, losses in same().items() if name != "gpu bf16 plain"}
    (failed,) = [figure for figure in compare(curves) if figure.failed]
    assert failed.note == "not measured, so there is no bound"


def test_distances() -> None:
    apart = distance([1.0, 2.0, 5.0], [1.0, 4.0, 4.0])
    assert (apart.mean, apart.largest, apart.signed) == (1.0, 2.0, 1.0)
    assert math.isnan(distance([1.0, math.nan, 1.0], [1.0, 1.0, 1.0]).largest)


def test_a_run_that_fails_leaves_the_others(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = replace(WAYS["gpu fp32"], title="broken")
    monkeypatch.setitem(WAYS, "gpu fp32", broken)
    right = curve.follow

    def fail(run, way, device, report):  # type: ignore[no-untyped-def]
        if way is broken:
            raise RuntimeError("its kernel\nbroke")
        return right(run, way, device, report)

    monkeypatch.setattr(curve, "follow", fail)
    saved: list[set[str]] = []
    curves, figures = run_curve(make_run(data), list(WAYS), CPU, {}, save=lambda curves: saved.append(set(curves)))
    assert curves.keys() == WAYS.keys() - {"gpu fp32"} == saved[-1]
    assert figures[0].note == "RuntimeError: its kernel broke"
    assert figures[0].failed


@pytest.fixture(scope="module")
def cpu_part(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with cpu.json and the initial weights."""
    folder = tmp_path_factory.mktemp("part")
    words = ["--path", "cpu", "--weights", str(folder / "weights"), "--json", str(folder / "cpu.json")]
    assert main(["bench", "curve", str(data), *OPTIONS, *words]) == 0
    return folder


def gpu_part(data: Path, cpu_part: Path, *more: str) -> list[str]:
    words = ["--path", "gpu", "--against", str(cpu_part / "cpu.json"), "--weights", str(cpu_part / "weights")]
    return ["bench", "curve", str(data), *OPTIONS, *words, *more]


def test_both_parts(data: Path, cpu_part: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "require_gpu", lambda command: CPU)
    monkeypatch.setattr(curve, "FLOOR", 0.05)
    file, png = tmp_path / "b.json", tmp_path / "c.png"
    assert main(gpu_part(data, cpu_part, "--json", str(file), "--figure", str(png))) == 0
    record, before = json.loads(file.read_text()), json.loads((cpu_part / "cpu.json").read_text())
    assert before["curves"].keys() == {"cpu", "definition"}
    assert record["curves"].keys() == WAYS.keys()
    assert record["identity"] == before["identity"]
    assert record["curves"]["cpu"] == before["curves"]["cpu"]
    assert record["curves"]["gpu fp32"]["losses"] == record["curves"]["cpu"]["losses"]
    assert record["against"]["torch"] == torch.__version__
    assert {"name", "value", "bar", "check"} <= record["figures"][0].keys()
    assert png.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(curve, "PLAIN_BOUND", 0.0)  # now nothing is noise
    with pytest.raises(SystemExit) as stop:
        main(gpu_part(data, cpu_part))
    assert stop.value.code == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--steps", "7"], "is of a run with steps 6, and this one has 7: give the same options"),
        (["--lr", "0.5"], "lr 0.001, and this one has 0.5"),
        (["--window", "6", "--weights", "fresh"], "is of a run with another model"),
        (["--window", "6"], "holds the weights of another model"),
        (["--seed", "1", "--weights", "fresh"], "seed 0, and this one has 1"),
    ],
)
def test_another_run_is_refused(
    words: list[str], told: str, data: Path, cpu_part: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(gpu, "require_gpu", lambda command: CPU)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(gpu_part(data, cpu_part, *words)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert told in error


def test_other_weights_other_text_and_other_files_are_refused(
    data: Path, cpu_part: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "require_gpu", lambda command: CPU)

    def refusal(*args: str) -> str:
        capsys.readouterr()
        assert main(list(args)) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "other batches (their sha256 differs)" in refusal(*gpu_part(write_data(tmp_path / "text", 2), cpu_part))
    initial_model(make_run(data).model.config, 1, tmp_path / "drawn")
    assert "other initial weights" in refusal(*gpu_part(data, cpu_part, "--weights", str(tmp_path / "drawn")))
    part = tmp_path / "part"
    part.mkdir()
    record = json.loads((cpu_part / "cpu.json").read_text())
    for change, told in (
        ({"identity": None}, "is not what"),
        ({"curves": {"cpu": 3}}, "is not what"),
        ({"curves": {"nonsense": record["curves"]["cpu"]}}, "is not what"),
        ({"curves": {"cpu": record["curves"]["cpu"] | {"losses": [None]}}}, "is not what"),
        ({"curves": {"definition": record["curves"]["definition"]}}, "holds no whole run of the CPU"),
    ):
        (part / "cpu.json").write_text(json.dumps(record | change))
        words = gpu_part(data, part, "--weights", str(cpu_part / "weights"))
        assert told in refusal(*words)
    assert "--path gpu needs --against" in refusal("bench", "curve", str(data), "--path", "gpu")
    assert "makes the CPU's curve itself" in refusal("bench", "curve", str(data), "--against", "x")
    assert "is a folder: give a file in it" in refusal("bench", "curve", str(data), "--figure", str(part))
    assert "is a file and no folder" in refusal("bench", "curve", str(data), "--figure", str(part / "cpu.json" / "x"))
    assert "--steps 0 must be from 1" in refusal("bench", "curve", str(data), "--steps", "0")
    assert "--threads 4096 must be from 1 to 1024" in refusal("bench", "curve", str(data), "--threads", "4096")
    assert "`curve` is measured on a GPU" in refusal("bench", "scan", "curve")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_one_line(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "curve", str(data)]) == 2
    assert "`samba-lm bench curve` needs a CUDA GPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_the_gpu(data: Path, tmp_path: Path) -> None:
    words = ["--steps", "30", "--batch", "4", "--length", "64", "--layers", "4", "--d-model", "128", "--mlp", "96"]
    assert main(["bench", "curve", str(data), *words, "--json", str(tmp_path / "a.json")]) == 0

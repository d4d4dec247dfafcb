"""The benchmark of the paper's two figures, on the CPU with tiny models; what it concludes, from made-up curves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import samba_lm
from samba_lm.bench import ceilings, claims, gpu, paper
from samba_lm.bench.ceilings import Ceilings
from samba_lm.bench.figure import Figure
from samba_lm.bench.paper import LLAMA, MODELS, SAMBA, Curves, Plan, doublings, generate, measure, read, time_prompts
from samba_lm.bench.paper_figure import write_figure
from samba_lm.cli.main import main
from samba_lm.errors import UserError
from samba_lm.zoo import get

CPU = torch.device("cpu")
SMALL = Plan(2048, 2048, batch=3, repeats=1, steps=2, at_once=(2048, 512))
FOREVER = float("inf")
COPY = 3e12


def made_up(name: str, share: float = 0.9) -> Curves:
    """Curves as an H100 may give: a growing cache is read at ``share`` of the copy bandwidth."""
    plan, config = Plan(), get(name)

    def ms(context: int) -> float:
        return 1.4 + 1e3 * plan.batch * config.state_bytes(context) / (share * COPY)

    prompts = {n: [700 + config.flops_per_token(n) / 5e6 + i for i in range(3)] for n in plan.lengths}
    steps = {n: ms(n) for n in plan.contexts}
    return Curves(
        name, prompts, dict.fromkeys(plan.lengths, plan.tokens), steps, dict(steps), {"steps": [0.006, 0.007]}
    )


def figures_of(found: list[Curves], plan: Plan, copy: float, run: dict[int, float] | None = None) -> list[Figure]:
    rows = [row for curves in found for row in claims.curve_figures(curves, plan)]
    return rows + claims.conclusions(found, plan, copy, run)


def named(figures: list[Figure], words: str) -> Figure:
    (figure,) = [figure for figure in figures if words in figure.name]
    return figure


def test_every_way_to_cut_prompts_gives_the_same_logits() -> None:
    model = samba_lm.create("samba-micro").eval()
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (3, 160))
    with torch.inference_mode():
        expected = model(torch.from_numpy(ids))[0][:, -1]
    for at_once in (1000, 320, 160, 50):
        torch.testing.assert_close(read(model, ids, at_once), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["samba-micro", "llama-micro"])
def test_a_model_is_measured_whole(name: str) -> None:
    curves = measure(name, SMALL, CPU, FOREVER)
    assert curves.whole, curves.notes
    assert list(curves.prompts) == SMALL.lengths == [1024, 2048]
    assert list(curves.steps) == list(curves.gpu_steps) == SMALL.contexts
    assert set(curves.at_once.values()) <= {2048, 512}
    assert curves.parity.keys() == {"reading", "steps"}
    again = Curves.from_record(json.loads(json.dumps(curves.record())))
    assert again == curves
    figures = figures_of([curves], SMALL, COPY)
    assert not any(figure.failed for figure in figures), figures


def test_parity_of_self_extend_sees_far_keys() -> None:
    from samba_lm.bench.training import narrow

    small = narrow(get("self-extend-llama3-1.6b"))
    assert [spec.neighbor_window for spec in small.layers if spec.kind == "self_extend"] == [40, 40]  # type: ignore[attr-defined]
    assert paper.decode.check(small, CPU)


def test_what_runs_out_of_time_or_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    late = measure("samba-micro", SMALL, CPU, 0.0)
    assert set(late.notes) == {"prompts 1024", "prompts 2048", "steps 1024", "steps 2048"}
    assert set(late.notes.values()) == {paper.UP}
    figures = figures_of([late], SMALL, COPY)
    assert [figure.note for figure in figures if figure.failed] == [paper.UP] * 4

    def broken(*args: object) -> None:
        raise LookupError("no such\nkernel")

    monkeypatch.setattr(paper.decode, "check", broken)
    wrong = measure("samba-micro", SMALL, CPU, FOREVER)
    assert wrong.notes == {"all": "LookupError: no such kernel"}
    assert [figure.note for figure in figures_of([wrong], SMALL, COPY)] == ["LookupError: no such kernel"]


def test_prompts_that_memory_does_not_allow_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def scarce(model: object, ids: np.ndarray, at_once: int) -> torch.Tensor:
        tried.append(at_once)
        if at_once > 16_384:
            raise torch.OutOfMemoryError("no")
        return torch.zeros(1)

    monkeypatch.setattr(paper, "read", scarce)
    model = samba_lm.create("samba-micro")
    times, taken = time_prompts(model, Plan(repeats=2), 131_072)
    assert (len(times), taken, tried) == (2, 16_384, [131_072, 65_536, 32_768, 16_384, 16_384])
    monkeypatch.setattr(paper, "LEAST_AT_ONCE", 65_536)
    with pytest.raises(torch.OutOfMemoryError):
        time_prompts(model, Plan(repeats=2), 131_072)


def test_one_run_is_as_long_as_its_steps() -> None:
    plan = Plan(1024, 1024, batch=2, steps=2)
    run = generate("samba-micro", plan, CPU)
    assert list(run) == [1024]
    ms = {1024: 1e3 * run[1024] / 1024}
    curves = Curves(SAMBA, steps=ms, gpu_steps=ms, notes={"prompts 1024": "-"})
    figure = named(figures_of([curves], plan, COPY, run), "against the sum")
    assert figure.value == pytest.approx(0, abs=1e-9)
    assert figure.met
    curves.steps[1024] *= 1.05
    assert named(figures_of([curves], plan, COPY, run), "against the sum").failed


def test_steps_add_up() -> None:
    assert claims.seconds({1024: 2.0}, 1024) == pytest.approx(1024 * 2e-3)
    assert claims.seconds({1024: 2.0, 2048: 4.0}, 2048) == pytest.approx(1.024 * 2 + 1.024 * 3)
    assert claims.seconds({1024: 2.0, 2048: 4.0, 4096: 9.0}, 2048) == pytest.approx(1.024 * 5)


def test_ratios_and_bandwidth() -> None:
    samba, llama = made_up(SAMBA), made_up(LLAMA)
    figures = figures_of([samba, llama], Plan(), COPY)
    share = named(figures, "of the copy bandwidth")
    assert share.value == pytest.approx(0.9)
    assert share.met
    last, average = named(figures, "the last of"), named(figures, "average over")
    assert last.value == pytest.approx(llama.steps[65_536] / samba.steps[65_536])
    assert average.value == pytest.approx(claims.seconds(llama.steps, 65_536) / claims.seconds(samba.steps, 65_536))
    assert average.bar == 3.64
    assert average.note.startswith("counts")
    assert named(figures, "reading one prompt").bar == 4.5
    speed = named(figures, "samba-1.7b, 16 texts, 65,536 tokens")
    assert speed.value == pytest.approx(16 * 65.536 / claims.seconds(samba.steps, 65_536))
    slow = figures_of([samba, made_up(LLAMA, share=0.6)], Plan(), COPY)
    assert named(slow, "of the copy bandwidth").verdict == "MISSED"
    assert named(slow, "average over").bar is None
    assert named(slow, "average over").note.startswith("does not count: llama3-1.6b's attention reads its cache at 60%")
    shorter = figures_of([samba, llama], Plan(generated=32_768), COPY)
    assert named(shorter, "average over").bar is None
    del llama.steps[32_768], llama.gpu_steps[32_768]
    llama.notes["steps 32768"] = "out of memory"
    assert "was not measured" in named(figures_of([samba, llama], Plan(), COPY), "the last of").note


def test_a_gap_is_not_guessed() -> None:
    curves = made_up(SAMBA)
    del curves.steps[4096], curves.prompts[1024]
    curves.notes = {"steps 4096": "out of memory", "prompts 1024": "out of memory"}
    assert list(claims.generation_speed(curves, Plan())) == [1024, 2048]
    figures = figures_of([curves], Plan(), COPY)
    assert named(figures, " 4,096 tokens each").note == "out of memory"
    assert named(figures, "65,536 tokens each").note.endswith("a shorter one is missing")
    assert named(figures, "prompts of 1,024").failed


def test_plans() -> None:
    assert doublings(8192) == [1024, 2048, 4096, 8192]
    assert len(Plan().lengths) == 8
    assert len(Plan().contexts) == 7
    for wrong in (1000, 1536, 512):
        with pytest.raises(UserError, match="power of two"):
            Plan(generated=wrong)


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    file = tmp_path / "speed.png"
    write_figure(file, [made_up(name) for name in MODELS], Plan(), "a test")
    assert file.read_bytes().startswith(b"\x89PNG")
    write_figure(file, [Curves("samba-micro", notes={"all": "failed"})], Plan(), "a test")
    assert file.read_bytes().startswith(b"\x89PNG")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu, "require_gpu", lambda command: CPU)
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda clock: Ceilings(copy=1e10, matmul=1e11))
    monkeypatch.setattr(paper, "SAMBA", "samba-micro")
    file, figure = tmp_path / "p.json", tmp_path / "p.png"
    small = ["--tokens", "1024", "--generated", "1024", "--repeats", "1", "--steps", "2", "--json", str(file)]
    args = ["bench", "paper", "--models", "samba-micro", "mamba-micro", *small]
    assert main([*args, "--figure", str(figure), "--full-run"]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    first = json.loads(file.read_text())
    assert first["models"].keys() == {"samba-micro", "mamba-micro"}
    assert first["plan"]["generated"] == 1024
    assert any("in one run" in row["name"] for row in first["figures"]["paper"])
    told = capsys.readouterr().out
    assert "Reading prompts, thousand tokens/s" in told
    assert "mamba-micro: steps by model.step, not by the kernels for steps: no GPU that they run on" in told
    assert any(line.startswith("mamba-micro ") for line in told.splitlines())
    assert main(["bench", "paper", "--models", "samba-micro", *small, "--resume"]) == 0
    assert json.loads(file.read_text())["models"] == first["models"]
    assert main([*args, "--resume", "--steps", "3"]) == 0
    assert "differs in plan" in capsys.readouterr().out
    assert json.loads(file.read_text())["models"] != first["models"]
    with pytest.raises(SystemExit) as stop:
        main([*args, "--seconds", "0"])
    assert stop.value.code == 1
    file.write_text("[]")
    assert main([*args, "--resume"]) == 2
    assert "was not written by `samba-lm bench paper`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--tokens", "1000"], "--tokens 1000 must be from 1024"),
        (["--generated", "1536"], "generated=1536 must be a power of two"),
        (["--models", "samba-1.7"], "Did you mean 'samba-1.7b'"),
        (["--at-once", "0"], "--at-once 0 must be from 1"),
        (["--resume"], "--resume goes on from what --json FILE has"),
        (["--figure", "/"], "--figure / is a folder"),
    ],
)
def test_mistakes_are_one_line(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "paper", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert told in error


def test_the_defaults_are_the_bars() -> None:
    assert (Plan.tokens, Plan.generated, Plan.batch) == (131_072, 65_536, 16)
    assert replace(Plan(), repeats=10).lengths[-1] == Plan.tokens
    assert {SAMBA, LLAMA} <= set(MODELS)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["samba-micro", "llama-micro"])
def test_on_the_gpu(name: str) -> None:
    curves = measure(name, SMALL, torch.device("cuda"), FOREVER)
    assert curves.whole, curves.notes

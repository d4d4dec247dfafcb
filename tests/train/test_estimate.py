"""Estimates: held to the code's own tensors at full size, and to what was measured on an H100."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peak import peak_of_a_step

from samba_lm import zoo
from samba_lm.cli.train import COLLECTED
from samba_lm.config import ModelConfig
from samba_lm.errors import UserError
from samba_lm.model import SambaLM
from samba_lm.nn.linear import Linear
from samba_lm.train.estimate import GIB, GPUS, MEASURED, Layout, arrange, estimate, memory, speed
from samba_lm.train.estimate.memory import matrices
from samba_lm.train.recipe import ParallelSection, Recipe, TrainSection

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "h100"


def settings(**changes: Any) -> TrainSection:
    """The paper's rows in bf16, 8 of them in micro-batches of 4."""
    fields = {"dtype": "bfloat16", "length": 4096, "batch_size": 8, "micro_batch": 4, "steps": 10}
    return TrainSection.model_validate({**fields, **changes})


def first_layers(name: str, number: int = 4) -> ModelConfig:
    config = zoo.get(name)
    return config.with_overrides(layers=tuple(spec.model_dump() for spec in config.layers[:number]))


def without_optimizer(config: ModelConfig, train: TrainSection, layout: Layout | None = None) -> int:
    taken = memory(config, train, layout or Layout(), 4)
    return taken.total - taken.optimizer


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *(("samba-421m", mode) for mode in ("none", "selective", "full")),
        ("samba-1.7b", "none"),
        ("mamba-1.3b", "selective"),
        ("llama3-1.6b", "full"),
        ("samba-421m-sc", "none"),
        pytest.param("sliding-gla-438m", "full", marks=pytest.mark.slow),  # thousands of small tensors
        pytest.param("sliding-retnet-1.4b", "none", marks=pytest.mark.slow),
        ("mega-s6-1.3b", "full"),
        ("mlp2-swa-mlp-417m", "selective"),
    ],
)
def test_memory_is_what_the_tensors_of_a_step_take(name: str, mode: str) -> None:
    pytest.importorskip("triton")
    config, train = first_layers(name), settings(activation_checkpointing=mode)
    assert without_optimizer(config, train) == pytest.approx(peak_of_a_step(config, train, 4), rel=0.1)


def test_memory_in_float32_and_of_paths_beside_each_other() -> None:
    pytest.importorskip("triton")
    config, train = first_layers("samba-421m", 2), settings(dtype="float32")
    assert without_optimizer(config, train) == pytest.approx(peak_of_a_step(config, train, 4), rel=0.05)
    for name in ("parallel-27m", "gated-27m"):
        config, train = zoo.get(name), settings()
        assert without_optimizer(config, train) == pytest.approx(peak_of_a_step(config, train, 4), rel=0.15)


@pytest.mark.parametrize(("name", "mode"), [("samba-1.3b", "selective"), ("llama2-438m", "none")])
def test_memory_of_a_model_that_is_shared_out(name: str, mode: str) -> None:
    """FSDP2 itself; on a GPU its communication runs beside the computation, and holds a few buffers more for it."""
    pytest.importorskip("triton")
    config, train = first_layers(name), settings(activation_checkpointing=mode, batch_size=64)
    taken = without_optimizer(config, train, Layout(1, 8))
    shared = peak_of_a_step(config, train, 4, gpus=8)
    assert shared < taken < shared + 0.6 * GIB


def test_float8_weights_are_not_shared_out() -> None:
    """What further layers add: in bf16 what they keep, by float8 their weights too, in two forms of a byte."""
    pytest.importorskip("triton")
    layout, added = Layout(1, 8), []
    for float8 in (False, True):
        train = settings(activation_checkpointing="full", batch_size=64, float8=float8)
        few, more = (first_layers("samba-1.3b", number) for number in (8, 12))
        measured = peak_of_a_step(more, train, 4, gpus=8) - peak_of_a_step(few, train, 4, gpus=8)
        added.append((measured, memory(more, train, layout, 4).casts - memory(few, train, layout, 4).casts))
    (plain, none), (low, casts) = added
    assert none == 0
    assert casts == pytest.approx(low - plain, rel=0.02)


def measured(name: str) -> dict[str, Any]:
    """What `samba-lm bench train` recorded of a model on an H100: its first figure, and its peak memory."""
    figures = json.loads((RESULTS / "train.json").read_text())["figures"][name]
    (rate,) = [f for f in figures if f["unit"] == "thousand tokens/s" and "by" not in f]
    (peak,) = [f["value"] for f in figures if f["name"].endswith("peak memory") and "by" not in f]
    return {"tokens_per_s": 1e3 * rate["value"], "peak": peak, **rate["facts"]}


@pytest.mark.parametrize("line", MEASURED, ids=lambda line: line.model)
def test_estimates_of_what_was_measured(line: Any) -> None:
    found = measured(line.model)
    assert line.tokens_per_s == pytest.approx(found["tokens_per_s"], rel=1e-3)
    assert line.peak_memory == pytest.approx(found["peak"], rel=1e-3)
    assert (line.micro_batch, line.activation_checkpointing) == (
        found["micro_batch"],
        found["activation_checkpointing"],
    )
    config = zoo.get(line.model)
    train = settings(
        batch_size=2 * line.micro_batch,
        micro_batch=line.micro_batch,
        activation_checkpointing=line.activation_checkpointing,
    )
    taken = memory(config, train, Layout(), line.micro_batch).total / GIB
    assert taken == pytest.approx(found["peak"], rel=0.01)
    told = speed(config, train, Layout(), GPUS["h100"])
    assert told.each == line.tokens_per_s
    assert told.mfu == pytest.approx(line.mfu, abs=1e-3)
    assert "Measured" in told.basis


@pytest.mark.parametrize("name", ["samba-421m", "mega-s6-422m", "sliding-gla-438m", "gated-27m"])
def test_matrices_are_the_linear_maps_weights(name: str) -> None:
    config = zoo.get(name)
    with torch.device("meta"):
        model = SambaLM(config)
    weights = sum(m.weight.numel() for m in model.layers.modules() if isinstance(m, Linear))
    assert sum(matrices(spec, config.d_model) for spec in config.layers) == weights


def test_sharding_shares_what_stays_and_context_what_is_kept() -> None:
    config, train = zoo.get("samba-1.3b"), settings(batch_size=64, activation_checkpointing="selective")
    one, eight, both = (memory(config, train, layout, 4) for layout in (Layout(), Layout(1, 8), Layout(1, 4, 2)))
    for part in ("parameters", "gradients", "optimizer"):
        assert getattr(eight, part) == pytest.approx(getattr(one, part) / 8, rel=0.1)
        assert getattr(both, part) == getattr(eight, part)
    assert eight.activations == one.activations
    assert both.activations == pytest.approx(one.activations / 2, rel=0.01)
    assert one.gathered == 0 < eight.gathered < one.casts + one.parameters
    muon = memory(config, settings(batch_size=64, optimizer="muon"), Layout(1, 8), 4)
    assert muon.optimizer < 0.6 * eight.optimizer


def test_the_advice_fits_and_is_the_most_that_does() -> None:
    config, train = zoo.get("samba-1.3b"), settings(batch_size=512, micro_batch=64, tokens=10**11, steps=None)
    found = estimate(config, train, Layout(1, 8), GPUS["h100"])
    assert not found.fits
    for choice in found.choices:
        assert choice.micro_batch is not None
        changed = train.model_copy(update={"activation_checkpointing": choice.activation_checkpointing})
        assert memory(config, changed, Layout(1, 8), choice.micro_batch).total <= found.gpu.usable
        assert memory(config, changed, Layout(1, 8), 2 * choice.micro_batch).total > found.gpu.usable
    assert all(a.micro_batch <= b.micro_batch for a, b in pairwise(found.choices))  # type: ignore[operator]
    assert found.advised is not None
    layout, choice = found.advised
    assert (layout, choice.activation_checkpointing) == (Layout(1, 8), "none")
    assert found.seconds == pytest.approx(found.tokens / (8 * 0.92 * 57_536))
    assert found.gpu_hours == pytest.approx(8 * found.seconds / 3600)

    between = estimate(config, train, Layout(1, 64), GPUS["h100"])
    assert between.advised is not None
    assert between.advised[0] == Layout(8, 8)
    long = estimate(
        zoo.get("samba-421m"), settings(length=1 << 20, batch_size=1, micro_batch=1), Layout(1, 1, 4), GPUS["h200"]
    )
    assert long.advised is not None
    assert (long.advised[0], long.advised[1].activation_checkpointing) == (Layout(1, 1, 4), "full")
    too_large = estimate(zoo.get("samba-3.8b"), settings(batch_size=1, micro_batch=1), Layout(), GPUS["4090"])
    assert too_large.advised is None


def test_the_advice_keeps_what_the_recipe_says_of_the_layout() -> None:
    config, train = zoo.get("samba-1.3b"), settings(batch_size=512, micro_batch=4)
    for layout in (Layout(2, 4), Layout(1, 4, 2), Layout(64, 1)):
        found = estimate(config, train, layout, GPUS["h100"])
        assert found.advised is not None
        assert found.advised[0] == layout
    # A whole copy of 1.7B is too much for each GPU: shared out instead.
    large = estimate(zoo.get("samba-1.7b"), settings(batch_size=64, micro_batch=1), Layout(8, 1), GPUS["4090"])
    assert large.advised is not None
    assert large.advised[0] == Layout(1, 8)


def test_what_does_not_fit_together_is_told() -> None:
    assert arrange(ParallelSection(replicate=2), 8) == Layout(2, 4)
    with pytest.raises(UserError, match=r"replicate 3 .* does not make 8 GPUs"):
        arrange(ParallelSection(replicate=3), 8)
    with pytest.raises(UserError, match="batch_size = 8 is not a multiple of the 16 GPUs"):
        estimate(zoo.get("samba-421m"), settings(), Layout(1, 16), GPUS["h100"])
    with pytest.raises(UserError, match="length = 4095 is not a multiple"):
        estimate(zoo.get("samba-421m"), settings(length=4095), Layout(1, 1, 2), GPUS["h100"])


def test_speed_says_what_it_rests_on() -> None:
    config, train = zoo.get("samba-1.7b"), settings()
    assumed = speed(config, train, Layout(), GPUS["a100"])
    assert "Not measured" in assumed.basis
    assert assumed.mfu == pytest.approx(0.45)
    given = speed(config, train, Layout(1, 4), GPUS["a100"], given=1000.0)
    assert (given.each, given.all, given.basis) == (1000.0, 4000.0, "As given.")
    full = speed(zoo.get("samba-421m"), settings(activation_checkpointing="full"), Layout(), GPUS["h200"])
    assert full.each == pytest.approx(0.75 * 164_515)
    assert "an H200 has too" in full.basis
    pair = speed(zoo.get("samba-1.3b"), train, Layout(1, 2), GPUS["h200"])
    assert pair.each == pytest.approx(0.936 * 57_536)
    assert "94% of it in 2 GPUs, as measured on two H200s." in pair.basis
    assert "92% of it in 4 GPUs, assumed." in speed(config, train, Layout(1, 4), GPUS["h200"]).basis
    shared = [speed(config, train, Layout(replicate, 1, 4), GPUS["h200"]) for replicate in (1, 2, 4)]
    assert shared[0].each == shared[1].each == pytest.approx(shared[2].each * 0.92 / 0.85)
    assert "78% of it in 4 GPUs, as two H200s that share rows have." in shared[0].basis
    assert "73% of it in 16 GPUs, as two H200s that share rows have, and less between" in shared[2].basis
    assert "no kernels of ours" in speed(zoo.get("mega-s6-422m"), train, Layout(), GPUS["h100"]).basis


@pytest.mark.parametrize("name", ["samba-421m", "samba-1.3b", "samba-1.7b", "samba-3.8b"])
def test_the_table_of_the_docs_is_what_is_estimated(name: str) -> None:
    table = (RESULTS.parents[1] / "scaling.md").read_text(encoding="utf-8")
    (row,) = [line for line in table.splitlines() if line.startswith(f"| `paper/{name}` |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    recipe = Recipe.from_toml(COLLECTED[f"paper/{name}"])
    for layout, fits, time in ((Layout(1, 8), *cells[2:4]), (Layout(8, 8), *cells[4:6])):
        found = estimate(recipe.model.config(0), recipe.train, layout, GPUS["h100"])
        assert found.advised is not None
        advised, choice = found.advised
        assert advised == layout
        taken = round(choice.memory.total / GIB)
        assert fits == f"{choice.micro_batch}, {choice.activation_checkpointing}: {taken} GiB"
        number, unit = time.split()
        seconds = float(number) * {"min": 60, "h": 3600, "days": 86400}[unit]
        assert found.seconds == pytest.approx(seconds, rel=0.02)

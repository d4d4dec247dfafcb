"""The recipes of the paper's tables: as large as the paper says, trained as it says, and all of them train."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from samba_lm.checkpoint import create
from samba_lm.cli.train import COLLECTED, RECIPES
from samba_lm.config import Attention, LayerSpec, MegaS6, ModelConfig, SelfExtend, SwiGLU
from samba_lm.data.loader import Loader
from samba_lm.data.shards import TokenDataset
from samba_lm.train.loop import fit
from samba_lm.train.observer import Observer, StepRecord
from samba_lm.train.parallel import connect
from samba_lm.train.recipe import Recipe

ALL = {**RECIPES, **COLLECTED}
PAPER = {name: path for name, path in COLLECTED.items() if name.startswith("paper/")}
LENGTH, VOCAB = 32, 320


def shrunk(config: ModelConfig) -> ModelConfig:
    """A few layers of ``config``, one of each kind and setting in their order, narrow and with short windows."""

    def smaller(spec: LayerSpec) -> LayerSpec:
        match spec:
            case SelfExtend():
                return spec.model_copy(update={"heads": 4, "kv_heads": 2, "neighbor_window": 8})
            case Attention():
                groups = max(1, 4 * spec.groups // spec.heads)
                return spec.model_copy(
                    update={"heads": 4, "kv_heads": groups, "window": None if spec.window is None else 16}
                )
            case SwiGLU():
                return spec.model_copy(update={"width": 48 if spec.width < 2 * config.d_model else 40})
            case MegaS6():
                return spec.model_copy(update={"z_dim": 8, "chunk": 16})
            case _:
                heads = getattr(spec, "heads", None)
                return spec if heads is None else spec.model_copy(update={"heads": 2})

    kinds = dict.fromkeys(spec.changed(smaller) for spec in config.layers)
    layers = [spec.model_dump() for spec in kinds]
    return config.with_overrides(name=f"shrunk {config.name}", d_model=32, vocab_size=VOCAB, layers=layers)


@pytest.fixture(scope="module")
def loader(data: Path) -> Loader:
    """The tiny data of these tests, in rows of 32 tokens."""
    return Loader(TokenDataset.open(data / "train"), 4, LENGTH, seed=0)


class Losses(Observer):
    """What the loop told."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def step(self, record: StepRecord) -> None:
        self.seen.append(record.loss)


@pytest.mark.parametrize("name", sorted(ALL))
def test_every_recipe_trains(name: str, loader: Loader) -> None:
    recipe = Recipe.from_toml(ALL[name])
    config = shrunk(recipe.model.config(VOCAB))
    assert {spec.kind for spec in config.layers} == {spec.kind for spec in recipe.model.config(VOCAB).layers}
    changes = {"batch_size": 4, "micro_batch": 2, "length": LENGTH, "tokens": None, "steps": 2, "device": "cpu"}
    settings = recipe.train.model_copy(update={**changes, "eval_every": 0, "save_every": 0})
    losses = Losses()
    fit(create(config, seed=0), loader, settings, parallel=connect("cpu"), observer=losses)
    assert len(losses.seen) == 2
    assert all(abs(loss - math.log(VOCAB)) < 1.0 for loss in losses.seen), losses.seen


@pytest.mark.parametrize("name", sorted(PAPER))
def test_a_row_of_the_paper(name: str) -> None:
    """Its architecture, its size and how it is trained, at full size; no weights are made."""
    recipe = Recipe.from_toml(PAPER[name])
    short = name.removeprefix("paper/")
    assert recipe.model.name == short
    assert recipe.train.out == f"runs/{short}"
    assert recipe.model.vocab_size != "auto"
    config = recipe.model.config(0)
    tolerance = 0.06 if "heads" in short or printed(short) > 1e9 else 0.015  # of billions it prints one decimal
    assert abs(config.parameters() / printed(short) - 1) < tolerance, f"{config.parameters():,}"

    train, paper = recipe.train, paper_settings(printed(short))
    assert (train.batch_size, train.length) == (paper["batch"], 4096)
    assert train.tokens == paper["tokens"]
    assert config.vocab_size == paper["vocab"]
    assert train.lr == paper["lr"]
    assert (train.min_lr_ratio, train.warmup_fraction) == (0.1, 0.01)
    assert (train.betas, train.eps, train.weight_decay, train.clip) == ((0.9, 0.95), 1e-8, 0.1, 1.0)
    assert (train.decay_all, train.dtype, recipe.data.documents) == (True, "bfloat16", False)
    for processes in (1, 8, 64):
        assert train.batch_size % (processes * train.micro_batch_size) == 0


def printed(name: str) -> float:
    """Parameters as the paper prints them: the names hold them; those of Table 6 are of the model changed there."""
    size = next(word for word in name.split("-") if word[-1] in "mb" and word[0].isdigit())
    return float(size[:-1]) * (1e6 if size[-1] == "m" else 1e9)


def paper_settings(parameters: float) -> dict[str, float]:
    """Table 12, by size class."""
    if parameters < 6e8:
        return {"batch": 512, "tokens": 20e9, "vocab": 32_000, "lr": 4e-4}
    if parameters < 1.45e9:
        return {"batch": 512, "tokens": 100e9, "vocab": 32_000, "lr": 4e-4}
    if parameters < 3e9:
        return {"batch": 2048, "tokens": 230e9, "vocab": 50_304, "lr": 6e-4}
    return {"batch": 2048, "tokens": 3.2e12, "vocab": 32_064, "lr": 6e-4}


def test_every_row_of_the_tables_has_its_recipe() -> None:
    from samba_lm import zoo

    without = {"mamba-370m", "mamba-130m", "self-extend-llama3-1.6b"}  # reference code's, another's, not trained
    rows = {
        name
        for name in zoo.names()
        if zoo.get(name).parameters() > 1e8 and not name.startswith("shrunk") and name not in without
    }
    assert {name.removeprefix("paper/") for name in PAPER} == rows


def test_the_short_name_is_the_same_run() -> None:
    short, row = (Recipe.from_toml(path) for path in (RECIPES["samba-421m"], PAPER["paper/samba-421m"]))
    assert short == row
    assert (row.train.tokens_per_step, row.train.total_steps) == (2_097_152, 9537)

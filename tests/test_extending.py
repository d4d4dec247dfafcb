"""docs/extending.md works as it is printed: its files, its commands, its test; and its mixer keeps the contract."""

from __future__ import annotations

import importlib
import random
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from contract import check_chunks, check_documents

import samba_lm
from samba_lm import zoo
from samba_lm.cli.main import main
from samba_lm.config import SPECS
from samba_lm.mixers.base import Mixer
from samba_lm.mixers.registry import MIXERS
from samba_lm.model import SambaLM  # with it, the built-in mixers are registered

TEXT = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
SHELL = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
MY_MIXER, USING, TESTING = PYTHON


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in, as a researcher's: my_mixer.py in it. What it registers is forgotten afterwards."""
    (tmp_path / "my_mixer.py").write_text(MY_MIXER, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    registries: tuple[dict[Any, Any], ...] = (zoo.ZOO, SPECS, MIXERS)
    before = [dict(registry) for registry in registries]
    yield tmp_path
    for name in ("my_mixer", "block"):
        sys.modules.pop(name, None)
    for registry, content in zip(registries, before, strict=True):
        registry.clear()
        registry.update(content)


@pytest.fixture
def my_mixer(folder: Path) -> ModuleType:
    sys.path.append(str(folder))
    return importlib.import_module("my_mixer")


@pytest.mark.parametrize("block", [USING, TESTING])
def test_the_python_blocks_run(block: str, my_mixer: ModuleType, folder: Path) -> None:
    (folder / "block.py").write_text(block, encoding="utf-8")
    importlib.import_module("block")


def test_the_commands_run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "my-text").mkdir()
    for i in range(20):
        words = random.Random(i).choices(["red", "green", "blue"], k=900)
        (folder / "my-text" / f"{i}.txt").write_text(" ".join(words))
    export, *commands = [line.removeprefix("samba-lm ") for line in SHELL[0].splitlines()]
    name, _, value = export.removeprefix("export ").partition("=")
    assert main(["models", "average-nano"]) == 2  # not without the variable
    monkeypatch.setenv(name, value)
    capsys.readouterr()
    for command in commands:
        words = shlex.split(command)
        # As printed, but for the time it takes.
        fast = ["--train.batch-size", "2", "--train.length", "32", "--train.device", "cpu"] if "train" in words else []
        assert main([*("6" if word == "200" else word for word in words), *fast]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "expand 2" in out
    assert "6 steps" in out


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("my_mixr", "SAMBA_LM_PLUGINS = 'my_mixr': there is no such module, neither installed nor in "),
        ("my_mixer.py", "give the names of modules, such as my_mixer for ./my_mixer.py"),
        ("./my_mixer", "give the names of modules"),
        ("my_mixer, nowhere.at_all", "'nowhere.at_all': there is no such module"),
        ("clash", "The name 'samba-micro' is already in the zoo"),
    ],
)
def test_bad_plugins(
    value: str, told: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "clash.py").write_text("import samba_lm\nsamba_lm.register_architecture('samba-micro', None)\n")
    monkeypatch.setenv("SAMBA_LM_PLUGINS", value)
    assert main(["models", "samba-micro"]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_a_plugin_s_own_mistake_shows_where_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "careless.py").write_text("import a_package_that_is_not_installed\n")
    monkeypatch.setenv("SAMBA_LM_PLUGINS", "careless")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_installed"):
        main(["models"])
    monkeypatch.delenv("SAMBA_LM_PLUGINS")
    assert main(["models", "samba-micro"]) == 0


def _make(my_mixer: ModuleType, dtype: torch.dtype) -> Mixer:
    model = samba_lm.create(my_mixer.average_nano(), seed=1, dtype=dtype)
    assert isinstance(model, SambaLM)
    mixer = model.layers[0].mixer
    assert isinstance(mixer, my_mixer.AverageMixer)
    return mixer


WAYS = {"chunks": [3, 4, 17], "one by one": list(range(1, 24))}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batch", [1, 3])
def test_full_is_chunked_is_stepwise(my_mixer: ModuleType, batch: int, dtype: torch.dtype) -> None:
    check_chunks(lambda: _make(my_mixer, dtype), 64, batch, 24, dtype, WAYS)


def test_packed_documents_are_documents_apart(my_mixer: ModuleType) -> None:
    rows = [[0] * 9 + [1] * 2 + [4] * 13, [-1] * 4 + [0] * 3 + [-1] * 2 + [3] * 8 + [-1] * 7]
    check_documents(lambda: _make(my_mixer, torch.float64), 64, rows, torch.float64, {"at once": [], **WAYS})


def test_bf16_activations_keep_the_state_in_fp32(my_mixer: ModuleType) -> None:
    model = samba_lm.create("average-nano")
    model.compute_dtype = torch.bfloat16
    logits, state = model(torch.randint(0, 257, (2, 9)))
    assert logits.dtype == torch.bfloat16
    assert state.layers[0]["h"].dtype == torch.float32
    cursor = 2 * 8  # a document's number and a position, both int64
    assert state.nbytes() == 2 * (model.config.state_bytes(9) + cursor)

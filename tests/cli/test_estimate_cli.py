from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from samba_lm.cli.main import main
from samba_lm.cli.train import find_recipe
from samba_lm.train.recipe import Recipe


def run(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(["estimate", *argv])
    return code, *capsys.readouterr()


def test_what_a_run_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    file = tmp_path / "estimate.json"
    code, out, err = run(["paper/samba-1.3b", "--gpus", "16", "--train.lr", "2e-4", "--json", str(file)], capsys)
    assert (code, err) == (0, "")
    told = json.loads(file.read_text())
    assert told["layout"] == {"replicate": 1, "shard": 16, "context": 1, "gpus": 16}
    assert told["fits"]
    assert sum(told["memory"].values()) == 2 * told["memory"]["total"]
    assert told["seconds"] * told["speed"]["all"] == pytest.approx(told["tokens"])
    assert f"{told['memory']['total'] / 2**30:.2f} GiB" in out
    assert "Measured: 57,536 tokens/s" in " ".join(out.split())
    *text, line = out.splitlines()
    assert all(len(row) <= 60 for row in text)
    # The line that is advised is one that `samba-lm train` takes.
    words = shlex.split(line)
    start = "torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --nproc-per-node 8 -m samba_lm train"
    assert line.startswith(start)
    options = words[len(shlex.split(start)) :]
    assert options[0] == "paper/samba-1.3b"
    again, _, _ = run([*options, "--gpus", "16", "--json", str(file)], capsys)
    assert again == 0
    recipe = Recipe.from_dict(json.loads(file.read_text())["recipe"])
    assert (recipe.train.lr, recipe.parallel.replicate, recipe.train.activation_checkpointing) == (2e-4, 2, "none")
    changed = {"train.lr", "train.micro_batch", "train.activation_checkpointing", "parallel.replicate"}
    assert recipe.differences(Recipe.from_toml(find_recipe("paper/samba-1.3b")).to_dict()).keys() == changed


def test_a_model_that_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(["paper/samba-3.8b", "--gpu", "4090"], capsys)
    assert "It does NOT fit" in out
    assert "Nothing tried fits 1 x RTX 4090" in out
    _, out, _ = run(["samba-tiny", "--tokens-per-s-per-gpu", "1000"], capsys)
    assert "Vocabulary: taken as 320" in out
    assert "As given." in out
    _, out, _ = run(["finetune/lora"], capsys)
    assert "samba-nano, 7.59M parameters" in out
    assert "Adapters are trained" in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["Which recipe?", "samba-lm estimate RECIPE"]),
        (["samba-tinny"], ["Did you mean 'samba-tiny'"]),
        (["samba-tiny", "--gpus", "0"], ["--gpus 0 must be from 1"]),
        (["samba-tiny", "--gpus", "3"], ["batch_size = 16", "3 GPUs"]),
        (["samba-tiny", "--parallel.context", "3", "--gpus", "4"], ["does not make 4 GPUs"]),
        (["samba-tiny", "--efficiency", "1.5"], ["--efficiency 1.5", "at most 1"]),
        (
            ["samba-tiny", "--efficiency", "0.9", "--tokens-per-s-per-gpu", "5"],
            ["--efficiency says nothing", "give one"],
        ),
        (["samba-1.3b"], ["No recipe 'samba-1.3b'. Did you mean 'paper/samba-1.3b'?"]),
        (["samba-tiny", "--gpu", "h300"], ["--gpu", "h100"]),
        (["samba-tiny", "--train.lrr", "1"], ["Did you mean", "--train.lr"]),
        (["samba-tiny", "--model.init-from", "nowhere"], ["init_from = 'nowhere'", "no checkpoint"]),
    ],
)
def test_mistakes_are_one_line(argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(argv, capsys)
    assert code == 2
    assert err.count("\n") == 1, err
    for word in words:
        assert word in err, err

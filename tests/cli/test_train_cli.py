"""``samba-lm train`` as people use it: real processes, really killed."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from samba_lm.cli.main import main
from samba_lm.cli.train import RECIPES, find_recipe
from samba_lm.data.shards import ShardWriter
from samba_lm.errors import UserError
from samba_lm.tokenizer import ByteTokenizer
from samba_lm.train.metrics import read_metrics
from samba_lm.train.recipe import Recipe

STEPS = 30

RECIPE = """
[model]
name = "samba-micro"

[data]
train = "{data}"
val = "{data}"

[train]
out = "unset"
steps = {steps}
batch_size = 2
length = 32
eval_every = 7
eval_batches = 2
save_every = 4
log_every = 1
device = "cpu"
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "data"
    folder.mkdir()
    words = random.Random(0)
    tokenizer = ByteTokenizer()
    with ShardWriter(folder, tokenizer) as writer:
        for _ in range(20):
            text = " ".join(words.choices(["red", "green", "blue", "white"], k=60))
            writer.append(tokenizer.encode(text), end=True, text_bytes=len(text))
        writer.close()
    path = folder.parent / "recipe.toml"
    path.write_text(RECIPE.format(data=folder, steps=STEPS))
    return path


def start(recipe: Path, out: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "COLUMNS": "200"}
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored, and rightly
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "samba_lm", "train", str(recipe), "--train.out", str(out)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
    finally:
        signal.signal(signal.SIGHUP, before)


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=120)
    return output


def wait_for_steps(process: subprocess.Popen[str], out: Path, steps: int) -> None:
    """Until the run has logged so many steps (or ended)."""
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= steps:
            return
        time.sleep(0.002)


def weights_sha256(out: Path) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(out / f"step-{STEPS:08d}" / "model.safetensors").items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def curve(out: Path) -> list[tuple[float, ...]]:
    keys = ("step", "tokens", "loss", "lr", "grad_norm", "val_loss")
    return [tuple(record[key] for key in keys if key in record) for record in read_metrics(out / "metrics.jsonl")]


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run in a process of its own."""
    out = tmp_path_factory.mktemp("whole") / "run"
    process = start(recipe, out)
    assert f"{STEPS} steps" in finish(process)
    assert process.returncode == 0
    assert len(curve(out)) == STEPS
    return out


def kill_and_resume(recipe: Path, out: Path, kills: int, delays: random.Random) -> int:
    """Kill -9 after random delays, then let a new process finish; returns how many kills hit a running process."""
    hits = 0
    for _ in range(kills):
        before = len(curve(out))
        process = start(recipe, out)
        wait_for_steps(process, out, before + 1)
        delay = delays.uniform(0, 0.5)
        time.sleep(delay)
        process.kill()
        finish(process)
        hits += process.returncode == -signal.SIGKILL
        print(f"killed {delay:.3f} s after its first step (exit {process.returncode}), {len(curve(out))} steps logged")
    process = start(recipe, out)
    output = finish(process)
    assert process.returncode == 0, output
    return hits


def test_kill_9_then_the_same_weights(recipe: Path, whole: Path, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed of the delays: {seed}")
    out = tmp_path / "run"
    assert kill_and_resume(recipe, out, kills=1, delays=random.Random(seed)) == 1
    assert weights_sha256(out) == weights_sha256(whole)
    assert curve(out) == curve(whole)


@pytest.mark.slow
def test_killed_again_and_again(recipe: Path, whole: Path, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed of the delays: {seed}")
    hits = 0
    for round_ in range(5):
        out = tmp_path / f"run{round_}"
        hits += kill_and_resume(recipe, out, kills=4, delays=random.Random(seed + round_))
        assert weights_sha256(out) == weights_sha256(whole)
        assert curve(out) == curve(whole)
    assert hits >= 5


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow), (signal.SIGHUP, 129)],
)
def test_ctrl_c_saves_and_says_how_to_go_on(
    recipe: Path, whole: Path, tmp_path: Path, number: int, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for attempt in range(5):
        out = tmp_path / f"run{attempt}"
        process = start(recipe, out)
        wait_for_steps(process, out, 5)
        process.send_signal(number)
        output = finish(process)
        if process.returncode or f"{STEPS} steps" not in output:  # or else the machine was busy, and the run at its end
            break
    assert process.returncode == code, output
    assert "Traceback" not in output
    assert f"To go on: samba-lm train {recipe}" in output
    saved = max(out.glob("step-*"))
    assert json.loads((saved / "trainer.json").read_text())["step"] == len(curve(out)) < STEPS

    assert main(["train", str(recipe), "--train.out", str(out)]) == 0
    assert f"Continuing from {saved}" in capsys.readouterr().out
    assert weights_sha256(out) == weights_sha256(whole)
    assert curve(out) == curve(whole)


def test_a_reader_that_goes_away_ends_the_run_with_a_checkpoint(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(recipe, out)
    assert process.stdout is not None
    assert "Training" in process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    saved = max(out.glob("step-*"))
    assert json.loads((saved / "trainer.json").read_text())["step"] < STEPS


def run(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(["train", *argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_overrides_and_json(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, result = tmp_path / "run", tmp_path / "result.json"
    options = ["--train.out", str(out), "--train.steps", "2", "--train.lr", "5e-4", "--train.micro-batch", "1"]
    code, text, _ = run([str(recipe), *options, "--json", str(result)], capsys)
    assert code == 0
    assert f"Model: {out / 'step-00000002'}" in text
    record = json.loads(result.read_text())
    assert (record["steps"], record["tokens"], record["device"], record["interrupted"]) == (2, 128, "cpu", None)
    assert record["recipe"]["train"]["lr"] == 5e-4
    assert record["final_loss"] == read_metrics(out / "metrics.jsonl")[-1]["loss"]
    assert record["folder"] == str(out / "step-00000002")

    code, text, _ = run([str(recipe), *options], capsys)
    assert code == 0
    assert "has all 2 steps" in text
    code, text, _ = run([str(recipe), *options, "--fresh"], capsys)
    assert code == 0
    assert "the earlier run is now in" in text
    assert len(list(tmp_path.glob("run.before-*"))) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--train.lrr", "3"], ["--train.lrr", "Did you mean '--train.lr'"]),
        (["--train.lr", "fast"], ["train.lr", "'fast'", "number"]),
        (["--train.lr", "-1"], ["train.lr", "greater than 0"]),
        (["--train.steps", "0"], ["train.steps", "greater than or equal to 1"]),
        (["--train.micro-batch", "3"], ["micro_batch = 3", "batch_size = 2"]),
        (["--train.tokens", "9"], ["steps = 30", "tokens = 9", "--train.tokens None"]),
        (["--train.device", "tpu"], ["'tpu'", "cpu"]),
        (["--train.dtype", "fp8"], ["fp8", "bfloat16"]),
        (["--model.name", "samba-micrro"], ["samba-micrro", "Did you mean 'samba-micro'"]),
        (["--model.vocab-size", "100"], ["100", "257", "auto"]),
        (["--data.train", "nowhere"], ["nowhere", "data prepare"]),
        (["--model.init-from", "nowhere/at-all"], ["nowhere/at-all"]),
    ],
)
def test_mistakes_are_one_line(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: list[str]
) -> None:
    code, _, err = run([str(recipe), "--train.out", str(tmp_path / "run"), *options], capsys)
    assert code == 2
    assert err.startswith("samba-lm: error: ")
    assert err.count("\n") == 1
    assert "recipe.train" not in err
    for word in words:
        assert word in err, err
    assert not list(tmp_path.glob("run/step-*"))


def test_the_recipe_comes_first(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run([], capsys)
    assert code == 2
    assert "Which recipe?" in err
    code, _, err = run(["missing.toml"], capsys)
    assert code == 2
    assert "No recipe at missing.toml" in err


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_that_comes_with_it_has_a_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()  # a folder of that name is no recipe, and does not stand in the way
    code, _, err = run([name], capsys)
    assert code == 2
    data = Recipe.from_toml(RECIPES[name]).data.train
    assert data in err  # read as far as its data, which are not here
    assert "data prepare" in err


def test_the_paths_of_recipes_and_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert set(RECIPES) == {"samba-421m", "samba-tiny"}
    assert find_recipe("samba-tiny") == RECIPES["samba-tiny"]
    assert find_recipe("sub/samba-tiny") == Path("sub/samba-tiny")
    (tmp_path / "samba-tiny").write_text("")
    assert find_recipe("samba-tiny") == Path("samba-tiny"), "one's own file comes first"
    with pytest.raises(
        UserError, match=r"No recipe 'samba-tinny'. Did you mean 'samba-tiny'\?.*samba-421m, samba-tiny"
    ):
        find_recipe("samba-tinny")
    assert find_recipe("paper/samba-1.3b").name == "samba-1.3b.toml"
    with pytest.raises(UserError, match=r"No recipe 'paper/samba-1.3B'. Did you mean 'paper/samba-1.3b'\?"):
        find_recipe("paper/samba-1.3B")
    with pytest.raises(UserError, match="No recipe 'paper/base'"):  # what recipes stand on, none itself
        find_recipe("paper/base")
    (tmp_path / "sub").mkdir()
    for own in ("mine", "sub/mine"):
        Path(f"{own}.toml").write_text("")
        with pytest.raises(UserError, match=rf"No recipe '{own}'. Did you mean '{own}.toml'\?$"):
            find_recipe(own)
    with pytest.raises(UserError, match="No recipe 'xxx"):
        find_recipe("x" * 255)  # a name that could be, but not with .toml behind it


@pytest.mark.parametrize("command", ["train", "estimate"])
def test_an_empty_name_is_no_recipe(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a shell's variable that is not set nothing is trained."""
    assert main([command, ""]) == 2
    assert "the name is empty" in capsys.readouterr().err


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    from samba_lm.train.recipe import DataSection, ModelSection, TrainSection

    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = re.sub(r"\s+", " ", re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out))
    for name, section in (("model", ModelSection), ("data", DataSection), ("train", TrainSection)):
        for field, info in section.model_fields.items():
            assert info.description, f"{name}.{field} has no docstring"
            if field in ("passkey", "phonebook", "chat", "mixture"):  # their options come with a recipe that has them
                assert f"{name}.{field}" in text
                continue
            assert f"--{name}.{field.replace('_', '-')}" in text
            assert info.description.split(";")[0].split("(")[0].strip()[:30] in text


def test_a_misspelt_option_of_a_mixture_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mix.toml"
    file.write_text('[data.mixture.books]\npath = "books"\nweight = 0.5\n')
    assert main(["train", str(file), "--data.mixture.books.weigth", "0.8"]) == 2
    assert "Did you mean '--data.mixture.books.weight'?" in capsys.readouterr().err


def test_made_rows_have_options_where_the_recipe_has_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "key.toml"
    file.write_text('[model]\nname = "samba-micro"\n[data]\ntokenizer = "byte"\npasskey = {}\n[train]\nsteps = 1\n')
    options = ["--train.out", str(tmp_path / "run"), "--train.device=cpu", "--train.batch-size=2", "--train.length=600"]
    assert main(["train", str(file), *options, "--data.passkey.lengths", "300", "600"]) == 0
    assert "1 steps, 1,200 tokens" in capsys.readouterr().out
    assert main(["train", str(file), *options, "--data.phonebook.lengths", "300"]) == 2
    assert "Unknown option '--data.phonebook.lengths'" in capsys.readouterr().err

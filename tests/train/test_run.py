"""Whole runs in a folder: exact continuation, refusals, full disks, bad numbers."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from samba_lm import checkpoint, zoo
from samba_lm.data.shards import ShardWriter
from samba_lm.errors import UserError
from samba_lm.files import TMP_MARK
from samba_lm.tokenizer import ByteTokenizer, train_bpe
from samba_lm.train.checkpoints import list_checkpoints, read_state, run_folder
from samba_lm.train.metrics import read_metrics
from samba_lm.train.observer import Observer, StepRecord
from samba_lm.train.recipe import Recipe
from samba_lm.train.run import train

MakeRecipe = Callable[..., Recipe]


class StopAt(Observer):
    """A real SIGINT in the middle of a run."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        self.at = step
        self.number = number

    def step(self, record: StepRecord) -> None:
        if record.step == self.at:
            signal.raise_signal(self.number)


class Messages(Observer):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


def sha256(folder: Path, name: str = "model.safetensors") -> str:
    """Of the tensors, not of the file: safetensors writes the metadata in its header in a random order."""
    digest = hashlib.sha256()
    for key, tensor in sorted(load_file(folder / name).items()):
        digest.update(key.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def curve(out: Path) -> list[tuple[float, ...]]:
    """Everything in metrics.jsonl that is not a clock's reading."""
    keys = ("step", "tokens", "loss", "lr", "grad_norm", "val_loss")
    records = read_metrics(out / "metrics.jsonl")
    return [tuple(record[key] for key in keys if key in record) for record in records]


@pytest.fixture
def whole(whole_run: Path, tmp_path: Path) -> Path:
    """The final checkpoint of an uninterrupted run of ``recipe("whole")``, a copy of one's own."""
    copy = tmp_path / "whole"
    shutil.copytree(whole_run, copy)
    return copy / "step-00000006"


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_stopped_after_any_step_it_continues_bit_for_bit(recipe: MakeRecipe, whole: Path, k: int) -> None:
    first = train(recipe(), observer=StopAt(k))
    assert (first.steps, first.interrupted) == (k, signal.SIGINT)
    torch.manual_seed(12345)
    told = Messages()
    second = train(recipe(), observer=told)
    assert (second.steps, second.interrupted) == (6, None)
    assert any(f"step {k} of 6" in text for text in told.texts)
    assert sha256(second.folder) == sha256(whole)
    assert sha256(second.folder, "optimizer.safetensors") == sha256(whole, "optimizer.safetensors")
    assert curve(second.folder.parent) == curve(whole.parent)
    assert len(curve(whole.parent)) == 6


def test_checkpoints_are_models_and_only_the_last_are_kept(recipe: MakeRecipe, tmp_path: Path) -> None:
    result = train(recipe(keep=2))
    names = [path.name for path in list_checkpoints(tmp_path / "run")]
    assert names == ["step-00000004", "step-00000006"]
    assert not list((tmp_path / "run").glob(f"*{TMP_MARK}*"))
    assert sorted(path.name for path in result.folder.iterdir()) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "trainer.json",
    ]
    model, tokenizer = checkpoint.load(result.folder)
    assert isinstance(tokenizer, ByteTokenizer)
    assert model.config.vocab_size == 320
    state = read_state(result.folder)
    assert (state.step, state.tokens, state.loss) == (6, 6 * 4 * 32, result.final_loss)
    assert state.best_val_loss is not None
    assert Recipe.from_dict(state.recipe) == recipe(keep=2)


def test_a_finished_run_has_nothing_to_do(recipe: MakeRecipe, whole: Path) -> None:
    before = (whole / "trainer.json").read_bytes()
    told = Messages()
    again = train(recipe("whole"), observer=told)
    assert (again.steps, again.folder) == (6, whole)
    assert "raise train.steps" in told.texts[0]
    assert (whole / "trainer.json").read_bytes() == before


def test_more_steps_go_on_and_the_change_is_told(recipe: MakeRecipe, whole: Path) -> None:
    told = Messages()
    result = train(recipe("whole", steps=7, lr=1e-3), observer=told)
    assert result.steps == 7
    assert any("train.lr = 0.001, was 0.003" in text for text in told.texts)
    assert any("train.steps = 7, was 6" in text for text in told.texts)


def test_fresh_moves_the_old_run_aside(recipe: MakeRecipe, whole: Path, tmp_path: Path) -> None:
    old = sha256(whole)
    result = train(recipe("whole", seed=1), fresh=True)
    assert result.steps == 6
    (aside,) = tmp_path.glob("whole.before-*")
    assert sha256(aside / whole.name) == old
    assert sha256(result.folder) != old


@pytest.mark.parametrize("entry", ["letters/", ".profile"])
def test_fresh_moves_nothing_but_a_run(recipe: MakeRecipe, tmp_path: Path, entry: str) -> None:
    mine = tmp_path / "home" / entry
    mine.parent.mkdir(parents=True)
    (tmp_path / "home" / "metrics.jsonl").touch()
    mine.mkdir() if entry.endswith("/") else mine.write_text("mine")
    with pytest.raises(UserError, match=f"holds '{mine.name}'"):
        train(recipe("home"), fresh=True)
    assert mine.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_fresh_does_not_move_the_current_folder(
    recipe: MakeRecipe, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(whole.parent)
    with pytest.raises(UserError, match="holds the current folder"):
        train(replaced(recipe(), train={"out": "."}), fresh=True)


def test_micro_batches_are_a_matter_of_memory(recipe: MakeRecipe, whole: Path) -> None:
    result = train(recipe(micro_batch=1))
    got, want = checkpoint.load(result.folder)[0], checkpoint.load(whole)[0]
    for name, tensor in got.state_dict().items():
        torch.testing.assert_close(tensor, want.state_dict()[name], rtol=1e-3, atol=1e-4)


def test_what_moves_the_last_digits_is_told_on_resuming(recipe: MakeRecipe) -> None:
    train(recipe(), observer=StopAt(2))
    told = Messages()
    train(recipe(micro_batch=2, device="auto", log_every=3), observer=told)
    changed = [text for text in told.texts if text.startswith("Changed since the checkpoint")]
    assert len(changed) == 2, "log_every touches no number"
    assert "train.micro_batch = 2, was None" in changed[0]
    assert "train.device = auto, was cpu" in changed[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 2}, "train.batch_size = 4, not 2"),
        ({"length": 16}, "train.length = 32, not 16"),
        ({"seed": 3}, "train.seed = 0, not 3"),
    ],
)
def test_another_order_of_the_data_is_refused(recipe: MakeRecipe, whole: Path, change: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        train(recipe("whole", **change))


def replaced(recipe: Recipe, **sections: dict) -> Recipe:
    plain = recipe.to_dict()
    return Recipe.from_dict({name: {**fields, **sections.get(name, {})} for name, fields in plain.items()})


def test_another_model_is_refused_naming_both(recipe: MakeRecipe, whole: Path) -> None:
    before = sha256(whole)
    with pytest.raises(UserError, match=r"samba-micro .*mamba-micro.*--fresh"):
        train(replaced(recipe("whole"), model={"name": "mamba-micro"}))
    with pytest.raises(UserError, match=r"vocab_size = 320, but .* with 512"):
        train(replaced(recipe("whole"), model={"vocab_size": 512}))
    other = checkpoint.create(zoo.get("llama-micro").with_overrides(vocab_size=320))
    with pytest.raises(UserError, match=r"samba-micro .*llama-micro"):
        train(recipe("whole"), model=other)
    assert sha256(whole) == before


def test_other_data_are_refused_naming_both(recipe: MakeRecipe, whole: Path, data: Path) -> None:
    with pytest.raises(UserError, match=r"data/train.*data/val.*fine-tune"):
        train(replaced(recipe("whole"), data={"train": str(data / "val")}))


def bpe_data(folder: Path) -> Path:
    texts = ["one two three four five"] * 40
    tokenizer = train_bpe(texts, 280)
    folder.mkdir()
    with ShardWriter(folder, tokenizer) as writer:
        for text in texts:
            writer.append(tokenizer.encode(text), end=True, text_bytes=len(text))
        writer.close()
    return folder


def test_another_tokenizer_is_refused_naming_both(recipe: MakeRecipe, whole: Path, tmp_path: Path) -> None:
    other = str(bpe_data(tmp_path / "bpe"))
    with pytest.raises(UserError, match=r"trained with tokenizer [0-9a-f]{12}, but .* has [0-9a-f]{12}"):
        train(replaced(recipe("whole", length=4), data={"train": other, "val": None}))
    with pytest.raises(UserError, match="another tokenizer"):
        train(replaced(recipe("mixed", length=4), data={"val": other}))
    with pytest.raises(UserError, match=r"model\.init_from .* another tokenizer"):
        train(replaced(recipe("tuned", length=4), data={"train": other, "val": None}, model={"init_from": str(whole)}))


def test_fine_tuning_starts_from_the_checkpoints_weights(recipe: MakeRecipe, whole: Path) -> None:
    tune = replaced(recipe("tuned", steps=1, lr=1e-9), model={"init_from": str(whole)})
    result = train(tune)
    start, end = checkpoint.load(whole)[0], checkpoint.load(result.folder)[0]
    for name, tensor in start.state_dict().items():
        torch.testing.assert_close(end.state_dict()[name], tensor, rtol=0, atol=1e-7)
    again = train(replaced(tune, train={"steps": 2}))
    assert again.steps == 2


def test_a_given_model_is_trained_in_place(recipe: MakeRecipe) -> None:
    model = checkpoint.create(zoo.get("mamba-micro").with_overrides(vocab_size=320), seed=3)
    result = train(recipe(steps=2), model=model)
    loaded, _ = checkpoint.load(result.folder)
    assert loaded.config.name == "mamba-micro"
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    train(recipe(steps=3), model=model)
    with pytest.raises(UserError, match=r'has a vocabulary of 100: .* model.vocab_size = "auto" fits'):
        train(recipe("small"), model=checkpoint.create(zoo.get("samba-micro").with_overrides(vocab_size=100)))


class Poison(Observer):
    """Makes the weights infinite after a step."""

    def __init__(self, model: torch.nn.Module, step: int) -> None:
        self.model = model
        self.at = step

    def step(self, record: StepRecord) -> None:
        if record.step == self.at:
            with torch.no_grad():
                next(self.model.parameters()).fill_(math.inf)


def test_a_bad_loss_names_the_step_and_the_last_good_checkpoint(recipe: MakeRecipe, tmp_path: Path) -> None:
    model = checkpoint.create(zoo.get("samba-micro").with_overrides(vocab_size=320))
    with pytest.raises(UserError, match=r"Step 4: the loss is nan.* Last good checkpoint: .*step-00000002\.$"):
        train(recipe(), model=model, observer=Poison(model, 3))
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000002"]
    checkpoint.load(tmp_path / "run" / "step-00000002")
    model = checkpoint.create(zoo.get("samba-micro").with_overrides(vocab_size=320))
    with pytest.raises(UserError, match="Last good checkpoint: none yet"):
        train(recipe("early"), model=model, observer=Poison(model, 1))


def test_weights_that_are_not_finite_are_never_saved(recipe: MakeRecipe, tmp_path: Path) -> None:
    model = checkpoint.create(zoo.get("samba-micro").with_overrides(vocab_size=320))
    with pytest.raises(UserError, match=r"Step 6: .* not saved.* Last good checkpoint: .*step-00000004\.$"):
        train(recipe(save_every=4), model=model, observer=Poison(model, 6))
    for lr in (1e300, 1e30):
        with pytest.raises(UserError, match=r"Step 1: .* Last good checkpoint: none yet\.$"):
            train(recipe("one", steps=1, lr=lr))
        assert list_checkpoints(tmp_path / "one") == []


class LimitFileSize(Observer):
    """After the first checkpoint no file may grow past 64 KiB: writing the next one fails half-way."""

    def saved(self, step: int, folder: Path) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    recipe: MakeRecipe, whole: Path, tmp_path: Path
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(UserError, match=r"Could not write .*step-00000004: File too large"):
            train(recipe(keep=1), observer=LimitFileSize())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in (tmp_path / "run").glob("step-*")) == ["step-00000002"]
    checkpoint.load(tmp_path / "run" / "step-00000002")
    assert sha256(train(recipe(keep=1)).folder) == sha256(whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that has room for one checkpoint (1.9 MB) but not for two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root; the file size limit above stands in")
    yield disk
    gc.collect()  # weights that were read are maps of their files, where a model still stands
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk_leaves_the_checkpoint_before(recipe: MakeRecipe, whole: Path, small_disk: Path) -> None:
    full = replaced(recipe(keep=1), train={"out": str(small_disk / "run")})
    with pytest.raises(UserError, match=r"The disk is full: could not write .*step-00000004.* free some space"):
        train(full)
    assert sorted(path.name for path in (small_disk / "run").glob("step-*")) == ["step-00000002"]
    _, tokenizer = checkpoint.load(small_disk / "run" / "step-00000002")
    assert tokenizer is not None
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    assert sha256(train(full).folder) == sha256(whole)


def test_what_a_killed_write_left_is_ignored_and_cleared(recipe: MakeRecipe, whole: Path, tmp_path: Path) -> None:
    train(recipe(), observer=StopAt(3))
    out = tmp_path / "run"
    torn = out / f"step-00000004{TMP_MARK}abc"
    shutil.copytree(out / "step-00000003", torn)
    (torn / "trainer.json").unlink()
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "tokens": 512, "loss": 9.9}\n{"step": 5, "tok')
    result = train(recipe())
    assert sha256(result.folder) == sha256(whole)
    assert curve(out) == curve(whole.parent)
    assert not torn.exists()


@pytest.mark.parametrize("name", ["trainer.json", "optimizer.safetensors", "model.safetensors", "config.json"])
@pytest.mark.parametrize("harm", ["cut", "missing", "changed"])
def test_a_damaged_checkpoint_is_told_and_passed_over(recipe: MakeRecipe, whole: Path, name: str, harm: str) -> None:
    good = sha256(whole)
    shutil.rmtree(whole)
    damage(whole.with_name("step-00000004") / name, harm)
    told = Messages()
    result = train(recipe("whole"), observer=told)
    passed, resumed = told.texts[:2]
    assert passed.startswith("A damaged checkpoint was passed over: ")
    assert f"step-00000004/{name}" in passed
    assert "it is now step-00000004.aside-" in passed
    assert "step 2 of 6" in resumed
    assert sha256(result.folder) == good


def test_a_finished_runs_damage_is_seen_too(recipe: MakeRecipe, whole: Path) -> None:
    good = sha256(whole)
    damage(whole / "model.safetensors", "changed")
    assert sha256(train(recipe("whole")).folder) == good
    (whole / "optimizer.safetensors").unlink()  # of a run that is done, it may be deleted
    told = Messages()
    train(recipe("whole"), observer=told)
    assert "raise train.steps" in told.texts[0]


def damage(path: Path, harm: str) -> None:
    data = path.read_bytes()
    path.unlink()
    if harm == "cut":
        path.write_bytes(data[:-10])
    elif harm == "changed":
        # One bit, in the middle: the file still opens, as long as before.
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])


@pytest.mark.parametrize("name", ["trainer.json", "optimizer.safetensors", "model.safetensors"])
@pytest.mark.parametrize("harm", ["cut", "missing"])
def test_damage_is_seen_where_an_earlier_version_left_no_checksums(
    recipe: MakeRecipe, whole: Path, name: str, harm: str
) -> None:
    good = sha256(whole)
    shutil.rmtree(whole)
    newest = whole.with_name("step-00000004")
    (newest / "manifest.json").unlink()
    damage(newest / name, harm)
    told = Messages()
    assert sha256(train(recipe("whole"), observer=told).folder) == good
    assert name in told.texts[0]


def test_an_earlier_versions_checkpoint_is_gone_on_from(recipe: MakeRecipe, whole: Path) -> None:
    good = sha256(whole)
    shutil.rmtree(whole)
    before = whole.with_name("step-00000004")
    (before / "manifest.json").unlink()
    assert sha256(train(recipe("whole")).folder) == good


def test_when_nothing_is_whole_nothing_is_begun(recipe: MakeRecipe, whole: Path) -> None:
    for folder in list_checkpoints(whole.parent):
        (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"step-00000006.*has no other to go on from: start over with --fresh"):
        train(recipe("whole", steps=7))
    assert len(list_checkpoints(whole.parent)) == 3


def test_going_on_from_an_earlier_step(recipe: MakeRecipe, whole: Path, tmp_path: Path) -> None:
    good, early = sha256(whole), whole.with_name("step-00000002")
    told = Messages()
    branch = train(recipe("branch"), resume=early, observer=told)
    assert (branch.folder.parent.name, sha256(branch.folder)) == ("branch", good)
    assert "step 2 of 6" in told.texts[0]
    assert whole.exists()
    again = train(recipe("whole"), resume=early, observer=told)
    assert sha256(again.folder) == good
    aside = sorted(path.name.partition(".aside-")[0] for path in whole.parent.glob("*.aside-*"))
    assert aside == ["step-00000004", "step-00000006"]
    with pytest.raises(UserError, match="has checkpoints of its own"):
        train(recipe("branch"), resume=whole.parent)
    for other in (tmp_path / "nothing", whole.with_name("step-00000009"), tmp_path):
        with pytest.raises(UserError, match="--resume"):
            train(recipe("other"), resume=other)
    with pytest.raises(UserError, match="exclude each other"):
        train(recipe("whole"), resume=whole, fresh=True)


def test_some_checkpoints_are_kept_for_good(recipe: MakeRecipe, tmp_path: Path) -> None:
    train(recipe(keep=1, keep_every=3, save_every=1))
    assert [path.name[-1] for path in list_checkpoints(tmp_path / "run")] == ["3", "6"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("recipe", {}),
        ("recipe", {"model": None}),
        ("step", -1),
        ("step", 5),
    ],
)
def test_a_wrong_trainer_json_is_told(recipe: MakeRecipe, whole: Path, key: str, value: object) -> None:
    path = whole / "trainer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    told = Messages()
    train(recipe("whole", steps=7), observer=told)
    assert key in told.texts[0]


@pytest.mark.parametrize("value", [{}, {"0": {"cpu": "AA"}}])
def test_wrong_generators_are_told(recipe: MakeRecipe, whole: Path, value: object) -> None:
    path = whole / "trainer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rng": value}))
    (whole / "manifest.json").unlink()
    with pytest.raises(UserError, match="rng"):
        train(recipe("whole", steps=7))


def test_deep_json_is_told(recipe: MakeRecipe, whole: Path) -> None:
    (whole / "trainer.json").write_text("[" * 100_000)
    told = Messages()
    train(recipe("whole", steps=7), observer=told)
    assert "trainer.json is damaged" in told.texts[0]


@pytest.mark.parametrize("name", ["metrics.jsonl", ".lock"])
def test_a_folder_in_a_files_place_is_told(recipe: MakeRecipe, tmp_path: Path, name: str) -> None:
    (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(UserError, match=f"{name} is a folder"):
        train(recipe())


def test_a_file_with_a_checkpoints_name_is_none(recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "step-00000099").touch()
    assert train(recipe(keep=1)).steps == 6


def test_two_processes_may_not_train_into_one_folder(recipe: MakeRecipe, tmp_path: Path) -> None:
    with run_folder(tmp_path / "run"), pytest.raises(UserError, match="Another process is training into"):
        train(recipe())


def test_out_must_be_a_folder(recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match="is a file: name a folder"):
        train(recipe())
    assert (tmp_path / "run").read_text() == "mine"


def test_too_little_data_is_told(recipe: MakeRecipe) -> None:
    with pytest.raises(UserError, match="tokens"):
        train(recipe(length=100_000))


def test_sigterm_is_told_apart(recipe: MakeRecipe, tmp_path: Path) -> None:
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    result = train(recipe(), observer=StopAt(3, signal.SIGTERM))
    assert result.interrupted == signal.SIGTERM
    assert checkpoint.latest_step(tmp_path / "run") == tmp_path / "run" / "step-00000003"
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers


class StopTwice(Observer):
    def step(self, record: StepRecord) -> None:
        if record.step == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)


def test_a_second_ctrl_c_stops_at_once(recipe: MakeRecipe, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(recipe(), observer=StopTwice())
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000002"]
    assert sha256(train(recipe()).folder) == sha256(whole)


def test_trainer_json_holds_no_surprise(whole: Path) -> None:
    data = json.loads((whole / "trainer.json").read_text())
    assert data["format"] == "samba-lm trainer"
    data["version"] = 99
    (whole / "trainer.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="99"):
        read_state(whole)

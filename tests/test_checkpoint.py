"""Checkpoint folders: whole or not there, and refused with a reason when they are not what they should be."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import samba_lm
from samba_lm import zoo
from samba_lm.checkpoint import create, load, save
from samba_lm.errors import UserError
from samba_lm.tokenizer import ByteTokenizer, train_bpe


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(create("samba-micro", seed=1), tmp_path / "m", ByteTokenizer())
    return tmp_path / "m"


def test_round_trip_is_exact(saved: Path) -> None:
    model, tokenizer = load(saved)
    assert tokenizer is not None
    assert tokenizer.fingerprint() == ByteTokenizer().fingerprint()
    for (name, p), q in zip(create("samba-micro", seed=1).named_parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert not model.training


def test_the_same_model_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    save(create("samba-micro", seed=1), tmp_path / "again", ByteTokenizer())
    for file in saved.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_bf16_keeps_the_recurrence_in_fp32(saved: Path) -> None:
    model, _ = load(saved, dtype=torch.bfloat16)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert {d for n, d in dtypes.items() if "selection" in n} == {torch.float32}
    assert {d for n, d in dtypes.items() if "selection" not in n} == {torch.bfloat16}
    logits, _ = model(torch.tensor([[1, 2, 3]]))
    assert logits.dtype == torch.bfloat16


def test_a_name_gives_fresh_weights() -> None:
    model, tokenizer = samba_lm.load("samba-micro")
    assert model.config == zoo.get("samba-micro")
    assert isinstance(tokenizer, ByteTokenizer)


def test_the_newest_step_of_a_run(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        save(create("samba-micro", seed=step), tmp_path / "run" / f"step-{step:08d}")
    (tmp_path / "run" / "step-00000200.tmp-x").mkdir()
    model, tokenizer = load(tmp_path / "run")
    assert torch.equal(model.embedding, create("samba-micro", seed=100).embedding)
    assert tokenizer is None


def test_saving_replaces_a_checkpoint_and_nothing_else(saved: Path, tmp_path: Path) -> None:
    save(create("mamba-micro"), saved)
    assert load(saved)[0].config.name == "mamba-micro"
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="is not a samba-lm checkpoint"):
        save(create("samba-micro"), tmp_path / "work")
    assert (tmp_path / "work" / "config.json").exists()


def test_saving_onto_a_link_replaces_what_it_points_to(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(saved)
    save(create("mamba-micro"), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert load(saved)[0].config.name == "mamba-micro"


def test_notes_beside_a_checkpoint_are_not_lost(saved: Path) -> None:
    (saved / "notes.txt").write_text("precious")
    with pytest.raises(UserError, match=r"also holds 'notes\.txt'"):
        save(create("mamba-micro"), saved)
    assert (saved / "notes.txt").read_text() == "precious"


def test_files_are_readable_like_their_neighbours(saved: Path) -> None:
    assert {oct(file.stat().st_mode & 0o777) for file in saved.iterdir()} == {"0o644"}


@pytest.mark.parametrize("crash", ["between the renames", "after the second rename"])
def test_a_crash_while_replacing_loses_nothing(saved: Path, crash: str) -> None:
    old = saved.with_name("m.tmp-old")
    if crash == "between the renames":
        saved.rename(old)
        assert load(saved)[0].config.name == "samba-micro"
    else:
        shutil.copytree(saved, old)
    save(create("mamba-micro"), saved)
    assert load(saved)[0].config.name == "mamba-micro"
    assert not old.exists()


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def foreign_weights(folder: Path) -> None:
    save(create("mamba-micro"), folder.with_name("other"))
    shutil.copy(folder.with_name("other") / "model.safetensors", folder)


def lost_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["norm.weight"]
    save_file(tensors, folder / "model.safetensors")


def wrong_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["norm.weight"] = torch.ones(3)
    save_file(tensors, folder / "model.safetensors")


def int_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["norm.weight"] = tensors["norm.weight"].int()
    save_file(tensors, folder / "model.safetensors")


def other_tokenizer(folder: Path) -> None:
    train_bpe(["some words to learn from " * 50], 300).save(folder)


def edit_config(**fields: object) -> object:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "truncated or damaged"),
        (foreign_weights, "belongs to another model"),
        (lost_tensor, "no tensor 'norm.weight'"),
        (wrong_shape, r"'norm.weight' has shape \[3\]"),
        (other_tokenizer, "is not the tokenizer this model was saved with"),
        (lambda f: (f / "tokenizer.json").unlink(), "has lost its tokenizer.json"),
        (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda f: (f / "config.json").unlink(), "it has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (edit_config(version=99), "format version 99"),
        (edit_config(format="other"), "was not written by samba-lm"),
        (edit_config(model={"name": "x"}), "d_model is missing"),
        (edit_config(model=5), "is damaged"),
        (edit_config(tokenizer=5), "is damaged"),
        (lambda f: (f / "config.json").write_text("[" * 100_000), "nested too deeply"),
        (int_weights, "'norm.weight' is torch.int32"),
    ],
)
def test_damage_is_named_in_one_line(saved: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    damage(saved)
    with pytest.raises(UserError, match=message) as caught:
        load(saved)
    assert "\n" not in str(caught.value)


def test_a_run_that_has_saved_nothing_yet_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match=r"is a run without a checkpoint so far: train\.save_every"):
        load(tmp_path)


def test_a_folder_of_runs_is_none_but_those_in_it_are_named(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    saved.rename(folder / "b")
    for name in ("a", "c", "d", "e", "f"):
        (folder / name / "step-00000001").mkdir(parents=True)
    (folder / "none").mkdir()
    named = ", ".join(str(folder / name) for name in "abcde")
    with pytest.raises(UserError, match=re.escape(f"Give a model's folder, a run's or a step's: {named} and others.")):
        load(folder)


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match="There is no folder 'runs/nothing'"):
        load("runs/nothing")
    for empty in ("", "/"):
        with pytest.raises(UserError):
            load(empty)
    with pytest.raises(UserError, match="Did you mean 'samba-tiny'"):
        load("samba-tny")
    with pytest.raises(UserError, match=r"Check the path, or give a name that `samba-lm models` lists\.$"):
        load("zzz")


def test_a_tokenizer_too_large_is_refused(tmp_path: Path) -> None:
    config = zoo.get("samba-micro").with_overrides(vocab_size=100)
    with pytest.raises(UserError, match="tokenizer has 257 ids but model 'samba-micro' has a vocabulary of 100"):
        save(create(config), tmp_path / "m", ByteTokenizer())
    assert not (tmp_path / "m").exists()

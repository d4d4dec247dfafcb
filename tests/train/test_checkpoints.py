"""Checkpoints of several processes: what lies in the folder, gone on from by any number of them, read by everything."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from safetensors import safe_open

from samba_lm import checkpoint, zoo
from samba_lm.errors import UserError
from samba_lm.files import TMP_MARK
from samba_lm.train.checkpoints import Saver, TrainerState, list_checkpoints, read_state, rng_state
from samba_lm.train.metrics import read_metrics
from samba_lm.train.parallel import connect
from samba_lm.train.prepare import make_optimizer, prepare_model
from samba_lm.train.recipe import ParallelSection, Recipe, TrainSection
from samba_lm.train.run import train

MakeRecipe = Callable[..., Recipe]
LAST = "step-00000006"


def go(recipe: dict[str, Any], stop_after: int = 99, resume: str | None = None) -> dict[str, Any]:
    """What a process of a run does, and what it then knows."""
    left = iter(range(stop_after - 1, -2, -1))
    result = train(
        Recipe.from_dict(recipe), resume=None if resume is None else Path(resume), stop=lambda: next(left, 0) == 0
    )
    return {"steps": result.steps, "folder": str(result.folder), "loss": result.final_loss}


def into(recipe: Recipe, out: Path | str, replicate: int = 1, context: int = 1) -> dict[str, Any]:
    """A recipe as plain data, for other processes, with another folder and mesh."""
    plain = recipe.to_dict()
    plain["train"]["out"] = str(out)
    plain["parallel"] |= {"replicate": replicate, "context": context, "timeout": 60.0}
    return plain


def curve(out: Path) -> list[tuple[float, ...]]:
    return [(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(out / "metrics.jsonl")]


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder)[0].state_dict()


def assert_close(got: list[tuple[float, ...]], want: list[tuple[float, ...]]) -> None:
    assert len(got) == len(want) > 0
    for one, other in zip(got, want, strict=True):
        assert one == pytest.approx(other, rel=2e-6)  # another order of sums in fp32, and nothing else


@pytest.fixture(scope="module")
def two(data: Path, whole_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run of two processes, with checkpoints after 2, 4 and 6 steps; look only."""
    out = tmp_path_factory.mktemp("two") / "run"
    recipe = Recipe.from_dict(read_state(whole_run / LAST).recipe)
    first, second = on_ranks(2, go, into(recipe, out))
    assert first == second
    assert first["folder"] == str(out / LAST)
    return out


def test_a_folder_holds_every_tensor_once(two: Path, whole_run: Path) -> None:
    names = {path.name for path in (two / LAST).iterdir()}
    assert names == {
        *("config.json", "tokenizer.json", "tokenizer_config.json", "trainer.json", "manifest.json"),
        *("model-00000.safetensors", "model-00001.safetensors"),
        *("optimizer-00000.safetensors", "optimizer-00001.safetensors"),
    }
    assert not list(two.glob(f"*{TMP_MARK}*"))
    for kind in ("model", "optimizer"):
        assert elements(two / LAST, f"{kind}-*") == elements(whole_run / LAST, f"{kind}.*")
    manifest = json.loads((two / LAST / "manifest.json").read_text())
    assert manifest["files"].keys() == names - {"manifest.json"}
    assert sorted(read_state(two / LAST).rng) == ["0", "1"]


def elements(folder: Path, files: str) -> dict[str, int]:
    """How many elements of each tensor lie in a folder's files."""
    found: dict[str, int] = {}
    for path in folder.glob(files):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                found[name] = found.get(name, 0) + math.prod(file.get_slice(name).get_shape())
    return found


def test_it_is_a_model_for_every_command(two: Path, whole_run: Path) -> None:
    assert curve(two)[0] == pytest.approx(curve(whole_run)[0], rel=1e-5)
    model, tokenizer = checkpoint.load(two)
    assert tokenizer is not None
    one, _ = checkpoint.load(whole_run)
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-2, atol=1e-3)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_pytorchs_own_reader_reads_it(two: Path) -> None:
    import torch.distributed.checkpoint as dcp

    tensors = {name: torch.zeros_like(tensor) for name, tensor in weights(two).items()}
    dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(two / LAST)), no_dist=True)
    for name, tensor in weights(two).items():
        assert torch.equal(tensors[name], tensor)


def test_the_same_processes_go_on_bit_for_bit(recipe: MakeRecipe, two: Path, tmp_path: Path) -> None:
    plain = into(recipe(), tmp_path / "run")
    assert on_ranks(2, go, plain, 3)[0]["steps"] == 3
    assert on_ranks(2, go, plain)[1]["steps"] == 6
    assert curve(tmp_path / "run") == curve(two)
    for kind in ("model", "optimizer"):
        for path in (two / LAST).glob(f"{kind}-*"):
            assert path.read_bytes() == (tmp_path / "run" / LAST / path.name).read_bytes(), path.name
    assert read_state(tmp_path / "run" / LAST).rng == read_state(two / LAST).rng


def test_two_then_four_then_one(recipe: MakeRecipe, two: Path, tmp_path: Path) -> None:
    """Each shard of a mesh with replicas is written once; the loss goes on as it would have."""
    out = tmp_path / "run"
    shutil.copytree(two / "step-00000002", out / "step-00000002")
    on_ranks(4, go, into(recipe(), out, replicate=2), 2)
    four = out / "step-00000004"
    assert elements(four, "model-*") == elements(two / LAST, "model-*")
    assert elements(four, "optimizer-*") == elements(two / LAST, "optimizer-*")
    assert sorted(read_state(four).rng) == ["0", "1", "2", "3"]
    result = train(recipe())
    assert (result.folder / "model.safetensors").exists()
    assert_close(curve(out), curve(two)[2:])
    assert_close([(result.final_loss,)], [(curve(two)[-1][1],)])


def test_one_then_two_that_share_rows(recipe: MakeRecipe, whole_run: Path, tmp_path: Path) -> None:
    on_ranks(2, go, into(recipe(), tmp_path / "run", context=2), 99, str(whole_run / "step-00000004"))
    assert_close(curve(tmp_path / "run"), curve(whole_run)[4:])


def test_a_damaged_shard_is_told_and_passed_over(recipe: MakeRecipe, two: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for step in ("step-00000002", "step-00000004"):
        shutil.copytree(two / step, out / step)
    shard = out / "step-00000004" / "model-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    on_ranks(2, go, into(recipe(), out))
    assert [path.name for path in list_checkpoints(out)] == [path.name for path in list_checkpoints(two)]
    assert list(out.glob("step-00000004.aside-*"))
    assert curve(out)[-1] == curve(two)[-1]
    shard.unlink()
    with pytest.raises(UserError, match=r"lacks a part|has shape"):
        checkpoint.load(shard.parent)


def save_and_go_on(out: str, device: str) -> list[bool]:
    """Save a model in the background and change it at once, twice; whether what was saved is what it was."""
    settings = TrainSection(device=device)
    parallel = connect(device, ParallelSection(timeout=60.0))
    model = checkpoint.create(zoo.get("samba-micro"), seed=1)
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prepare_model(model, settings, parallel)
    optimizer = make_optimizer(model, settings)
    saver = Saver(Path(out), None, parallel, keep=1, keep_every=1, timeout=60.0)
    plain = {"tokens": 0, "seconds": 0.0, "loss": 0.0, "val_loss": None, "best_val_loss": None, "threads": 1}
    rng = {str(parallel.rank): rng_state(parallel.device)}
    with torch.no_grad():
        for step in (1, 2):
            state = TrainerState(
                **plain, step=step, recipe=Recipe().to_dict(), config="", tokenizer="", data="", rng=rng
            )
            assert saver.save(model, optimizer, state) is None
            for parameter in model.parameters():
                parameter.add_(1.0)
            while saver.poll() is None:
                pass
    right = []
    for step in (1, 2) if parallel.is_main else ():
        saved = weights(f"{out}/step-{step:08d}")
        right.append(all(torch.equal(saved[name], tensor + (step - 1)) for name, tensor in whole.items()))
    parallel.close()
    return right


def test_what_is_saved_is_what_was_there(tmp_path: Path) -> None:
    assert on_ranks(2, save_and_go_on, str(tmp_path), "cpu") == [[True, True], []]


def slow_after_its_note(out: str) -> list[bool]:
    """Rank 1 opens the folder that is being written, as to force it to the disk, only when it was renamed."""

    def hook(name: str, arguments: tuple[object, ...]) -> None:
        if name == "open" and str(arguments[0]).endswith(f"{TMP_MARK}save"):
            time.sleep(0.3)

    if os.environ["RANK"] == "1":
        sys.addaudithook(hook)
    return save_and_go_on(out, "cpu")


def test_a_process_that_has_left_its_note_needs_the_folder_no_more(tmp_path: Path) -> None:
    assert on_ranks(2, slow_after_its_note, str(tmp_path)) == [[True, True], []]


@pytest.mark.gpu
def test_what_is_saved_is_what_was_there_on_a_gpu(tmp_path: Path) -> None:
    assert save_and_go_on(str(tmp_path), "cuda") == [True, True]


@pytest.mark.gpu
def test_two_gpus_go_on_bit_for_bit(recipe: MakeRecipe, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for out, parts in (("whole", [99]), ("run", [3, 99])):
        for stop_after in parts:
            on_ranks(2, go, into(recipe(device="cuda"), tmp_path / out), stop_after, timeout=300)
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    for path in (tmp_path / "whole" / LAST).glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "run" / LAST / path.name).read_bytes(), path.name


def fail_on_one(recipe: dict[str, Any]) -> str:
    """Rank 1 may write no file past 64 KiB once training begins."""
    if os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with pytest.raises(UserError) as error:
        go(recipe)
    return str(error.value)


def test_an_error_in_the_background_ends_the_run_on_all(recipe: MakeRecipe, tmp_path: Path) -> None:
    told = on_ranks(2, fail_on_one, into(recipe(save_every=1), tmp_path / "run"))
    assert "could not be written by another process" in told[0]
    assert "Could not write" in told[1]
    assert "File too large" in told[1]
    assert list_checkpoints(tmp_path / "run") == []
    assert not list((tmp_path / "run").glob(f"*{TMP_MARK}*"))


def elsewhere_on_one(recipe: dict[str, Any], out: str) -> str:
    """Rank 1 sees another folder, as on a machine that does not share the first one's."""
    if os.environ["RANK"] == "1":
        recipe["train"]["out"] = out
    with pytest.raises(UserError) as error:
        go(recipe)
    return str(error.value)


def test_a_folder_that_is_not_shared_is_told(recipe: MakeRecipe, tmp_path: Path) -> None:
    told = on_ranks(2, elsewhere_on_one, into(recipe(), tmp_path / "here"), str(tmp_path / "there"))
    assert "could not be written by another process" in told[0]
    assert "all processes must share train.out's file system" in told[1]


def wrong_on_one(recipe: dict[str, Any], other: str) -> str:
    if os.environ["RANK"] == "1":
        recipe["data"]["train"] = other
    with pytest.raises(UserError) as error:
        go(recipe)
    return str(error.value)


def test_what_one_process_cannot_open_none_waits_for(recipe: MakeRecipe, tmp_path: Path) -> None:
    told = on_ranks(2, wrong_on_one, into(recipe(), tmp_path / "run"), str(tmp_path / "none"))
    assert "Another process of this run stopped" in told[0]
    assert str(tmp_path / "none") in told[1]
    assert not (tmp_path / "run").exists()

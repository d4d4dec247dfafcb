"""The --json files: valid JSON always, with what is needed to repeat the figures."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from pathlib import Path

import pytest
import torch

import samba_lm
from samba_lm.cli.main import main
from samba_lm.cli.output import source_commit, write_json
from samba_lm.errors import UserError
from samba_lm.files import atomic_file


def _strict(path: Path) -> dict[str, object]:
    def refuse(name: str) -> object:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/samba-lm", "eval", "perplexity", "CKPT"])
    target = tmp_path / "new" / "folder" / "r.json"
    write_json(target, {"loss": 2.5, "where": Path("a/b"), "text": "é"})
    read = _strict(target)
    assert read["command"] == ["samba-lm", "eval", "perplexity", "CKPT"]
    assert read["samba_lm"] == samba_lm.__version__
    assert read["torch"] == torch.__version__
    assert read["python"] == platform.python_version()
    assert read["threads"] == torch.get_num_threads()
    assert "device" not in read
    assert str(read["platform"]).split()[0] == platform.system()
    assert platform.machine() in str(read["platform"])
    named = platform.release().lstrip("0123456789.")  # what an owner calls their kernel is theirs
    assert not named or named not in str(read["platform"])
    assert datetime.datetime.fromisoformat(str(read["time"])).tzinfo is not None
    assert (read["loss"], read["where"], read["text"]) == (2.5, "a/b", "é")
    assert [each.name for each in target.parent.iterdir()] == ["r.json"]


def test_what_is_no_number_becomes_null(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write_json(path, {"a": float("nan"), "b": [float("inf"), 1.0], "c": {"d": (float("-inf"),)}})
    read = _strict(path)
    assert (read["a"], read["b"], read["c"]) == (None, [None, 1.0], {"d": [None]})


def test_a_record_may_say_its_device(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write_json(path, {"device": "cuda: NVIDIA H100"})
    assert _strict(path)["device"] == "cuda: NVIDIA H100"


def test_a_strange_value_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert _strict(path)["a"] == 1


def test_the_commit_of_a_checkout() -> None:
    commit = source_commit()
    if not (Path(__file__).parents[2] / ".git").exists():
        assert commit is None
    else:
        assert commit is not None
        assert len(commit.removesuffix("-dirty")) == 40


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("", "--json is empty"),
        (".", "--json . is a folder"),
        ("/", "--json / is a folder"),
        ("no/..", "--json no/.. is"),
    ],
)
def test_what_cannot_be_a_file_is_told_before_the_work(
    path: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=f"^{told}"):
        write_json(path, {})
    assert main(["models", "samba-micro", "--json", path]) == 2
    said = capsys.readouterr()
    assert told in said.err
    assert (said.out, said.err.count("\n")) == ("", 1)


def test_a_pipe_stays_one_and_a_link_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe, link, other = tmp_path / "pipe", tmp_path / "link.json", tmp_path / "there" / "r.json"
    os.mkfifo(pipe)
    told = "is a device or a pipe, which a file would take the place of"
    for option in ("--json", "--csv", "--figure"):
        assert main(["eval", "passkey", "samba-nano", option, str(pipe)]) == 2
        assert told in capsys.readouterr().err
    with pytest.raises(UserError, match=told), atomic_file(pipe):
        pass
    assert pipe.is_fifo()
    other.parent.mkdir()
    link.symlink_to(other)
    write_json(link, {"loss": 2.5})
    assert link.is_symlink()
    assert _strict(other)["loss"] == 2.5
    assert [each.name for each in tmp_path.iterdir() if "tmp" in each.name] == []


def test_a_place_where_nothing_can_be_written_is_told_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["bench", "ops", "--json", str(tmp_path / "file" / "new" / "r.json")]) == 2
    assert "file is a file and no folder" in capsys.readouterr().err
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    assert main(["bench", "ops", "--json", str(tmp_path / "new" / "r.json")]) == 2
    told = capsys.readouterr().err
    assert f"nothing may be written in {tmp_path}" in told
    assert told.count("\n") == 1

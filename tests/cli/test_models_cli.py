"""``samba-lm models``: every name with true figures, a drawn stack, narrow terminals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from samba_lm import shipped, zoo
from samba_lm.cli import models
from samba_lm.cli.main import main
from samba_lm.errors import UserError


def test_the_list_has_every_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("COLUMNS", "120")
    models.main(["--json", str(tmp_path / "m.json")])
    told = capsys.readouterr().out
    record = json.loads((tmp_path / "m.json").read_text())
    rows = [row for row in record["models"] if not row["trained"]]
    assert [row["name"] for row in rows] == zoo.names()
    assert [row["name"] for row in record["models"] if row["trained"]] == shipped.names()
    for row in rows:
        assert row["name"] in told
        config = zoo.get(row["name"])
        assert row["parameters"] == config.parameters()
        assert row["layers"] == len(config.layers)
        assert row["flops_per_token"] == config.flops_per_token(4096)
        assert row["state_bytes"] == config.state_bytes(4096)


@pytest.mark.parametrize("name", zoo.names())
def test_every_stack_is_drawn(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    models.main([name])
    told = capsys.readouterr().out
    assert f"{zoo.get(name).parameters():,} parameters" in told
    for spec in zoo.get(name).layers:
        assert spec.kind in told


def test_what_comes_with_the_package_is_shown(
    nano: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    models.main(["--json", str(tmp_path / "m.json")])
    told = capsys.readouterr().out
    assert "samba-nano is trained and comes with samba-lm" in told
    first = json.loads((tmp_path / "m.json").read_text())["models"][0]
    assert (first["name"], first["trained"]) == ("samba-nano", True)
    assert first["parameters"] == zoo.get("samba-micro").parameters()
    models.main(["samba-nano"])
    told = capsys.readouterr().out
    assert "samba-nano  (trained, comes with samba-lm)" in told
    assert str(nano / "README.md") in told
    with pytest.raises(UserError, match="Did you mean 'samba-nano'"):
        models.main(["samba-nanno"])


def test_a_usual_terminal_has_one_line_for_each(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    models.main([])
    lines = capsys.readouterr().out.splitlines()
    names = [*shipped.names(), *zoo.names()]
    assert [line.split()[0] for line in lines[1 : 1 + len(names)]] == names


def test_the_pattern_is_found() -> None:
    pattern, repeat = models.repeating(zoo.get("samba-421m").layers)
    assert (len(pattern), repeat) == (4, 6)
    pattern, repeat = models.repeating(zoo.get("mamba-mlp-449m-full-5").layers)
    assert (len(pattern), repeat) == (24, 1)


def test_a_narrow_terminal_tears_no_name_apart(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("COLUMNS", "40")
    models.main([])
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 40 for line in lines)
    assert any(line.startswith("samba-421m ") for line in lines)


def test_an_unknown_name_and_a_bad_context() -> None:
    with pytest.raises(UserError, match="Did you mean 'samba-421m'"):
        models.main(["samba-421"])
    with pytest.raises(UserError, match="context"):
        models.main(["--context", "0"])


@pytest.mark.parametrize("context", ["0", "-1", "1" + 400 * "0"])
def test_a_context_out_of_range_is_told(context: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--context", context]) == 2
    assert "must be from 1 to 1000000000000 tokens" in capsys.readouterr().err


def test_a_number_of_too_many_digits_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--context", 5000 * "1"]) == 2
    assert "--context: a number of 5000 digits is too large. See" in capsys.readouterr().err


@pytest.mark.parametrize("threads", ["0", "-1", "100000"])
def test_threads_of_bench_out_of_range_are_told(threads: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "scan", "--threads", threads]) == 2
    assert f"--threads {threads} must be from 1 to 1024" in capsys.readouterr().err

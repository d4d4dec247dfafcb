"""Programs under test: honest ones pass, and hostile ones neither pass nor do harm."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from samba_lm.eval.harness import sandbox
from samba_lm.eval.harness.sandbox import leaks, run_program, run_programs

LINUX = sys.platform == "linux"


def test_a_program_that_ends_has_passed() -> None:
    source = "import math, re, typing, collections\nassert math.sqrt(4) == 2\nprint('words on', 'stdout')"
    assert run_program(source).passed
    assert run_program("if __name__ == '__main__':\n    assert open('program.py').read()").passed
    assert run_program("assert 'é' == '\\u00e9'").passed
    assert run_program("").passed


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError"),
        ("import sys\nsys.exit(0)", "SystemExit"),
        ("raise SystemExit", "SystemExit"),
        ("quit_ = exit if 'exit' in dir(__builtins__) else None\nraise SystemExit(0)", "SystemExit"),
        ("import os\nos._exit(0)", "ended early"),
        ("import os, signal\nsignal.raise_signal(signal.SIGKILL)", "ended early"),
        ("print('passed')\nprint('ok')\nimport os\nos.write(1, b'0' * 32)\nos._exit(0)", "ended early"),
        (
            "import os\nfor f in range(3, 64):\n    try: os.write(f, b'passed\\n')\n    except OSError: pass\nassert 0",
            None,
        ),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("def f(): return f()\nf()", "RecursionError"),
        ("raise ValueError('x' * 100000)", "ValueError: xxx"),
    ],
)
def test_no_other_end_counts(source: str, why: str | None) -> None:
    outcome = run_program(source)
    assert not outcome.passed
    assert why is None or outcome.why.startswith(why), outcome
    assert len(outcome.why) <= 200


@pytest.mark.parametrize(
    "source", ["while True: pass", "import time\ntime.sleep(60)", "import sys\nsys.stdin.read()\nwhile 1: 1"]
)
def test_time_is_limited(source: str) -> None:
    began = time.monotonic()
    outcome = run_program(source, seconds=0.5)
    assert (outcome.passed, outcome.why) == (False, "timed out")
    assert time.monotonic() - began < 20


@pytest.mark.skipif(not LINUX, reason="macOS does not limit a process's memory")
def test_memory_and_files_are_limited() -> None:
    assert run_program("x = bytearray(1 << 27)").passed
    assert run_program("x = bytearray(1 << 31)").why.startswith("MemoryError")
    assert not run_program("open('mine', 'w').write('x')").passed
    assert not run_program("files = [open('program.py') for _ in range(100)]").passed


def test_nothing_comes_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_USER", "1")
    source = """
import os, sys
assert "SECRET_OF_THE_USER" not in os.environ
assert os.listdir(".") == ["program.py"]
assert sys.stdin.read() == ""
assert sys.flags.isolated and not [p for p in sys.path if "site-packages" in p]
"""
    outcome = run_program(source)
    assert outcome.passed, outcome


def test_what_was_made_for_a_program_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    assert run_program("x = 1").passed
    assert run_program("while True: pass", seconds=0.5).why == "timed out"
    assert list(tmp_path.iterdir()) == []


def test_hostile_programs_do_no_harm(tmp_path: Path) -> None:
    if not LINUX or leaks():
        pytest.skip("this system's kernel cannot shut all doors")
    kept = tmp_path / "kept"
    kept.write_text("mine")
    os.chmod(tmp_path, 0o777)
    os.chmod(kept, 0o666)
    bomb = run_program("import os\nwhile True: os.fork()", seconds=5)
    assert not bomb.passed
    assert bomb.why != "timed out", "the first fork must fail"
    for source in (
        f"open({str(kept)!r}, 'w').write('theirs')",
        f"open({str(kept)!r}, 'a').write('theirs')",
        f"import os\nos.remove({str(kept)!r})",
        f"import os\nos.truncate({str(kept)!r}, 0)",
        f"import os\nos.rename({str(kept)!r}, 'mine')",
        f"import os\nos.chmod({str(kept)!r}, 0)",
        f"open({str(tmp_path / 'new')!r}, 'w').close()",
        "open('mine', 'w').close()",
        f"import os\nos.mkdir({str(tmp_path / 'new')!r})",
        f"import os\nos.symlink('x', {str(tmp_path / 'new')!r})",
        f"import os\nos.link({str(kept)!r}, {str(tmp_path / 'new')!r})",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.execv('/bin/true', ['true'])",
        "import os\nos.posix_spawn('/bin/true', ['true'], {})",
        "import threading\nthreading.Thread(target=print).start()",
        "import socket\nsocket.create_connection(('127.0.0.1', 9), timeout=1)",
        "import socket\nsocket.socketpair()",
        f"import os\nos.kill({os.getpid()}, 15)",
        "import os\nos.kill(-1, 15)",
        "import os\nos.killpg(0, 15)",
        "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
        "import ctypes\nassert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0",
    ):
        outcome = run_program(source, seconds=10)
        assert not outcome.passed, source
    assert kept.read_text() == "mine"
    assert kept.stat().st_mode & 0o777 == 0o666
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_leaks_tries_what_it_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "TRIED", {"count": "assert 1 + 1 == 2", "fly": "raise OSError"})
    assert leaks() == ["count"]


def test_many_keep_their_order() -> None:
    sources = [f"assert {i} % 3" for i in range(9)]
    assert [outcome.passed for outcome in run_programs(sources)] == [bool(i % 3) for i in range(9)]

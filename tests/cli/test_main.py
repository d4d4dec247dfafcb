"""The shell: help without imports, one line for every mistake, the right exit codes."""

from __future__ import annotations

import ast
import contextlib
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import samba_lm
from samba_lm.cli import main as shell
from samba_lm.errors import UserError

SOURCE = Path(shell.__file__).parent


class _Command:
    """Stands in a command's place and does what a test says; the shell around it is the real one."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error
        self.argv: list[str] | None = None

    def main(self, argv: list[str]) -> None:
        self.argv = argv
        if self.error is not None:
            raise self.error


def _run(monkeypatch: pytest.MonkeyPatch, error: BaseException | None, *argv: str) -> tuple[int, _Command]:
    command = _Command(error)
    monkeypatch.setattr(shell.importlib, "import_module", lambda name: command)
    return shell.main(argv or ("train",)), command


def _message(capsys: pytest.CaptureFixture[str]) -> str:
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.endswith("\n")
    assert told.err.count("\n") == 1, told.err
    return told.err


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_help_lists_every_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert shell.main(argv) == 0
    out = capsys.readouterr().out
    for command in shell.COMMANDS:
        assert f"  {command.name} " in out
        assert command.help.split()[0] in out


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("argv", [["--help"], ["data", "-h"], ["data", "show", "--help"]])
def test_of_several_processes_one_shows_help(
    rank: str, argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with contextlib.suppress(SystemExit):
        shell.main(argv)
    assert bool(capsys.readouterr().out) == (rank == "0")


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_help_fits_the_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    shell.main([])
    shell.main(["convert"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= columns


def test_a_group_shows_its_own_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert shell.main(["data", "--help"]) == 0
    out = capsys.readouterr().out
    assert "data prepare" in out
    assert "data verify" in out
    assert "generate" not in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert shell.main(["--version"]) == 0
    assert capsys.readouterr().out == f"samba-lm {samba_lm.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["tran"], ("Unknown command 'tran'", "Did you mean 'train'?", "samba-lm --help")),
        (["data", "prepar"], ("'data prepar'", "Did you mean 'prepare'?", "samba-lm data --help")),
        (["eval", "xyz"], ("'eval xyz'", "perplexity")),
        (["--verson"], ("Unknown option '--verson'", "--version")),
        (["qqqq"], ("'qqqq'", "Known:", "generate")),
    ],
)
def test_an_unknown_word_names_the_nearest(
    argv: list[str], parts: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert shell.main(argv) == 2
    message = _message(capsys)
    assert message.startswith("samba-lm: error: ")
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("argv", "given"),
    [
        (("train", "R.toml", "--train.lr", "1"), ["R.toml", "--train.lr", "1"]),
        (("data", "show", "DIR"), ["show", "DIR"]),
        (("generate", "--help"), ["--help"]),
    ],
)
def test_a_command_gets_what_follows_its_first_word(
    argv: tuple[str, ...], given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, command = _run(monkeypatch, None, *argv)
    assert code == 0
    assert command.argv == given


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (UserError("lr = -1:\n  must be positive.\r\n Give more."), "lr = -1: must be positive. Give more.\n"),
        (FileNotFoundError(errno.ENOENT, "no", "a/b.txt"), "No such file or folder: a/b.txt"),
        (PermissionError(errno.EACCES, "no", "/opt/x"), "No permission for /opt/x"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "d"), "Is a directory: d"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "n" * 300), f"File name too long: {'n' * 120}.... Give"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "d.tmp-x", None, "d"), "Is a directory: d. Give"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk is full"),
        (MemoryError(), "Out of memory (no details). Lower the batch size"),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 9 GiB. Including non-PyTorch memory, this"),
            "Tried to allocate 9 GiB). Lower",
        ),
    ],
)
def test_what_people_can_mend_is_one_line(
    error: Exception, part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = _run(monkeypatch, error)
    assert code == 2
    assert part in _message(capsys)


def test_memory_that_torch_cannot_get_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError, match="memory") as caught:
        torch.empty(1 << 58)
    code, _ = _run(monkeypatch, caught.value)
    assert code == 2
    assert "Lower the batch size" in _message(capsys)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), OSError(errno.EIO, "input/output error"), KeyError("x")]
)
def test_our_own_defects_keep_their_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(type(error)):
        _run(monkeypatch, error)


def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SAMBA_LM_TRACEBACK", "1")
    code, _ = _run(monkeypatch, UserError("lr = -1"))
    assert code == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("samba-lm: error: lr = -1\n")


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = _run(monkeypatch, KeyboardInterrupt())
    assert code == 130
    assert _message(capsys) == "samba-lm: interrupted\n"


def test_a_closed_pipe_is_quiet() -> None:
    # More help than a pipe holds, so that the writer meets the closed end.
    script = (
        "import sys; from samba_lm.cli import main as m; m._help = lambda *a: 'x' * 1_000_000; sys.exit(m.main([]))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (141, b"")


def test_a_closed_pipe_is_quiet_where_rich_writes() -> None:
    command = [sys.executable, "-m", "samba_lm", "models"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (141, b"")


@pytest.mark.parametrize(
    ("shell_line", "code"),
    [
        ("--help >&-", 0),
        ("tran 2>&-", 2),
        ("models samba-micro >/dev/full", 2),
        ("generate samba-micro - <&-", 2),
        ("chat samba-micro <&-", 2),
    ],
)
def test_closed_and_full_streams(shell_line: str, code: int) -> None:
    script = f"{sys.executable} -m samba_lm {shell_line}"
    ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert ran.returncode == code, ran.stderr
    assert "Traceback" not in ran.stderr
    assert ran.stderr.count("samba-lm: error:") == (0 if "2>&-" in shell_line else code // 2)


def test_a_narrow_encoding_shows_what_it_can() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "samba_lm", "models", "samba-micro"],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert b"embedding" in ran.stdout
    assert ran.stdout.isascii()


def test_ctrl_c_of_a_real_process(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text(
        "import time\ndef main(argv):\n    print('up', flush=True)\n    time.sleep(60)\n"
    )
    script = (
        "import sys; from samba_lm.cli import main as m; "
        "m.COMMANDS = (m.Command('sleep', '', 'sleeper'),); sys.exit(m.main(['sleep']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "samba-lm: interrupted\n")


HEAVY = {"torch", "numpy", "pydantic", "rich", "tyro", "tokenizers", "safetensors", "matplotlib"}


@pytest.mark.parametrize("argv", [[], ["--help"], ["--version"], ["data"], ["nonsense"]])
def test_the_shell_alone_imports_nothing_heavy(argv: list[str]) -> None:
    script = f"import sys, samba_lm.cli.main as m; m.main({argv}); print(*sys.modules, file=sys.stderr)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(ran.stderr.split())
    assert "samba_lm.cli.main" in loaded
    assert not loaded & HEAVY


def test_help_of_a_command_waits_for_no_torch() -> None:
    # One process for all: torch, once loaded, would stay loaded, and the first command named is the one at fault.
    script = """
import sys
from samba_lm.cli import main as m
for command in m.COMMANDS:
    try:
        m.main([*command.name.split(), "--help"])
    except SystemExit as stop:
        assert stop.code == 0, command.name
    print(command.name, "loads" if "torch" in sys.modules else "is light", file=sys.stderr)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stderr.splitlines() == [f"{command.name} is light" for command in shell.COMMANDS]


def test_a_command_that_compiles_nothing_waits_for_no_compiler() -> None:
    script = """
import sys
from samba_lm.cli.main import main
assert main(["generate", "samba-tiny", "--prompt", "a", "--max-tokens", "1"]) == 0
assert "torch" in sys.modules
assert "torch._dynamo" not in sys.modules
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_python_m_is_the_same_command() -> None:
    ran = subprocess.run([sys.executable, "-m", "samba_lm", "tran"], capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert "Did you mean 'train'?" in ran.stderr


@pytest.mark.parametrize("module", sorted({command.module for command in shell.COMMANDS}))
def test_every_command_has_its_main(module: str) -> None:
    path = SOURCE / f"{module.rpartition('.')[2]}.py"
    functions = {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
    assert [each.arg for each in functions["main"].args.args] == ["argv"]

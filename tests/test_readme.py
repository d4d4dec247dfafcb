"""What the README says is run: the Python example as it stands, the command lines on a small text."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, section: str) -> list[str]:
    """The code blocks of a section."""
    text = README.split(f"\n## {section}\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_python_example_runs(tmp_path: Path) -> None:
    (example,) = blocks("python", "From Python")
    assert len([line for line in example.splitlines() if line and not line.startswith("import")]) <= 10
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("page", ["engine.md", "contexts.md"])
def test_the_python_of_other_pages_runs(page: str, tmp_path: Path) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    example = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    prepare = "import samba_lm as s; s.save(s.create('samba-tiny'), 'runs/first', s.ByteTokenizer())\n"
    command = [sys.executable, "-c", prepare + example]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_command_lines_run(tmp_path: Path) -> None:
    (session,) = blocks("sh", "From the command line")
    texts = tmp_path / "my-text"
    texts.mkdir()
    for i in range(40):
        (texts / f"{i}.txt").write_text(f"Text number {i}. " * 60)
    for line in session.strip().splitlines():
        words = shlex.split(line.replace("--train.steps 200", "--train.steps 2").replace("512,1024", "512"))
        assert words[0] == "samba-lm"
        done = subprocess.run(
            [sys.executable, "-m", "samba_lm", *words[1:]],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, f"{line}: {done.stderr}"


def test_every_command_is_in_the_table() -> None:
    from samba_lm.cli.main import COMMANDS

    table = README.split("| command | what it does |", 1)[1].split("\n\n", 1)[0]
    for command in COMMANDS:
        for word in command.name.split():
            assert word in table, f"{command.name} is not in the README's table"


def test_files_named_in_the_readme_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), f"README links to {target}"

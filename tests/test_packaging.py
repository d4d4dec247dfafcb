"""The wheel: what is inside, and that it runs where only it was installed.

The clean environment borrows the packages of the running one (torch among them) through a .pth file, so that the test
needs no network and no minutes; samba-lm itself comes from the wheel alone, and that it does is asserted.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from fnmatch import fnmatch
from pathlib import Path

import pytest

import samba_lm

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SOURCES = [
    path.relative_to(ROOT / "src").as_posix()
    for path in (ROOT / "src" / "samba_lm").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
]

STAND_IN = [f"samba_lm/shipped/stand-in/{name}" for name in ("config.json", "model.safetensors", "README.md")]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: setuptools leaves a build folder in the source, stale the next time."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("pyproject.toml", "README.md", "LICENSE", *(f"src/{path}" for path in SOURCES)):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    for name in STAND_IN:  # what is shipped is packed, whether or not this checkout has any
        (source / "src" / name).parent.mkdir(exist_ok=True)
        (source / "src" / name).write_text("{}")
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    _run([sys.executable, "-m", "pip", *build, str(source)])
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new virtual environment in which the wheel is installed."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    install = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    _run([sys.executable, "-m", "pip", "--python", str(python), *install, str(wheel)])
    # Python does not read the .pth files of a folder named by a .pth file, so our editable install is not borrowed.
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "borrowed.pth").write_text("\n".join(sorted(borrowed)) + "\n")
    where = _run([str(python), "-c", "import samba_lm; print(samba_lm.__file__)"])
    assert Path(where.strip()).is_relative_to(packages)
    return python


def _run(command: list[str]) -> str:
    ran = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False, timeout=120)
    assert ran.returncode == 0, f"{' '.join(command)}\n{ran.stdout}{ran.stderr}"
    return ran.stdout


def _metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        licence = archive.read(next(name for name in names if name.endswith("licenses/LICENSE"))).decode()
    inside = {name for name in names if ".dist-info/" not in name}
    data = ("/page/", "/shipped/")
    ours = {
        name
        for name in SOURCES
        if name.endswith((".py", ".toml", ".cuh", "py.typed")) or any(folder in name for folder in data)
    }
    assert {*ours, *STAND_IN} == inside
    assert "samba_lm/py.typed" in inside
    assert any(name.endswith(".toml") for name in inside), "no recipes"
    assert any(name.endswith(".cuh") for name in inside), "no CUDA kernels"
    assert "samba_lm/serve/page/index.html" in inside
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence


def test_metadata(wheel: Path) -> None:
    metadata = _metadata(wheel)
    assert metadata["Name"] == "samba-lm"
    assert metadata["Version"] == samba_lm.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"


def test_the_installed_command_runs(python: Path) -> None:
    command = str(python.with_name("samba-lm"))
    assert _run([command, "--version"]) == f"samba-lm {samba_lm.__version__}\n"
    assert "samba-lm COMMAND" in _run([command])
    assert "samba-tiny" in _run([command, "models", "samba-tiny"])
    assert "stand-in" in _run([str(python), "-c", "import samba_lm.shipped; print(samba_lm.shipped.names())"])
    assert "runs/samba-421m" in _run([command, "train", "samba-421m", "--help"])  # the recipe's own train.out


def test_help_imports_no_torch(python: Path) -> None:
    ran = subprocess.run(
        [str(python), "-X", "importtime", "-m", "samba_lm", "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    imported = {line.rpartition("|")[2].strip() for line in ran.stderr.splitlines()}
    assert "samba_lm.cli.main" in imported
    heavy = {"torch", "numpy", "pydantic", "tyro", "rich", "tokenizers", "matplotlib"}
    assert not heavy & {name.partition(".")[0] for name in imported}


EVERY_MODULE = """
import fnmatch, importlib, pkgutil, sys
for name in {blocked!r}:
    sys.modules[name] = None
import samba_lm
for module in pkgutil.walk_packages(samba_lm.__path__, "samba_lm."):
    if not any(fnmatch.fnmatch(module.name, each) for each in {needy!r}):
        importlib.import_module(module.name)
        print(module.name)
"""
# Those that `ops/backend.py` loads where their package is there, and what Ray itself loads; `samba_lm.ops.*.cuda` and
# `nvrtc` look for theirs at the first kernel and are imported here too.
NEEDY = [
    "samba_lm.__main__",
    "samba_lm.ops.*.triton",
    "samba_lm.ops.*triton_*",
    "samba_lm.ops.*.external",
    "samba_lm.eval.harness.model",
    "samba_lm.serve.ray",
]


def test_every_module_imports_without_triton_and_extras(python: Path) -> None:
    blocked = [
        "triton",
        "cuda",
        "fla",
        "ray",
        "pyarrow",
        "datasets",
        "transformers",
        "tensorboard",
        "pytest",
        "lm_eval",
    ]
    walk = EVERY_MODULE.format(blocked=blocked, needy=NEEDY)
    imported = set(_run([str(python), "-W", "error::SyntaxWarning", "-c", walk]).split())
    paths = [name.removesuffix(".py").removesuffix("/__init__") for name in SOURCES if name.endswith(".py")]
    modules = {path.replace("/", ".") for path in paths} - {"samba_lm"}
    assert imported == {name for name in modules if not any(fnmatch(name, each) for each in NEEDY)}
    assert "samba_lm.ops.nvrtc" in imported


# What constraints.txt leaves open, and why.
UNPINNED = {
    "triton": "A build of PyTorch for CUDA pins its own, which a pin here could contradict; and the CPU's "
    "tests, in the interpreter, are to meet the newest.",
}


def _name(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement)[0].lower().replace("_", "-")


def test_everything_we_ask_for_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert pins["torch"] == "2.13.0"
    assert all(re.fullmatch(r"\d[\w.]*", version) for version in pins.values()), "a pin for one machine only"
    extras = PROJECT["optional-dependencies"].values()
    asked = {_name(each) for each in (*PROJECT["dependencies"], *(each for extra in extras for each in extra))}
    assert asked - {"samba-lm"} - {_name(name) for name in pins} == UNPINNED.keys()


def test_installing_what_the_tests_need_leaves_the_build_of_torch_alone() -> None:
    """Packages that ask for torch and Triton of their own are for those who have a GPU."""
    extras = PROJECT["optional-dependencies"]
    assert not any("fla" in re.split(r"[\[\],]", each) for extra in ("test", "dev") for each in extras[extra])
    assert not {_name(each) for extra in ("test", "dev") for each in extras[extra]} & {
        "flash-linear-attention",
        "fla-core",
    }


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_without_a_fitting_python_says_so(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    old = tmp_path / "python-of-old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    ran = subprocess.run(
        ["make", "test", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True, env=_plain_make(), check=False
    )
    assert ran.returncode != 0
    assert "no Python 3.11 or newer" in ran.stderr
    assert not (tmp_path / ".venv").exists()


def _plain_make() -> dict[str, str]:
    """This process's environment without what an outer make (`make test`) hands to an inner one."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}

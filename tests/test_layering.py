"""Holds the doors of docs/design.md by walking every file's syntax tree; its table of rooms is read from there."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "samba_lm"
MAX_LINES = 600

MODEL_ROOMS = {"ops", "nn", "span", "state", "mixers", "model", "checkpoint", "convert"}
CLOSED = {  # what the order of the table alone would allow
    "ops": {"files", "validation", "config", "zoo"},
    "tokenizer": MODEL_ROOMS,
    "loss": MODEL_ROOMS,
    "data": MODEL_ROOMS,
    "train": {"eval", "serve"},
    "eval": {"train", "serve"},
    "serve": {"train", "eval"},
    "study": {"serve", "demo", "bench"},
}
NO_TORCH = {"errors", "files", "memory", "shipped", "validation", "config", "zoo"}
STANDARD_LIBRARY_ONLY = {"errors", "files", "memory", "shipped"}
# These run before any command is chosen, so they stay fast: `samba-lm --help` passes through no other.
START = {"__init__.py", "__main__.py", "cli/__init__.py", "cli/main.py"}
START_IMPORTS = {"samba_lm.__version__", "samba_lm.errors", "samba_lm.cli.main"}
# Optional packages, and who may import them (inside functions); nobody means ops/*/external.py alone.
EXTRAS = {
    "pyarrow": ("data/sources.py",),
    "tensorboard": ("train/trackers.py",),
    "torch.utils.tensorboard": ("train/trackers.py",),
    "wandb": ("train/trackers.py",),
    "transformers": ("convert/*", "bench/*"),
    "datasets": ("data/hub.py",),
    "fla": ("bench/peers.py",),
    "flash_attn": ("bench/peers.py",),
    "liger_kernel": ("bench/peers.py",),
    "mamba_ssm": ("bench/peers.py",),
    "causal_conv1d": ("bench/peers.py",),
    "fastapi": ("serve/*",),
    "starlette": ("serve/*",),
    "uvicorn": ("serve/*",),
    "prometheus_client": ("serve/*",),
    "llguidance": ("serve/*",),
    "ray": ("serve/ray.py",),
    "faker": ("data/names.py",),
    "rouge_score": ("eval/summaries.py",),
    "lm_eval": ("eval/harness/*",),
}
# Rooms that are an extra as a whole: they import its packages anywhere, and only functions import them.
WHOLE_EXTRAS = {"serve"}
# A module that is an extra: it derives from what the package gives, and only functions import it.
EXTRA_MODULES = {"eval/harness/model.py"}
# The GPU kernels: the public file triton.py of an operation, and what it is made of (triton_forward.py, ...).
KERNELS = ("ops/*/triton*.py", "ops/triton_math.py")
PARSERS = {"argparse", "optparse", "getopt", "click", "typer", "tyro", "sys.argv"}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# Names are computed here, from tables of our own modules or from what the user asks for.
COMPUTED_IMPORTS = {"__init__.py", "cli/main.py", "plugins.py"}


class Import(NamedTuple):
    """One imported thing, ``from a import b`` as ``a.b``; lazy: inside a function or for the type checker only."""

    name: str
    line: int
    lazy: bool

    def within(self, module: str) -> bool:
        return self.name == module or self.name.startswith(module + ".")


def rooms() -> list[str]:
    """The rooms in the order of the table in docs/design.md: each may import those before it."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    table = text[text.index("| room |") :].split("\n\n")[0]
    first_cells = [row.split("|")[1] for row in table.splitlines()[2:]]
    return [name for cell in first_cells for name in re.findall(r"`(\w+)(?:\.py|/\*?)`", cell)]


def violations(path: str, source: str, order: list[str]) -> list[str]:
    """Every rule that the file at ``path`` (relative to the package, with slashes) breaks, as ``path:line: rule``."""
    tree = ast.parse(source)
    imports = list(_imports(tree, path))
    found = [*_doors(path, imports, order), *_packages(path, imports), *_parsing(path, tree, imports)]
    found += [*_unsafe(tree, imports), *_habits(source, tree)]
    return [f"{path}:{line}: {rule}" for line, rule in sorted(set(found))]


def _imports(node: ast.AST, path: str, lazy: bool = False) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        inside = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            inside = True
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, inside) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from (Import(f"{_source(child, path)}.{alias.name}", child.lineno, inside) for alias in child.names)
        elif isinstance(child, ast.Call) and (name := _imported_by_call(child)) is not None:
            yield Import(name, child.lineno, inside)
        yield from _imports(child, path, inside)


def _source(node: ast.ImportFrom, path: str) -> str:
    """The absolute module of a ``from`` import; ``path`` is where it stands."""
    if not node.level:
        return node.module or ""
    package = ["samba_lm", *path.split("/")[:-1]]
    return ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])


def _called(call: ast.Call) -> str:
    return ast.unparse(call.func)


def _imported_by_call(node: ast.Call) -> str | None:
    """The module that ``importlib.import_module(...)`` or ``__import__(...)`` names, "" for a computed name."""
    if _called(node).split(".")[-1] not in ("import_module", "__import__"):
        return None
    first = node.args[0] if node.args else None
    return str(first.value) if isinstance(first, ast.Constant) else ""


def _room(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


def _doors(path: str, imports: list[Import], order: list[str]) -> Iterator[tuple[int, str]]:
    room = _room(path)
    if path in START:
        for each in imports:
            ours = any(each.within(module) for module in START_IMPORTS)
            if each.name and not each.lazy and not ours and each.name.split(".")[0] not in sys.stdlib_module_names:
                yield each.line, f"imports {each.name}, but --help passes here"
        if room != "cli":
            return
    if room not in order:
        yield 1, f"the room {room!r} is not in the table of docs/design.md"
        return
    for each in imports:
        if not each.name and path not in COMPUTED_IMPORTS:
            yield each.line, "a computed import goes around the doors"
        if each.name == "samba_lm":
            yield each.line, "imports the whole package, which goes around the doors: name the room"
        if not each.name.startswith("samba_lm.") or each.name == "samba_lm.__version__":
            continue
        other = each.name.split(".")[1]
        if other == room:
            continue
        if other not in order:
            yield each.line, f"imports {each.name}, which is in no room of docs/design.md"
        elif order.index(other) > order.index(room):
            yield each.line, f"{room} imports {other}, which stands below it"
        elif other in CLOSED.get(room, ()):
            yield each.line, f"{room} never imports {other}"


def _packages(path: str, imports: list[Import]) -> Iterator[tuple[int, str]]:
    room = _room(path)
    for each in imports:
        top = each.name.split(".")[0]
        if room in NO_TORCH and top == "torch":
            yield each.line, f"{room} imports no torch"
        elif room in STANDARD_LIBRARY_ONLY and top != "samba_lm" and top not in sys.stdlib_module_names:
            yield each.line, f"{room} imports no third-party package, and {top} is one"
        if top == "triton" and not any(fnmatch(path, kernels) for kernels in KERNELS):
            yield each.line, "only ops/*/triton*.py imports triton"
        kernel = re.match(r"samba_lm\.ops(\.\w+)?\.(triton\w*|external)\b", each.name)
        if kernel and not each.lazy and not any(fnmatch(path, kernels) for kernels in KERNELS):
            yield each.line, f"{each.name} is imported inside the function that needs it: not every machine can"
        for extra, owners in EXTRAS.items():
            if each.within(extra):
                if not any(fnmatch(path, owner) for owner in (*owners, "ops/*/external.py")):
                    yield (
                        each.line,
                        f"the optional package {extra} is not imported here, only in {owners or 'external.py'}",
                    )
                elif not each.lazy and room not in WHOLE_EXTRAS and path not in EXTRA_MODULES:
                    yield each.line, f"the optional package {extra} is imported inside the function that needs it"
        modules = {module.removesuffix(".py").replace("/", ".") for module in EXTRA_MODULES}
        for other in (WHOLE_EXTRAS - {room}) | modules:
            if each.within(f"samba_lm.{other}") and not each.lazy:
                yield each.line, f"samba_lm.{other} needs an extra: it is imported inside the function that needs it"
        if each.within("torch.distributed.fsdp") and not path.startswith("train/parallel/"):
            yield each.line, "only train/parallel/ wraps a model in FSDP"


def _parsing(path: str, tree: ast.AST, imports: list[Import]) -> Iterator[tuple[int, str]]:
    if _room(path) == "cli":
        return
    for each in imports:
        if any(each.within(parser) for parser in PARSERS):
            yield each.line, f"only cli parses arguments, and this imports {each.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.argv":
            yield node.lineno, "only cli parses arguments, and this reads sys.argv"


def _unsafe(tree: ast.AST, imports: list[Import]) -> Iterator[tuple[int, str]]:
    for each in imports:
        # An exception class reads nothing, and it is what torch.load raises for a foreign file.
        if any(each.within(module) for module in PICKLES) and each.name != "pickle.UnpicklingError":
            yield each.line, f"no pickle, and {each.name} is of its kind"
        if each.name in ("torch.load", "numpy.load"):
            yield each.line, f"write {each.name}(...) in full, so that its safety can be seen"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = _called(node)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in ("eval", "exec", "builtins.eval", "builtins.exec"):
            yield node.lineno, f"no {called}"
        if called == "torch.load" and options.get("weights_only") != "True":
            yield node.lineno, "torch.load without weights_only=True runs what the file says"
        if options.get("allow_pickle", "False") != "False":
            yield node.lineno, "allow_pickle runs what the file says"


def _habits(source: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    lines = len(source.splitlines())
    if lines > MAX_LINES:
        yield lines, f"{lines} lines: a file has at most {MAX_LINES}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _called(node) == "hasattr":
            yield node.lineno, "no hasattr probing"
        if isinstance(node, ast.ExceptHandler):
            caught = "" if node.type is None else ast.unparse(node.type)
            broad = not caught or re.search(r"\b(Base)?Exception\b", caught)
            if broad and not isinstance(node.body[-1], ast.Raise):
                yield node.lineno, "a broad except that does not raise hides defects: name what can happen"


def _sources() -> dict[str, str]:
    return {
        path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))
    }


def test_every_file_keeps_the_rules() -> None:
    order = rooms()
    found = [each for path, source in _sources().items() for each in violations(path, source, order)]
    assert not found, "\n" + "\n".join(found)


def test_every_kernel_says_whether_multiplications_fuse_with_additions() -> None:
    """Triton's default changes with its version 3.10, and with it digits and speed."""
    launches = 0
    for path, source in _sources().items():
        for node in ast.walk(ast.parse(source)) if any(fnmatch(path, kernels) for kernels in KERNELS) else ():
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launches += 1
                assert "enable_fp_fusion" in {keyword.arg for keyword in node.keywords}, f"{path}:{node.lineno}"
    assert launches > 20


def test_the_walk_sees_the_package() -> None:
    sources = _sources()
    assert {"__init__.py", "errors.py", "cli/main.py"} <= sources.keys()
    assert {"errors", "files", "config", "ops", "model", "data", "train", "eval", "cli"} <= set(rooms())
    # A parser that saw nothing would find nothing wrong.
    assert any(each.within("samba_lm.errors") for each in _imports(ast.parse(sources["files.py"]), "files.py"))


def test_tests_are_short_files_too() -> None:
    long = {
        path.name: lines
        for path in (ROOT / "tests").rglob("*.py")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert not long


PLANTED = [
    ("stands below", "model.py", "from samba_lm.train import loop"),
    ("stands below", "mixers/mamba.py", "from ..model import SambaLM"),
    ("stands below", "nn/norm.py", "def f():\n    from samba_lm import model"),
    ("stands below", "data/loader.py", "import importlib\nimportlib.import_module('samba_lm.train.loop')"),
    ("eval never imports train", "eval/perplexity.py", "from samba_lm.train.loop import fit"),
    ("stands below", "train/loop.py", "from samba_lm import eval"),
    ("data never imports model", "data/loader.py", "import samba_lm.model"),
    ("data never imports mixers", "data/loader.py", "from samba_lm.mixers.base import Mixer"),
    ("ops never imports config", "ops/gla/cpu.py", "from samba_lm.config import ModelConfig"),
    ("whole package", "eval/report.py", "import samba_lm"),
    ("not in the table", "newroom/a.py", ""),
    ("in no room", "cli/train.py", "from samba_lm.newroom import a"),
    ("computed import", "data/loader.py", "import importlib\nimportlib.import_module(name)"),
    ("--help passes here", "cli/main.py", "import torch"),
    ("--help passes here", "__init__.py", "from samba_lm.model import SambaLM"),
    ("config imports no torch", "config.py", "def f():\n    import torch.nn"),
    ("zoo imports no torch", "zoo.py", "from torch import Tensor"),
    ("no third-party", "files.py", "import rich"),
    ("imports triton", "ops/gla/cpu.py", "import triton.language as tl"),
    ("inside the function", "ops/gla/__init__.py", "from samba_lm.ops.gla import triton"),
    ("inside the function", "ops/gla/__init__.py", "from .external import chunk_gla"),
    ("optional package fla", "ops/gla/__init__.py", "def f():\n    import fla"),
    ("optional package transformers", "model.py", "def f():\n    from transformers import AutoModel"),
    ("optional package pyarrow is imported inside", "data/sources.py", "import pyarrow.parquet as pq"),
    ("optional package torch.utils.tensorboard is im", "train/trackers.py", "from torch.utils.tensorboard import X"),
    ("optional package fastapi", "engine/engine.py", "def f():\n    import fastapi"),
    ("serve needs an extra", "cli/serve.py", "from samba_lm.serve import app"),
    ("harness.model needs an extra", "cli/eval_harness.py", "from samba_lm.eval.harness.model import HarnessLM"),
    ("optional package lm_eval is imported inside", "eval/harness/run.py", "import lm_eval"),
    ("FSDP", "train/loop.py", "from torch.distributed.fsdp import fully_shard"),
    ("imports argparse", "train/loop.py", "import argparse"),
    ("imports tyro", "config.py", "from tyro.conf import Positional"),
    ("reads sys.argv", "bench/run.py", "import sys\nprint(sys.argv[1:])"),
    ("imports sys.argv", "bench/run.py", "from sys import argv"),
    ("no pickle", "checkpoint.py", "import pickle"),
    ("no eval", "config.py", "eval('1')"),
    ("no exec", "config.py", "exec('1')"),
    ("weights_only", "convert/official.py", "import torch\ntorch.load(path)"),
    ("weights_only", "convert/official.py", "import torch\ntorch.load(path, weights_only=False)"),
    ("in full", "convert/official.py", "from torch import load"),
    ("allow_pickle", "data/shards.py", "import numpy as np\nnp.load(path, allow_pickle=True)"),
    ("hasattr", "model.py", "hasattr(x, 'y')"),
    ("broad except", "model.py", "try:\n    pass\nexcept Exception:\n    pass"),
    ("broad except", "model.py", "try:\n    pass\nexcept (ValueError, BaseException):\n    pass"),
    ("broad except", "model.py", "try:\n    pass\nexcept:\n    pass"),
    ("601 lines", "model.py", "\n" * 601),
]


@pytest.mark.parametrize(("rule", "path", "source"), PLANTED)
def test_a_planted_violation_is_found(rule: str, path: str, source: str) -> None:
    found = violations(path, source, rooms())
    assert len(found) == 1, found
    assert rule in found[0]
    assert found[0].startswith(f"{path}:")


ALLOWED = [
    ("__init__.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from samba_lm.model import SambaLM"),
    ("__main__.py", "import sys\nfrom samba_lm.cli.main import main"),
    ("cli/train.py", "import sys, tyro, torch\nfrom samba_lm.train import loop\nprint(sys.argv)"),
    ("cli/output.py", "from samba_lm import __version__"),
    ("ops/gla/triton.py", "import triton\nfrom samba_lm.ops.backend import Backend"),
    ("ops/gla/external.py", "def f():\n    import fla"),
    ("ops/gla/__init__.py", "def f():\n    from samba_lm.ops.gla import triton"),
    ("data/sources.py", "def f():\n    import pyarrow"),
    ("serve/app.py", "import fastapi"),
    ("cli/serve.py", "def f():\n    from samba_lm.serve import app"),
    ("train/trackers.py", "def f():\n    from torch.utils.tensorboard import SummaryWriter"),
    ("eval/harness/model.py", "from lm_eval.api.model import TemplateLM"),
    ("demo/run.py", "from samba_lm.train import loop\nfrom samba_lm.eval import perplexity"),
    ("convert/official.py", "from pickle import UnpicklingError"),
    ("eval/perplexity.py", "import torch\ntorch.load(p, weights_only=True)\nmodel.eval()"),
    ("tokenizer.py", "try:\n    pass\nexcept Exception as error:\n    raise UserError('x') from error"),
    ("model.py", "try:\n    pass\nexcept (ValueError, KeyError):\n    pass" + "\n" * 596),
]


@pytest.mark.parametrize(("path", "source"), ALLOWED)
def test_what_is_allowed_passes(path: str, source: str) -> None:
    assert violations(path, source, rooms()) == []

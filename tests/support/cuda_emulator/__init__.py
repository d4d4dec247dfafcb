"""Runs the CUDA kernels on the CPU: compiled by g++ against a twin of their primitives, each CUDA thread a fiber."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from samba_lm.ops import nvrtc

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs g++")

_libraries: dict[str, ctypes.CDLL] = {}


def run(launch: nvrtc.Launch, seed: int = 0) -> None:
    """``nvrtc.launch`` for CPU tensors; ``seed`` draws the order in which threads take turns."""
    parameters = ctypes.create_string_buffer(launch.parameters, len(launch.parameters))
    _library(launch).launch(parameters, *launch.grid, launch.threads, seed)


def _library(launch: nvrtc.Launch) -> ctypes.CDLL:
    twins = [HERE / path.name if (HERE / path.name).exists() else path for path in launch.files]
    files = (*twins, HERE / "launch.cuh")
    kind = launch.entry.split("_")[0] if launch.entry == "sum_partials" else launch.entry.split("_")[1]
    special = {"SHARED_BYTES": launch.shared, "ENTRY": launch.entry, "PARAMETER_TYPE": kind.title()}
    defines = [*launch.defines, *special.items()]
    text = nvrtc.source(files)
    key = hashlib.sha256(repr((text, defines)).encode()).hexdigest()[:16]
    if key not in _libraries:
        folder = Path(tempfile.mkdtemp(prefix="emulator-"))
        try:
            (folder / "kernel.cpp").write_text(text)
            options = ["-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=fast", "-mfma", "-w"]
            macros = [f"-D{name}={value}" for name, value in defines]
            command = [str(COMPILER), *options, *macros, "-o", str(folder / "kernel.so"), str(folder / "kernel.cpp")]
            subprocess.run(command, check=True)
            _libraries[key] = ctypes.CDLL(str(folder / "kernel.so"))
        finally:
            shutil.rmtree(folder)
    return _libraries[key]

"""CUDA C++ kernels compiled where they run: NVRTC and the driver, both through pip packages; no toolkit, no nvcc.

``cuda-bindings`` and ``nvidia-cuda-nvrtc`` come with PyTorch's CUDA builds. A compiled kernel is kept in the user's
cache folder (``$XDG_CACHE_HOME``, else ``~/.cache``), named by a hash of all that it depends on.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from samba_lm.errors import UserError, one_line

OPTIONS = ("--std=c++17",)
OLDEST = (8, 0)
"""Compute capability that the kernels need: they copy to shared memory without waiting."""
STATIC_SHARED_LIMIT = 48 * 1024
"""Bytes of shared memory that a block gets without asking."""


class Launch(NamedTuple):
    """One launch of a kernel: what to compile, and what to run it on."""

    entry: str
    """Name of the kernel in the source (``extern "C"``)."""
    files: tuple[Path, ...]
    """Texts that make up the source, in order."""
    defines: tuple[tuple[str, int], ...]
    grid: tuple[int, int]
    threads: int
    shared: int
    """Bytes of dynamic shared memory of a block."""
    parameters: bytes
    """The kernel's one parameter, a struct."""
    early: bool = False
    """It may begin before the kernel before it on the stream has ended, and itself waits for that one's results: see
    ``griddepcontrol``. Needs compute capability 9.0."""
    beside: bool = False
    """It shares multiprocessors with the kernels before and after it, which must then divide the memory in each alike:
    as much as can be is shared memory, whatever this kernel needs."""


@torch.compiler.assume_constant_result  # torch.compile could not trace the bindings
def why_not() -> str:
    """Why kernels cannot be compiled in this process; "" where they can."""
    return _why_not()


@functools.cache
def _why_not() -> str:
    try:
        _, nvrtc = _bindings()
    except ImportError as error:
        return f"needs the packages cuda-bindings and nvidia-cuda-nvrtc ({one_line(str(error))})"
    try:
        nvrtc.nvrtcVersion()
    except RuntimeError as error:  # cuda-bindings' error where it finds no library
        return f"cuda-bindings found no NVRTC library; install nvidia-cuda-nvrtc ({one_line(str(error))})"
    return ""


def _bindings() -> tuple[ModuleType, ModuleType]:
    from cuda.bindings import driver, nvrtc

    return driver, nvrtc


def launch(what: Launch, device: torch.device) -> None:
    """Run ``what`` on PyTorch's current stream of ``device``. Its tensors must stay alive until it is enqueued."""
    driver, _ = _bindings()
    with torch.cuda.device(device):
        index = torch.cuda.current_device()
        if not int(
            _check(driver.cuCtxGetCurrent())
        ):  # the thread (autograd has its own) has called no CUDA runtime yet
            _check(driver.cuCtxSetCurrent(_check(driver.cuDevicePrimaryCtxRetain(index))))
        function = _function(what.entry, what.files, what.defines, what.shared, what.beside, index)
        block = ctypes.create_string_buffer(what.parameters, len(what.parameters))
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(block))
        stream = torch.cuda.current_stream(index).cuda_stream
        arguments = (ctypes.addressof(pointers), 0)
        if not what.early:
            _check(driver.cuLaunchKernel(function, *what.grid, 1, what.threads, 1, 1, what.shared, stream, *arguments))
            return
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = *what.grid, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = what.threads, 1, 1
        config.sharedMemBytes, config.hStream = what.shared, stream
        early = driver.CUlaunchAttribute()
        early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        early.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [early], 1
        _check(driver.cuLaunchKernelEx(config, function, *arguments))


@torch.compiler.assume_constant_result
def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that a block may have on ``device``, a CUDA GPU; 0 where kernels cannot run on it."""
    return _shared_limit(device)


@functools.cache
def _shared_limit(device: torch.device) -> int:
    if torch.cuda.get_device_capability(device) < OLDEST or why_not():
        return 0
    driver, _ = _bindings()
    with torch.cuda.device(device):
        number = _check(driver.cuDeviceGet(torch.cuda.current_device()))
    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    return _check(driver.cuDeviceGetAttribute(attribute, number))


_modules: list[Any] = []


@functools.cache
def _function(
    entry: str, files: tuple[Path, ...], defines: tuple[tuple[str, int], ...], shared: int, beside: bool, device: int
) -> Any:
    """The loaded kernel, for the current device. The first call of a variant compiles it (a second or two)."""
    driver, _ = _bindings()
    major, minor = torch.cuda.get_device_capability(device)
    module = _check(driver.cuModuleLoadData(compiled(files, defines, f"sm_{major}{minor}")))
    _modules.append(module)  # it lives as long as the process
    function = _check(driver.cuModuleGetFunction(module, entry.encode()))
    if shared > STATIC_SHARED_LIMIT:
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(driver.cuFuncSetAttribute(function, attribute, shared))
    if beside:
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
        _check(driver.cuFuncSetAttribute(function, attribute, 100))  # percent
    return function


def compiled(files: tuple[Path, ...], defines: tuple[tuple[str, int], ...], arch: str) -> bytes:
    """The machine code (a cubin) for ``arch``, such as ``"sm_90"``: from the cache, or compiled and kept there.

    Raises UserError where NVRTC is missing or does not know the architecture.
    """
    if problem := why_not():
        raise UserError(f"the cuda backend {problem}")
    _, nvrtc = _bindings()
    version = ".".join(str(part) for part in _check(nvrtc.nvrtcVersion()))
    text = source(files)
    options = [f"--gpu-architecture={arch}", *OPTIONS, *(f"-D{name}={value}" for name, value in defines)]
    key = hashlib.sha256("\0".join([version, *options, text]).encode()).hexdigest()
    cached = _cache_folder() / f"{files[-1].stem}-{arch}-{key[:32]}.cubin"
    code = _kept(cached)
    if code is not None:
        return code
    code = _compile(nvrtc, text, options)
    _keep(cached, code)
    return code


def source(files: tuple[Path, ...]) -> str:
    """One text of all ``files``; compilers' messages name the file and line."""
    return "".join(f'#line 1 "{path.name}"\n{path.read_text(encoding="utf-8")}' for path in files)


def _compile(nvrtc: ModuleType, text: str, options: list[str]) -> bytes:
    program = _check(nvrtc.nvrtcCreateProgram(text.encode(), b"kernel.cu", 0, [], []))
    try:
        encoded = [option.encode() for option in options]
        (result,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program))
            _check(nvrtc.nvrtcGetProgramLog(program, log))
            message = log.rstrip(b"\0 \n").decode(errors="replace")
            raise UserError(f"NVRTC does not compile a kernel of the cuda backend ({result.name}):\n{message}")
        code = b" " * _check(nvrtc.nvrtcGetCUBINSize(program))
        _check(nvrtc.nvrtcGetCUBIN(program, code))
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)


DIGEST = hashlib.sha256().digest_size
"""Bytes before a kept kernel: its own digest, so that a file cut short by a crash is compiled again."""


def _cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "samba-lm" / "kernels"


def _kept(path: Path) -> bytes | None:
    """What :func:`_keep` wrote; None if there is nothing, or not all of it."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    code = data[DIGEST:]
    return code if hashlib.sha256(code).digest() == data[:DIGEST] else None


def _keep(path: Path, code: bytes) -> None:
    """Write ``code`` at once or not at all: other processes may read and write the same file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(code).digest() + code)
            os.replace(name, path)
        except OSError:
            os.unlink(name)
            raise
    except OSError as error:  # a read-only home: the next process compiles again
        print(f"samba-lm: cannot keep compiled kernels in {path.parent}: {error}", file=sys.stderr)


def _check(result: tuple) -> Any:
    """What a call of the bindings returned, without its status; RuntimeError if that is not success."""
    status, *values = result
    if status.value != 0:
        raise RuntimeError(f"{type(status).__name__}: {status.name}")
    if len(values) > 1:
        return tuple(values)
    return values[0] if values else None

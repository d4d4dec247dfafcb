"""Functions run in several real processes at once, connected by gloo as torchrun's are.

``on_ranks(4, function, a, b)`` gives what ``function(a, b)`` returned on each of four ranks. The function stands at the
top of a test's module; arguments and results are what JSON holds (numbers come back exactly), and folders go as text.

A server that has imported torch and samba_lm once forks the ranks, so that they start within milliseconds. It starts
with the first call and ends with the tests.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

IGNORED = (
    "`torch.jit.script_method` is deprecated",
    "TensorFloat32 tensor cores",
    "The .grad attribute of a Tensor that is not a leaf",
    "Attempting to run cuBLAS, but there was no current CUDA context",
    "Synchronization debug mode is a prototype feature",
)
"""How PyTorch's warnings begin that pyproject.toml has pytest pass over."""
_server: subprocess.Popen[str] | None = None


class RanksError(AssertionError):
    """A rank failed, or did not end in time; holds what the ranks wrote to stderr."""


def on_ranks(world: int, function: Callable[..., Any], *args: Any, timeout: float = 120, **env: str) -> list[Any]:
    """What ``function(*args)`` returns on each of ``world`` ranks, which have ``env`` besides torchrun's variables.

    Raises RanksError when a rank raises, exits with another code than 0, or is not done after ``timeout`` seconds.
    """
    ended = run_ranks(world, function, *args, timeout=timeout, **env)
    if any(code for code, _, _ in ended):
        raise RanksError("\n".join(f"rank {i}: exit code {c}\n{text}" for i, (c, _, text) in enumerate(ended)))
    return [result for _, result, _ in ended]


def run_ranks(
    world: int, function: Callable[..., Any], *args: Any, timeout: float = 120, **env: str
) -> list[tuple[int, Any, str]]:
    """How each rank ended: its exit code (-9: killed, as all are that are not done in time), what the function
    returned (None if it did not), and what the rank wrote to stdout and stderr."""
    global _server
    if _server is None or _server.poll() is not None:
        _server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # The server must not begin to use a GPU: its forks could not.
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
        )
        atexit.register(_server.kill)
    assert _server.stdin is not None
    assert _server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        order = {
            "file": sys.modules[function.__module__].__file__,
            "function": function.__qualname__,
            "args": args,
            "world": world,
            "timeout": timeout,
            "env": {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), **env},
            "path": sys.path,
            "folder": folder,
        }
        print(json.dumps(order), file=_server.stdin, flush=True)
        answer = _server.stdout.readline()
        if not answer:
            raise RanksError("the server of ranks could not start: see stderr")
        codes = json.loads(answer)
        ended = []
        for rank, code in enumerate(codes):
            result = Path(folder, f"{rank}.json")
            text = Path(folder, f"{rank}.txt").read_text(errors="replace")
            ended.append((code, json.loads(result.read_text()) if result.exists() else None, text))
        return ended


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _serve() -> None:
    import torch
    import torch._dynamo  # what sharding imports

    import samba_lm.train.loop
    import samba_lm.train.parallel.group  # noqa: F401 - so that no rank has to

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which then ends this
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(_run(order)), flush=True)


def _run(order: dict[str, Any]) -> list[int]:
    """Fork the ranks and wait for them: their exit codes."""
    pids = []
    for rank in range(order["world"]):
        pid = os.fork()
        if pid == 0:
            _rank(order, rank)  # never returns
        pids.append(pid)
    deadline = time.monotonic() + order["timeout"]
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        for rank, pid in enumerate(pids):
            if rank not in codes:
                if time.monotonic() > deadline:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[rank] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return [codes[rank] for rank in range(len(pids))]


def _rank(order: dict[str, Any], rank: int) -> None:
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        folder = Path(order["folder"])
        out = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (out, 1), (out, 2)):
            os.dup2(source, target)
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": order["world"], "LOCAL_WORLD_SIZE": order["world"]}
        os.environ.update({key: str(value) for key, value in numbers.items()}, **order["env"])
        sys.path[:] = order["path"]
        warnings.simplefilter("error")  # as in pytest, and with what its settings let pass
        for words in IGNORED:
            warnings.filterwarnings("ignore", message=words)
        spec = importlib.util.spec_from_file_location("ranks_test", order["file"])
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["ranks_test"] = module
        spec.loader.exec_module(module)
        result = getattr(module, order["function"])(*order["args"])
        (folder / f"{rank}.json").write_text(json.dumps(result))
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()

"""Joining a run: from what torchrun says, and a recipe, to :class:`Parallel`."""

from __future__ import annotations

import itertools
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from samba_lm.errors import UserError
from samba_lm.train.parallel.parallel import Parallel
from samba_lm.train.recipe import ParallelSection


def connect(device: str = "auto", section: ParallelSection | None = None) -> Parallel:
    """Join the run: this process, and those that torchrun started beside it, as ``section`` arranges them.

    ``device``: "auto" is a CUDA GPU if there is one, else the CPU; of several processes on a machine each has a GPU of
    its own. To join again in the same processes makes another arrangement of them.

    Raises UserError where processes and section do not fit each other, or there is no such device.
    """
    section = section or ParallelSection()
    world = _variable("WORLD_SIZE", 1)
    sizes = layout(section, world)
    if world == 1:
        return Parallel(device=pick_device(device))
    picked = _own_device(device)
    if not dist.is_initialized():
        # gloo besides NCCL: what the hosts agree on need not wait for their GPUs.
        backend = "cpu:gloo,cuda:nccl" if picked.type == "cuda" else "gloo"
        try:
            timeout = timedelta(seconds=section.timeout)
            dist.init_process_group(backend, timeout=timeout, **_store_of_this_start(timeout))
        except (ValueError, dist.DistError) as error:  # a variable is missing, or nobody came
            raise UserError(
                f"Process {started_rank()} of {world} did not meet the others within parallel.timeout = "
                f"{section.timeout:g} s: {error} Start all with torchrun."
            ) from error
    from samba_lm.train.parallel.group import group  # sharding is a second of imports

    return group(picked, sizes)


_meetings = itertools.count()
"""Of this process: one for each run, where a program trains several one after the other."""


def _store_of_this_start(timeout: timedelta) -> dict[str, Any]:
    """Where processes meet that torchrun started anew after a failure, or that met before: apart from what was left
    there then.

    torchrun keeps its store over its restarts (PyTorch's issue 135712), so that a process could find the address of one
    that is dead. Of several machines each counts its own restarts: there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 helps.
    """
    started, alone = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), os.environ.get("LOCAL_WORLD_SIZE")
    number = next(_meetings)
    if alone != os.environ.get("WORLD_SIZE"):
        started = "0"
    if started == "0" and number == 0:
        return {}
    store, rank, world = next(rendezvous("env://", timeout=timeout))
    return {"store": PrefixStore(f"samba_lm/start-{started}-{number}", store), "rank": rank, "world_size": world}


def layout(section: ParallelSection, world: int) -> tuple[int, int, int]:
    """How many of ``world`` processes replicate, shard and share rows out: three factors of it.

    Raises UserError where there are none.
    """
    others = section.replicate * section.context
    shard = max(1, world // others) if section.shard == "auto" else section.shard
    sizes = section.replicate, shard, section.context
    if others * shard != world:
        asked = f"replicate {section.replicate} x shard {section.shard} x context {section.context}"
        here = "is one process" if world == 1 else f"are {world}"
        wanted = f"a multiple of {others}" if section.shard == "auto" else str(others * shard)
        raise UserError(
            f"[parallel] {asked} needs {wanted} processes, but there {here}: change it, or torchrun's --nproc-per-node."
        )
    return sizes


def started_rank() -> int:
    """This process's number among those that torchrun started, before they are connected; 0 without torchrun."""
    return _variable("RANK", 0)


def _variable(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"The variable {name} is {text!r}: torchrun sets it to a number; without torchrun unset it.")
    return int(text)


def pick_device(device: str) -> torch.device:
    """Resolve "auto", "cpu", "cuda", "cuda:1". Raises UserError when there is no such device."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError:
        raise UserError(f"Unknown device {device!r}: use auto, cpu, cuda or cuda:N.") from None
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"Device {device!r} asked for, but {torch.cuda.device_count()} CUDA GPUs found: use auto or cpu."
        )
    if picked.type not in ("cpu", "cuda"):
        raise UserError(f"Device {device!r} is not supported for training: use auto, cpu or cuda.")
    return picked


def _own_device(device: str) -> torch.device:
    """What one of several processes computes on: the CPU, or the GPU of its number on this machine, made current."""
    picked = pick_device(device)
    if picked.type == "cpu":
        return picked
    if picked.index is not None:
        raise UserError(f"Device {device!r} is one GPU, and there are several processes: use cuda, for one each.")
    number, found = _variable("LOCAL_RANK", 0), torch.cuda.device_count()
    here = _variable("LOCAL_WORLD_SIZE", number + 1)
    if here > found:
        raise UserError(
            f"{here} processes on this machine, but {found} CUDA GPUs: start {found} (--nproc-per-node), or use "
            "--train.device cpu."
        )
    own = torch.device("cuda", number)
    torch.cuda.set_device(own)
    return own

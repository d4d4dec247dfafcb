"""``samba-lm bench scale``: training on 1, 2, 4 ... GPUs of this machine, against one of them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

from rich.console import Console

from samba_lm.cli.bench_session import within
from samba_lm.cli.bench_table import figures_table
from samba_lm.cli.output import JsonFile, write_json
from samba_lm.cli.parse import parse, several
from samba_lm.errors import UserError
from samba_lm.files import read_json, write_text

PROG = "samba-lm bench scale"
MOST = 64
LAST_LINES = 3
PART = "SAMBA_LM_BENCH_SCALE_PART"
"""Variable that tells a process which torchrun started for this command to measure, and where to write it."""


def _numbers(words: list[str]) -> tuple[int, ...]:
    return tuple(int(word) for word in words[0].split(","))


@dataclass(frozen=True)
class BenchScale:
    """Train on several numbers of this machine's GPUs and compare them with one: the speed of each GPU at the same
    local batch (FSDP2), very long rows shared out among the GPUs (context parallelism), and losses on the same batches
    in every layout. Each number of GPUs is a torchrun of its own. Random tokens, random weights."""

    gpus: Annotated[tuple[int, ...], several("N,N,...", _numbers)] = (1, 2, 4)
    """Numbers of GPUs, 1 among them. On a CPU: of processes."""
    model: str = "samba-1.3b"
    """Whose speed is measured."""
    rows: int = 8
    """Rows of each GPU and step."""
    micro_batch: int = 4
    """Rows computed at once; divides --rows."""
    length: int = 4096
    """Tokens of a row."""
    steps: int = 8
    """Steps timed, after 3 to warm up."""
    long_model: str = "samba-421m"
    """Whose long rows are shared out, with full activation checkpointing."""
    long_length: int = 1 << 20
    """Tokens of a row among the most GPUs; among fewer it is as much shorter, so that each has as many tokens."""
    loss_model: str = "samba-421m"
    """Whose losses are compared."""
    loss_rows: int = 8
    """Rows of a step there."""
    loss_length: int = 2048
    """Tokens of such a row."""
    device: str = "auto"
    """auto (GPUs), cpu (processes) or cuda."""
    timeout: float = 240.0
    """Seconds for each number of GPUs; what is not done then has failed."""
    json: JsonFile = None
    """Also write the figures to this file."""


def main(argv: list[str]) -> None:
    """Run the command; in a process that torchrun started for it, that process's part."""
    args = parse(BenchScale, argv, prog=PROG)
    _check(args)
    from samba_lm.bench.scale import Work, figures, measure

    work = Work(
        **{
            field.name: getattr(args, field.name)
            for field in dataclasses.fields(Work)
            if field.name in {each.name for each in dataclasses.fields(args)}
        }
    )
    if PART in os.environ:
        import json

        found, writes = measure(work, max(args.gpus), args.device)
        if writes:
            write_text(Path(os.environ[PART]), json.dumps(found))
        return
    _check_machine(args)
    console, began = Console(), time.perf_counter()
    parts: dict[int, dict[str, Any]] = {}
    what = "processes" if args.device == "cpu" else "GPUs"
    with _ending_by_signal():
        for number in dict.fromkeys(args.gpus):
            with console.status(f"{number} of {max(args.gpus)} {what}"):
                parts[number] = _run(args, argv, number)
            _save(args, work, parts, figures(work, parts))
    told = figures(work, parts)
    console.print(figures_table(told))
    console.print(f"{time.perf_counter() - began:.0f} s", highlight=False)
    failed = [figure for figure in told if figure.failed]
    if failed:
        why = "; ".join(f"{figure.name}: {figure.note or 'too far apart'}" for figure in failed[:LAST_LINES])
        console.print(f"Failed: {why}", highlight=False, markup=False)
        raise SystemExit(1)


def _check(args: BenchScale) -> None:
    if not args.gpus or not all(1 <= number <= MOST for number in args.gpus) or 1 not in args.gpus:
        raise UserError(f"--gpus {','.join(map(str, args.gpus))}: give numbers from 1 to {MOST}, 1 among them.")
    for name, most in (("rows", 1 << 16), ("length", 1 << 24), ("steps", 1000), ("loss_rows", 1 << 16)):
        within(name.replace("_", "-"), getattr(args, name), 1, most)
    within("loss-length", args.loss_length, 2 * max(args.gpus), 1 << 24)
    within("long-length", args.long_length, 2 * max(args.gpus), 1 << 28)
    within("timeout", args.timeout, 1, 86_400)
    if args.micro_batch < 1 or args.rows % args.micro_batch:
        raise UserError(f"--micro-batch {args.micro_batch} does not divide --rows {args.rows}.")
    for number in args.gpus:
        if args.loss_rows % number or args.loss_length % number:
            raise UserError(f"--gpus {number} does not divide --loss-rows and --loss-length: change one.")
    if args.long_length % max(args.gpus):
        raise UserError(f"--long-length {args.long_length} is not a multiple of {max(args.gpus)} GPUs.")
    from samba_lm import zoo

    for name in (args.model, args.long_model, args.loss_model):
        zoo.get(name)


def _check_machine(args: BenchScale) -> None:
    """Tell before minutes of measuring that there are too few GPUs."""
    import torch

    if args.device == "cpu":
        return
    there = torch.cuda.device_count()
    if not there:
        raise UserError(
            "There is no GPU here. --device cpu compares processes on the CPU instead: with small models (--model "
            "samba-micro --long-model samba-micro --loss-model samba-micro --length 256 --long-length 1024)."
        )
    if max(args.gpus) > there:
        raise UserError(f"--gpus {max(args.gpus)}: there are {there} GPUs here.")


def _run(args: BenchScale, argv: list[str], number: int) -> dict[str, Any]:
    """What torchrun's processes measured on ``number`` GPUs, or why they did not."""
    with tempfile.TemporaryDirectory() as folder:
        part, log = Path(folder, "part.json"), Path(folder, "log")
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)),
            *("-m", "samba_lm", "bench", "scale", *argv),
        ]
        own = {**os.environ, PART: str(part)}
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, env=own)
            try:
                code = process.wait(args.timeout)
            except subprocess.TimeoutExpired:
                return {"failed": f"not done after {args.timeout:g} s (--timeout)"}
            finally:
                _end(process)
        if code or not part.exists():
            return {"failed": f"exit code {code}: {_reason(log.read_text(errors='replace'))}"}
        found: dict[str, Any] = read_json(part)
        return found


def _reason(log: str) -> str:
    """What the processes said before they ended: our own messages, else what looks like an error."""
    lines = list(dict.fromkeys(line.strip() for line in log.splitlines()))
    ours = [line.partition(" error: ")[2] for line in lines if "samba-lm: error: " in line]
    return " / ".join((ours or [line for line in lines if "Error" in line])[:LAST_LINES])[:300] or "no message"


@contextlib.contextmanager
def _ending_by_signal() -> Iterator[None]:
    """SIGTERM and SIGHUP end the command as an error does: what it started is ended first."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End torchrun and, through it, what it started."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(40)  # torchrun gives its processes 30
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _save(args: BenchScale, work: Any, parts: dict[int, dict[str, Any]], found: list[Any]) -> None:
    if args.json is None:
        return
    from samba_lm.bench.environment import environment
    from samba_lm.train.parallel import pick_device

    record = {
        **environment(pick_device(args.device)),
        "work": dataclasses.asdict(work),
        "figures": {"scale": [figure.record() for figure in found]},
        "parts": {str(number): part for number, part in parts.items()},
    }
    write_json(args.json, record)

"""``samba-lm bench ops``: every operation's kernels beside their bars, the ceilings of the GPU and their peers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import torch

from samba_lm.bench.bars import NONE, OPS
from samba_lm.bench.cases import (
    DTYPES,
    attention_operation,
    conv_operation,
    gla_operation,
    scan_operation,
)
from samba_lm.bench.cases_rows import cross_entropy_operation, norm_operation, rope_operation, swiglu_operation
from samba_lm.bench.ceilings import Ceilings
from samba_lm.bench.figure import OURS, Figure
from samba_lm.bench.gpu import Clock, NotMeasured, Timing, attempt, release
from samba_lm.bench.operation import Case, Implementation, Inputs, Operation, bound, caller, compare
from samba_lm.bench.peers import PEERS, Peer

OPERATIONS: dict[str, Callable[[], Operation]] = {
    "scan": scan_operation,
    "conv": conv_operation,
    "attention": attention_operation,
    "norm": norm_operation,
    "swiglu": swiglu_operation,
    "rope": rope_operation,
    "cross-entropy": cross_entropy_operation,
    "gla": gla_operation,
}
Report = Callable[[str], None]
"""Told what is being measured now."""


def run_ops(
    operations: Iterable[Operation],
    clock: Clock,
    ceilings: Ceilings,
    *,
    repeats: int,
    seconds: float = math.inf,
    peers: Iterable[Peer] = PEERS,
    report: Report = lambda what: None,
    save: Callable[[list[Figure]], None] = lambda figures: None,
) -> list[Figure]:
    """Ours first, all of it; then the peers, none begun after ``seconds``; in the order of the operations.

    What fails is a figure without a value, and the rest goes on. Nothing is timed whose parity check has not passed.
    """
    bench = _Bench(clock, ceilings, repeats, time.perf_counter() + seconds, report)
    operations, tables = list(operations), []
    for operation in operations:
        torch.manual_seed(0)
        tables.append(bench.ours(operation))
        save(_all(tables))  # the next one, or a peer, may take the GPU down or be too much to wait for
    for operation, table in zip(operations, tables, strict=True):
        for peer in peers:
            if peer.operation == operation.name and operation.worth():
                bench.peer(operation, peer, table)
    return _all(tables)


Table = dict[tuple[str, str], list[Figure]]
"""An operation's figures by (shape, direction), parity under ("", "")."""
PARITY = ("", "")


class _Bench:
    def __init__(self, clock: Clock, ceilings: Ceilings, repeats: int, deadline: float, report: Report) -> None:
        self.clock, self.ceilings, self.repeats = clock, ceilings, repeats
        self.deadline, self.report = deadline, report

    def ours(self, operation: Operation) -> Table:
        table: Table = {PARITY: []}
        if not operation.worth():
            table[PARITY] = [Figure(operation.name, None, "ms", by="", note=operation.unworthy)]
            return table
        self.report(f"{operation.name}: parity")
        own = Implementation(operation.run)
        for dtype in DTYPES:
            table[PARITY] += self.parity(operation, own, OURS, dtype, lambda small: small)
        passed = all(figure.met for figure in table[PARITY])
        for case in operation.cases:
            for direction in case.work:
                figure = self.figure(operation, case, direction)
                figure = replace(figure, note="" if passed else "no speed without parity")
                bar = OPS.get((operation.name, case.shape, direction), NONE)
                figure = replace(figure, bar=bar.bar, stretch=bar.stretch, goal=bar.goal)
                table[case.shape, direction] = [figure, *bar.figures(figure.name, "ms")]
            if passed:
                self.times(operation, case, own, table, OURS)
        return table

    def peer(self, operation: Operation, peer: Peer, table: Table) -> None:
        """Put a peer's figures behind ours, before the quoted ones."""
        self.report(f"{operation.name}: {peer.label}")
        try:
            if time.perf_counter() > self.deadline:
                raise NotMeasured("skipped: the time was up")
            loaded = attempt(peer.load)
            checked = self.parity(operation, loaded, peer.label, DTYPES[0], lambda small: {"plain": small["plain"]})
        except NotMeasured as failure:
            table[PARITY].append(Figure(operation.name, None, "ms", by=peer.label, note=str(failure)))
            return
        table[PARITY] += checked
        if not all(figure.met for figure in checked):
            return
        for case in operation.cases:
            for direction in case.work:
                figures = table[case.shape, direction]
                figures.insert(_measured(figures), replace(self.figure(operation, case, direction), by=peer.label))
            self.times(operation, case, loaded, table, peer.label, peer.fits)

    def figure(self, operation: Operation, case: Case, direction: str) -> Figure:
        return Figure(f"{operation.name} {case.shape} {direction}", None, "ms")

    def parity(
        self,
        operation: Operation,
        by: Implementation,
        name: str,
        dtype: torch.dtype,
        choose: Callable[[dict[str, Inputs]], dict[str, Inputs]],
    ) -> list[Figure]:
        """One figure for each of the small inputs: the largest difference from fp64 over all tensors."""
        allowed, kind = bound(dtype), str(dtype).removeprefix("torch.")
        what = f"{operation.name}, largest difference from fp64, {kind}"
        try:
            chosen = choose(attempt(partial(operation.small, self.clock.device, dtype)))
        except NotMeasured as failure:
            return [Figure(what, None, "", allowed, by=name, check=True, note=str(failure))]
        figures = []
        for label, inputs in chosen.items():
            figure = Figure(f"{what}, {label}", None, "", allowed, by=name, check=True)
            try:
                errors = attempt(partial(compare, operation, by, inputs))
            except NotMeasured as failure:
                figures.append(replace(figure, note=str(failure)))
            else:
                worst = max(errors, key=lambda tensor: _nan_is_worst(errors[tensor][0]))
                told = {tensor: {"largest": m, "relative": r} for tensor, (m, r) in errors.items()}
                figures.append(
                    replace(
                        figure,
                        value=errors[worst][0],
                        facts={"worst": worst, "relative": max(r for _, r in errors.values()), "errors": told},
                    )
                )
        return figures

    def times(
        self,
        operation: Operation,
        case: Case,
        by: Implementation,
        table: Table,
        name: str,
        fits: Callable[[Inputs], bool] = lambda inputs: True,
    ) -> None:
        """Fill in the times of one implementation, whose figures go by ``name``, at one shape."""

        def make() -> Inputs:
            inputs = case.make(self.clock.device)
            if not fits(inputs):
                raise NotMeasured("not for this shape")
            return by.prepare(inputs)

        inputs: Inputs = {}
        failed = ""
        try:
            inputs = attempt(make)
        except NotMeasured as failure:
            failed = str(failure)
        for direction, work in case.work.items():
            figures = table[case.shape, direction]
            at = next(i for i, figure in enumerate(figures) if figure.by == name)
            self.report(f"{name}: {figures[at].name}")
            try:
                if failed:
                    raise NotMeasured(failed)
                timing = attempt(partial(self.time, operation, by, inputs, direction))
            except NotMeasured as failure:
                figures[at] = replace(figures[at], note=str(failure))
            else:
                shares = self.ceilings.shares(timing.median, work.moved, work.flops, operation.matmul)
                figures[at] = replace(figures[at], value=timing.median, facts={**shares, **timing.facts()})
        del inputs
        release(self.clock.device)

    def time(self, operation: Operation, by: Implementation, inputs: Inputs, direction: str) -> Timing:
        return self.clock.time(caller(operation, by.run, inputs, direction), self.repeats)


def _all(tables: list[Table]) -> list[Figure]:
    return [figure for table in tables for figures in table.values() for figure in figures]


def _measured(figures: list[Figure]) -> int:
    """How many of the figures are of this run: the quoted ones stand last."""
    return sum(figure.note != "quoted" for figure in figures)


def _nan_is_worst(value: float) -> float:
    return math.inf if math.isnan(value) else value

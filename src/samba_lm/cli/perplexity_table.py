"""What `eval perplexity` measured, as tables for a terminal of any width."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from samba_lm.eval.protocols import Settings

if TYPE_CHECKING:
    from samba_lm.eval.perplexity import LengthResult

WIDE, MIDDLING = 96, 64
"""Columns of a terminal that has room for all figures of one checkpoint, or for the more important ones."""
RULE = 3
"""Columns between two columns of a table."""
SHORTEST_NAME = 16
"""Columns of a name that stay, at least, where a terminal is narrow."""


def say(console: Console, line: str) -> None:
    """Print a line as it is."""
    console.print(line, markup=False, highlight=False)


def print_lengths(console: Console, name: str, settings: Settings, results: Sequence[LengthResult]) -> None:
    """One checkpoint: a row for each length."""
    say(console, f"{name}: perplexity, {_protocol(settings)}")
    headings = ["length", "perplexity", "95%"]
    headings += ["loss", "bits/byte"] if console.width >= MIDDLING else []
    headings += ["windows", "tokens"] if console.width >= WIDE else []
    table = Table(show_edge=False, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        if result.windows:
            figures = (
                _span(settings, result),
                figure(result.perplexity, 3),
                _interval(result),
                figure(result.loss, 4),
                figure(result.bits_per_byte, 4),
                f"{result.windows:,}",
                f"{result.tokens:,}",
            )
            table.add_row(*figures[: len(headings)])
    console.print(table)
    for result in results:
        if result.note:
            say(console, f"{'Not finite' if result.windows else 'Skipped'}: {result.note}.")


def print_models(
    console: Console, settings: Settings, found: Mapping[str, Sequence[LengthResult]], *, bits: bool
) -> None:
    """Several checkpoints: a row for each, a column for each length; as many tables as the terminal's width needs.

    ``bits``: show bits a byte, because tokens are not the same for all.
    """
    what = "bits a byte" if bits else "perplexity"
    say(console, f"{what[0].upper()}{what[1:]} (± 95%), {_protocol(settings)}")
    if bits:
        say(console, "The tokenizers differ, so perplexities a token cannot be compared.")
    digits = 4 if bits else 3 if any(r.perplexity < 10 for results in found.values() for r in results) else 2
    _print_columns(console, settings, found, lambda result: _cell(result, digits, bits=bits))
    for name, results in found.items():
        for reason, some in _reasons(results).items():
            say(console, f"{name}: {reason}.{'' if not some else f' Skipped: {some}.'}")


def print_changes(
    console: Console, settings: Settings, found: Mapping[str, Sequence[LengthResult]], against: str
) -> None:
    """By how many percent each checkpoint's perplexity is above that of one of them, window by window."""
    from samba_lm.eval.perplexity import difference

    base = {result.length: result for result in found[against]}

    def cell(result: LengthResult) -> str:
        if result.length not in base:
            return "-"
        change = difference(result, base[result.length])
        if math.isnan(change.mean):
            return "-"
        reach = 50 * (math.exp(min(change.high, 700)) - math.exp(change.low))
        told = f"{100 * (math.exp(min(change.mean, 700)) - 1):+.2f}%"
        return told + (f" ±{figure(reach, 2)}" if math.isfinite(reach) else "")

    say(console, f"Perplexity against that of {against}, the same windows compared (± 95%)")
    others = {name: results for name, results in found.items() if name != against}
    _print_columns(console, settings, others, cell)


def _print_columns(
    console: Console,
    settings: Settings,
    found: Mapping[str, Sequence[LengthResult]],
    cell: Callable[[LengthResult], str],
) -> None:
    """A row for each name, and a column for each length that was measured, in as many tables as the width needs."""
    rows = {name: {result.length: result for result in results} for name, results in found.items()}
    spans = {r.length: _span(settings, r) for results in found.values() for r in results if r.windows}
    columns = []
    for length in sorted(spans):
        here = [results.get(length) for results in rows.values()]
        columns.append([spans[length], *("-" if r is None or not r.windows else cell(r) for r in here)])
    widest = max((len(word) for column in columns for word in column), default=0)
    most = max(SHORTEST_NAME, console.width - RULE - widest)
    names = [name if len(name) <= most else "…" + name[1 - most :] for name in rows]
    while columns:
        room, taken = console.width - max(map(len, names)), 0
        for column in columns:
            room -= RULE + max(map(len, column))
            if room < 0 and taken:
                break
            taken += 1
        table = Table(show_edge=False, pad_edge=False)
        table.add_column("", no_wrap=True)
        for column in columns[:taken]:
            table.add_column(column[0], justify="right", no_wrap=True)
        for i, name in enumerate(names):
            table.add_row(name, *(column[i + 1] for column in columns[:taken]))
        console.print(table)
        del columns[:taken]


def figure(value: float | None, digits: int) -> str:
    """A number with so many digits, "-" for none."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.3g}"


def _cell(result: LengthResult, digits: int, *, bits: bool) -> str:
    value, (low, high) = (result.bits_per_byte, result.bits_interval) if bits else (result.perplexity, result.interval)
    reach = (high - low) / 2
    return figure(value, digits) + (f" ±{figure(reach, digits)}" if math.isfinite(reach) else "")


def _interval(result: LengthResult) -> str:
    low, high = result.interval
    return "-" if math.isnan(low) else f"{figure(low, 3)}-{figure(high, 3)}"


def _reasons(results: Sequence[LengthResult]) -> dict[str, str]:
    """The lengths that have no figure, by the reason."""
    found: dict[str, list[str]] = {}
    for result in results:
        if result.note:
            skipped = found.setdefault(result.note, [])
            if not result.windows:
                skipped.append(str(result.length))
    return {reason: ", ".join(lengths) for reason, lengths in found.items()}


def _protocol(settings: Settings) -> str:
    named = {"window": settings.window, "stride": settings.stride, "max tokens": settings.max_tokens}
    every = ", every document that is long enough" if settings.documents == "every" else ""
    return f"protocol {settings.protocol}{every}" + "".join(
        f", {name} {value:,}" for name, value in named.items() if value is not None
    )


def _span(settings: Settings, result: LengthResult) -> str:
    """The length; for buckets, where it begins too."""
    low, high = result.positions
    return f"{0 if low == 1 else low}-{high}" if settings.protocol == "stream" else str(result.length)

"""Benchmark figures as tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from samba_lm.bench.figure import Figure


def figures_table(figures: Iterable[Figure]) -> Table:
    """Name, value and bar."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(overflow="fold")
    table.add_column(justify="right")
    table.add_column()
    for figure in figures:
        table.add_row(figure.name, _value(figure), _bar(figure))
    return table


def compared_table(figures: Iterable[Figure]) -> Table:
    """Name, whose work it is, value, shares of the ceilings, bar: one group of rows for each name."""
    table = Table(box=None, pad_edge=False)
    table.add_column("work", overflow="fold")
    table.add_column("by", overflow="fold")
    table.add_column("measured", justify="right")
    table.add_column("GB/s", justify="right")
    table.add_column("of copy", justify="right")
    table.add_column("TFLOP/s", justify="right")
    table.add_column("of matmul", justify="right")
    table.add_column("bar", overflow="fold")
    before = ""
    for figure in figures:
        facts = figure.facts
        rates = (_number(facts, "GB/s", "{:.0f}"), _number(facts, "of_copy", "{:.0%}"))
        products = (_number(facts, "TFLOP/s", "{:.1f}"), _number(facts, "of_matmul", "{:.0%}"))
        name = "" if figure.name == before else figure.name
        style = "dim" if figure.note == "quoted" else None
        table.add_row(name, figure.by, _value(figure), *rates, *products, _bar(figure), style=style)
        before = figure.name
    return table


def kernels_table(kernels: Iterable[Mapping[str, object]]) -> Table:
    """Kernels by the time they took."""
    table = Table(box=None, pad_edge=False)
    for title in ("ms", "share", "calls"):
        table.add_column(title, justify="right")
    table.add_column("kernel", overflow="ellipsis", no_wrap=True, max_width=110)
    for row in kernels:
        table.add_row(f"{row['ms']:.3f}", f"{row['share']:.1%}", str(row["calls"]), str(row["kernel"]))
    return table


def grid_table(columns: Iterable[int], rows: Mapping[str, Mapping[int, float]]) -> Table:
    """A row of numbers for each name, under lengths; "-" where there is none."""
    columns = list(columns)
    table = Table(box=None, pad_edge=False)
    table.add_column("tokens")
    for column in columns:
        table.add_column(f"{column // 1024}K", justify="right")
    for name, numbers in rows.items():
        table.add_row(name, *(f"{numbers[column]:.2f}" if column in numbers else "-" for column in columns))
    return table


def _value(figure: Figure) -> str:
    if figure.value is None:
        return ""
    quoted = "quoted " if figure.note == "quoted" else ""
    return f"{quoted}{figure.value:.4g} {figure.unit}".strip()


def _bar(figure: Figure) -> str:
    note = "" if figure.note == "quoted" else figure.note
    if "worst" in figure.facts:
        note = f"{figure.facts['worst']}; relative at most {_number(figure.facts, 'relative', '{:.1e}')}"
    if figure.bar is None:
        return note
    relation = "at most" if figure.low_is_good else "at least"
    told = f"{relation} {figure.bar:g}: {figure.verdict}"
    harder = ((word, bar) for word, bar in (("stretch", figure.stretch), ("goal", figure.goal)) if bar is not None)
    more = ", ".join(f"{word} {bar:g}" for word, bar in harder)
    return told + (f" ({more})" if more else "") + (f"; {note}" if note else "")


def _number(facts: Mapping[str, object], key: str, form: str) -> str:
    value = facts.get(key)
    return form.format(value) if isinstance(value, (int, float)) else ""

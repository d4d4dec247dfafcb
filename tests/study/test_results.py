"""What is computed from records."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from samba_lm.eval.intervals import mean_interval
from samba_lm.eval.perplexity import LengthResult
from samba_lm.study.figures import difference_figure
from samba_lm.study.record import Record
from samba_lm.study.results import Cell, Found, Results, View, _cell, difference, rank_correlation
from samba_lm.study.study import Evaluation, Run, Study
from samba_lm.study.tables import grid, markdown, number, signed, slug
from samba_lm.study.worker import compact

RECORD: dict[str, Any] = {
    "run": "samba",
    "stage": "final",
    "lr": 1e-3,
    "seed": 0,
    "fingerprint": "",
    "status": "done",
    "recipe": {"train": {"length": 8}},
    "config": {},
    "parameters": 1,
    "flops_per_token": 1.0,
    "started": "",
}


def cell(*means: float, losses: tuple[float, ...] | None = None) -> Cell:
    loss = sum(means) / len(means) if means else math.nan
    return Cell(1024, 0, len(means), 1000, losses or ((loss,) if means else ()), means, (1,) * len(means), (), "")


def test_two_models_are_compared_window_by_window() -> None:
    hard, easy = 5.0, 1.0
    reference = cell(hard, easy, 3.0)
    found = difference(cell(hard + 0.11, easy + 0.09, 3.1), reference)
    assert found.mean == pytest.approx(0.1)
    assert found.low == pytest.approx(0.1 - 4.3027 * 0.01 / math.sqrt(3), abs=1e-5)
    low, high = reference.interval
    assert high - low > 100 * (math.exp(found.high) - math.exp(found.low)), "the text itself varies far more"
    lone = difference(cell(3.1), cell(3.0))
    assert lone.mean == pytest.approx(0.1)
    assert math.isnan(lone.low)
    assert math.isnan(difference(cell(losses=(3.1,)), cell(losses=(3.0,))).low)


def measured(means: list[float], length: int = 1024) -> dict[str, Any]:
    """A row of a record, of windows with these means."""
    error = float(np.std(means, ddof=1)) / math.sqrt(len(means))
    result = LengthResult(length, (1, length), len(means), 9, float(np.mean(means)), error, 1.0, None, "", tuple(means))
    return compact(asdict(result))


def test_of_many_windows_groups_are_kept_and_give_intervals() -> None:
    random = np.random.RandomState(0)
    text = random.standard_normal(1300).tolist()
    near = [value + 0.1 + 0.01 * noise for value, noise in zip(text, random.standard_normal(1300), strict=True)]
    rows = [measured(text), measured(near)]
    assert [(len(row["means"]), row["group"]) for row in rows] == [(434, 3)] * 2
    one, other = (_cell(1024, [row]) for row in rows)
    assert one.sizes == (3,) * 433 + (1,)
    low, high = one.interval
    exact = mean_interval(text)
    assert (math.log(low), math.log(high)) == (pytest.approx(exact.low, abs=0.01), pytest.approx(exact.high, abs=0.01))
    found = difference(other, one)
    assert found.mean == pytest.approx(0.1, abs=0.002)
    assert found.reach == pytest.approx(1.96 * 0.01 / math.sqrt(1300), rel=0.1)


def test_records_of_earlier_versions_give_the_intervals_that_they_can() -> None:
    values = np.random.RandomState(0).standard_normal(600).tolist()
    old = {**measured(values), "means": []}
    del old["group"]
    cell = _cell(1024, [old])
    exact = mean_interval(values)
    assert [math.log(end) for end in cell.interval] == pytest.approx([exact.low, exact.high])
    assert math.isnan(difference(cell, _cell(1024, [measured(values)])).low), "of the two together nothing is known"
    assert math.isnan(_cell(1024, [{**old, "standard_error": None}]).interval[0])


def test_of_few_unlike_texts_each_is_shown_by_itself() -> None:
    """As whole: three documents, a mean, an interval. Apart: each one's perplexity, no interval."""
    whole = Evaluation(name="stream", data="x", lengths=(8,), protocol="stream")
    apart = Evaluation(**{**whole.model_dump(), "apart": ("a", "b", "c"), "title": "Books"})
    record = {**RECORD, "evaluations": [{"name": "stream", "fingerprint": "", "seconds": 1.0, "results": [
        {**measured([2.0, 3.0, 7.0], 8), "tokens": 24}
    ]}]}  # fmt: skip
    run = Run(name="samba", recipe="samba.toml", groups=("g",))
    found = Found(run, (Record.model_validate(record),), ())
    assert found.cells(View(whole))[8].perplexity == pytest.approx(math.exp(4))
    results = Results(Study(runs=(run,), evaluations=(apart,)), (found,), {}, Path(), ())
    assert [(view.title, view.stem) for view in results.views] == [
        ("Books: a", "stream-1"), ("Books: b", "stream-2"), ("Books: c", "stream-3"),
    ]  # fmt: skip
    cells = [found.cells(view)[8] for view in results.views]
    assert [cell.perplexity for cell in cells] == pytest.approx([math.exp(2), math.exp(3), math.exp(7)])
    assert all(math.isnan(cell.interval[0]) and cell.tokens == 8 for cell in cells)
    assert not found.cells(View(Evaluation(**{**apart.model_dump(), "apart": tuple("abcd")}), 3))[8].losses
    text = markdown(results)
    assert "### Books: b" in text
    assert "| samba | **20.09** |" in text


def test_differences_that_leave_the_figure_are_named_so() -> None:
    """Shown is what is less than 30% above the reference, with its intervals, and whatever is below it."""
    texts = ((1, 0.01), (2, -0.01), (4, 0.0))
    evaluation = Evaluation(name="books", data="x", lengths=(8, 16), protocol="prefix")

    def found(name: str, *percents: float) -> Found:
        rows = [
            measured([math.log1p(percent / 100) + text + noise for text, noise in texts], length)
            for length, percent in zip((8, 16), percents, strict=True)
        ]
        record = {
            **RECORD,
            "run": name,
            "evaluations": [{"name": "books", "fingerprint": "", "seconds": 1.0, "results": rows}],
        }
        return Found(Run(name=name, recipe="x.toml", groups=("g",)), (Record.model_validate(record),), ())

    models = (
        found("samba", 0, 0),
        found("near", 5, 9),
        found("low", -5, -60),
        found("far", 90, 80),
        found("up", 9, 90),
    )
    study = Study(runs=tuple(each.run for each in models), evaluations=(evaluation,), reference="samba")
    figure = difference_figure(Results(study, models, {}, Path(), ()), models, View(evaluation))
    assert figure is not None
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["samba", "near", "low", "far (above)", "up (goes on above)"]
    low, high = figure.axes[0].get_ylim()
    assert low < -60
    assert 9 < high < 30


def test_means_that_are_not_finite_are_not_kept() -> None:
    assert measured([1.0, math.nan])["means"] == []


def test_seeds_are_averaged_in_losses() -> None:
    both = cell(2.0, 4.0, losses=(2.9, 3.1))
    assert both.perplexity == pytest.approx(math.exp(3.0))
    assert both.seeds == pytest.approx((math.exp(2.9), math.exp(3.1)))
    assert cell(3.0).seeds is None
    assert math.isnan(cell().perplexity)


def test_the_order_of_two_tables() -> None:
    assert rank_correlation([1, 2, 3], [10, 200, 3000]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # By hand: ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
    assert rank_correlation([1, 2, 2, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert math.isnan(rank_correlation([1, 1], [1, 2]))


def test_figures_of_a_table() -> None:
    texts = [number(value) for value in (1.234, 123.4, 12345.6, 1.5e7, math.inf, math.nan)]
    assert texts == ["1.23", "123.4", "12,346", "1.5e+07", "inf", "–"]  # noqa: RUF001 - a dash
    assert [signed(value) for value in (1.26, -5.04, 300.0, 4000.0)] == ["+1.3", "-5.0", "x4.0", "x41.0"]
    assert slug("Table 3") == "table-3"
    assert grid(["a", "b"], [["x|y", "1"]]) == "| a | b |\n| --- | ---: |\n| x\\|y | 1 |"

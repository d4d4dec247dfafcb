"""Figures of several models: nothing that was measured lies under their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from samba_lm.eval.harness.figure import write_figure
from samba_lm.eval.harness.run import Metric, Score
from samba_lm.eval.recall_figure import Spot, phonebook_curves
from samba_lm.figures import save_figure


def _check(figure: Figure, names: list[str]) -> None:
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == names
    box: Any = legend.get_window_extent()
    assert not box.overlaps(figure.axes[0].get_window_extent())
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1


@pytest.mark.parametrize("count", [1, 3, 6])
def test_names_stand_beside_what_is_drawn(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"checkpoints/model-{i}-of-the-usual-length" for i in range(count)]
    spots = {(size, None): Spot(size % 128, 128) for size in range(20, 481, 20)}
    _check(phonebook_curves(dict.fromkeys(names, spots)), names)
    drawn: list[Figure] = []
    monkeypatch.setattr("samba_lm.eval.harness.figure.save_figure", lambda _, figure: drawn.append(figure))
    score = Score("arc_easy", 9, 0, "1", (Metric("acc", "none", 0.5, 0.1, 0.2, 0.8),), {}, None, 1.0)
    write_figure(tmp_path / "a.png", {name: [score] for name in names})
    _check(drawn[0], names)


@pytest.mark.parametrize(("ending", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("PDF", b"%PDF")])
def test_a_figure_is_what_its_name_says_and_the_same_bytes_again(ending: str, begins: bytes, tmp_path: Path) -> None:
    spots = {(size, None): Spot(size, 128) for size in (20, 40)}
    for name in ("a", "b"):
        save_figure(tmp_path / f"{name}.{ending}", phonebook_curves({"model": spots}))
    first, second = ((tmp_path / f"{name}.{ending}").read_bytes() for name in ("a", "b"))
    assert first.startswith(begins)
    assert first == second

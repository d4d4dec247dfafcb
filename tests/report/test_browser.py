"""The page in a real browser: light and dark, wide and narrow."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from samba_lm.eval.recall_figure import Spot, heat_map
from samba_lm.figures import Axis, Curve, draw_curves
from samba_lm.report.markup import tag
from samba_lm.report.page import curves_figure, grid, how, named, page, section, with_note
from samba_lm.report.svg import inline

HERE = Path(__file__).parent
LENGTHS = [2**i for i in range(9, 21)]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of twelve models with long names."""
    names = [(f"a-model-of-a-rather-long-name-{i}", i) for i in range(12)]
    curves = [Curve(name, LENGTHS, [20 - i - j / 2 for j in range(12)], style=i) for name, i in names]
    x, y = Axis("context length, tokens", "log2"), Axis("perplexity", "log10")
    figure = curves_figure(lambda size: draw_curves(curves, x, y, size=size, legend=False), "a", "A caption.", names)
    spots = {(length, depth / 10): Spot(length % 5, 5) for length in LENGTHS[3:] for depth in range(11)}
    depths = [depth / 10 for depth in range(11)]
    maps = [tag("figure", inline(heat_map(LENGTHS[3:], depths, spots), f"m{i}", "a map", "map")) for i in range(3)]
    cells = [[with_note("20.00", "19.00-21.00")] * 12] * 12
    table = grid("tokens", LENGTHS, [named(*name) for name in names], cells)
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(page("A page", section("One", figure, tag("div", *maps, class_="maps"), table, how(["x" * 300]))))
    return path


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (360, "light"), (1200, "dark"), (1200, "light")])
def test_it_can_be_read(file: Path, width: int, scheme: str) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None or shutil.which("node") is None:
        pytest.skip("needs Chromium and Node.js")
    if not (HERE.parent / "serve" / "js" / "node_modules" / "playwright-core").is_dir():
        pytest.skip("needs playwright-core: run `npm ci` in tests/serve/js")
    command = ["node", str(HERE / "look.mjs"), browser, str(file), str(width), scheme]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    seen = json.loads(ran.stdout)
    assert seen["complaints"] == [], "the policy forbids nothing that the page has"
    assert seen["requests"] == 1, "the page itself"
    assert seen["sideways"] <= 0
    assert seen["outside"] == 0
    assert (seen["wide"], seen["narrow"]) == ((0, 1) if width == 360 else (1, 0))
    assert seen["letters"] >= 9, "of a figure, in pixels"
    assert seen["selected"] > 20, "a figure's text is text"
    dark = scheme == "dark"
    assert (seen["ground"], seen["line"]) == (
        ("rgb(23, 23, 22)", "rgb(251, 139, 75)") if dark else ("rgb(255, 255, 255)", "rgb(194, 65, 12)")
    )
    assert seen["axis"] == seen["ink"]

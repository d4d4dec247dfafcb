"""The paper's two figures of speed, drawn from what was measured: reading prompts, and generating."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samba_lm.bench.claims import generation_speed, prompt_speed
from samba_lm.bench.paper import LLAMA, SAMBA, Curves, Plan
from samba_lm.figures import save_figure

LINES = {
    SAMBA: ("Samba 1.7B", "#c2410c", "o"),
    "mamba-1.8b": ("Mamba 1.8B", "#0f766e", "s"),
    "mistral-1.6b": ("Mistral 1.6B", "#7c3aed", "^"),
    LLAMA: ("Llama-3 1.6B", "#1d4ed8", "D"),
    "self-extend-llama3-1.6b": ("SE-Llama-3 1.6B", "0.45", "v"),
}
"""Label, colour and marker, by name; other models get what is left."""


def write_figure(path: Path, found: Sequence[Curves], plan: Plan, where: str) -> None:
    """Write the figure ``path``, atomically. ``where``: the device that was measured, for the title."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    figure.suptitle(f"bf16 on {where}", fontsize=10)
    left, right = figure.subplots(1, 2)
    _draw(left, {c.name: prompt_speed(c, plan) for c in found}, plan.lengths)
    left.set_title(f"Reading prompts, {_short(plan.tokens)} tokens in all", fontsize=11)
    left.set_xlabel("tokens a prompt")
    _draw(right, {c.name: generation_speed(c, plan) for c in found}, plan.contexts)
    right.set_title(f"Generating {plan.batch} texts", fontsize=11)
    right.set_xlabel("tokens generated, average from the first on")
    handles, labels = left.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside lower center", ncols=len(labels))
    save_figure(path, figure)


def _draw(axes: Any, speeds: Mapping[str, Mapping[int, float]], ticks: Sequence[int]) -> None:
    """Lines of thousand tokens a second by length, and Samba over Llama at the longest."""
    for name in [*(n for n in LINES if n in speeds), *(n for n in speeds if n not in LINES)]:
        label, colour, marker = LINES.get(name, (name, None, "x"))
        points = speeds[name]
        axes.plot(points.keys(), points.values(), color=colour, marker=marker, markersize=4.5, label=label)
    end = ticks[-1]
    over, under = (speeds.get(name, {}).get(end) for name in (SAMBA, LLAMA))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [_short(tick) for tick in ticks])
    axes.set_xlim(ticks[0] / 1.15, end * (1.7 if over and under else 1.15))
    axes.set_ylim(bottom=0)
    axes.set_ylabel("thousand tokens/s")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if over and under:
        arrow = {"arrowstyle": "<->", "color": "0.25", "linewidth": 0.9}
        axes.annotate("", (end * 1.1, under), (end * 1.1, over), arrowprops=arrow)
        axes.text(
            end * 1.14, (over + under) / 2, f"{over / under:.2f}x\nLlama-3", fontsize=9, va="center", color="0.25"
        )


def _short(tokens: int) -> str:
    return f"{tokens // 1024}K"

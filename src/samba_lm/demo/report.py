"""The demo's report: one HTML file that needs nothing else, its figures also as PNG."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from samba_lm.demo.run import LENGTH, MULTIPLES, DemoResult, Twin, change_in_perplexity, verdict
from samba_lm.figures import WIDE, Axis, Curve, draw_curves, save_figure
from samba_lm.files import write_text
from samba_lm.report.markup import Html, join, tag
from samba_lm.report.page import command, curves_figure, facts, how, named, page, paragraph, section, table
from samba_lm.report.part import environment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = {
    "samba-tiny": "Mamba + sliding window + MLP",
    "llama-tiny": "full attention + MLP",
    "swa-tiny": "sliding window + MLP",
    "mamba-tiny": "Mamba",
}


def write_report(result: DemoResult, provenance: dict[str, object], out: Path) -> Path:
    """Write report.html, loss.png and perplexity.png into ``out``; returns the report's path."""
    for name, draw in (("loss", _draw_loss), ("perplexity", _draw_perplexity)):
        save_figure(out / f"{name}.png", draw(result.twins, WIDE, True))
    path = out / "report.html"
    write_text(path, _page(result, provenance))
    return path


def record(result: DemoResult) -> dict[str, object]:
    """The figures as plain data."""
    return {
        "steps": result.steps,
        "train_length": LENGTH,
        "source": result.source,
        "train_tokens": result.train_tokens,
        "heldout_tokens": result.heldout_tokens,
        "scored_tokens": result.scored_tokens,
        "seconds": result.seconds,
        "stages": result.stages,
        "verdict": verdict(result.twins, result.steps),
        "decode_tokens_per_s": result.decode_tokens_per_s,
        "twins": [
            {
                "name": t.name,
                "parameters": t.parameters,
                "train_seconds": t.train_seconds,
                "train_tokens_per_s": t.train_tokens_per_s,
                "final_loss": smooth(t.losses)[-1],
                "losses": t.losses,
                "state_bytes": t.state_bytes,
                "constant_state": t.constant_state,
                "perplexity": {str(r.length): r.perplexity for r in t.results},
                "standard_error_nats": {str(r.length): r.standard_error for r in t.results},
                "change": change_in_perplexity(t),
            }
            for t in result.twins
        ],
    }


def smooth(losses: list[float]) -> list[float]:
    """Each point the mean of the last 5% of the steps up to it."""
    span = max(1, len(losses) // 20)
    return [sum(losses[max(0, i - span + 1) : i + 1]) / min(span, i + 1) for i in range(len(losses))]


def _draw_loss(twins: list[Twin], size: tuple[float, float], legend: bool) -> Figure:
    curves = [
        Curve(twin.name, range(1, len(twin.losses) + 1), smooth(twin.losses), style=i) for i, twin in enumerate(twins)
    ]
    return draw_curves(curves, Axis("step"), Axis("training loss, nats a byte"), size=size, legend=legend)


def _draw_perplexity(twins: list[Twin], size: tuple[float, float], legend: bool) -> Figure:
    curves = [
        Curve(twin.name, [r.length for r in twin.results], [r.perplexity for r in twin.results], style=i)
        for i, twin in enumerate(twins)
    ]
    x = Axis("context length, bytes", "log2", ticks=[LENGTH * multiple for multiple in MULTIPLES])
    y = Axis("perplexity a byte, held-out text", "log10")
    return draw_curves(curves, x, y, size=size, legend=legend, marks=[(LENGTH, "trained here")])


def _page(result: DemoResult, provenance: dict[str, object]) -> str:
    twins = result.twins
    names = [(twin.name, i) for i, twin in enumerate(twins)]

    def figure(draw: Callable[[list[Twin], tuple[float, float], bool], Figure], anchor: str, caption: str) -> Html:
        return curves_figure(lambda size: draw(twins, size, False), anchor, caption, names)

    opening = join(
        [
            paragraph(
                f"Four models of one size, trained from scratch on the same {result.steps:,} batches of {LENGTH}-byte "
                "sequences."
            ),
            paragraph(tag("b", verdict(twins, result.steps))),
        ]
    )
    perplexity = section(
        "Perplexity against context",
        paragraph(
            f"{result.scored_tokens:,} bytes of held-out text, cut into windows of each length; every window is read "
            "from a fresh state and all its predictions count. Lower is better."
        ),
        table(
            ["model", *map(_multiple, MULTIPLES), "change"], [_row(*each) for each in zip(twins, names, strict=True)]
        ),
        figure(_draw_perplexity, "perplexity", "Perplexity by the context length. Dotted: the length trained on."),
    )
    headings = ["model", "layers", "parameters", "tokens/s", f"state at {LENGTH * MULTIPLES[-1]}"]
    training = section(
        "Training",
        table(headings, [_description(*each) for each in zip(twins, names, strict=True)], texts=(1,)),
        paragraph(
            f"{result.source}: {result.train_tokens:,} bytes to learn from, {result.heldout_tokens:,} held out, whole "
            "files on either side. One token is one byte."
        ),
        figure(_draw_loss, "loss", "The training loss by the step."),
    )
    sample = section(
        "What samba-tiny writes",
        paragraph(
            f"After the grey prompt, from the reloaded checkpoint, {result.decode_tokens_per_s:.0f} tokens a second."
        ),
        tag("pre", tag("span", result.sample_prompt, class_="prompt"), result.sample),
    )
    return page("samba-lm demo", opening, perplexity, training, sample, _made(result, provenance))


def _made(result: DemoResult, provenance: dict[str, object]) -> Html:
    seconds = [("seconds in all", f"{result.seconds:.0f}")]
    seconds += [(stage, f"{spent:.0f}") for stage, spent in result.stages.items()]
    line = command(provenance.get("command")) or tag("code", "samba-lm demo")
    return section("How this was made", how([line, facts(environment("", provenance)), facts(seconds)]))


def _multiple(multiple: int) -> Html:
    return join([LENGTH * multiple, tag("br"), tag("small", f"{multiple}x")])


def _row(twin: Twin, name: tuple[str, int]) -> list[object]:
    change = 100 * (change_in_perplexity(twin) - 1)
    return [named(*name), *(f"{r.perplexity:.2f}" for r in twin.results), f"{change:+.1f}%"]


def _description(twin: Twin, name: tuple[str, int]) -> list[object]:
    state = f"{twin.state_bytes / 1e6:.2f} MB" + ("" if twin.constant_state else ", growing")
    speed = f"{twin.train_tokens_per_s:,.0f}"
    return [named(*name), KINDS[twin.name], f"{twin.parameters / 1e6:.2f}M", speed, state]

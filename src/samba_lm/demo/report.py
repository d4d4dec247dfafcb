"""The demo's report: one HTML file that needs nothing else, its figures also as PNG."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from samba_lm.demo.run import LENGTH, MULTIPLES, DemoResult, Twin, change_in_perplexity, verdict
from samba_lm.files import atomic_file, write_text

COLOURS = {"samba-tiny": "#c2410c", "llama-tiny": "#1d4ed8", "swa-tiny": "#0f766e", "mamba-tiny": "#7e22ce"}
MARKERS = {"samba-tiny": "o", "llama-tiny": "s", "swa-tiny": "^", "mamba-tiny": "D"}
KINDS = {
    "samba-tiny": "Mamba + sliding window + MLP",
    "llama-tiny": "full attention + MLP",
    "swa-tiny": "sliding window + MLP",
    "mamba-tiny": "Mamba",
}


def write_report(result: DemoResult, provenance: dict[str, object], out: Path) -> Path:
    """Write report.html, loss.png and perplexity.png into ``out``; returns the report's path."""
    figures = {"loss.png": _figure(result, _draw_loss), "perplexity.png": _figure(result, _draw_perplexity)}
    for name, png in figures.items():
        with atomic_file(out / name) as tmp:
            tmp.write_bytes(png)
    path = out / "report.html"
    write_text(path, _page(result, provenance, figures))
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


def _figure(result: DemoResult, draw: Callable[[Any, list[Twin]], None]) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    axes = figure.subplots()
    draw(axes, result.twins)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw_loss(axes: Any, twins: list[Twin]) -> None:
    for twin in twins:
        axes.plot(range(1, len(twin.losses) + 1), smooth(twin.losses), color=COLOURS[twin.name], label=twin.name)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (nats a byte)")


def _draw_perplexity(axes: Any, twins: list[Twin]) -> None:
    for twin in twins:
        lengths, values = [r.length for r in twin.results], [r.perplexity for r in twin.results]
        axes.plot(lengths, values, color=COLOURS[twin.name], marker=MARKERS[twin.name], label=twin.name)
    axes.axvline(LENGTH, color="0.4", linestyle=":", linewidth=1)
    axes.annotate("trained here", (LENGTH, 1), (4, -12), xycoords=("data", "axes fraction"),
                  textcoords="offset points", fontsize=8, color="0.4")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([LENGTH * m for m in MULTIPLES], [str(LENGTH * m) for m in MULTIPLES])
    axes.minorticks_off()
    low = min(r.perplexity for t in twins for r in t.results)
    high = max(r.perplexity for t in twins for r in t.results)
    ticks = [
        t * 10.0**e for e in range(-1, 7) for t in (1, 1.5, 2, 3, 4, 5, 6, 8) if low / 1.3 < t * 10.0**e < high * 1.3
    ]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_ylim(low / 1.15, high * 1.15)
    axes.set_xlabel("context length (bytes)")
    axes.set_ylabel("perplexity a byte, held-out text")


def _page(result: DemoResult, provenance: dict[str, object], figures: dict[str, bytes]) -> str:
    heads = "".join(f"<th>{LENGTH * m}<br><small>{m}x</small></th>" for m in MULTIPLES)
    rows = "".join(_row(twin) for twin in result.twins)
    images = {
        name: f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for name, png in figures.items()
    }
    command = provenance.get("command")
    shown = " ".join(map(str, command)) if isinstance(command, list) else "samba-lm demo"
    facts = {
        "command": shown,
        **{k: provenance[k] for k in ("samba_lm", "torch", "python", "platform", "threads", "time", "commit")
           if k in provenance},
        "seconds in all": f"{result.seconds:.0f}",
        **{f"seconds {stage}": f"{seconds:.0f}" for stage, seconds in result.stages.items()},
    }  # fmt: skip
    listed = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>" for k, v in facts.items())
    return _PAGE.format(
        verdict=html.escape(verdict(result.twins, result.steps)),
        source=html.escape(result.source),
        train=f"{result.train_tokens:,}",
        heldout=f"{result.heldout_tokens:,}",
        scored=f"{result.scored_tokens:,}",
        steps=f"{result.steps:,}",
        length=LENGTH,
        longest=LENGTH * MULTIPLES[-1],
        descriptions="".join(_description(twin) for twin in result.twins),
        heads=heads,
        rows=rows,
        loss=images["loss.png"],
        perplexity=images["perplexity.png"],
        prompt=html.escape(result.sample_prompt),
        sample=html.escape(result.sample),
        decode=f"{result.decode_tokens_per_s:.0f}",
        facts=listed,
    )


def _row(twin: Twin) -> str:
    cells = "".join(f"<td>{r.perplexity:.2f}</td>" for r in twin.results)
    change = 100 * (change_in_perplexity(twin) - 1)
    return f"<tr><td>{_name(twin)}</td>{cells}<td>{change:+.1f}%</td></tr>"


def _description(twin: Twin) -> str:
    state = f"{twin.state_bytes / 1e6:.2f} MB" + ("" if twin.constant_state else ", growing")
    return (
        f"<tr><td>{_name(twin)}</td><td>{KINDS[twin.name]}</td><td>{twin.parameters / 1e6:.2f}M</td>"
        f"<td>{twin.train_tokens_per_s:,.0f}</td><td>{state}</td></tr>"
    )


def _name(twin: Twin) -> str:
    return f'<b style="color:{COLOURS[twin.name]}">{twin.name}</b>'


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>samba-lm demo</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ margin-bottom: 0; }} h2 {{ margin-top: 2rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ padding: .35rem .6rem; border-bottom: 1px solid #8884; text-align: right; vertical-align: top; }}
th:first-child, td:first-child {{ text-align: left; }}
.facts td {{ text-align: left; }}
img {{ max-width: 100%; background: white; border-radius: 4px; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; padding: .8rem; border: 1px solid #8884; border-radius: 4px; }}
.prompt {{ opacity: .6; }}
</style></head><body>
<h1>samba-lm demo</h1>
<p>Four models of one size, trained from scratch on the same {steps} batches of {length}-byte sequences.</p>
<p><b>{verdict}</b></p>
<h2>Perplexity against context</h2>
<p>{scored} bytes of held-out text, cut into windows of each length; every window is read from a fresh state and all its
predictions count. Lower is better.</p>
<div class="scroll"><table><tr><th>model</th>{heads}<th>change</th></tr>{rows}</table></div>
{perplexity}
<h2>Training</h2>
<div class="scroll"><table><tr><th>model</th><th>layers</th><th>parameters</th><th>tokens/s</th>
<th>state at {longest}</th></tr>{descriptions}</table></div>
<p>{source}: {train} bytes to learn from, {heldout} held out, whole files on either side. One token is one byte.</p>
{loss}
<h2>What samba-tiny writes</h2>
<p>After the grey prompt, from the reloaded checkpoint, {decode} tokens a second.</p>
<pre><span class="prompt">{prompt}</span>{sample}</pre>
<h2>How this was made</h2>
<div class="scroll"><table class="facts">{facts}</table></div>
</body></html>
"""

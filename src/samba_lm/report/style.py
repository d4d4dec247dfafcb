"""How pages look: light and dark as the reader's system says, on a telephone, on a screen and on paper."""

from __future__ import annotations

from samba_lm.figures import PALETTE

LIGHT = {"ground": "#ffffff", "raised": "#f6f5f2", "line": "#dedad0", "ink": "#1f1e1b", "faint": "#66625a",
         "accent": "#0d665e", "wash": "#fdf0d5"}  # fmt: skip
DARK = {"ground": "#171716", "raised": "#222220", "line": "#3b3a36", "ink": "#ebe8e1", "faint": "#a7a299",
        "accent": "#6ccabd", "wash": "#3a2f16"}  # fmt: skip

_RULES = """
* { box-sizing: border-box; }
html { color-scheme: light dark; background: var(--ground); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
body { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .4rem; padding-top: .5rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .3rem; }
h4 { font-size: .95rem; margin: 1.2rem 0 .2rem; }
p { margin: .4rem 0; max-width: 46rem; }
a { color: var(--accent); }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .8rem 0; }
code, pre { font: .86em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: .8rem; border: 1px solid var(--line);
  border-radius: 6px; }
.faint { color: var(--faint); }
.note { color: var(--faint); font-size: .86rem; }
.notice { background: var(--wash); border-radius: 6px; padding: .6rem .9rem; max-width: none; }
.notice li { overflow-wrap: anywhere; }
.notice ul { margin: .2rem 0; padding-left: 1.2rem; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--ground);
  padding-right: 1rem; }
th.text, td.text { text-align: left; }
td small, th small { display: block; color: var(--faint); font-size: .82em; line-height: 1.25; }
td.best { font-weight: 650; }
td.best small { font-weight: 400; }
.name { white-space: nowrap; }
td .name, th .name { display: inline-block; width: max-content; max-width: 22rem; white-space: normal;
  overflow-wrap: anywhere; }
th .name { max-width: 9rem; }
figure { margin: .8rem 0; }
figcaption { color: var(--faint); font-size: .86rem; max-width: 46rem; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; margin: .3rem 0; padding: 0; list-style: none;
  font-size: .9rem; }
.legend .name { white-space: normal; overflow-wrap: anywhere; }
.swatch { width: 30px; height: 12px; margin-right: .35rem; vertical-align: -1px; overflow: visible; }
svg.plot { display: block; width: 100%; max-width: 52rem; height: auto; }
svg.plot.narrow { display: none; max-width: 26rem; }
svg.plot.map { width: auto; max-width: 100%; }
svg.plot text, svg.plot tspan { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans",
  "DejaVu Sans", sans-serif; }
svg { fill: currentColor; stroke-linejoin: round; }
.maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: .8rem 1.4rem; }
.maps figure { margin: 0; }
.maps figcaption { color: var(--ink); }
.scale { display: flex; align-items: center; gap: .5rem; font-size: .86rem; color: var(--faint); }
.scale span { display: block; width: 9rem; height: .7rem; border-radius: 3px;
  background: linear-gradient(90deg, #440154, #3b528b, #21918c, #5ec962, #fde725); print-color-adjust: exact;
    -webkit-print-color-adjust: exact; }
.how { font-size: .82rem; color: var(--faint); margin: .3rem 0 1rem; }
.how p { max-width: none; margin: .1rem 0; overflow-wrap: anywhere; }
.how code { color: var(--ink); }
.prompt { color: var(--faint); }
.i-fill { fill: var(--ink); } .i-stroke { stroke: var(--ink); }
.d-fill { fill: var(--faint); } .d-stroke { stroke: var(--faint); }
.l-fill { fill: var(--line); } .l-stroke { stroke: var(--line); }
.g-stroke { stroke: var(--ground); }
@media (max-width: 34rem) {
  body { padding: 1rem .9rem 3rem; }
  h1 { font-size: 1.4rem; }
  svg.plot.wide { display: none; } svg.plot.narrow { display: block; }
  table { font-size: .86rem; }
  td .name { max-width: 8.5rem; }
  th .name { max-width: 6.5rem; }
}
@page { margin: 1.4cm; }
@media print {
  html { font-size: 11px; } body { max-width: none; padding: 0; }
  nav { display: none; }
  h2, h3 { break-after: avoid; }
  figure, tr, .how { break-inside: avoid; }
  .scroll { overflow: visible; }
  th, td { padding-right: .45rem; }
  th .name { max-width: 4rem; font-size: .85em; }
  th:first-child, td:first-child { position: static; }
  svg.plot.wide { display: block; max-width: 36rem; } svg.plot.narrow { display: none; }
}
"""


def stylesheet() -> str:
    """All rules, the palette of the figures among them: ``cN-fill`` and ``cN-stroke`` for its colour N."""
    light = LIGHT | {f"c{i}": pair[0] for i, pair in enumerate(PALETTE)}
    dark = DARK | {f"c{i}": pair[1] for i, pair in enumerate(PALETTE)}
    colours = "\n".join(
        f".c{i}-fill {{ fill: var(--c{i}); }} .c{i}-stroke {{ stroke: var(--c{i}); }}" for i in range(len(PALETTE))
    )
    # On paper the ground is white whatever the screen is.
    return f"{_root(light)}\n@media screen and (prefers-color-scheme: dark) {{ {_root(dark)} }}\n{colours}{_RULES}"


def _root(colours: dict[str, str]) -> str:
    return ":root { " + " ".join(f"--{name}: {value};" for name, value in colours.items()) + " }"

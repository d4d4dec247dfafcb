"""What the measured curves say: throughputs, and Samba's speed over Llama's beside the paper's claims."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from samba_lm import zoo
from samba_lm.bench.bars import (
    ATTENTION_SHARE,
    DECODE_LIMIT,
    DECODE_RATIO,
    LAST_LIMIT,
    LAST_RATIO,
    NONE,
    PROMPT_RATIO,
    Bar,
)
from samba_lm.bench.figure import Figure
from samba_lm.bench.paper import LLAMA, SAMBA, Curves, Plan

AGREES = 0.03
"""How far the time of one whole run may be from what the steps' times add up to."""


def seconds(steps: Mapping[int, float], tokens: int) -> float:
    """How long ``tokens`` take from nothing, by ms a step at some lengths of text: straight lines between these, and
    below the first its time."""
    at = [0, *(context for context in sorted(steps) if context < tokens), tokens]
    ms = np.interp(at, sorted(steps), [steps[context] for context in sorted(steps)])
    return float((np.diff(at) * (ms[1:] + ms[:-1]) / 2).sum()) / 1e3


def prompt_speed(curves: Curves, plan: Plan) -> dict[int, float]:
    """Thousand tokens a second, by the prompts' length."""
    return {length: plan.tokens / statistics.median(times) for length, times in sorted(curves.prompts.items())}


def generation_speed(curves: Curves, plan: Plan) -> dict[int, float]:
    """Thousand tokens a second of all texts, averaged from the first token on, by their number."""
    known = sorted(curves.steps)
    # Only up to where all before was measured: what is missing must not be guessed.
    whole = [context for i, context in enumerate(plan.contexts) if known[: i + 1] == plan.contexts[: i + 1]]
    return {context: plan.batch * context / seconds(curves.steps, context) / 1e3 for context in whole}


def attention_share(curves: Curves, plan: Plan, copy: float) -> float | None:
    """Of the copy bandwidth ``copy``, at which the growing cache is read: its bytes between the last two lengths over
    the difference of their steps. None where the state does not grow, or steps are missing."""
    config, longer = zoo.get(curves.name), plan.generated
    shorter = longer // 2
    grown = plan.batch * (config.state_bytes(longer) - config.state_bytes(shorter))
    if not grown or not {longer, shorter} <= curves.gpu_steps.keys():
        return None
    ms = curves.gpu_steps[longer] - curves.gpu_steps[shorter]
    return grown / (ms / 1e3) / copy if ms > 0 else None


def conclusions(
    found: Sequence[Curves], plan: Plan, copy: float, run: Mapping[int, float] | None = None
) -> list[Figure]:
    """The share of the copy bandwidth ``copy``, the whole ``run`` (seconds by tokens), and the ratios."""
    by_name = {curves.name: curves for curves in found}
    rows = []
    shares = {curves.name: attention_share(curves, plan, copy) for curves in found}
    for name, share in shares.items():
        if share is not None:
            title = f"{name}, its attention reading the cache at {plan.generated:,} tokens, of the copy bandwidth"
            bar = ATTENTION_SHARE.bar if name == LLAMA else None
            rows.append(Figure(title, share, "", bar, False, facts={"copy_bytes_per_s": copy}))
    if run is not None:
        rows += _run_rows(by_name.get(SAMBA), plan, run)
    if {SAMBA, LLAMA} <= by_name.keys():
        rows += _ratios(by_name[SAMBA], by_name[LLAMA], plan, shares[LLAMA])
    return rows


def curve_figures(curves: Curves, plan: Plan) -> list[Figure]:
    """Every point of one model's curves; what is missing says why."""
    name, unit = curves.name, "thousand tokens/s"
    if "all" in curves.notes:
        return [Figure(name, None, unit, low_is_good=False, note=curves.notes["all"])]
    prompts, generated = prompt_speed(curves, plan), generation_speed(curves, plan)
    rows = [
        Figure(f"narrow {name}, {what}, relative error", own, "", note=f"plain bf16 on the CPU: {plain:.1e}")
        for what, (own, plain) in curves.parity.items()
    ]
    for length in plan.lengths:
        what = f"{name}, prompts of {length:,} tokens, {plan.tokens // length} of them"
        if length not in prompts:
            rows.append(Figure(what, None, unit, low_is_good=False, note=curves.notes[f"prompts {length}"]))
            continue
        facts = {"ms": curves.prompts[length], "at once": curves.at_once[length]}
        rows.append(Figure(what, prompts[length], unit, low_is_good=False, facts=facts))
    for context in plan.contexts:
        what = f"{name}, {plan.batch} texts, {context:,} tokens each"
        if context not in curves.steps:
            rows.append(Figure(what, None, unit, low_is_good=False, note=curves.notes[f"steps {context}"]))
            continue
        facts = {"ms a step": curves.steps[context], "ms a step on the GPU": curves.gpu_steps[context]}
        note = f"the last step {curves.steps[context]:.3f} ms"
        if context not in generated:
            note += "; a shorter one is missing"
            rows.append(Figure(what, None, unit, low_is_good=False, note=note, facts=facts))
            continue
        rows.append(Figure(what, generated[context], unit, low_is_good=False, note=note, facts=facts))
    return rows


def _run_rows(samba: Curves | None, plan: Plan, run: Mapping[int, float]) -> list[Figure]:
    """The whole run, and how far the curve is from it."""
    tokens = plan.generated
    what = f"{SAMBA}, {plan.batch} x {tokens:,} tokens in one run"
    facts = {"seconds by tokens": dict(run)}
    speed = plan.batch * tokens / run[tokens] / 1e3
    rows = [Figure(what, speed, "thousand tokens/s", low_is_good=False, facts=facts)]
    if samba is not None and tokens in generation_speed(samba, plan):
        off = max(abs(seconds(samba.steps, count) / run[count] - 1) for count in run if count >= tokens // 2)
        rows.append(Figure(f"{what}: its time against the sum of the steps' times", off, "", AGREES, check=True))
    return rows


def _ratios(samba: Curves, llama: Curves, plan: Plan, share: float | None) -> list[Figure]:
    """Samba over Llama. Where Llama's attention is too slow for a fair comparison, without a bar, and saying so."""
    full = plan.tokens == Plan.tokens and plan.generated == Plan.generated and plan.batch == Plan.batch
    assert ATTENTION_SHARE.bar is not None
    fair = share is not None and share >= ATTENTION_SHARE.bar
    told = "counts" if fair else "does not count"
    read = "was not measured" if share is None else f"reads its cache at {share:.0%} of the copy bandwidth"
    title, longest = f"{SAMBA} over {LLAMA}", plan.generated
    rows = []

    def add(what: str, over: float, under: float, bar: Bar, note: str) -> None:
        rows.append(Figure(f"{title}, {what}", over / under, "x", bar.bar, False, note=note))

    fast, slow = prompt_speed(samba, plan), prompt_speed(llama, plan)
    if plan.tokens in fast.keys() & slow.keys():
        what = f"reading one prompt of {plan.tokens:,} tokens"
        add(what, fast[plan.tokens], slow[plan.tokens], PROMPT_RATIO if full else NONE, "")
    bars = (DECODE_RATIO, LAST_RATIO) if full and fair else (NONE, NONE)
    reason = f"{told}: {LLAMA}'s attention {read}; at the full bandwidth it would be about"
    fast, slow = generation_speed(samba, plan), generation_speed(llama, plan)
    if longest in fast.keys() & slow.keys():
        what = f"{plan.batch} texts, average over {longest:,} generated tokens"
        add(what, fast[longest], slow[longest], bars[0], f"{reason} {DECODE_LIMIT:g}")
    if longest in samba.steps.keys() & llama.steps.keys():
        what = f"{plan.batch} texts, the last of {longest:,} generated tokens"
        add(what, llama.steps[longest], samba.steps[longest], bars[1], f"{reason} {LAST_LIMIT:g}")
    return rows

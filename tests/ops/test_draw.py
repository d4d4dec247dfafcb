"""Drawing a token: the definition against plain Python, and every backend against the definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kernels import DEVICE, needs_triton

from samba_lm.errors import UserError
from samba_lm.ops.backend import HAS_TRITON, Backend
from samba_lm.ops.draw import NOT_FINITE, Rules, candidates, cpu, draw, reference, uniform

TRITON = pytest.param("triton", marks=needs_triton)
BACKENDS = ["reference", "cpu", TRITON]
EDGE = 2e-5
"""Backends' masses differ by a few parts in 2^22: where a nucleus' mass is this near it may end one token off."""


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several chunks for the interpreter, which takes milliseconds for each."""
    if HAS_TRITON and DEVICE == "cpu":
        from samba_lm.ops.draw import triton

        monkeypatch.setattr(triton, "LEAST", 256)


def rules_of(rows: list[dict[str, float]], vocab_size: int) -> Rules:
    def column(name: str, default: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor([row.get(name, default) for row in rows], dtype=dtype, device=DEVICE)

    top_k = column("top_k", vocab_size, torch.int64)
    return Rules(column("temperature", 1.0), top_k, column("top_p", 1.0), column("min_p", 0.0))


def drawn(
    logits: torch.Tensor, rules: Rules, seed: torch.Tensor | None = None, backend: Backend = "auto", cut: bool = True
) -> torch.Tensor:
    """Token i of each row's own sequence."""
    logits = logits.to(DEVICE)
    best, likeliest = logits.max(dim=-1)
    position = torch.arange(len(logits), device=DEVICE)
    seed = torch.zeros_like(position) if seed is None else seed.to(DEVICE)
    return draw(logits, best, likeliest, rules, seed, position, cut=cut, backend=backend)


def brute_force(logits: list[float], rule: dict[str, float]) -> set[int]:
    """The candidates in the words of SamplingParams, equals at the edge included; one row, plain Python."""
    weights = [math.exp((x - max(logits)) / rule.get("temperature", 1.0)) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[: int(rule.get("top_k", len(logits)))]
    order = [i for i in range(len(logits)) if logits[i] >= logits[order[-1]]]
    total, mass, last = sum(weights[i] for i in order), 0.0, math.inf
    for i in sorted(order, key=lambda i: -logits[i]):
        if mass >= rule.get("top_p", 1.0) * total:
            break
        last, mass = logits[i], mass + weights[i]
    return {i for i in order if logits[i] >= last and weights[i] >= max(2**-40, rule.get("min_p", 0.0))}


RULES: list[dict[str, float]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5, "top_k": 3},
    {"top_p": 0.7},
    {"top_p": 0.999, "temperature": 3.0},
    {"min_p": 0.2},
    {"top_k": 5, "top_p": 0.8, "min_p": 0.1, "temperature": 1.3},
    {"top_k": 1},
    {"top_k": 1, "top_p": 1e-9},
    {"top_p": 1e-9},
    {"top_p": 1e-50},
    {"top_k": 400, "top_p": 0.9},
    {"top_k": 37, "top_p": 0.5},
    {"min_p": 1.0},
]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("few", [4, 256])
def test_candidates_equal_brute_force(backend: Backend, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "FEW", few)
    for scale in (0.5, 4.0):
        for rule in RULES:
            logits = torch.randn(8, 61) * scale
            logits[:, 7] = logits[:, 50]
            mass = candidates(logits.to(DEVICE), logits.amax(-1).to(DEVICE), rules_of([rule] * 8, 61), backend=backend)
            for row in range(8):
                expected = brute_force(logits[row].tolist(), rule)
                assert set(mass[row].nonzero()[:, 0].tolist()) == expected, (rule, row)


@pytest.mark.parametrize("V", [1, 5, 700, 1025, 3001])
@pytest.mark.parametrize("kind", ["spread", "flat", "equal", "bf16", "ruled out", "outliers"])
def test_histograms_find_what_a_sort_finds(V: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "FEW", 1)
    logits, rules = rows_of(kind, V), rules_of(RULES, V)
    best = logits.amax(-1)
    expected, found = (candidates(logits, best, rules, backend=backend) for backend in ("reference", "cpu"))
    assert torch.equal(found, expected)


def rows_of(kind: str, V: int) -> torch.Tensor:
    """Logits for RULES."""
    logits = torch.randn(len(RULES), V) * 3
    if kind == "flat":
        logits = 10 + logits * 1e-5
    elif kind == "equal":
        logits = torch.full_like(logits, -2.5)
    elif kind == "bf16":
        logits = logits.bfloat16().float()
    elif kind == "ruled out":
        logits[:, torch.rand(V) < 0.9] = -torch.inf
        logits[:, V // 2] = 0.1
    elif kind == "outliers":
        logits[:, V // 3], logits[:, V // 5] = 60.0, -1e30
    return logits.to(DEVICE)


@needs_triton
@pytest.mark.parametrize("V", [300] if DEVICE == "cpu" else [1, 300, 3001, 50304, 262_143])
@pytest.mark.parametrize("kind", ["spread", "flat", "equal", "bf16", "ruled out", "outliers"])
def test_kernels_find_what_a_sort_finds(V: int, kind: str) -> None:
    """Where the kernels cut, what is nearer must not have been enough, and what is kept must be."""
    from samba_lm.ops.draw.triton import furthest_triton

    logits, rules = rows_of(kind, V), rules_of(RULES, V)
    best = logits.amax(-1)
    distance, weight = reference.weigh(logits, best, rules.temperature)
    furthest = furthest_triton(logits, best, *rules)
    kept = distance <= furthest[:, None]
    expected = reference.furthest_reference(distance, weight, rules)
    count, nearer = kept.sum(-1), (distance < furthest[:, None]).sum(-1)
    for row, rule in enumerate(RULES):
        if rule.get("top_p", 1.0) == 1.0:  # whole numbers only: equal
            assert torch.equal(kept[row], distance[row] <= expected[row]), rule
        k = min(rules.top_k[row], torch.tensor(V))
        assert nearer[row] < k or count[row] == V, rule
        by_k = weight[row].double() * (distance[row] <= distance[row].sort().values[int(k) - 1])
        p = min(float(rules.top_p[row]), 1.0)
        held, before = by_k[kept[row]].sum(), by_k[distance[row] < furthest[row]].sum()
        if p < 1:
            assert before < (p + EDGE) * by_k.sum(), rule
            assert held > (p - EDGE) * by_k.sum(), rule
            assert bool((distance[row] == furthest[row]).any()), rule


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("V", [1, 257, 700])
def test_a_draw_equals_the_definitions(backend: Backend, V: int) -> None:
    logits, rules = torch.randn(len(RULES), V) * 2, rules_of(RULES, V)
    for seed in (0, 2**63 - 1) if V == 257 else (-(2**63),):
        seeds = torch.full((len(RULES),), seed)
        expected = drawn(logits, rules, seeds, "reference")
        assert torch.equal(drawn(logits, rules, seeds, backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_is_drawn_alike_alone_among_others_and_where_nobody_cuts(backend: Backend) -> None:
    n = len(RULES)
    logits, rules, seeds = torch.randn(n, 300), rules_of(RULES, 300), torch.arange(n) * 2**40
    together = drawn(logits, rules, seeds, backend)
    position, logits = torch.arange(n, device=DEVICE), logits.to(DEVICE)
    best, likeliest = logits.max(dim=-1)
    for i in range(0, n, 3):
        one = slice(i, i + 1)
        alone = Rules(*(rule[one] for rule in rules))
        arguments = logits[one], best[one], likeliest[one], alone, seeds[one].to(DEVICE), position[one]
        assert torch.equal(draw(*arguments, backend=backend), together[one])
        if not RULES[i].keys() - {"temperature"}:
            assert torch.equal(draw(*arguments, cut=False, backend=backend), together[one])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", [False, True])
def test_rows_without_numbers_and_cold_ones(backend: Backend, cut: bool) -> None:
    logits = torch.randn(6, 330)
    logits[0, 3], logits[1, 310], logits[2] = torch.nan, torch.inf, -torch.inf
    rules = rules_of(
        [{"top_k": 4}, {"top_p": 0.5}, {}, {"temperature": 0}, {"temperature": 1e-35, "top_p": 0.5}, {}], 330
    )
    tokens = drawn(logits, rules, None, backend, cut).tolist()
    assert tokens[:3] == [NOT_FINITE] * 3
    assert tokens[3:5] == logits[3:5].argmax(-1).tolist()
    assert 0 <= tokens[5] < 330


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_temperatures(backend: Backend) -> None:
    logits = torch.randn(4, 40) * 100
    logits[:, 20:] = -torch.inf
    rules = rules_of([{"temperature": t, "top_p": 0.9} for t in (1e-30, 1e-20, 1e38, math.inf)], 40)
    tokens = drawn(logits, rules, torch.arange(4), backend)
    assert torch.equal(tokens[:2].cpu(), logits[:2].argmax(-1))
    assert int(tokens.max()) < 20  # what is ruled out stays so however hot


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_may_be_parts_of_longer_ones(backend: Backend) -> None:
    logits, rules = torch.randn(len(RULES), 90) * 2, rules_of(RULES, 77)
    assert torch.equal(
        drawn(logits[:, :77], rules, None, backend), drawn(logits[:, :77].contiguous(), rules, None, backend)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_candidate_is_drawn_at_the_top_of_the_range(backend: Backend) -> None:
    """A seed whose number is the largest of some: at the other end of the row from the smallest's."""
    seeds = torch.arange(200_000)
    numbers = uniform(seeds, torch.zeros_like(seeds))
    logits = torch.zeros(1, 5000)
    logits[:, 4990:] = -torch.inf
    for seed, low, high in ((int(numbers.argmax()), 4988, 4989), (int(numbers.argmin()), 0, 1)):
        token = int(drawn(logits, rules_of([{}], 5000), torch.tensor([seed]), backend, cut=False))
        assert low <= token <= high


def test_uniform_numbers_are_spread_evenly_over_seeds_and_positions() -> None:
    several, same = torch.arange(4000), torch.zeros(4000, dtype=torch.int64)
    for seed, position in ((same, several), (several, same + 5), (-several * 2**40, 2**40 + several)):
        numbers = uniform(seed, position)
        assert ((numbers >= 0) & (numbers < 1)).all()
        assert len(numbers.unique()) == 4000
        tenths = torch.histc(numbers, bins=10, min=0, max=1)
        assert float(((tenths - 400) ** 2 / 400).sum()) < 27.9  # 99.9% at 9 degrees of freedom


def test_the_generator_is_splitmix64() -> None:
    state = torch.tensor(1234567)
    for known in (6457827717110365317, 3203168211198807973, 9817491932198370423):  # of its authors' test vectors
        state = state + reference.signed(reference.GOLDEN)
        assert int(reference.mix(state)) % 2**64 == known


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("logits", torch.zeros(2, 5).half()),
        ("best", torch.zeros(3)),
        ("likeliest", torch.zeros(2)),
        ("seed", torch.zeros(1)),
    ],
)
def test_wrong_tensors_are_named(name: str, wrong: torch.Tensor) -> None:
    whole = torch.zeros(2, dtype=torch.int64)
    right: dict[str, Any] = {"logits": torch.zeros(2, 5), "best": torch.zeros(2), "likeliest": whole, "seed": whole}
    rules = Rules(torch.ones(2), whole + 5, torch.ones(2), torch.zeros(2))
    with pytest.raises(UserError, match=f"draw: {name} must be"):
        draw(**{**right, name: wrong}, rules=rules, position=whole)

"""Sampling against brute force, against the distribution it claims, and its seed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from samba_lm.errors import UserError
from samba_lm.generation import sampling
from samba_lm.generation.params import SamplingParams
from samba_lm.generation.sampling import NOT_FINITE, History, Options, require_finite
from samba_lm.ops.draw import cpu


def options_of(params: SamplingParams | list[SamplingParams], rows: int, vocab_size: int) -> Options:
    return Options.of(params if isinstance(params, list) else [params] * rows, vocab_size)


def sample(
    logits: torch.Tensor,
    params: SamplingParams | list[SamplingParams],
    positions: Iterable[int],
    history: History | None = None,
    vocab_size: int | None = None,
) -> torch.Tensor:
    options = options_of(params, len(logits), vocab_size or logits.shape[1])
    return sampling.sample(logits, options, torch.tensor(list(positions)), history, vocab_size)


def brute_force(logits: list[float], params: SamplingParams) -> dict[int, float]:
    """The distribution in the words of SamplingParams, one row, plain Python."""
    weights = {i: math.exp(x / params.temperature) for i, x in enumerate(logits)}
    order = sorted(weights, key=lambda i: -weights[i])
    if params.top_k is not None:
        order = order[: params.top_k]
    total, mass, kept = sum(weights[i] for i in order), 0.0, []
    for i in order:
        if mass >= params.top_p:
            break
        kept.append(i)
        mass += weights[i] / total
    kept = [i for i in kept if weights[i] >= params.min_p * weights[order[0]]]
    total = sum(weights[i] for i in kept)
    return {i: weights[i] / total for i in kept}


OPTIONS = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5, "top_k": 3},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"top_k": 5, "top_p": 0.8, "min_p": 0.1, "temperature": 1.3},
    {"top_k": 1},
    {"top_k": 100, "top_p": 0.9},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_draws_follow_the_distribution(options: dict[str, float]) -> None:
    params = SamplingParams(seed=3, **options)  # type: ignore[arg-type]
    logits, n = torch.tensor([1.0, 0.2, -0.5, 2.0, 0.0, -3.0, 1.5, 0.9]), 4000
    drawn = sample(logits.expand(n, -1), params, range(n))
    want = brute_force(logits.tolist(), params)
    counts = torch.bincount(drawn, minlength=8).tolist()
    assert sum(counts[i] for i in want) == n  # nothing outside the candidates
    chi_square = sum((counts[i] - n * p) ** 2 / (n * p) for i, p in want.items())
    assert chi_square < 24.3  # 99.9% quantile at 7 degrees of freedom, fewer need less


def test_every_row_has_options_of_its_own() -> None:
    params = [SamplingParams().replace(seed=i, **chosen) for i, chosen in enumerate(OPTIONS)]
    params += [SamplingParams(temperature=0), SamplingParams(temperature=1e-35, top_p=0.5)]
    logits = torch.randn(len(params), 300)
    together = sample(logits, params, range(len(params)))
    alone = [sample(logits[i : i + 1], one, [i]) for i, one in enumerate(params)]
    assert together.tolist() == [int(t) for t in alone]
    assert together[-2:].tolist() == logits[-2:].argmax(-1).tolist()


def test_one_who_asks_for_few_among_those_who_ask_for_all() -> None:
    params = [SamplingParams(top_k=2), SamplingParams()]
    logits = torch.zeros(2, 50)
    logits[:, 7] = logits[:, 9] = 1.0
    drawn = torch.stack([sample(logits, params, [i, i]) for i in range(200)])
    assert set(drawn[:, 0].tolist()) == {7, 9}
    assert len(set(drawn[:, 1].tolist())) > 20


def test_equals_at_the_edge_all_stay() -> None:
    logits = torch.tensor([[1.0, 3.0, 1.0, 2.0]]).expand(3000, -1)
    for params in (SamplingParams(top_k=3), SamplingParams(top_p=0.95)):
        assert set(sample(logits, params, range(3000)).tolist()) == {0, 1, 2, 3}
    assert set(sample(logits, SamplingParams(top_k=2), range(3000)).tolist()) == {1, 3}


def test_greedy_takes_the_lowest_of_equals_and_needs_no_seed() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0], [5.0, 1.0, 5.0]])
    for seed in range(5):
        assert sample(logits, SamplingParams(temperature=0, seed=seed), [7, 9]).tolist() == [1, 0]


def test_a_tiny_temperature_is_greedy_without_overflow() -> None:
    logits = torch.randn(50, 30) * 100
    assert torch.equal(sample(logits, SamplingParams(temperature=1e-30), range(50)), logits.argmax(-1))


@pytest.mark.parametrize("options", [{"temperature": 1e-50}, {"temperature": 1e-300}, {"top_p": 1e-50}])
@pytest.mark.parametrize("vocab_size", [5, 2 * cpu.FEW])
def test_values_too_small_for_fp32_leave_the_likeliest(options: dict[str, float], vocab_size: int) -> None:
    logits = torch.linspace(0, 3, vocab_size)[None]
    assert sample(logits, SamplingParams(**options), [0]).tolist() == [vocab_size - 1]


def test_padded_columns_are_never_drawn() -> None:
    logits = torch.zeros(2000, 12)
    logits[:, 8:] = 50.0
    for params in (
        SamplingParams(),
        SamplingParams(top_k=10),
        SamplingParams(top_p=0.99),
        SamplingParams(temperature=0),
    ):
        assert int(sample(logits, params, range(2000), vocab_size=8).max()) < 8


def test_a_result_depends_on_seed_and_position_but_not_on_the_batch() -> None:
    logits, params = torch.randn(64, 100), SamplingParams(seed=11, top_p=0.95)
    together = sample(logits, params, range(64))
    alone = torch.cat([sample(logits[i : i + 1], params, [i]) for i in range(64)])
    assert torch.equal(together, alone)
    assert not torch.equal(together, sample(logits, params.replace(seed=12), range(64)))
    assert not torch.equal(together, sample(logits, params, range(64, 128)))


def test_penalties_by_hand() -> None:
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    history = History.create(1, 5, "cpu")
    history.read(0, torch.tensor([0, 1]))  # the prompt: for the repetition penalty only
    for token in (2, 2, 1):
        history.add(torch.tensor([token]))
    logits = sampling.penalise(torch.tensor([[4.0, -4.0, 4.0, 4.0, -4.0]]), options_of(params, 1, 5), history)
    assert logits.tolist() == [[2.0, -8.0 - 0.5 - 0.25, 2.0 - 0.5 - 0.5, 4.0, -4.0]]
    assert sampling.penalised(params)
    assert not sampling.penalised(SamplingParams())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_damaged_logits_are_told(bad: float, temperature: float) -> None:
    logits = torch.stack((torch.full((4,), bad), torch.arange(4.0)))
    ids = sample(logits, SamplingParams(temperature=temperature, top_k=1), [0, 0]).tolist()
    assert ids == [NOT_FINITE, 3]  # only the row that is damaged
    with pytest.raises(UserError, match="not finite"):
        require_finite(ids)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": "hot"},
        {"top_k": 0},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"min_p": -0.5},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"repetition_penalty": 1e-50},
        {"presence_penalty": math.inf},
        {"frequency_penalty": 1e300},
        {"seed": -1},
        {"seed": 2**64},
        {"max_tokens": -1},
        {"stop": ("a", "")},
    ],
    ids=str,
)
def test_values_out_of_range_are_named(options: dict[str, float]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(UserError) as error:
        SamplingParams(**options)  # type: ignore[arg-type]
    assert str(error.value).startswith(f"{name}={value!r}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options",
    [{"top_k": True}, {"temperature": True}, {"temperature": 10**400}, {"seed": 10**6000}, {"stop": None}],
)
def test_values_of_another_kind_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"^{next(iter(options))}=.*"):
        SamplingParams(**options)


def test_an_unknown_option_gets_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r"'temperatur' is not a sampling option\. Did you mean 'temperature'"):
        SamplingParams().replace(temperatur=1)


def test_one_stop_string_may_be_given_as_it_is() -> None:
    assert SamplingParams(stop="User:").stop == ("User:",)  # type: ignore[arg-type]

"""The mixer contract as a program: run a layer or a model in different ways and compare everything it gives.

Works on anything called as ``f(x, state, segments) -> (y, state)``; ``pieces`` lists the tensors of a state that must
agree, so that caches of different capacity can be compared by what they hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from tolerances import assert_close

from samba_lm.mixers.base import Mixer

Tensors = dict[str, torch.Tensor]
RINGS = {"k", "v", "near_k", "near_v"}


def all_slots(position: int) -> int:
    """How many slots of a ring are in use after ``position`` tokens; Mega's ring starts anew with every chunk."""
    return position


def held(state: Tensors, slots: int | None) -> Tensors:
    """The tensors of a mixer's state, rings cut to the ``slots`` of them that are in use."""
    return {
        name: t[:, : min(slots, t.shape[1])] if name.rpartition(".")[2] in RINGS and slots is not None else t
        for name, t in state.items()
        if name not in ("segment", "position")
    }


def run(
    mixer: Mixer,
    x: torch.Tensor,
    cuts: Iterable[int],
    segments: torch.Tensor | None = None,
    state: Tensors | None = None,
) -> tuple[torch.Tensor, Tensors]:
    """The mixer over x in chunks that end at ``cuts``, the state carried."""
    ys, start = [], 0
    for stop in (*cuts, x.shape[1]):
        if stop > start:
            part = None if segments is None else segments[:, start:stop]
            y, state = mixer(x[:, start:stop], state, part)
            ys.append(y)
            start = stop
    assert state is not None
    return torch.cat(ys, dim=1), state


def gradients(outputs: dict[str, torch.Tensor], mixer: Mixer, x: torch.Tensor, state: Tensors | None = None) -> Tensors:
    """d (fixed random weighting of all outputs) / d x, d every parameter, d every tensor of the initial state."""
    generator = torch.Generator().manual_seed(7)
    total = sum(
        (t * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)).sum()
        for t in outputs.values()
        if t.requires_grad
    )
    inputs = {"x": x, **dict(mixer.named_parameters())}
    if state is not None:
        inputs |= {f"state.{name}": t for name, t in state.items() if t.requires_grad}
    found = torch.autograd.grad(total, list(inputs.values()), allow_unused=True)
    zero = {name: torch.zeros_like(t) for name, t in inputs.items()}
    return {name: zero[name] if g is None else g for name, g in zip(inputs, found, strict=True)}


def assert_same(actual: Tensors, expected: Tensors, what: str, dtype: torch.dtype, scale: float = 1.0) -> None:
    assert actual.keys() == expected.keys(), f"{what}: {sorted(actual)} against {sorted(expected)}"
    for name, tensor in expected.items():
        assert_close(actual[name], tensor, f"{what}: {name}", dtype, scale)


def check_chunks(
    make: Callable[[], Mixer],
    d_model: int,
    batch: int,
    length: int,
    dtype: torch.dtype,
    ways: dict[str, list[int]],
    slots_in_use: Callable[[int], int] = all_slots,
) -> None:
    """Full, chunked and one by one: outputs, final state and all gradients agree; the given state is left alone."""
    mixer = make()
    x = torch.randn(batch, length, d_model, dtype=torch.float64).to(dtype).requires_grad_()
    # Not from nothing, but from a state with numbers in it, so that its gradient is compared too.
    with torch.no_grad():
        _, warm = mixer(torch.randn(batch, 5, d_model, dtype=torch.float64).to(dtype))
    warm = {name: t.requires_grad_() if t.is_floating_point() else t for name, t in warm.items()}
    before = {name: t.detach().clone() for name, t in warm.items()}
    slots = slots_in_use(5 + length)
    y, state = run(mixer, x, [], state=warm)
    expected = {"y": y, **held(state, slots)}
    expected_grads = gradients(expected, mixer, x, warm)
    for way, cuts in ways.items():
        y, state = run(mixer, x, cuts, state=warm)
        actual = {"y": y, **held(state, slots)}
        assert_same(actual, expected, way, dtype)
        assert_same(gradients(actual, mixer, x, warm), expected_grads, f"{way}, gradient", dtype, scale=5.0)
    for name, t in warm.items():
        assert torch.equal(t, before[name]), f"the given state's {name} was changed"


def check_documents(
    make: Callable[[], Mixer],
    d_model: int,
    rows: list[list[int]],
    dtype: torch.dtype,
    ways: dict[str, list[int]],
    slots_in_use: Callable[[int], int] = all_slots,
) -> None:
    """Documents packed into rows (with padding, ids < 0) equal the same documents run apart, gradients included."""
    mixer = make()
    segments = torch.tensor(rows)
    x = torch.randn(*segments.shape, d_model, dtype=torch.float64).to(dtype).requires_grad_()
    expected_y = torch.zeros_like(x)
    finals: list[Tensors] = []
    for row in range(segments.shape[0]):
        for document in segments[row].unique().tolist():
            if document < 0:
                continue
            where = segments[row] == document
            y, state = mixer(x[row : row + 1, where])
            expected_y = expected_y.index_put((torch.tensor(row), where.nonzero()[:, 0]), y[0])
        finals.append(state)
    valid = (segments >= 0)[..., None]
    expected_grads = gradients({"y": expected_y * valid}, mixer, x)
    for way, cuts in ways.items():
        y, state = run(mixer, x, cuts, segments)
        assert torch.isfinite(y).all(), f"{way}: output at padding is not finite"
        actual = torch.where(valid, y, 0)
        assert_same({"y": actual}, {"y": expected_y}, way, dtype)
        assert_same(gradients({"y": actual}, mixer, x), expected_grads, f"{way}, gradient", dtype, scale=5.0)
        for row, final in enumerate(finals):
            length = int(final["position"])
            slots = slots_in_use(length)
            mine = held({name: t[row : row + 1] for name, t in state.items()}, slots)
            assert_same(mine, held(final, slots), f"{way}, state of row {row}", dtype)
            assert int(state["position"][row]) == length
            assert int(state["segment"][row]) == segments[row].max()
        # Who goes on without a word of documents goes on with the last one, and with nothing of those before it.
        more = torch.randn(len(rows), 6, d_model, dtype=torch.float64).to(dtype)
        with torch.no_grad():
            together, _ = mixer(more, state)
            for row, final in enumerate(finals):
                alone, _ = mixer(more[row : row + 1], final)
                assert_close(together[row : row + 1], alone, f"{way}, going on from row {row}", dtype)

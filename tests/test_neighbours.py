"""What a part of a row gets from the parts before it: on real processes, against the whole row in one."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from samba_lm.neighbours import Neighbours

REACHES = (0, 1, 5, 6, 7, 11, 12, 40)
"""With parts of 6 columns: none, some, all of a part, into the next one, and more than any row has."""


def neighbours() -> Neighbours:
    dist.init_process_group("gloo")
    return Neighbours(dist.group.WORLD)


def part(us: Neighbours, whole: torch.Tensor) -> torch.Tensor:
    return whole.chunk(us.count, dim=1)[us.index].clone().requires_grad_()


def summed(gradient: torch.Tensor, us: Neighbours) -> torch.Tensor:
    """Everybody's part of a gradient, side by side."""
    return torch.cat(list(us.from_all(gradient)), dim=1)


def worst(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found - wanted).detach().abs().max()) if found.numel() else 0.0


def halo_errors(us: Neighbours) -> list[float]:
    length, errors = 6, []
    torch.manual_seed(0)
    row = torch.randn(2, length * us.count, 3, 2, dtype=torch.float64)
    for reach in REACHES:
        weights = torch.randn(us.count, 2, reach, 3, 2, dtype=torch.float64)
        # One process: the columns before each part, zeros before the row.
        whole = row.clone().requires_grad_()
        padded = torch.cat((whole.new_zeros(2, reach, 3, 2), whole), dim=1)
        windows = [padded[:, i * length : i * length + reach] for i in range(us.count)]
        torch.stack([(w * x).sum() for w, x in zip(weights, windows, strict=True)]).sum().backward()
        assert whole.grad is not None
        mine = part(us, row)
        found = us.from_left(mine, reach)
        (found * weights[us.index]).sum().backward()
        assert mine.grad is not None, "this process took no part in backward"
        errors += [worst(found, windows[us.index]), worst(summed(mine.grad, us), whole.grad)]
        narrow = us.from_left(mine.detach().bfloat16(), reach)
        assert torch.equal(narrow, windows[us.index].bfloat16())
    return errors


def carry_errors(us: Neighbours) -> list[float]:
    errors = []
    torch.manual_seed(0)
    for kept_shape in ((2, 5, 3), (2, 5, 1)):
        finals = torch.randn(us.count, 2, 5, 3, dtype=torch.float64, requires_grad=True)
        keeps = torch.rand(us.count, *kept_shape, dtype=torch.float64)
        keeps[1, 0] = 0.0  # a document begins there
        keeps.requires_grad_()
        weights = torch.randn(us.count, 2, 5, 3, dtype=torch.float64)
        starts = [torch.zeros(2, 5, 3, dtype=torch.float64)]
        for final, kept in itertools.islice(zip(finals, keeps, strict=True), us.count - 1):
            starts.append(kept * starts[-1] + final)
        (torch.stack(starts) * weights).sum().backward()
        final, kept = (t[us.index].detach().clone().requires_grad_() for t in (finals, keeps))
        start = us.carry(final, kept)
        (start * weights[us.index]).sum().backward()
        assert finals.grad is not None
        assert keeps.grad is not None
        assert final.grad is not None, "this process took no part in backward"
        assert kept.grad is not None
        errors.append(worst(start, starts[us.index]))
        errors += [worst(final.grad, finals.grad[us.index]), worst(kept.grad, keeps.grad[us.index])]
    return errors


def errors() -> list[list[float]]:
    us = neighbours()
    return [halo_errors(us), carry_errors(us)]


@pytest.mark.parametrize("world", [2, 4])
def test_a_part_gets_what_one_process_has(world: int) -> None:
    for halo, carry in on_ranks(world, errors, timeout=60):
        assert max(halo) < 1e-13
        assert max(carry) < 1e-13


def compiled_errors() -> list[float]:
    """A function of both exchanges, compiled as one graph, against itself."""
    us = neighbours()

    def both(x: torch.Tensor) -> torch.Tensor:
        x = x + us.from_left(x, 2).sum(1, keepdim=True)
        return x * us.carry(x.sum(1), torch.sigmoid(x).mean(1))[:, None].sin()

    torch.manual_seed(us.index)
    x, results = torch.randn(2, 6, 3, dtype=torch.float64), []
    for function in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
        mine = x.clone().requires_grad_()
        y = function(mine)
        y.square().sum().backward()
        assert mine.grad is not None
        results += [y, mine.grad]
    return [worst(results[2], results[0]), worst(results[3], results[1])]


@pytest.mark.slow
def test_torch_compile_keeps_the_exchanges() -> None:
    for found in on_ranks(2, compiled_errors, timeout=100):
        assert max(found) < 1e-14

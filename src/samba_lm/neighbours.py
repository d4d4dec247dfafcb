"""The processes that hold the consecutive parts of the same rows, and what a part takes from those before it.

A row of L tokens that is too long for one process lies on C of them, part c on process c: columns c L/C up to
(c + 1) L/C. Two exchanges make of the parts' layers those of the whole row, forward and backward:

- :meth:`Neighbours.from_left`, for convolutions and attention: the inputs that come just before a part;
- :meth:`Neighbours.carry`, for recurrences h_t = a_t * h_{t-1} + b_t: a part's effect on a state is h -> kept * h +
  final, whatever it starts from, so each part finds its own effect first and then, from those before it, its start.

Every process must make the same exchanges in the same order, backward too, or all wait for ever. So each gets a tensor
of the same shape, the first of them as well, whose zeros are to be used like the others' values: what goes unused would
leave a process out of backward. The exchanges are operators of ``torch.library``: autograd and activation checkpointing
call them where they stand, and torch.compile keeps them as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor


class Neighbours:
    """The processes of ``group`` as holders of consecutive parts, in the order of their ranks.

    ``index``: which part is this process's, from 0. ``count``: how many there are.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.index, self.count = dist.get_rank(group), dist.get_world_size(group)
        self.name = f"neighbours-{next(_numbers)}"  # operators take no objects
        _all[self.name] = self

    def from_left(self, x: Tensor, reach: int) -> Tensor:
        """The ``reach`` inputs that come before this part's x [B, L, ...]: [B, reach, ...], oldest first.

        Zeros where the row had not begun. L is the same everywhere and may be shorter than ``reach``. Differentiable.
        """
        length = x.shape[1]
        found: Tensor = _from_left(x[:, length - min(reach, length) :], reach, self.name)
        return found

    def carry(self, final: Tensor, kept: Tensor) -> Tensor:
        """The state that this part starts from, in the shape of ``final``; zeros in the first.

        final: the state after the part when it starts from zero. kept: how much of a state before the part is left
        after it, of the same shape or one that broadcasts to it, and of the same dtype. Differentiable in both.
        """
        start: Tensor = _carry(final, kept, self.name)[0]
        return start

    def shares(self, length: int, reach: int) -> list[int]:
        """Of ``reach`` inputs before a part, how many lie in the part next to it, the one before that, and so on."""
        return [max(0, min(length, reach - distance * length)) for distance in range(self.count - 1)]

    def to_each(self, sent: list[Tensor], sizes: list[int]) -> list[Tensor]:
        """Send flat ``sent[i]`` to process i and receive ``sizes[i]`` numbers of it."""
        width = sent[0].element_size()
        out = sent[0].new_empty(sum(sizes))
        # As bytes: not every backend knows every dtype.
        dist.all_to_all_single(
            out.view(torch.uint8),
            torch.cat(sent).view(torch.uint8),
            [size * width for size in sizes],
            [t.numel() * width for t in sent],
            group=self.group,
        )
        return list(out.split(sizes))

    def from_all(self, x: Tensor) -> Tensor:
        """Everybody's x, [count, ...]."""
        out = x.new_empty(self.count, *x.shape)
        dist.all_gather(list(out), x.contiguous(), group=self.group)
        return out


_all: WeakValueDictionary[str, Neighbours] = WeakValueDictionary()


def _count() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += 1


_numbers = _count()


@torch.library.custom_op("samba_lm::from_left", mutates_args=())
def _from_left(x: Tensor, reach: int, name: str) -> Tensor:
    us, (batch, length, *rest) = _all[name], x.shape
    shares = us.shares(length, reach)
    sent = [x.new_empty(0)] * (us.index + 1) + [x[:, length - n :].flatten() for n in shares[: us.count - 1 - us.index]]
    column = x[:, :1].numel()
    sizes = [n * column for n in reversed(shares[: us.index])] + [0] * (us.count - us.index)
    received = us.to_each(sent, sizes)
    found, end = x.new_zeros(batch, reach, *rest), reach
    for part, n in zip(reversed(received[: us.index]), shares, strict=False):
        found[:, end - n : end] = part.view(batch, n, *rest)
        end -= n
    return found


@_from_left.register_fake
def _(x: Tensor, reach: int, name: str) -> Tensor:
    return x.new_empty(x.shape[0], reach, *x.shape[2:])


@torch.library.custom_op("samba_lm::from_left_backward", mutates_args=())
def _to_left(dy: Tensor, length: int, name: str) -> Tensor:
    """Of the gradient of what came from the left, what belongs to this part's own L inputs."""
    us, (batch, reach, *rest) = _all[name], dy.shape
    shares, sent, end = us.shares(length, reach), [dy.new_empty(0)] * (us.count - us.index), reach
    for n in shares[: us.index]:
        sent.insert(0, dy[:, end - n : end].flatten())
        end -= n
    column = dy[:, :1].numel()
    sizes = [0] * (us.index + 1) + [n * column for n in shares[: us.count - 1 - us.index]]
    dx = dy.new_zeros(batch, length, *rest)
    for part, n in zip(us.to_each(sent, sizes)[us.index + 1 :], shares, strict=False):
        dx[:, length - n :] += part.view(batch, n, *rest)
    return dx


@_to_left.register_fake
def _(dy: Tensor, length: int, name: str) -> Tensor:
    return dy.new_empty(dy.shape[0], length, *dy.shape[2:])


def _from_left_setup(ctx: Any, inputs: tuple[Tensor, int, str], output: Tensor) -> None:
    ctx.length, ctx.name = inputs[0].shape[1], inputs[2]


def _from_left_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    return _to_left(dy, ctx.length, ctx.name), None, None


_from_left.register_autograd(_from_left_backward, setup_context=_from_left_setup)


@torch.library.custom_op("samba_lm::carry", mutates_args=())
def _carry(final: Tensor, kept: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The start, and everybody's ``kept`` [count, ...] for backward."""
    us = _all[name]
    effects = us.from_all(torch.cat((final.flatten(), kept.flatten())))
    finals, keeps = effects.split((final.numel(), kept.numel()), dim=1)
    finals, keeps = finals.unflatten(1, final.shape), keeps.unflatten(1, kept.shape).clone()
    start = torch.zeros_like(final, memory_format=torch.contiguous_format)
    for i in range(us.index):
        start = torch.addcmul(finals[i], keeps[i], start)
    return start, keeps


@_carry.register_fake
def _(final: Tensor, kept: Tensor, name: str) -> tuple[Tensor, Tensor]:
    start = torch.empty_like(final, memory_format=torch.contiguous_format)
    return start, kept.new_empty(_all[name].count, *kept.shape)


@torch.library.custom_op("samba_lm::carry_backward", mutates_args=())
def _carried(dstart: Tensor, start: Tensor, keeps: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The gradients of this part's ``final`` and ``kept``: what the parts after it have made of its effect."""
    us = _all[name]
    grads = us.from_all(dstart)
    dfinal = torch.zeros_like(start)
    for i in range(us.count - 1, us.index, -1):
        dfinal = torch.addcmul(grads[i], keeps[i], dfinal)
    return dfinal, (dfinal * start).sum_to_size(keeps.shape[1:])


@_carried.register_fake
def _(dstart: Tensor, start: Tensor, keeps: Tensor, name: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(start), keeps.new_empty(keeps.shape[1:])


def _carry_setup(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output)
    ctx.name = inputs[2]


def _carry_backward(ctx: Any, dstart: Tensor, _keeps: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_carried(dstart, *ctx.saved_tensors, ctx.name), None


_carry.register_autograd(_carry_backward, setup_context=_carry_setup)

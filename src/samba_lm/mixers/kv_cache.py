"""The keys and values of the last C positions of each sequence's document: a ring, slot = position modulo C.

A window needs C = w. Full attention lets C grow (by doubling) so that no position is ever overwritten.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from samba_lm.errors import UserError
from samba_lm.mixers.base import Tensors
from samba_lm.neighbours import Neighbours
from samba_lm.span import Span


def empty_cache(
    batch: int, slots: int, heads: int, key_dim: int, value_dim: int, device: torch.device, dtype: torch.dtype
) -> Tensors:
    """Zeros: k [B, C, G, K], v [B, C, G, Kv]."""
    shape = (batch, slots, heads)
    return {
        "k": torch.zeros(*shape, key_dim, device=device, dtype=dtype),
        "v": torch.zeros(*shape, value_dim, device=device, dtype=dtype),
    }


def grow(cache: Tensors, span: Span, max_context: int) -> Tensors:
    """Make room for all positions up to the span's end (full attention). Raises UserError beyond ``max_context``."""
    slots = cache["k"].shape[1]
    needed = span.longest_past + span.length if span.documents is None else int(span.end.position.max())
    if needed <= slots:
        return cache
    if needed > max_context:
        raise UserError(
            f"full attention would have to hold {needed} positions, but max_context is {max_context}: read a shorter "
            "text, raise max_context in the model's config.json, or use a model with a window (`samba-lm models`)"
        )
    if not span.keep:
        return cache
    # Doubling only when going on from something: a prompt read at once gets exactly its length.
    target = needed if slots == 0 else min(max(needed, 2 * slots), max_context)
    return {name: F.pad(cache[name], (0, 0, 0, 0, 0, target - slots)) for name in ("k", "v")}


def past(
    cache: Tensors, k: torch.Tensor, v: torch.Tensor, span: Span, reach: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The last keys and values before the span's k [B, L, G, K], v [B, L, G, Kv], oldest first: k, v [B, P, G, *], P
    <= reach (None: all), and their documents. From the cache, or from the processes that hold what precedes.

    Documents are int64 [B, P]: 0 for keys of the state's document, -1 for slots that hold nothing yet; None: all 0.
    With ``span.apart`` its numbers are added to the documents'.
    """
    if span.neighbours is not None:
        return _from_left(span.neighbours, k, v, span, reach)
    begin, slots = span.start.position, cache["k"].shape[1]
    count = min(slots if reach is None else reach, span.longest_past)
    if count == 0:
        return cache["k"][:, :0], cache["v"][:, :0], begin.new_empty(begin.shape[0], 0)
    position = begin[:, None] + torch.arange(-count, 0, device=begin.device)
    k, v = (_take(cache[name], position.remainder(slots)) for name in ("k", "v"))
    if begin.shape[0] == 1 and span.longest is None:
        return k, v, None  # ``count`` is exact
    held = position >= 0
    if held.device.type == "cpu" and bool(held.all()):  # a GPU would be waited for
        return k, v, None
    return k, v, torch.where(held, 0, -1)


def _from_left(
    neighbours: Neighbours, k: torch.Tensor, v: torch.Tensor, span: Span, reach: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As ``past``; as many on every process, also on those that are nearer to the row's beginning."""
    most = (neighbours.count - 1) * span.length
    count = most if reach is None else min(reach, most)
    # One exchange of what others want of both.
    last = span.length - min(count, span.length)
    before = neighbours.from_left(torch.cat((k[:, last:], v[:, last:]), dim=-1), count)
    k, v = before.split((k.shape[-1], v.shape[-1]), dim=-1)
    position = span.start.position[:, None] + torch.arange(-count, 0, device=k.device)
    documents: int | torch.Tensor = 0
    if span.apart is not None:
        apart = span.apart[:, last:]
        documents = span.once(("apart", count), lambda: neighbours.from_left(apart, count))
    return k, v, torch.where(position >= 0, documents, -1)


def update(cache: Tensors, k: torch.Tensor, v: torch.Tensor, span: Span) -> Tensors:
    """The cache after the span's keys k [B, L, G, K] and values v [B, L, G, Kv]: those of each row's last document.

    Every slot takes its value from exactly one place (a gather, not a scatter), so the result is deterministic and
    differentiable.
    """
    slots, length = cache["k"].shape[1], k.shape[1]
    if not span.keep:
        return {"k": cache["k"], "v": cache["v"]}
    if span.in_place and length == 1 and span.documents is None:
        row, slot = span.once(
            ("slot", slots), lambda: (torch.arange(k.shape[0], device=k.device), span.start.position % slots)
        )
        cache["k"][row, slot], cache["v"][row, slot] = k[:, 0], v[:, 0]
        return {"k": cache["k"], "v": cache["v"]}
    end = span.end.position[:, None]
    slot = torch.arange(slots, device=k.device)
    newest = end - 1 - (end - 1 - slot).remainder(slots)  # the newest position that belongs in each slot
    read = span.start.position.new_full((k.shape[0], 1), length) if span.lengths is None else span.lengths[:, None]
    source = read - (end - newest)  # its row in k, if it came in this span
    fresh = (newest >= 0) & (source >= 0)
    source = source.clamp(0, length - 1)
    new = {}
    for name, values in (("k", k), ("v", v)):
        new[name] = torch.where(fresh[..., None, None], _take(values, source), cache[name])
    return new


def filled(cache: Tensors, span: Span, lag: int = 0) -> torch.Tensor | None:
    """bool [B, C]: the slots that hold a key of the current document after :func:`update`, but for the newest ``lag``
    (with which the cache must not have come round). None: all do."""
    slots, end = cache["k"].shape[1], span.end.position
    if end.device.type == "cpu" and int(end.min()) - lag >= slots:
        return None
    # A row that has read nothing yet (padding only) still looks at one slot, to stay finite.
    return span.once(
        ("filled", slots, lag), lambda: torch.arange(slots, device=end.device) < (end - lag).clamp(min=1)[:, None]
    )


def _take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return x.gather(1, index[..., None, None].expand(-1, -1, *x.shape[2:]))

"""Training on short rows as if they were long: tokens of which each stands for many of its kind.

Mamba's states read such a token as they would that many (:func:`samba_lm.mixers.mamba.lasting`). Attention sees what is
there, but for this: what lies further back than its windows reach, one after another, in the text that is stood for, it
does not see in the row either. Otherwise it answers short rows by itself, and a hybrid's states learn nothing.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from samba_lm.data.loader import Batch
from samba_lm.mixers.base import Mixer
from samba_lm.model import SambaLM


def stretched(batch: Batch, model: SambaLM) -> Batch:
    """The batch of whole rows with ``apart`` as its ``stretch`` and the model have it.

    A model without states has nothing but its attention, and nothing to learn from rows that this cannot answer: it
    reads them undivided.
    """
    if batch.stretch is None and batch.apart is None:
        return batch
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    if not any(mixer.recurrent for mixer in mixers):
        return replace(batch, apart=None)
    reaches = [mixer.reach for mixer in mixers]
    known = [reach for reach in reaches if reach is not None]
    if batch.stretch is None or not any(reaches) or len(known) < len(reaches):
        return batch
    apart = parts(batch.stretch, sum(known))
    return replace(batch, apart=apart if batch.apart is None else apart + batch.apart)


def parts(times: Tensor, reach: int) -> Tensor:
    """Numbers of the parts that attention sees of rows of which each token stands for ``times`` [B, L], int64 [B, L].

    A new one begins where a run of tokens that stand for more than one has stood for more than ``reach``: what is seen
    before the run would not be seen from there.
    """
    inside = times > 1
    total = times.double().cumsum(1)
    before = torch.where(_begins(inside), total - times, 0).cummax(1).values
    return _begins(inside & (total - before > reach)).cumsum(1)


def _begins(yes: Tensor) -> Tensor:
    """bool [B, L]: true here and not one to the left."""
    return yes & ~torch.nn.functional.pad(yes[:, :-1], (1, 0))

"""Who of several processes tells an error that all of them have."""

from __future__ import annotations

import hashlib
import os
from datetime import timedelta

from torch.distributed.rendezvous import rendezvous


def first_to_tell(topic: str) -> bool:
    """Whether no other process that torchrun started has asked this of ``topic`` yet, since it last started them.

    They need not be connected: torchrun keeps a store for them. True too where there is none, or it does not answer.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = f"samba_lm/told/{attempt}/{hashlib.sha256(topic.encode()).hexdigest()}"
    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=5)))
        return bool(store.add(key, 1) == 1)
    except (RuntimeError, ValueError):
        return True

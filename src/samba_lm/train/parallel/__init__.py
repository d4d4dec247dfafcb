"""A run's processes: who they are, what each computes, and how they agree."""

from samba_lm.train.parallel.connect import connect, pick_device, started_rank
from samba_lm.train.parallel.parallel import Parallel
from samba_lm.train.parallel.telling import first_to_tell

__all__ = ["Parallel", "connect", "first_to_tell", "pick_device", "started_rank"]

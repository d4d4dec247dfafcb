"""How far a share that was counted may be from the true one."""

from __future__ import annotations

import math

CONFIDENCE = 0.95
_Z = 1.959963984540054  # of the normal distribution at 97.5%


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95% interval of a probability, of which ``right`` of ``total`` independent tries were right (Wilson, 1927).

    Unlike mean +- error it stays within 0 and 1 and does not shrink to a point where all were right. (0, 1) without
    tries.
    """
    if not 0 <= right <= total:
        raise ValueError(f"{right} of {total} is no count")
    if not total:
        return 0.0, 1.0
    share, z2 = right / total, _Z * _Z / total
    centre = (share + z2 / 2) / (1 + z2)
    reach = math.sqrt(share * (1 - share) * z2 + z2 * z2 / 4) / (1 + z2)
    # At either end the formula's own value is exact, but for rounding.
    return 0.0 if right == 0 else max(0.0, centre - reach), 1.0 if right == total else min(1.0, centre + reach)

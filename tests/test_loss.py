from __future__ import annotations

import torch

from samba_lm.loss import IGNORE_INDEX, valid_tokens


def test_valid_tokens() -> None:
    assert valid_tokens(torch.tensor([[1, IGNORE_INDEX, 0], [IGNORE_INDEX, 5, 7]])).item() == 4
    assert valid_tokens(torch.full((2, 3), IGNORE_INDEX)).item() == 0

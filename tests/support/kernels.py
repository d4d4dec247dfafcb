"""Where the Triton kernels are tested: on the GPU if there is one, else in Triton's interpreter on the CPU."""

from __future__ import annotations

import pytest
import torch

from samba_lm.ops.backend import HAS_TRITON

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton, which this machine's PyTorch came without")

"""Where the Triton kernels are tested: on the GPU if there is one, else in Triton's interpreter on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from samba_lm.ops.backend import HAS_TRITON

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _absent() -> str:
    """Why no kernel can run here; "" where they can."""
    if not HAS_TRITON:
        return "needs Triton, which this machine's PyTorch came without"
    import triton

    # Its interpreter makes numbers of arrays as NumPy did before 2.4; PyTorch 2.11 comes with this version.
    if DEVICE == "cpu" and triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        return "needs NumPy before 2.4 for the interpreter of Triton 3.6: pip install 'numpy<2.4'"
    return ""


needs_triton = pytest.mark.skipif(bool(_absent()), reason=_absent() or "never")

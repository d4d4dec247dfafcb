"""The CPU's scan as torch.compile meets it.

Apart, because asking for ``torch.compiler.disable`` imports the compiler: a second, which everybody who compiles
nothing would wait for whenever a command starts.
"""

from __future__ import annotations

import torch

from samba_lm.ops.selective_scan.cpu import scan_cpu

scan_untraced = torch.compiler.disable(scan_cpu)
"""As ``scan_cpu``: its walk over time is Python, and tracing it would unroll every token."""

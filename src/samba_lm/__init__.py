"""samba-lm: train, evaluate and run Samba hybrid language models (arXiv 2406.07522)."""

from __future__ import annotations

__version__ = "0.1.0"

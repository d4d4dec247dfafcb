"""``python -m samba_lm`` is the same command line as ``samba-lm`` (used under torchrun)."""

from __future__ import annotations

import sys

from samba_lm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

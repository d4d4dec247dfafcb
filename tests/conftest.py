"""What every test starts from: one thread, known seeds, and GPU tests only where there is a GPU."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path

import numpy
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is defined: they then run on CPU tensors

torch.set_num_threads(1)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A script's job in the background ignores Ctrl-C, and so would all programs that the tests start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Seed every generator, so that a test's numbers depend neither on its neighbours nor on the order."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def nano(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the model that comes with the package: as small as can be, untrained, kept as that one is kept."""
    import samba_lm
    from samba_lm import checkpoint, shipped

    model = samba_lm.create("samba-micro", seed=1)
    samba_lm.save(
        checkpoint.place(model, "cpu", torch.bfloat16), tmp_path / "shipped" / "samba-nano", samba_lm.ByteTokenizer()
    )
    header = tmp_path / "shipped" / "samba-nano" / "config.json"
    header.write_text(json.dumps({**json.loads(header.read_text()), "dtype": "float32"}))
    (tmp_path / "shipped" / "samba-nano" / "README.md").write_text("# samba-nano\n\nA stand-in.\n")
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "shipped")
    return tmp_path / "shipped" / "samba-nano"


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a GPU, skip what needs one; with one, ``-m gpu`` takes all of the kernels' tests, those too that a CPU
    would interpret: what is compiled may be wrong where what is interpreted is right."""
    for item in items:
        if torch.cuda.is_available():
            if getattr(getattr(item, "module", None), "DEVICE", None) == "cuda":
                item.add_marker(pytest.mark.gpu)
        elif item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and torch sees none here"))

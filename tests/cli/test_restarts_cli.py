"""``torchrun --max-restarts``: processes that die are started anew and go on by themselves, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from samba_lm.data.shards import ShardWriter
from samba_lm.tokenizer import ByteTokenizer
from samba_lm.train.checkpoints import list_checkpoints
from samba_lm.train.metrics import read_metrics

RECIPE = """
model.name = "samba-micro"
data.train = "{data}"
[train]
steps = 8
batch_size = 4
length = 32
save_every = 1
log_every = 1
device = "cpu"
"""
DIES = """
import os, signal, sys

steps = {"0": "step-00000003.tmp", "1": "step-00000006.tmp"}
dies_at = steps.get(os.environ["TORCHELASTIC_RESTART_COUNT"], "never")

def hook(event, arguments):
    if event == "open" and dies_at in str(arguments[0]):
        os.kill(os.getpid(), signal.SIGKILL)

if os.environ["RANK"] == "1":
    sys.addaudithook(hook)
"""
"""A plugin that kills the second process as it writes the third checkpoint, and once more the sixth."""


def run(recipe: Path, out: Path, *words: str, **environment: str) -> str:
    """Two processes under torchrun, as people start them."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
    done = subprocess.run(
        [*torchrun, "-m", "samba_lm", "train", str(recipe), "--train.out", str(out), "--fresh"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.slow
def test_processes_that_die_are_started_anew_and_go_on(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    with ShardWriter(tmp_path / "data", tokenizer) as writer:
        (tmp_path / "data").mkdir(exist_ok=True)
        writer.append(tokenizer.encode("one two three four five " * 100), end=True, text_bytes=2400)
        writer.close()
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(data=tmp_path / "data"))
    (tmp_path / "dies.py").write_text(DIES)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    run(recipe, tmp_path / "whole")
    told = run(recipe, tmp_path / "run", "--max-restarts", "2", SAMBA_LM_PLUGINS="dies", PYTHONPATH=path)
    assert told.count("Continuing from ") == 2
    assert not list(tmp_path.glob("run.before-*")), "--fresh is for the beginning alone"
    curves = [[(r["step"], r["loss"]) for r in read_metrics(tmp_path / n / "metrics.jsonl")] for n in ("run", "whole")]
    assert curves[0] == curves[1]
    last = "step-00000008"
    for file in sorted((tmp_path / "whole" / last).glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "run" / last / file.name).read_bytes()
    assert len(list_checkpoints(tmp_path / "run")) == 3

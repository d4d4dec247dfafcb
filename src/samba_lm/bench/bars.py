"""What is asked of one H100 80GB, and what others' kernels took there in an earlier run ("quoted").

The quoted figures: PyTorch 2.11, Triton 3.6, medians, on an H100 with a copy bandwidth of 3.02 TB/s and a bf16 matrix
product of 693 TFLOP/s. A table shows them beside what the same peers do in its own run, where they are installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from samba_lm.bench.figure import Figure


@dataclass(frozen=True)
class Bar:
    """What a figure should reach, and the quoted figures of peers as (whose, value)."""

    bar: float | None = None
    stretch: float | None = None
    goal: float | None = None
    quoted: tuple[tuple[str, float], ...] = ()

    def figures(self, name: str, unit: str, low_is_good: bool = True) -> list[Figure]:
        """The quoted figures, to stand beside a measured one of that name."""
        return [
            Figure(name, value, unit, low_is_good=low_is_good, by=whose, note="quoted") for whose, value in self.quoted
        ]


NONE = Bar()

_MAMBA, _CONV = "mamba-ssm 2.3.2", "causal-conv1d 1.7"
_FA2, _FLEX = "FA2 in torch", "FlexAttention"
_LARGE, _LONG = "(8, 4096, 3072) N 16", "(1, 131072, 4096) N 16"

OPS: dict[tuple[str, str, str], Bar] = {
    # ms, by operation, shape and direction
    ("scan", _LARGE, "forward"): Bar(1.1, 0.90, 0.60, ((_MAMBA, 1.738),)),
    ("scan", _LARGE, "backward"): Bar(4.5, 3.6, 2.2, ((_MAMBA, 7.263),)),
    ("scan", _LONG, "forward"): Bar(5.8, 5.0, 3.5, ((_MAMBA, 12.21),)),
    ("scan", _LONG, "backward"): Bar(20.0, 17.0, 11.0, ((_MAMBA, 42.05),)),
    ("scan", "(4, 4096, 4608) N 16", "forward"): Bar(quoted=((_MAMBA, 1.310),)),
    ("scan", "(4, 4096, 4608) N 16", "backward"): Bar(quoted=((_MAMBA, 5.449),)),
    ("scan", "(1, 4096, 4096) N 16", "forward"): Bar(quoted=((_MAMBA, 0.330),)),
    ("scan", "(1, 4096, 4096) N 16", "backward"): Bar(quoted=((_MAMBA, 1.352),)),
    ("scan", "(1, 32768, 4096) N 16", "forward"): Bar(quoted=((_MAMBA, 3.069),)),
    ("scan", "(1, 32768, 4096) N 16", "backward"): Bar(quoted=((_MAMBA, 10.41),)),
    ("conv", "(8, 4096, 3072) k 4", "forward"): Bar(0.15, quoted=((_CONV, 0.158),)),
    ("conv", "(8, 4096, 3072) k 4", "backward"): Bar(0.35, quoted=((_CONV, 0.397),)),
    ("conv", "(1, 131072, 4096) k 4", "forward"): Bar(quoted=((_CONV, 0.823),)),
    ("conv", "(1, 131072, 4096) k 4", "backward"): Bar(quoted=((_CONV, 3.06),)),
    ("attention", "(8, 4096, 12/12 x 128) w 2048", "forward"): Bar(0.90, quoted=((_FA2, 1.189), (_FLEX, 0.898))),
    ("attention", "(8, 4096, 12/12 x 128) w 2048", "backward"): Bar(2.45, quoted=((_FA2, 2.877), (_FLEX, 2.427))),
    ("attention", "(1, 131072, 32/4 x 64) w 2048", "inference"): Bar(8.2, quoted=((_FA2, 12.10), (_FLEX, 8.20))),
    ("attention", "(8, 4096, 32/4 x 64) w 2048", "forward"): Bar(quoted=((_FA2, 2.606),)),
    ("attention", "(8, 4096, 32/4 x 64) w 2048", "backward"): Bar(quoted=((_FA2, 4.334),)),
}

_FLA = "FLA 0.6.0 Samba, bf16 parameters"


@dataclass(frozen=True)
class TrainBar:
    """Of a training step: the batch they are for, thousand tokens a second, and GiB of memory."""

    batch: int
    micro_batch: int
    """Rows computed at once by default: what fits the memory bar."""
    activation_checkpointing: Literal["none", "selective", "full"]
    """What is computed again by default, for the same reason."""
    speed: Bar
    memory: Bar


TRAIN = {
    "samba-421m": TrainBar(
        16, 8, "none", Bar(150.0, 165.0, 215.0, ((_FLA, 107.4),)), Bar(38.0, quoted=((_FLA, 38.0),))
    ),
    "samba-1.3b": TrainBar(
        8, 4, "selective", Bar(56.0, 64.0, 80.0, ((_FLA, 41.3),)), Bar(46.0, quoted=((_FLA, 45.8),))
    ),
}


def default_batch(name: str) -> int:
    """Sequences a training step of a model of the zoo, where nobody says."""
    return TRAIN[name].batch if name in TRAIN else 8


PREFILL_TOKENS = 131_072
PREFILL_LLAMA = ("transformers Llama, Llama-3 1.6B shape", 4721.0)
PREFILL = {"samba-1.7b": Bar(950.0, 820.0, 720.0, (("FLA 0.6.0 Samba", 1172.0), PREFILL_LLAMA))}

DECODE = {("samba-1.7b", 16): Bar(1.75, 1.55), ("samba-1.7b", 1): Bar(1.45)}
"""ms a step, by model and batch."""
FLAT = Bar(0.03)
"""How much a step may cost more at one length of text than at another."""
LOAD = Bar(50.0)
"""ms from a context's file to the first token."""
PROMPT_RATIO, DECODE_RATIO, LAST_RATIO = Bar(4.5), Bar(3.64), Bar(5.5)
"""Samba's speed over Llama's: reading 128K tokens, making 64K at batch 16, making the last of them."""
DECODE_LIMIT, LAST_LIMIT = 4.0, 7.2
"""What these two ratios would be if both models ran at the memory's full bandwidth."""
ATTENTION_SHARE = Bar(0.8)
"""Of the copy bandwidth, at which Llama's attention must read its cache, or its ratios do not count."""

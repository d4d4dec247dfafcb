"""Every named model: the paper's architectures and sizes, their ablations, and small ones for a laptop.

One row each. Sizes: Tables 3, 5, 6, 10, 11 and 12 of the paper. Imports no torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from samba_lm.config import (
    Attention,
    GatedLinearAttention,
    GatedParallel,
    LayerSpec,
    Mamba,
    MegaS6,
    ModelConfig,
    Parallel,
    Retention,
    SelfExtend,
    SwiGLU,
)
from samba_lm.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Entry:
    """A row of the zoo."""

    name: str
    paper: str
    """Where the paper gives it."""
    build: Callable[[], ModelConfig]


@dataclass(frozen=True)
class Scale:
    """The numbers that models of one size class share."""

    d_model: int
    mlp: int
    heads: int
    kv_heads: int
    vocab: int
    blocks: int
    """Blocks (a mixer and its MLP) of the two-layer-a-block models."""
    window: int = 2048
    """Of every sliding-window layer: half of the training length."""

    def attention(self, rope: bool = True) -> Attention:
        return Attention(heads=self.heads, kv_heads=self.kv_heads, window=self.window, rope=rope)

    @property
    def full(self) -> Attention:
        """Attention over everything."""
        return Attention(heads=self.heads, kv_heads=self.kv_heads)

    @property
    def swiglu(self) -> SwiGLU:
        return SwiGLU(width=self.mlp)


S421 = Scale(d_model=1536, mlp=4096, heads=12, kv_heads=12, vocab=32_000, blocks=12)
S13 = Scale(d_model=2304, mlp=6144, heads=18, kv_heads=18, vocab=32_000, blocks=18)
# Table 11 prints d_p = 8196; 8192 is what bf16 matrix units need, and surely what was meant.
S17 = Scale(d_model=2048, mlp=8192, heads=32, kv_heads=4, vocab=50_304, blocks=24)
S38 = Scale(d_model=2816, mlp=9984, heads=11, kv_heads=1, vocab=32_064, blocks=32)
# Table 6: fewer query and KV heads, the MLP widened to 4608.
HEADS = ((12, 2), (6, 1), (12, 1), (12, 4))
FEWER_HEADS = [replace(S421, mlp=4608, heads=heads, kv_heads=kv_heads) for heads, kv_heads in HEADS]
# The 421M class at a quarter of its width, window and training length (1,024), as deep: minutes on one GPU.
S27 = Scale(d_model=384, mlp=1024, heads=12, kv_heads=12, vocab=8192, blocks=12, window=512)
# What a laptop reads a long document with; the window is small, so that far things have to be held in Mamba's state.
S7 = Scale(d_model=256, mlp=480, heads=4, kv_heads=2, vocab=8192, blocks=8, window=256)
# Byte vocabulary (256 + end of document), rounded up to 64; window = half of the 256 tokens the demo trains on.
MICRO = Scale(d_model=64, mlp=216, heads=2, kv_heads=2, vocab=320, blocks=2, window=128)
TINY = Scale(d_model=128, mlp=368, heads=4, kv_heads=4, vocab=320, blocks=2, window=128)


def _model(
    name: str,
    scale: Scale,
    pattern: list[LayerSpec],
    repeat: int,
    *,
    tie: bool = True,
    init: Literal["samba", "llama"] = "samba",
) -> ModelConfig:
    return ModelConfig(
        name=name,
        d_model=scale.d_model,
        vocab_size=scale.vocab,
        layers=tuple(pattern * repeat),
        tie_embeddings=tie,
        init=init,
    )


def samba(name: str, scale: Scale, attention: Attention | None = None) -> ModelConfig:
    """[Mamba, MLP, SWA, MLP] repeated (Figure 1)."""
    pattern = [Mamba(), scale.swiglu, attention or scale.attention(), scale.swiglu]
    return _model(name, scale, pattern, scale.blocks // 2)


def in_place_of_mamba(name: str, scale: Scale, mixer: LayerSpec, tie: bool = True) -> ModelConfig:
    """Samba with another recurrent layer (Sliding GLA, Sliding RetNet) or an MLP (MLP2-SWA-MLP) in Mamba's place."""
    pattern = [mixer, scale.swiglu, scale.attention(), scale.swiglu]
    return _model(name, scale, pattern, scale.blocks // 2, tie=tie, init="samba" if tie else "llama")


def transformer(name: str, scale: Scale, blocks: int, attention: Attention, tie: bool = True) -> ModelConfig:
    """[attention, MLP] repeated; untied ones take the reference code's other initialisation."""
    return _model(name, scale, [attention, scale.swiglu], blocks, tie=tie, init="samba" if tie else "llama")


def mamba_swa_mlp(name: str, scale: Scale, repeat: int) -> ModelConfig:
    return _model(name, scale, [Mamba(), scale.attention(), scale.swiglu], repeat)


def two_paths(name: str, scale: Scale, paths: LayerSpec, repeat: int) -> ModelConfig:
    """[Mamba beside SWA, MLP] repeated: what the paper leaves to future work."""
    return _model(name, scale, [paths, scale.swiglu], repeat)


def mamba_mlp(name: str, scale: Scale, full_at: tuple[int, ...] = ()) -> ModelConfig:
    """[Mamba, MLP] repeated, with full attention in Mamba's place at the given blocks (Table 5)."""
    blocks = [(scale.full if i in full_at else Mamba(), scale.swiglu) for i in range(scale.blocks)]
    return _model(name, scale, [layer for block in blocks for layer in block], 1)


def mamba(name: str, d_model: int, layers: int, vocab: int = 32_000) -> ModelConfig:
    return ModelConfig(name=name, d_model=d_model, vocab_size=vocab, layers=(Mamba(),) * layers)


def mega_s6(name: str, scale: Scale) -> ModelConfig:
    return _model(name, scale, [MegaS6(chunk=scale.window), scale.swiglu], scale.blocks)


def _gla(scale: Scale) -> GatedLinearAttention:
    return GatedLinearAttention(heads=max(4, scale.d_model // 384))


def _retention(scale: Scale) -> Retention:
    return Retention(heads=scale.heads // 2)


def _with_short_conv(name: str, config: ModelConfig) -> ModelConfig:
    """+SC: a short convolution on q, k and v of every attention layer (Table 10)."""
    layers = [{**s.model_dump(), "short_conv": 4} if isinstance(s, Attention) else s for s in config.layers]
    return config.with_overrides(name=name, layers=layers)


def _small(size: str, scale: Scale) -> list[Entry]:
    """A laptop size and its twins: the same width, parameters within 2%, made from the same parts."""
    wide, layers = replace(scale, mlp=TWIN_MLP[size]), TWIN_MAMBA_LAYERS[size]
    return [
        Entry(f"samba-{size}", "laptop", lambda: samba(f"samba-{size}", scale)),
        Entry(f"llama-{size}", "laptop twin",
              lambda: transformer(f"llama-{size}", wide, scale.blocks, wide.full)),
        Entry(f"swa-{size}", "laptop twin",
              lambda: transformer(f"swa-{size}", wide, scale.blocks, wide.attention())),
        Entry(f"mamba-{size}", "laptop twin", lambda: mamba(f"mamba-{size}", scale.d_model, layers, scale.vocab)),
    ]  # fmt: skip


# What makes the twins as large as samba-micro and samba-tiny.
TWIN_MLP = {"micro": 256, "tiny": 432}
TWIN_MAMBA_LAYERS = {"micro": 4, "tiny": 4}

_ROWS: list[tuple[str, str, Callable[[str], ModelConfig]]] = [
    ("samba-421m", "Tables 3, 12", lambda n: samba(n, S421)),
    ("samba-1.3b", "Tables 3, 4, 12", lambda n: samba(n, S13)),
    ("samba-1.7b", "Tables 2, 11", lambda n: samba(n, S17)),
    ("samba-3.8b", "Tables 1, 12", lambda n: samba(n, S38)),
    ("mamba-swa-mlp-400m", "Table 3", lambda n: mamba_swa_mlp(n, S421, 8)),
    ("mamba-swa-mlp-1.3b", "Table 3", lambda n: mamba_swa_mlp(n, S13, 12)),
    ("mamba-swa-mlp-1.6b", "Tables 2, 11", lambda n: mamba_swa_mlp(n, S17, 18)),
    ("mamba-mlp-1.9b", "Tables 2, 11", lambda n: mamba_mlp(n, S17)),
    ("mamba-370m", "reference code", lambda n: mamba(n, 1024, 48)),
    ("mamba-432m", "Table 3", lambda n: mamba(n, 1024, 60)),
    ("mamba-1.3b", "Table 3", lambda n: mamba(n, 2048, 48)),
    ("mamba-1.8b", "Tables 2, 11", lambda n: mamba(n, 2048, 64, S17.vocab)),
    ("mamba-130m", "mamba-130m's shape", lambda n: mamba(n, 768, 24, 50_280)),
    ("llama2-438m", "Table 3", lambda n: transformer(n, S421, 12, S421.full, tie=False)),
    ("llama2-1.3b", "Table 3", lambda n: transformer(n, S13, 20, S13.full)),
    ("llama2-swa-438m", "Table 3", lambda n: transformer(n, S421, 12, S421.attention(), tie=False)),
    ("llama2-swa-1.3b", "Table 3", lambda n: transformer(n, S13, 20, S13.attention())),
    ("llama3-1.6b", "Tables 2, 11", lambda n: transformer(n, S17, 24, S17.full)),
    ("mistral-1.6b", "Tables 2, 11", lambda n: transformer(n, S17, 24, S17.attention())),
    ("self-extend-llama3-1.6b", "Figures 2, 4",
     lambda n: transformer(n, S17, 24, SelfExtend(heads=S17.heads, kv_heads=S17.kv_heads))),
    ("sliding-gla-438m", "Table 3", lambda n: in_place_of_mamba(n, S421, _gla(S421), tie=False)),
    ("sliding-gla-1.2b", "Table 3", lambda n: in_place_of_mamba(n, S13, _gla(S13))),
    ("sliding-retnet-446m", "Table 3", lambda n: in_place_of_mamba(n, S421, _retention(S421))),
    ("sliding-retnet-1.4b", "Table 3", lambda n: in_place_of_mamba(n, S13, _retention(S13))),
    ("mega-s6-422m", "Table 3", lambda n: mega_s6(n, S421)),
    ("mega-s6-1.3b", "Table 3", lambda n: mega_s6(n, S13)),
    ("mlp2-swa-mlp-417m", "Table 3", lambda n: in_place_of_mamba(n, S421, SwiGLU(width=2 * S421.d_model))),
    ("mlp2-swa-mlp-1.3b", "Table 3", lambda n: in_place_of_mamba(n, S13, SwiGLU(width=2 * S13.d_model))),
    ("samba-nope-421m", "Table 3", lambda n: samba(n, S421, S421.attention(rope=False))),
    ("samba-nope-1.3b", "Table 3", lambda n: samba(n, S13, S13.attention(rope=False))),
    ("mamba-mlp-449m-full-11", "Table 5", lambda n: mamba_mlp(n, S421, (11,))),
    ("mamba-mlp-449m-full-5", "Table 5", lambda n: mamba_mlp(n, S421, (5,))),
    ("mamba-mlp-449m-full-0", "Table 5", lambda n: mamba_mlp(n, S421, (0,))),
    ("mamba-mlp-443m-full-1-5", "Table 5", lambda n: mamba_mlp(n, S421, (1, 5))),
    ("samba-421m-window-512", "window ablation", lambda n: samba(n, replace(S421, window=512))),
    ("samba-421m-window-1024", "window ablation", lambda n: samba(n, replace(S421, window=1024))),
    *(
        (f"samba-421m-heads-{s.heads}-{s.kv_heads}", "Table 6", lambda n, s=s: samba(n, s))
        for s in FEWER_HEADS
    ),
    *(
        (f"llama2-swa-438m-heads-{s.heads}-{s.kv_heads}", "Table 6",
         lambda n, s=s: transformer(n, s, 12, s.attention(), tie=False))
        for s in FEWER_HEADS
    ),
    ("llama2-swa-438m-sc", "Table 10", lambda n: _with_short_conv(n, get("llama2-swa-438m"))),
    ("sliding-gla-438m-sc", "Table 10", lambda n: _with_short_conv(n, get("sliding-gla-438m"))),
    ("sliding-retnet-446m-sc", "Table 10", lambda n: _with_short_conv(n, get("sliding-retnet-446m"))),
    ("samba-421m-sc", "Table 10", lambda n: _with_short_conv(n, get("samba-421m"))),
]  # fmt: skip

# Table 3 and what belongs to it, small: S27 with the MLP width that gives each model Samba's 26.6M parameters (those of
# Tables 6 and 10 differ by up to 2.3%).
_SMALL_ROWS: list[tuple[str, str, Callable[[str], ModelConfig]]] = [
    ("samba-7m", "laptop", lambda n: samba(n, S7)),
    ("swa-7m", "laptop twin", lambda n: transformer(n, replace(S7, mlp=640), S7.blocks, S7.attention())),
    ("mamba-7m", "laptop twin", lambda n: mamba(n, S7.d_model, 13, S7.vocab)),
    ("samba-27m", "Table 3, small", lambda n: samba(n, S27)),
    ("samba-nope-27m", "Table 3, small", lambda n: samba(n, S27, S27.attention(rope=False))),
    ("llama2-27m", "Table 3, small", lambda n: transformer(n, replace(S27, mlp=1184), 12, S27.full)),
    ("llama2-swa-27m", "Table 3, small", lambda n: transformer(n, replace(S27, mlp=1184), 12, S27.attention())),
    ("mamba-27m", "Table 3, small", lambda n: mamba(n, S27.d_model, 24, S27.vocab)),
    ("sliding-gla-27m", "Table 3, small", lambda n: in_place_of_mamba(n, replace(S27, mlp=1184), _gla(S27))),
    ("sliding-retnet-27m", "Table 3, small", lambda n: in_place_of_mamba(n, replace(S27, mlp=928), _retention(S27))),
    ("mega-s6-27m", "Table 3, small", lambda n: mega_s6(n, replace(S27, mlp=992))),
    ("mamba-swa-mlp-27m", "Table 3, small", lambda n: mamba_swa_mlp(n, replace(S27, mlp=1200), 8)),
    ("mlp2-swa-mlp-27m", "Table 3, small",
     lambda n: in_place_of_mamba(n, replace(S27, mlp=1056), SwiGLU(width=2 * S27.d_model))),
    ("mamba-mlp-27m", "Table 2, small", lambda n: mamba_mlp(n, replace(S27, mlp=864))),
    ("mamba-mlp-27m-full-11", "Table 5, small", lambda n: mamba_mlp(n, replace(S27, mlp=880), (11,))),
    ("mamba-mlp-27m-full-5", "Table 5, small", lambda n: mamba_mlp(n, replace(S27, mlp=880), (5,))),
    ("mamba-mlp-27m-full-0", "Table 5, small", lambda n: mamba_mlp(n, replace(S27, mlp=880), (0,))),
    ("mamba-mlp-27m-full-1-5", "Table 5, small", lambda n: mamba_mlp(n, replace(S27, mlp=912), (1, 5))),
    ("parallel-27m", "past the paper",
     lambda n: two_paths(n, replace(S27, mlp=1200), Parallel(attention=S27.attention()), 8)),
    ("gated-27m", "past the paper",
     lambda n: two_paths(n, replace(S27, mlp=1184), GatedParallel(attention=S27.attention()), 8)),
    ("samba-27m-window-128", "windows, small", lambda n: samba(n, replace(S27, window=128))),
    ("samba-27m-window-256", "windows, small", lambda n: samba(n, replace(S27, window=256))),
    *(
        (f"samba-27m-heads-{h}-{g}", "Table 6, small",
         lambda n, h=h, g=g: samba(n, replace(S27, mlp=1152, heads=h, kv_heads=g)))
        for h, g in HEADS
    ),
    *(
        (f"llama2-swa-27m-heads-{h}-{g}", "Table 6, small",
         lambda n, s=s: transformer(n, s, 12, s.attention()))
        for h, g in HEADS
        for s in (replace(S27, mlp=1376, heads=h, kv_heads=g),)
    ),
    *(
        (f"{name}-sc", "Table 10, small", lambda n, name=name: _with_short_conv(n, get(name)))
        for name in ("samba-27m", "llama2-swa-27m", "sliding-gla-27m", "sliding-retnet-27m")
    ),
]  # fmt: skip

ZOO: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        *_small("micro", MICRO),
        *_small("tiny", TINY),
        *(Entry(name, paper, functools.partial(build, name)) for name, paper, build in (*_ROWS, *_SMALL_ROWS)),
    )
}


def names() -> list[str]:
    """All names, in the zoo's order."""
    return list(ZOO)


def get(name: str) -> ModelConfig:
    """The config of a named model. Raises UserError with the nearest name."""
    if name not in ZOO:
        raise UserError(f"Unknown model {name!r}.{did_you_mean(name, ZOO)} `samba-lm models` lists them all.")
    return ZOO[name].build()


def register_architecture(name: str, build: Callable[[], ModelConfig], paper: str = "yours") -> None:
    """Give a config of your own a name, for ``create``, recipes and ``samba-lm models``. Raises UserError if taken."""
    if name in ZOO:
        raise UserError(f"The name {name!r} is already in the zoo: choose another.")
    ZOO[name] = Entry(name, paper, build)

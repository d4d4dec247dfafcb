"""Which mixer a layer spec builds. Add your own with :func:`register_mixer`, in your own file."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from samba_lm.config import LayerSpec, ModelConfig
from samba_lm.mixers.base import Mixer

MIXERS: dict[type[LayerSpec], type[Mixer]] = {}

M = TypeVar("M", bound=type[Mixer])


def register_mixer(spec: type[LayerSpec]) -> Callable[[M], M]:
    """Class decorator: layers described by ``spec`` are built from this mixer, as ``mixer(spec, config)``.

    Example::

        class Average(LayerSpec):
            kind: Literal["average"] = "average"
            def parameters(self, d_model): return 0
            def matmul_flops(self, d_model): return 0

        @register_mixer(Average)
        class AverageMixer(Mixer): ...

    See docs/extending.md for a whole one with its state and its test.
    """

    def register(mixer: M) -> M:
        MIXERS[spec] = mixer
        return mixer

    return register


def build_mixer(spec: LayerSpec, config: ModelConfig) -> Mixer:
    """The mixer of one layer, with uninitialised parameters."""
    if type(spec) not in MIXERS:
        raise ValueError(f"no mixer is registered for {type(spec).__name__}; decorate one with @register_mixer")
    return MIXERS[type(spec)](spec, config)

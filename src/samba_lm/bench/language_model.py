"""A Mamba-130M-shape model on the CPU: reading a prompt against transformers, decoding against the memory's speed."""

from __future__ import annotations

import importlib.util
import time
from typing import Any

import torch

from samba_lm import checkpoint, zoo
from samba_lm.bench.figure import Figure
from samba_lm.bench.parity import ParityError, require_close
from samba_lm.bench.timing import best, matvec_bandwidth
from samba_lm.convert.transformers import to_transformers_names, transformers_config
from samba_lm.errors import UserError
from samba_lm.model import SambaLM

SHAPE = "mamba-130m"


def run_language_model(prompt: int = 1024, decode: int = 32, name: str = SHAPE) -> list[Figure]:
    """Prefill of ``prompt`` tokens and decoding of ``decode`` more: fp32, batch 1, random weights."""
    model = checkpoint.create(zoo.get(name)).eval()
    peer = _transformers_twin(model)
    ids = torch.randint(0, model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        short = ids[:, :65]
        off = require_close(model(short)[0], peer(short).logits, 1e-4, f"{name} against transformers")
        stepwise = _stepwise(model, short)
        require_close(stepwise, model(short)[0][:, -1], 1e-4, "decoding against reading at once")
        ours = best(lambda: _read(model, ids), 3)
        theirs = best(lambda: peer(ids, logits_to_keep=1), 1)
        token_seconds = _decode(model, ids, decode)
    weight_bytes = 4 * sum(p.numel() for p in model.parameters())
    D = model.config.d_model
    bandwidth = matvec_bandwidth(4 * D, D, weight_bytes)
    return [
        Figure("parity: worst relative difference from transformers", off, "", 1e-4),
        Figure(f"{name} prefill of {prompt}", prompt / ours, "tokens/s"),
        Figure(f"transformers prefill of {prompt}", prompt / theirs, "tokens/s"),
        Figure("prefill against transformers", theirs / ours, "x", 4.0, low_is_good=False),
        Figure(f"{name} decode", 1 / token_seconds, "tokens/s"),
        Figure("matrix-vector bandwidth", bandwidth / 1e9, "GB/s"),
        Figure(
            "decode, of what the bandwidth allows",
            weight_bytes / bandwidth / token_seconds,
            "",
            0.85,
            low_is_good=False,
        ),
    ]


def _read(model: SambaLM, ids: torch.Tensor) -> torch.Tensor:
    hidden, _ = model.features(ids)
    return model.head(hidden[:, -1])


def _stepwise(model: SambaLM, ids: torch.Tensor) -> torch.Tensor:
    state = model.init_state(1)
    for t in range(ids.shape[1]):
        logits = model.step(ids[:, t], state)
    return logits


def _decode(model: SambaLM, ids: torch.Tensor, tokens: int) -> float:
    """Seconds a token of greedy decoding, the best of three stretches; the prompt is not counted."""
    _, state = model.features(ids)
    token = ids[:, -1]
    times = []
    for _ in range(4):
        began = time.perf_counter()
        for _ in range(tokens):
            token = model.step(token, state).argmax(-1)
        times.append((time.perf_counter() - began) / tokens)
    return min(times[1:])


def check_transformers() -> None:
    """Raise UserError where what the model is compared with is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise UserError(
            'The comparison needs transformers: pip install "samba-lm[hf]", or run `samba-lm bench scan memory`.'
        )


def _transformers_twin(model: SambaLM) -> Any:
    check_transformers()
    import transformers

    config = transformers.MambaConfig(**_without_kind(transformers_config(model.config)))
    peer: Any = transformers.MambaForCausalLM(config)
    peer.eval()
    missing = peer.load_state_dict(to_transformers_names(model.state_dict(), model.config), strict=False)
    if [n for n in missing.missing_keys if n != "lm_head.weight"] or missing.unexpected_keys:
        raise ParityError(f"the weights did not map onto transformers' model: {missing}")
    peer.tie_weights()
    return peer


def _without_kind(config: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in ("architectures", "model_type", "dtype", "torch_dtype")}

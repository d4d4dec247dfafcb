"""Entropies against their formulas written out, and against what the layers themselves make of the same numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close

from samba_lm import zoo
from samba_lm.checkpoint import create
from samba_lm.config import (
    Attention,
    GatedParallel,
    LayerSpec,
    Mamba,
    MegaS6,
    ModelConfig,
    Parallel,
    SelfExtend,
    SwiGLU,
)
from samba_lm.errors import UserError
from samba_lm.eval import entropy
from samba_lm.eval.entropy import Entropy, Heads, Sample, attention_entropy, entropies, measure, selection_entropy
from samba_lm.eval.records import Record
from samba_lm.mixers.attention import AttentionMixer
from samba_lm.mixers.mamba import S6
from samba_lm.model import SambaLM
from samba_lm.ops.selective_scan.reference import scan_reference
from samba_lm.quantization import quantize
from samba_lm.span import Span
from samba_lm.tokenizer import ByteTokenizer

LENGTH = 40
SPECS = {
    "window": Attention(heads=4, kv_heads=2, window=7),
    "full": Attention(heads=4, kv_heads=1, window=None),
    "window longer than the text": Attention(heads=2, window=100),
    "no positions": Attention(heads=4, window=9, rope=False),
    "short convolution": Attention(heads=4, window=9, short_conv=4),
    "self-extend": SelfExtend(heads=4, kv_heads=2, group=3, neighbor_window=8),
}


def _model(*layers: LayerSpec, d_model: int = 16, max_context: int = 1 << 20, seed: int = 0) -> SambaLM:
    config = ModelConfig(name="tiny", d_model=d_model, vocab_size=257, layers=layers, max_context=max_context)
    model = create(config, seed=seed).double()
    for parameter in model.parameters():  # weights large enough that no distribution is all but flat
        if parameter.dim() == 2 and parameter.requires_grad:
            parameter.data *= 3
    return model


def _ids(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(0, 257, (1, length), generator=torch.Generator().manual_seed(1))


def _watched(model: SambaLM, ids: torch.Tensor) -> tuple[list[Heads], list[torch.Tensor], list[Any]]:
    """What is seen of each attention and selection, and each layer's (inputs, output)."""
    span = Span.of(1, ids.shape[1], ids.device, None, None, keep=False)
    heads: list[Heads] = []
    steps: list[torch.Tensor] = []
    layers: list[Any] = []
    hooks = [layer.register_forward_hook(lambda _, x, y: layers.append((x, y))) for layer in model.layers]
    watch = entropy.watching(model, span, lambda _, h: heads.append(h), lambda _, s: steps.append(s))
    with torch.no_grad(), watch:
        model.run(ids, None, span)
    for hook in hooks:
        hook.remove()
    return heads, steps, layers


@pytest.mark.parametrize("name", SPECS)
def test_the_weights_make_the_layers_output(name: str) -> None:
    model = _model(Mamba(state=4), SPECS[name])
    (heads,), _, layers = _watched(model, _ids())
    (x, branch, _, span, dtype), (_, output, _) = layers[1]
    mixer: Any = model.layers[1].mixer  # type: ignore[union-attr]
    inputs = model.layers[1].norm.add(x, branch, dtype)[1]  # type: ignore[union-attr]
    rotates = SPECS[name].rope
    v = mixer.project(inputs, mixer.init_tensors(1, x.device, dtype), span, rotates)[0][2][0]  # [L, G, K]
    v = v.repeat_interleave(4 // v.shape[1] if name != "window longer than the text" else 1, dim=1)
    made = torch.zeros(LENGTH, v.shape[1], v.shape[2], dtype=torch.float64)
    for start in range(0, LENGTH, 11):
        weights, first = heads.weights(start, min(start + 11, LENGTH))
        assert weights.shape[2] < LENGTH or SPECS[name].window is None or SPECS[name].window >= LENGTH
        made[start : start + 11] = torch.einsum("hij,jhk->ihk", weights, v[first : first + weights.shape[2]])
    assert_close(mixer.out_proj(made.flatten(1)[None]), output, name)


def test_megas_weights_make_the_layers_output() -> None:
    model = _model(MegaS6(z_dim=8, chunk=9, state=4))
    mixer: Any = model.layers[0].mixer  # type: ignore[union-attr]
    seen: dict[str, Any] = {}
    parts = {"v": mixer.v_proj, "mx": mixer.mx_proj}
    hooks = [
        part.register_forward_hook(lambda _, x, y, name=name: seen.update({name: y})) for name, part in parts.items()
    ]
    (heads,), _, layers = _watched(model, _ids())
    for hook in hooks:
        hook.remove()
    (x, *_), (_, output, _) = layers[0]
    weights, first = heads.weights(0, LENGTH)
    assert first == 0
    later, first = heads.weights(20, 30)
    assert first == 18
    assert_close(later, weights[:, 20:30, 18:30], "weights of some queries")
    u, _, r, hx = seen["mx"].split((16, 8, 16, 16), dim=-1)
    o = weights[0] @ F.silu(seen["v"][0])
    h = F.silu(hx + mixer.h_proj(o * F.silu(r)))
    assert_close(torch.sigmoid(u) * (h - x), output, "output")


def test_the_steps_make_the_scans_output() -> None:
    model = _model(Attention(heads=2, window=8), Mamba(state=4))
    s6 = next(part for part in model.modules() if isinstance(part, S6))
    seen: dict[str, Any] = {}
    hooks = [
        s6.register_forward_hook(lambda _, x, y: seen.update(s6=(x, y))),
        s6.x_proj.register_forward_hook(lambda _, x, y: seen.update(projected=(x[0], y))),
    ]
    _, (steps,), _ = _watched(model, _ids())
    for hook in hooks:
        hook.remove()
    (_, gate, tensors, _), (y, _) = seen["s6"]
    u, projected = seen["projected"]
    _, B, C = projected.split((s6.rank, s6.state, s6.state), dim=-1)
    assert steps.shape == (LENGTH, s6.inner)
    A, D = s6.selection.A(torch.float64), s6.selection.D
    h = torch.zeros(s6.inner, s6.state, dtype=torch.float64)
    made = []
    for t in range(LENGTH):  # the paper's equation, on the steps that were seen
        h = torch.exp(steps[t][:, None] * A) * h + (steps[t] * u[0, t])[:, None] * B[0, t]
        made.append((h @ C[0, t] + D * u[0, t]) * F.silu(gate[0, t]))
    assert_close(torch.stack(made)[None], y, "y")
    inverse = torch.log(torch.expm1(steps))[None]
    again, _ = scan_reference(u, inverse, A, B, C, D, gate, None, tensors["ssm"].double(), None, None)
    assert_close(again, y, "y of the reference")


def _written_out(heads: Heads, last: int) -> float:
    """H_a pair by pair."""
    total, (length, count, _) = 0.0, heads.q.shape
    share = count // heads.k.shape[1]
    for i in range(count):
        for j in range(length - last, length):
            seen = [k for k in range(j + 1) if heads.window is None or j - k < heads.window]
            seen = [k for k in seen if heads.chunk is None or k // heads.chunk == j // heads.chunk]
            scores = []
            for k in seen:
                q, key = (heads.q, heads.k) if heads.far is None or j - k < heads.neighbor else heads.far
                scores.append(math.exp(float(q[j, i] @ key[k, i // share]) * heads.scale))
            total -= sum(s / sum(scores) * math.log(s / sum(scores)) for s in scores)
    return total / (last * count)


@pytest.mark.parametrize("name", [*SPECS, "mega"])
@pytest.mark.parametrize("last", [1, 13, LENGTH])
def test_attention_against_the_formula(name: str, last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    spec: Any = {**SPECS, "mega": MegaS6(z_dim=8, chunk=16, state=4)}[name]
    (heads,), _, _ = _watched(_model(spec), _ids())
    found = attention_entropy(heads, last)
    assert found.nats == pytest.approx(_written_out(heads, last), rel=1e-9)
    for j, sight in enumerate(heads.in_sight(torch.arange(LENGTH)).tolist()):
        assert sight == (j % 16 + 1 if name == "mega" else min(j + 1, spec.window or LENGTH))
    assert found.most == pytest.approx(heads.in_sight(torch.arange(LENGTH - last, LENGTH)).double().log().mean())
    assert 0 < found.share < 1
    for scores in (1, 50, 700):  # cut into ever other blocks
        monkeypatch.setattr(entropy, "SCORES_AT_ONCE", scores)
        assert attention_entropy(heads, last).nats == pytest.approx(found.nats, rel=1e-12)


def test_selection_against_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    _, (steps,), _ = _watched(_model(Mamba(state=4)), _ids())
    expected = 0.0
    for j in range(steps.shape[1]):
        whole = sum(float(steps[i, j]) for i in range(LENGTH))
        expected -= sum(float(steps[i, j]) / whole * math.log(float(steps[i, j]) / whole) for i in range(LENGTH))
    expected /= steps.shape[1]
    found = selection_entropy(steps)
    assert found.nats == pytest.approx(expected, rel=1e-12)
    assert found.most == math.log(LENGTH)
    monkeypatch.setattr(entropy, "SCORES_AT_ONCE", 130)
    assert selection_entropy(steps).nats == pytest.approx(expected, rel=1e-12)


def test_the_two_ends() -> None:
    assert selection_entropy(torch.ones(8, 3)) == Entropy(pytest.approx(math.log(8)), math.log(8))
    once = torch.zeros(8, 3)
    once[2] = 5.0
    assert selection_entropy(once).nats == selection_entropy(torch.zeros(8, 3)).nats == 0.0
    flat = Heads(torch.zeros(9, 2, 4), torch.zeros(9, 1, 4), 0.5, window=4)
    assert attention_entropy(flat, 5) == Entropy(pytest.approx(math.log(4)), pytest.approx(math.log(4)))
    sharp = Heads(torch.full((9, 2, 4), 1e4), torch.eye(9)[:, None, :4], 0.5)
    assert attention_entropy(sharp, 1).nats == pytest.approx(math.log(4))  # the four keys that score alike
    assert math.isnan(attention_entropy(Heads(flat.q[:1], flat.k[:1], 0.5), 1).share)


def _shrunk(name: str) -> ModelConfig:
    """A model of the zoo with its layers in the same order, each as small as can be."""
    config = zoo.get(name)
    small = {
        "swiglu": {"width": 16}, "mamba": {"state": 4}, "mega_s6": {"z_dim": 8, "chunk": 16, "state": 4},
        "attention": {"heads": 4, "kv_heads": 2}, "self_extend": {"heads": 4, "kv_heads": 2, "neighbor_window": 16},
        "gla": {"heads": 2}, "retention": {"heads": 2},
    }  # fmt: skip
    layers = [{**spec.model_dump(), **small[spec.kind]} for spec in config.layers[:8]]
    layers = [{**spec, "window": 16} if spec.get("window") else spec for spec in layers]
    return config.with_overrides(d_model=32, vocab_size=257, layers=layers)


FAMILIES = {
    "samba-421m": ["selection", "attention"] * 2,
    "samba-nope-421m": ["selection", "attention"] * 2,
    "samba-421m-sc": ["selection", "attention"] * 2,
    "mamba-432m": ["selection"] * 8,
    "mamba-mlp-449m-full-0": ["attention"] + ["selection"] * 3,
    "mamba-swa-mlp-400m": ["selection", "attention"] * 3,
    "llama2-438m": ["attention"] * 4,
    "llama2-swa-438m": ["attention"] * 4,
    "mistral-1.6b": ["attention"] * 4,
    "self-extend-llama3-1.6b": ["attention"] * 4,
    "mega-s6-422m": ["attention", "selection"] * 4,
    "mlp2-swa-mlp-417m": ["attention"] * 2,
    "sliding-gla-438m": ["attention"] * 2,
    "sliding-retnet-446m": ["attention"] * 2,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str) -> None:
    model = create(_shrunk(name), seed=0)
    where = entropy.places(model)
    assert [kind for _, kind in where] == FAMILIES[name]
    (reading,) = measure(model, [Sample(3, _ids()[0].numpy(), 15)])
    assert (reading.row, reading.tokens, reading.decoded, reading.skipped) == (3, LENGTH, 15, "")
    assert sorted(reading.entropies) == sorted(where)
    assert all(0 < value.share <= 1 + 1e-6 for value in reading.entropies.values())
    silent = set(range(sum(spec.is_mixer for spec in model.config.layers))) - {block for block, _ in where}
    assert silent <= set(entropy.left_out(model))
    assert bool(entropy.left_out(model)) == bool(silent)


@pytest.mark.parametrize("kind", [Parallel, GatedParallel])
def test_two_paths_in_one_layer_are_both_seen(kind: Any) -> None:
    model = _model(SwiGLU(width=8), kind(mamba=Mamba(state=4), attention=Attention(heads=4, kv_heads=2, window=7)))
    assert entropy.places(model) == [(0, "attention"), (0, "selection")]
    (heads,), (steps,), _ = _watched(model, _ids())
    assert entropies(model, _ids(), 9) == {
        (0, "attention"): attention_entropy(heads, 9),
        (0, "selection"): selection_entropy(steps),
    }
    assert attention_entropy(heads, 9).nats == pytest.approx(_written_out(heads, 9))


def test_weights_in_a_few_bits() -> None:
    """The products are then other modules, and what they give is what is seen."""
    config = _model(Mamba(), Attention(heads=2, window=8), d_model=128).config
    model, rough = create(config, seed=0), create(config, seed=0)
    quantize(rough, "int8")
    exact, found = entropies(model, _ids(), 20), entropies(rough, _ids(), 20)
    for key, value in exact.items():
        assert found[key].nats == pytest.approx(value.nats, rel=0.01)
        assert found[key].nats != value.nats


def test_reading_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(Mamba(state=4), SwiGLU(width=8), Attention(heads=2, window=8), MegaS6(z_dim=4, chunk=8, state=4))
    model.train()
    before, _ = model(_ids())
    list(measure(model, [Sample(0, _ids()[0].numpy(), 5)]))
    assert model.training
    assert torch.equal(model(_ids())[0], before)
    assert not any(part._forward_hooks for part in model.modules())
    monkeypatch.setattr(entropy, "selection_entropy", lambda steps: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        entropies(model, _ids(), 5)
    assert not any(part._forward_hooks for part in model.modules())


def test_the_models_numbers_may_be_short() -> None:
    model = create(_model(Mamba(), Attention(heads=4, window=8)).config, seed=0)
    exact = entropies(model, _ids(), 20)
    rough = entropies(model.bfloat16(), _ids(), 20)
    for key, value in exact.items():
        assert rough[key].nats == pytest.approx(value.nats, rel=0.01)
        assert rough[key].nats != value.nats


def test_what_cannot_be_read_is_skipped_and_what_is_not_finite_is_refused() -> None:
    model = _model(Attention(heads=2, window=None), max_context=30)
    texts = [Sample(i, _ids(length)[0].numpy(), 5) for i, length in enumerate((31, 30))]
    long, short = measure(model, texts)
    assert "would have to hold more tokens than max_context = 30" in long.skipped
    assert not long.entropies
    assert len(short.entropies) == 1
    next(part for part in model.modules() if isinstance(part, AttentionMixer)).qkv.weight.data[0] = math.nan
    with pytest.raises(UserError, match="not finite"):
        list(measure(model, texts[1:]))


def test_samples_are_made_of_both_fields() -> None:
    tokenizer = ByteTokenizer()
    records = [Record(4, "x line 5", {"q": "How many?", "a": " 3\n"})]
    (sample,) = entropy.samples(records, tokenizer, "q", "a")
    assert tokenizer.decode(sample.tokens) == "Question: How many?\nAnswer: 3"
    assert (sample.row, sample.decoded) == (4, 2)
    with pytest.raises(UserError, match="x line 5: field 'a' is empty"):
        entropy.samples([Record(4, "x line 5", {"q": "", "a": " "})], tokenizer, "q", "a")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    model = create(_shrunk("samba-421m"), seed=0)
    exact = entropies(model, _ids(), 20)
    found = entropies(model.to("cuda", dtype), _ids().cuda(), 20)
    for key, value in exact.items():
        assert found[key].nats == pytest.approx(value.nats, rel=1e-4 if dtype == torch.float32 else 0.02)

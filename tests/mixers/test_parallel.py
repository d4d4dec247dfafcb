"""Mamba beside attention: what the layer computes, how it begins, and that what is done to models reaches inside."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from kernels import DEVICE, needs_triton
from tolerances import assert_close
from torch._dynamo.testing import CompileCounterWithBackend

import samba_lm
from samba_lm import zoo
from samba_lm.bench.curve import cut
from samba_lm.bench.training import narrow
from samba_lm.checkpoint import place
from samba_lm.cli import main as cli
from samba_lm.config import Attention, GatedParallel, LayerSpec, Mamba, ModelConfig, Parallel, SelfExtend, SwiGLU
from samba_lm.contexts.reading import read
from samba_lm.contexts.snapshot import load as load_context
from samba_lm.contexts.snapshot import save as save_context
from samba_lm.convert.transformers import transformers_config
from samba_lm.engine import fast_step
from samba_lm.engine.engine import Engine
from samba_lm.errors import UserError
from samba_lm.generation.params import SamplingParams
from samba_lm.mixers.attention import AttentionMixer
from samba_lm.mixers.mamba import MambaMixer
from samba_lm.mixers.parallel import GatedParallelMixer, ParallelMixer, TwoPathsMixer
from samba_lm.model import SambaLM
from samba_lm.nn.init import RULES
from samba_lm.nn.linear import Linear
from samba_lm.nn.quantized import QuantizedLinear
from samba_lm.ops.backend import preferring
from samba_lm.quantization import quantize
from samba_lm.span import Span
from samba_lm.tokenizer import ByteTokenizer
from samba_lm.train.optim import build_optimizer
from samba_lm.train.transforms import checkpoint_activations, remake_cheap_activations, use_float8

TOKENIZER = ByteTokenizer()
SWA = Attention(heads=2, kv_heads=1, window=24)
SPECS = {"parallel": Parallel(attention=SWA), "gated": GatedParallel(attention=SWA)}


def config(spec: LayerSpec, d_model: int = 64, **fields: object) -> ModelConfig:
    layers = (spec, SwiGLU(width=96)) * 2
    return ModelConfig.from_dict(
        {"name": "two-paths", "d_model": d_model, "vocab_size": 260, "layers": layers, **fields}
    )


def make(spec: LayerSpec, dtype: torch.dtype | None = None, **fields: object) -> SambaLM:
    """A model whose gates are off their special first values."""
    model = samba_lm.create(config(spec, **fields), seed=1, dtype=dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "gate_" in name:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)).to(p.dtype), alpha=0.3)
    return model.eval()


def layer(spec: LayerSpec, d_model: int = 24) -> TwoPathsMixer:
    """One initialised layer in fp64."""
    model = SambaLM(ModelConfig(name="one", d_model=d_model, vocab_size=8, layers=(spec,))).double()
    model.reset_parameters(seed=1)
    mixer = model.layers[0].mixer
    assert isinstance(mixer, TwoPathsMixer)
    return mixer


@pytest.mark.parametrize("kind", [Parallel, GatedParallel])
def test_the_layer_is_what_its_formula_says(kind: type[Parallel] | type[GatedParallel]) -> None:
    """From whole Mamba and attention layers, whose last projection lets their values through."""
    D = 24
    spec = kind(mamba=Mamba(expand=1), attention=Attention(heads=4, kv_heads=2, window=6))
    mixer = layer(spec, D)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    x = torch.randn(2, 17, D, dtype=torch.float64)
    branches = []
    for path, norm in ((mixer.mamba, mixer.mamba_norm), (mixer.attention, mixer.attention_norm)):
        weight = path.out_proj.weight.detach().clone()
        path.out_proj.weight.data = torch.eye(D, dtype=torch.float64)
        values, _ = path(x)
        path.out_proj.weight.data = weight
        values = values / (values.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
        branches.append(values @ weight.T)
    m, a = branches
    share: torch.Tensor | float = 0.5
    if isinstance(mixer, GatedParallelMixer):
        logits = x @ mixer.gate_down.weight.T @ mixer.gate_up.weight.T + mixer.gate_up.bias
        share = 1 / (1 + torch.exp(-logits))
        assert_close(mixer.gate(x), share, "gate")
        assert share.std(dim=1).min() > 0.01, "it depends on the input"
    assert_close(mixer(x)[0], share * m + (1 - share) * a, "output")


def test_a_gated_layer_begins_as_the_mean() -> None:
    plain, gated = (layer(SPECS[name]) for name in ("parallel", "gated"))
    missing, unexpected = gated.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert {name.partition(".")[0] for name in missing} == {"gate_down", "gate_up"}
    x = torch.randn(2, 40, 24, dtype=torch.float64)
    assert torch.equal(gated(x)[0], plain(x)[0])
    # And it can leave it at the first step: the gate has a gradient of its own.
    gated(x)[0].square().sum().backward()
    assert isinstance(gated, GatedParallelMixer)
    assert gated.gate_up.weight.grad is not None
    assert (gated.gate_up.weight.grad.abs().amax(dim=1) > 0).all()


def test_both_paths_begin_equally_loud_and_the_depth_counts() -> None:
    """Whatever their own size: the last projections read numbers of size 1, divided by sqrt(layers) as everywhere."""
    D, layers = 64, 24
    deep = ModelConfig(name="deep", d_model=D, vocab_size=8, layers=(SPECS["gated"], SwiGLU(width=8)) * (layers // 2))
    mixer = layer(SPECS["gated"], D)
    mixer.reset_parameters(RULES["samba"](deep, torch.Generator().manual_seed(0)))
    x = torch.randn(2, 200, D, dtype=torch.float64)
    outs: list[torch.Tensor] = []
    hooks = [
        path.out_proj.register_forward_hook(lambda _module, _args, y: outs.append(y))
        for path in (mixer.mamba, mixer.attention)
    ]
    mixer(x)
    for hook in hooks:
        hook.remove()
    expected = 1 / math.sqrt(3 * layers)  # of uniform weights within 1 / sqrt(inputs)
    for y in outs:
        assert y.square().mean().sqrt().item() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("name", SPECS)
def test_gradients(name: str) -> None:
    """By finite differences, in the input and every parameter, over a past."""
    D = 8
    mixer = layer(SPECS[name].model_copy(update={"attention": Attention(heads=2, window=3)}), D)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
        _, state = mixer(torch.randn(1, 4, D, dtype=torch.float64))
    names = list(dict(mixer.named_parameters()))

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        y, _ = torch.func.functional_call(mixer, dict(zip(names, parameters, strict=True)), (x, state))
        return y

    x = torch.randn(1, 3, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *mixer.parameters()), fast_mode=True)


@pytest.mark.parametrize("name", SPECS)
def test_counts_in_closed_form(name: str) -> None:
    given = config(SPECS[name])
    model = make(SPECS[name])
    assert sum(p.numel() for p in model.parameters()) == given.parameters()
    products = sum(m.weight.numel() for m in model.modules() if isinstance(m, Linear))
    attended = sum(spec.context_flops(64, 100) for spec in (SWA, SWA))
    assert given.flops_per_token(100) == 2 * (products + 260 * 64) + attended
    assert model.init_state(1).nbytes() == given.state_bytes(activation_bytes=4) + 2 * 8  # a segment, a position
    assert given.constant_state
    assert not config(Parallel(attention=Attention(heads=2))).constant_state
    wide = GatedParallel(attention=SWA, gate_rank=40)
    assert wide.parameters(64) - SPECS["parallel"].parameters(64) == 2 * 40 * 64 + 64


@pytest.mark.parametrize("name", SPECS)
def test_a_nested_spec_survives_as_data(name: str) -> None:
    given = config(SPECS[name])
    again = ModelConfig.from_dict(given.to_dict())
    assert again == given
    assert again.fingerprint() == given.fingerprint()
    assert type(again.layers[0]) is type(SPECS[name])
    other = SPECS[name].model_copy(update={"attention": Attention(heads=2, kv_heads=1, window=25)})
    assert config(other).fingerprint() != given.fingerprint()
    assert config(SPECS["parallel"]).fingerprint() != config(SPECS["gated"]).fingerprint()


def test_a_path_is_the_plain_layer() -> None:
    """What is stored knows the fields of these two only."""
    with pytest.raises(UserError, match="attention is a SelfExtend: give Attention"):
        config(Parallel(attention=SelfExtend(heads=2)))


@pytest.mark.parametrize("name", SPECS)
def test_a_checkpoint(name: str, tmp_path: Path) -> None:
    model = make(SPECS[name])
    samba_lm.save(model, tmp_path / "m", TOKENIZER)
    again, _ = samba_lm.load(tmp_path / "m")
    for (key, p), q in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(p, q[1]), key
    low, _ = samba_lm.load(tmp_path / "m", dtype=torch.bfloat16)
    wide = {key for key, p in low.named_parameters() if p.dtype == torch.float32}
    assert wide == {key for key, _ in model.named_parameters() if ".mamba.s6.selection." in key}
    assert len(wide) == 6


@pytest.mark.parametrize("window", [24, None])
@pytest.mark.parametrize("kind", [Parallel, GatedParallel])
def test_a_context_goes_on(kind: type[Parallel], window: int | None, tmp_path: Path) -> None:
    model = make(kind(attention=Attention(heads=2, window=window)))
    model.fix_parameters()
    snapshot = read(model, TOKENIZER, "The sea is salt, and so are tears. " * 3, "The sea")
    save_context(tmp_path / "sea.ctx", snapshot, model, TOKENIZER)
    back = load_context(tmp_path / "sea.ctx", model, TOKENIZER)
    token = torch.tensor([65])
    first, second = snapshot.reader(), back.reader()
    for _ in range(3):
        assert torch.equal(model.step(token, first.state), model.step(token, second.state))


@pytest.mark.parametrize("name", SPECS)
def test_states_fork_and_are_selected(name: str) -> None:
    model = make(SPECS[name])
    with torch.no_grad():
        _, state = model(torch.randint(0, 260, (2, 30)))
    assert {key.partition(".")[0] for key in state.layers[0]} == {"mamba", "attention"}
    fork, picked = state.fork(), state.select([1, 0])
    token = torch.tensor([5, 6])
    here = model.step(token, state)
    assert torch.equal(model.step(token, fork), here)
    assert_close(model.step(token.flip(0), picked), here.flip(0), "rows the other way round", scale=5)


@pytest.mark.parametrize("window", [24, None])
@pytest.mark.parametrize("kind", [Parallel, GatedParallel])
def test_the_engine_gives_what_generate_gives(kind: type[Parallel], window: int | None) -> None:
    """By model.step, with texts that come and go, also where the cache of a path grows."""
    model = make(kind(attention=Attention(heads=2, window=window)))
    assert type(model.layers[0].mixer).__name__ in fast_step.why_not(model.to(torch.bfloat16))
    model = make(kind(attention=Attention(heads=2, window=window)))
    params = SamplingParams(max_tokens=9, temperature=0, stop_at_eos=False)
    prompts = ["The sea", "and the sand", "x" * 40, "!"]
    with Engine(model, TOKENIZER, slots=3, batch_invariant=True) as engine:
        texts = [text.text for text in engine.generate(prompts, params)]
    alone = [samba_lm.generate(model, TOKENIZER, prompt, params) for prompt in prompts]
    assert texts == alone


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("name", SPECS)
def test_quantised(name: str, bits: str) -> None:
    ids = torch.randint(0, 260, (2, 50))
    model = make(SPECS[name])
    with torch.no_grad():
        plain, _ = model(ids)
    quantize(model, bits)
    parts = {key.removeprefix("layers.0.mixer."): type(module) for key, module in model.named_modules()}
    for key in ("mamba.in_proj", "mamba.out_proj", "attention.qkv", "attention.out_proj"):
        assert parts[key] is QuantizedLinear, key
    thin = {"mamba.s6.x_proj", "mamba.s6.dt_proj"} | ({"gate_down", "gate_up"} if name == "gated" else set())
    assert {parts[key] for key in thin} == {Linear}
    logits, _ = model(ids)
    assert 1e-5 < float((logits - plain).norm() / plain.norm()) < (0.03 if bits == "int8" else 0.25)
    state = model.init_state(2)
    steps = torch.stack([model.step(ids[:, i], state) for i in range(50)], dim=1)
    assert float((steps - logits).norm() / logits.norm()) < 0.02


@pytest.mark.parametrize("transform", [checkpoint_activations, remake_cheap_activations])
@pytest.mark.parametrize("name", SPECS)
def test_what_backward_makes_again(name: str, transform) -> None:  # type: ignore[no-untyped-def]
    ids = torch.randint(0, 260, (2, 40))
    found = []
    for change in (lambda _layers: None, transform):
        model = make(SPECS[name], torch.float64).train()
        change(model.layers)
        model(ids)[0].square().mean().backward()
        found.append({key: p.grad for key, p in model.named_parameters()})
    assert found[0].keys() == found[1].keys()
    for key, grad in found[0].items():
        assert_close(found[1][key], grad, key)


def test_float8_reaches_the_paths() -> None:
    model = make(SPECS["gated"], d_model=256)
    use_float8(model.layers, least=100.0)
    low = {name for name, module in model.layers[0].mixer.named_modules() if "halves" in vars(module)}
    assert low == {"mamba.in_proj", "mamba.out_proj", "attention.qkv", "attention.out_proj"}


def test_what_decays() -> None:
    model = make(SPECS["gated"])
    groups = build_optimizer(model, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1).param_groups
    names = {p: key.removeprefix("layers.0.mixer.") for key, p in model.named_parameters()}
    decayed, rest = ({names[p] for p in group["params"]} for group in groups)
    assert {"gate_down.weight", "gate_up.weight", "mamba.out_proj.weight", "attention.qkv.weight"} <= decayed
    exempt = {"mamba_norm.weight", "attention_norm.weight", "gate_up.bias", "mamba.s6.selection.A_log"}
    assert exempt <= rest


def test_it_learns() -> None:
    """Also the gate, which leaves its first value."""
    model = samba_lm.create(config(SPECS["gated"]), seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.randint(0, 9, (4, 12)).repeat(1, 4)
    losses = []
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1])[0].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    mixer = model.layers[0].mixer
    assert isinstance(mixer, GatedParallelMixer)
    gate = mixer.gate(torch.randn(1, 100, 64))
    assert gate.std(dim=1).mean() > 0.003


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_it_compiles_whole(name: str) -> None:
    model = make(SPECS[name]).to(DEVICE)
    first = model.layers[0]

    def block(x: torch.Tensor, span: Span) -> torch.Tensor:
        tensors = first.mixer.init_tensors(x.shape[0], x.device, x.dtype)
        return first(x, None, tensors, span, x.dtype)[1]

    counter, counts = CompileCounterWithBackend("aot_eager"), []
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    with preferring("triton" if DEVICE == "cpu" else None):
        for length in (9, 12, 11):
            x = torch.randn(1, length, 64, device=DEVICE)
            span = Span.of(1, length, x.device, None, None, keep=False)
            results = []
            for run in (block, compiled):
                model.zero_grad(set_to_none=True)
                y = run(x, span)
                y.square().mean().backward()
                results.append([y, *(p.grad for p in first.mixer.parameters())])
            for i, (expected, actual) in enumerate(zip(*results, strict=True)):
                assert_close(actual, expected, f"{length} tokens, result {i}", scale=5.0)
            counts.append(counter.frame_count)
    assert counts[0] == counts[-1], "a new length was compiled anew"


def test_no_other_library_has_it() -> None:
    with pytest.raises(UserError, match="no counterpart in transformers"):
        transformers_config(config(SPECS["gated"]))


def test_the_parts_are_the_known_mixers() -> None:
    """So that whatever looks for Mamba or attention in a model finds them."""
    for name, cls in (("parallel", ParallelMixer), ("gated", GatedParallelMixer)):
        model = make(SPECS[name])
        assert type(model.layers[0].mixer) is cls
        kinds = [type(module) for module in model.modules()]
        assert kinds.count(MambaMixer) == kinds.count(AttentionMixer) == 2


@pytest.mark.parametrize("name", ["parallel-27m", "gated-27m"])
def test_the_small_study_s_models(name: str) -> None:
    """As large as the model with the two in series; benchmarks make them small, their parts too."""
    config = zoo.get(name)
    assert config.parameters() == pytest.approx(zoo.get("mamba-swa-mlp-27m").parameters(), rel=1e-3)  # in series
    for small in (narrow(config), cut(config, layers=2, d_model=64, head_dim=16, mlp=80, window=9, vocab_size=64)):
        mamba, attention = small.layers[0].parts()
        assert mamba == Mamba()
        assert isinstance(attention, Attention)
        assert attention.window in (70, 9)
        assert small.layers[0].kind == config.layers[0].kind
        assert small.parameters() < 1e6


def test_a_drawn_stack(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(zoo.ZOO, "two-paths", zoo.Entry("two-paths", "test", lambda: config(SPECS["gated"])))
    assert cli.main(["models", "two-paths"]) == 0
    out = capsys.readouterr().out
    assert "+ gated" in out
    assert "expand 2, state 16, conv 4 | 2/1 heads, window 24" in out


@pytest.mark.gpu
@pytest.mark.parametrize("name", SPECS)
def test_a_gpu_gives_what_the_cpu_gives(name: str) -> None:
    """Logits and gradients read whole, and steps and the engine's texts after them."""
    ids = torch.randint(0, 260, (2, 120))
    found, texts = [], []
    params = SamplingParams(max_tokens=20, temperature=0, stop_at_eos=False)
    for device in ("cpu", "cuda"):
        model = make(SPECS[name]).to(device)
        logits, _ = model(ids.to(device))
        logits.log_softmax(-1).square().mean().backward()
        grads = {key: p.grad.cpu() for key, p in model.named_parameters() if p.grad is not None}
        state = model.init_state(2)
        steps = torch.stack([model.step(ids[:, i].to(device), state) for i in range(40)], dim=1)
        assert_close(steps, logits[:, :40].detach(), f"steps, {device}", scale=10)
        found.append({"logits": logits.detach().cpu(), **grads})
        with Engine(model, TOKENIZER, slots=3) as engine:
            texts.append([text.text for text in engine.generate(["The sea", "and the sand", "x" * 40], params)])
    assert found[0].keys() == found[1].keys()
    for key, expected in found[0].items():
        assert_close(found[1][key], expected, key, torch.float32, 20.0)
    assert texts[0] == texts[1]


@pytest.mark.gpu
@pytest.mark.parametrize("name", SPECS)
def test_bf16_on_a_gpu(name: str) -> None:
    """Chunks, a step and packed documents, through the kernels."""
    model = place(make(SPECS[name]), "cuda", torch.bfloat16)
    ids = torch.randint(0, 260, (2, 300), device="cuda")
    with torch.no_grad():
        expected, _ = model(ids)
        first, state = model(ids[:, :137])
        second, state = model(ids[:, 137:299], state)
        last = model.step(ids[:, 299], state)
        assert_close(torch.cat((first, second, last[:, None]), dim=1), expected, "chunks and a step", scale=3)
        segments = torch.tensor([[0] * 100 + [1] * 200, [-1] * 50 + [3] * 250], device="cuda")
        packed, _ = model(ids, None, segments)
        assert_close(packed[0, 100:], model(ids[:1, 100:])[0][0], "second document", scale=3)
        assert_close(packed[1, 50:], model(ids[1:, 50:])[0][0], "after padding", scale=3)

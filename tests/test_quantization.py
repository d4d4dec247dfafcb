"""A quantised model reads, steps, generates and keeps contexts as any other; it is not trained, saved or mistaken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import samba_lm
from samba_lm.cli import main as cli
from samba_lm.config import Attention, GatedLinearAttention, Mamba, MegaS6, ModelConfig, Retention, SwiGLU
from samba_lm.contexts.reading import read
from samba_lm.contexts.snapshot import load, save
from samba_lm.engine.engine import Engine
from samba_lm.errors import UserError
from samba_lm.generation.params import SamplingParams
from samba_lm.model import SambaLM
from samba_lm.nn.linear import Linear
from samba_lm.nn.quantized import QuantizedLinear
from samba_lm.quantization import quantize, weight_bytes
from samba_lm.tokenizer import ByteTokenizer

KINDS = ["int8", "int4"]
CLOSE = {"int8": 0.03, "int4": 0.25}
"""How far logits may be, relative to their size, with random weights."""
TOKENIZER = ByteTokenizer()
SAMBA = (Mamba(), SwiGLU(width=200), Attention(heads=2, window=24), SwiGLU(width=200))


def make(layers: tuple = SAMBA, dtype: torch.dtype | None = None) -> SambaLM:
    config = ModelConfig(name="small", d_model=64, vocab_size=260, layers=layers)
    return samba_lm.create(config, seed=1, dtype=dtype).eval()


def off(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.isfinite().all()
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_near_and_steps_give_what_reading_gives(kind: str, dtype: torch.dtype) -> None:
    ids = torch.randint(0, 260, (2, 50))
    model = make(dtype=dtype)
    with torch.no_grad():
        plain, _ = model(ids)
    assert quantize(model, kind) is model
    logits, _ = model(ids)
    assert not logits.requires_grad
    assert 1e-5 < off(logits, plain) < CLOSE[kind]
    state = model.init_state(2)
    steps = torch.stack([model.step(ids[:, i], state) for i in range(50)], dim=1)
    assert off(steps, logits) < 0.02  # few rows are computed in bf16
    _, after = model(ids[:, :20])
    rest, _ = model(ids[:, 20:], after)
    assert off(rest, logits[:, 20:]) < 0.02


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [GatedLinearAttention(heads=2), Retention(heads=2), MegaS6(z_dim=8, chunk=16)])
def test_every_mixer_may_be_quantised(layer: Retention, kind: str) -> None:
    ids = torch.randint(0, 260, (1, 40))
    model = make((layer,))
    with torch.no_grad():
        plain, _ = model(ids)
    quantize(model, kind)
    assert any(isinstance(module, QuantizedLinear) for module in model.modules())
    assert 1e-5 < off(model(ids)[0], plain) < CLOSE[kind]


def test_which_maps_are_quantised() -> None:
    model = make()
    quantize(model, "int8")
    kinds = {name: type(module) for name, module in model.named_modules()}
    for name in ("layers.0.mixer.in_proj", "layers.0.mixer.out_proj", "layers.1.mixer.w12", "layers.1.mixer.w3"):
        assert kinds[name] is QuantizedLinear, name
    for name in ("layers.2.mixer.qkv", "layers.2.mixer.out_proj"):
        assert kinds[name] is QuantizedLinear, name
    for name in ("layers.0.mixer.s6.x_proj", "layers.0.mixer.s6.dt_proj"):
        assert kinds[name] is Linear, name


def test_memory() -> None:
    model = make(dtype=torch.bfloat16)
    maps = sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, Linear) and ".s6." not in n)
    outputs = sum(m.weight.shape[0] for n, m in model.named_modules() if isinstance(m, Linear) and ".s6." not in n)
    before = weight_bytes(model)
    quantize(model, "int8")
    assert weight_bytes(model) == before - maps + 4 * outputs


def test_what_cannot_be_done_is_said() -> None:
    model = make()
    with pytest.raises(UserError, match="no quantisation 'int3': choose int8 or int4"):
        samba_lm.quantize(model, "int3")
    samba_lm.quantize(model, "int8")
    with pytest.raises(UserError, match="int8 already"):
        samba_lm.quantize(model, "int4")
    model.embedding.requires_grad_()
    with pytest.raises(UserError, match="cannot be trained"):
        model(torch.zeros(1, 4, dtype=torch.int64))


def test_a_quantised_model_is_not_saved(tmp_path: Path) -> None:
    model = samba_lm.quantize(make(), "int4")
    with pytest.raises(UserError, match="save it before it is quantised"):
        samba_lm.save(model, tmp_path / "ckpt", TOKENIZER)
    assert not (tmp_path / "ckpt").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_context_goes_on_only_with_the_same_quantisation(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "book.ctx"
    model = quantize(make(), kind)
    save(path, read(model, TOKENIZER, "The sea is salt. " * 9, "A book"), model, TOKENIZER)
    again = quantize(make(), kind)
    snapshot = load(path, again, TOKENIZER)
    first, second = snapshot.reader(), read(model, TOKENIZER, "The sea is salt. " * 9, "A book").reader()
    token = torch.tensor([7])
    assert torch.equal(again.step(token, first.state), model.step(token, second.state))
    with pytest.raises(UserError, match=rf"was made in {kind}/float32.*runs in float32/float32.*--quantize"):
        load(path, make(), TOKENIZER)
    other = "int4" if kind == "int8" else "int8"
    with pytest.raises(UserError, match=rf"was made in {kind}/float32.*runs in {other}/float32"):
        load(path, quantize(make(), other), TOKENIZER)


@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_gives_what_generate_gives(kind: str) -> None:
    model = quantize(make(), kind)
    params = SamplingParams(max_tokens=12, temperature=0, stop_at_eos=False)
    prompts = ["The sea", "and the sand are", "x" * 40]
    with Engine(model, TOKENIZER, slots=4, batch_invariant=True) as engine:
        together = engine.generate(prompts, params)
        alone = [engine.generate([prompt], params)[0] for prompt in prompts]
    assert [text.text for text in together] == [text.text for text in alone]


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samba_lm.save(make(), tmp_path / "ckpt", TOKENIZER)
    (tmp_path / "text.txt").write_text("The sea is salt, as the tears are. " * 60)
    found = {}
    for kind in (None, "int8", "int4"):
        option = [] if kind is None else ["--quantize", kind]
        record = tmp_path / f"{kind}.json"
        arguments = ["--data", str(tmp_path / "text.txt"), "--lengths", "256", "--json", str(record)]
        assert cli.main(["eval", "perplexity", str(tmp_path / "ckpt"), *arguments, *option]) == 0
        found[kind] = record.read_text()
        assert (f"in {kind}" in capsys.readouterr().out) is (kind is not None)
        assert f'"quantized": {"null" if kind is None else chr(34) + kind + chr(34)}' in found[kind]
    assert len(set(found.values())) == 3
    arguments = ["--prompt", "The sea", "--max-tokens", "5", "--device", "cpu"]
    assert cli.main(["generate", str(tmp_path / "ckpt"), *arguments, "--quantize", "int8"]) == 0
    assert "made 5" in capsys.readouterr().err
    assert cli.main(["generate", str(tmp_path / "ckpt"), *arguments, "--quantize", "int2"]) == 2
    assert "int8" in capsys.readouterr().err

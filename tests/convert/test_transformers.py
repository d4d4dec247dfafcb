"""Llama, Mistral and Mamba against the real `transformers`, on random weights, in both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import samba_lm
from samba_lm import zoo
from samba_lm.config import Attention, Mamba, ModelConfig, SwiGLU
from samba_lm.convert.transformers import (
    from_transformers,
    read_transformers_config,
    rename_transformers,
    to_transformers,
    to_transformers_names,
    transformers_config,
)
from samba_lm.errors import UserError
from samba_lm.model import SambaLM
from samba_lm.tokenizer import ByteTokenizer, train_bpe

hf = pytest.importorskip("transformers")

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3}
HEADS = {**SIZES, "intermediate_size": 44, "num_attention_heads": 4, "num_key_value_heads": 2}
ROPE = {"rope_type": "default", "rope_theta": 500.0}
LENGTH, WINDOW, VOCAB = 23, 5, 61

THEIRS = {
    "llama": lambda: hf.LlamaConfig(**HEADS, rms_norm_eps=1e-3, rope_parameters=ROPE),
    "llama-tied": lambda: hf.LlamaConfig(**{**HEADS, "num_key_value_heads": None}, tie_word_embeddings=True),
    "mistral": lambda: hf.MistralConfig(**HEADS, sliding_window=WINDOW),
    "mistral-full": lambda: hf.MistralConfig(**HEADS, sliding_window=None),
    "mamba": lambda: hf.MambaConfig(**SIZES, layer_norm_epsilon=1e-3),
    "mamba-odd": lambda: hf.MambaConfig(
        **SIZES, state_size=5, conv_kernel=3, expand=3, time_step_rank=7, tie_word_embeddings=False
    ),
}

OURS = {
    "full": (Attention(heads=4, kv_heads=1, rope_base=777.0), SwiGLU(width=44)),
    "window": (Attention(heads=4, kv_heads=2, window=WINDOW), SwiGLU(width=44)),
    "mamba": (Mamba(),),
    "mamba-odd": (Mamba(expand=1, state=3, conv=2, dt_rank=5),),
}


def _shake(model: torch.nn.Module) -> torch.nn.Module:
    """Move every weight, so that no norm is 1 and no bias 0."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model.eval()


def _theirs(name: str) -> torch.nn.Module:
    return _shake(hf.AutoModelForCausalLM.from_config(THEIRS[name]()))


def _ours(name: str, tied: bool) -> SambaLM:
    layers = OURS[name] * 3
    config = ModelConfig(
        name=name, d_model=32, vocab_size=VOCAB, layers=layers, tie_embeddings=tied, init="samba" if tied else "llama"
    )
    model = samba_lm.create(config, seed=1)
    _shake(model)
    return model


def _ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, LENGTH))


@torch.no_grad()
def _assert_same(ours: SambaLM, theirs: torch.nn.Module) -> None:
    """Their forward equals ours: read at once, in chunks, and token by token."""
    ids = _ids()
    wanted = theirs(input_ids=ids).logits
    assert wanted.std() > 0.1  # a difference would show
    at_once, _ = ours(ids)
    torch.testing.assert_close(at_once, wanted, rtol=1e-5, atol=1e-5)

    first, state = ours(ids[:, :10])
    second, state = ours(ids[:, 10:17], state)
    steps = [ours.step(ids[:, t], state) for t in range(17, LENGTH)]
    torch.testing.assert_close(torch.cat((first, second, torch.stack(steps, 1)), 1), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", THEIRS)
def test_theirs_to_ours(name: str, tmp_path: Path) -> None:
    theirs = _theirs(name)
    theirs.save_pretrained(tmp_path / "model")
    ours, tokenizer = from_transformers(tmp_path / "model")
    assert tokenizer is None
    assert ours.config.name == "model"
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    _assert_same(ours, theirs)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", OURS)
def test_ours_to_theirs_and_back(name: str, tied: bool, tmp_path: Path) -> None:
    ours = _ours(name, tied)
    to_transformers(ours, tmp_path / "model")
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert theirs.dtype == torch.float32
    _assert_same(ours, theirs.eval())

    back, _ = from_transformers(tmp_path / "model")
    assert back.config.fingerprint() == ours.config.fingerprint()
    for key, tensor in ours.state_dict().items():
        assert torch.equal(back.state_dict()[key], tensor), key


def test_gradients_are_theirs_too() -> None:
    theirs = _theirs("mistral")
    ours = samba_lm.create(read_transformers_config(theirs.config.to_dict()))
    ours.load_state_dict(rename_transformers(theirs.state_dict(), ours.config))
    ids = _ids()
    for logits in (theirs(input_ids=ids).logits, ours(ids)[0]):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    wanted = rename_transformers({name: p.grad for name, p in theirs.named_parameters()}, ours.config)
    assert wanted.keys() == dict(ours.named_parameters()).keys()
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], rtol=1e-4, atol=1e-6)


def test_shards_are_read(tmp_path: Path) -> None:
    theirs = _theirs("mamba")
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours, _ = from_transformers(tmp_path)
    _assert_same(ours, theirs)


def test_bf16_stays_bf16(tmp_path: Path) -> None:
    to_transformers(_ours("full", True).to(torch.bfloat16), tmp_path / "model")
    assert hf.AutoModelForCausalLM.from_pretrained(tmp_path / "model").dtype == torch.bfloat16
    assert from_transformers(tmp_path / "model")[0].dtype == torch.bfloat16


def test_the_layout_of_older_versions(tmp_path: Path) -> None:
    theirs = _theirs("llama")
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("rope_parameters", "head_dim", "dtype", "mlp_bias"):
        del config[key]
    config |= {"rope_theta": 500.0, "rope_scaling": None, "torch_dtype": "float32", "some_new_flag": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors")
    _assert_same(from_transformers(tmp_path)[0], theirs)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), train_bpe(["the cat sat on the mat " * 9], 300)])
def test_the_tokenizer_goes_along(tokenizer: Any, tmp_path: Path) -> None:
    model = samba_lm.create("llama-micro")
    to_transformers(model, tmp_path / "model", tokenizer)
    theirs = hf.AutoTokenizer.from_pretrained(tmp_path / "model")
    text = " The cat\n\tsat, <|endoftext\n naïve 猫 "
    assert theirs(text)["input_ids"] == tokenizer.encode(text).tolist()
    assert theirs.decode(tokenizer.encode(text)) == text
    assert theirs.eos_token_id == tokenizer.eos_id
    assert hf.AutoConfig.from_pretrained(tmp_path / "model").eos_token_id == tokenizer.eos_id
    _, back = from_transformers(tmp_path / "model")
    assert back is not None
    assert back.fingerprint() == tokenizer.fingerprint()


LLAMA = {**HEADS, "model_type": "llama"}
MISTRAL = {**LLAMA, "model_type": "mistral"}
MAMBA = {**SIZES, "model_type": "mamba"}


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({**LLAMA, "model_type": "gpt2"}, "model_type = 'gpt2' is not supported: llama, mistral, mamba"),
        ({}, "model_type = None"),
        ({**LLAMA, "model_type": []}, "model_type = []"),
        ({**LLAMA, "num_hidden_layers": 2**62}, "num_hidden_layers"),
        ({**LLAMA, "hidden_size": 10**30}, "hidden_size"),
        ({**MAMBA, "expand": 2**40}, "expand"),
        ({**LLAMA, "architectures": ["LlamaForSequenceClassification"]}, "it must be ['LlamaForCausalLM']"),
        ({**LLAMA, "hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({**LLAMA, "attention_bias": True}, "attention_bias = True"),
        ({**LLAMA, "mlp_bias": True}, "mlp_bias = True"),
        ({**LLAMA, "head_dim": 16}, "head_dim = 16 is not supported"),
        ({**LLAMA, "quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}"),
        ({**LLAMA, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters.rope_type = 'yarn'"),
        ({**LLAMA, "rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling.type = 'linear'"),
        ({**LLAMA, "rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({**LLAMA, "hidden_size": "wide"}, "hidden_size = 'wide'"),
        ({**LLAMA, "num_attention_heads": 5}, "heads=5 does not divide d_model=32"),
        ({**LLAMA, "num_key_value_heads": 3}, "kv_heads=3 does not divide heads=4"),
        ({key: value for key, value in LLAMA.items() if key != "intermediate_size"}, "intermediate_size is missing"),
        ({**MISTRAL, "sliding_window": 0}, "window=0 must be at least 1"),
        ({**MISTRAL, "layer_types": ["full_attention"] * 3}, "layer_types"),
        ({**MAMBA, "use_bias": True}, "use_bias = True"),
        ({**MAMBA, "use_conv_bias": False}, "use_conv_bias = False"),
        ({**MAMBA, "num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({**MAMBA, "time_step_rank": "big"}, "time_step_rank"),
    ],
)
def test_what_our_layers_cannot_express(data: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as error:
        read_transformers_config(data)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["samba-micro", "mamba-mlp-1.9b", "self-extend-llama3-1.6b", "sliding-gla-438m"])
def test_models_without_a_counterpart(name: str) -> None:
    with pytest.raises(UserError, match="has no counterpart in transformers"):
        transformers_config(zoo.get(name))


@pytest.mark.parametrize(
    ("layers", "told"),
    [
        ((Attention(heads=4, window=8), SwiGLU(width=8), Attention(heads=4), SwiGLU(width=8)), "no counterpart"),
        ((Attention(heads=4), SwiGLU(width=8), Attention(heads=4)), "no counterpart"),
        ((Mamba(), Mamba(state=8)), "no counterpart"),
        ((SwiGLU(width=8),), "no counterpart"),
        ((Attention(heads=4, rope=False), SwiGLU(width=8)), "attention without RoPE"),
        ((Attention(heads=4, short_conv=4), SwiGLU(width=8)), "short_conv = 4"),
    ],
)
def test_layers_without_a_counterpart(layers: tuple[Any, ...], told: str) -> None:
    with pytest.raises(UserError, match=told):
        transformers_config(ModelConfig(name="mine", d_model=32, vocab_size=9, layers=layers))


def test_tensors_that_do_not_belong() -> None:
    ours = _ours("window", tied=False)
    tensors = to_transformers_names(ours.state_dict(), ours.config)

    def told(**changes: torch.Tensor | None) -> str:
        changed = {**tensors, **{name.replace("__", "."): t for name, t in changes.items()}}
        with pytest.raises(UserError) as error:
            rename_transformers({name: t for name, t in changed.items() if t is not None}, ours.config)
        return str(error.value)

    assert "'lm_head.weight'" in told(lm_head__weight=None)
    assert "has shape [32], but the config needs [61, 32]" in told(lm_head__weight=torch.ones(32))
    assert "torch.int8: only unquantized" in told(model__norm__weight=torch.ones(32, dtype=torch.int8))
    assert "'model.extra' and 1 more" in told(model__extra=torch.ones(1), other=torch.ones(1))
    tied = ours.config.with_overrides(tie_embeddings=True)
    with pytest.raises(UserError, match=r"ties the embeddings, but 'lm_head.weight' differs"):
        rename_transformers(tensors, tied)


def test_damaged_folders(tmp_path: Path) -> None:
    def told() -> str:
        with pytest.raises(UserError) as error:
            from_transformers(tmp_path / "model")
        return str(error.value)

    folder = tmp_path / "model"
    assert "There is no folder" in told()
    folder.mkdir()
    assert "has no config.json" in told()
    (folder / "config.json").write_bytes(b'{"model_type": "\xff"}')
    assert "is not valid JSON" in told()
    (folder / "config.json").write_text("[1]")
    assert "must hold a JSON object ({...}), not a list" in told()
    (folder / "config.json").write_text(json.dumps({**LLAMA, "mlp_bias": True}))
    assert f"{folder / 'config.json'}: mlp_bias = True" in told()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    assert "has no model.safetensors" in told()
    _theirs("llama").save_pretrained(folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    assert "model.safetensors is truncated" in told()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    assert "no weight_map of tensors to files beside it" in told()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))
    assert "There is no file" in told()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty: choose another folder"):
        to_transformers(_ours("full", True), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_tokenizer_that_is_too_large(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"257 ids but model 'full' has a vocabulary of {VOCAB}"):
        to_transformers(_ours("full", True), tmp_path / "model", ByteTokenizer())
    assert not (tmp_path / "model").exists()

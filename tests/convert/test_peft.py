"""Adapters in peft's format, against the real peft on the real transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import samba_lm
from samba_lm import checkpoint
from samba_lm.config import Attention, LayerSpec, Mamba, ModelConfig, SwiGLU
from samba_lm.convert.peft import merge_adapter, save_adapter
from samba_lm.convert.transformers import to_transformers
from samba_lm.errors import UserError
from samba_lm.model import SambaLM
from samba_lm.nn.lora import LoraSettings, adapters, attach, reset_adapters
from samba_lm.templates import TAUGHT
from samba_lm.tokenizer import ByteTokenizer

STACKS: dict[str, tuple[LayerSpec, ...]] = {
    "llama": (Attention(heads=4, kv_heads=2), SwiGLU(width=44)) * 2,
    "mistral": (Attention(heads=4, kv_heads=1, window=5), SwiGLU(width=44)) * 2,
    "mamba": (Mamba(),) * 2,
    "samba": (Mamba(), SwiGLU(width=44), Attention(heads=4, window=5), SwiGLU(width=44)),
}
IDS = torch.randint(0, 257, (2, 17), generator=torch.Generator().manual_seed(0))


def make(name: str, settings: LoraSettings | None = None) -> SambaLM:
    config = ModelConfig(name=name, d_model=32, vocab_size=257, layers=STACKS[name])
    model = checkpoint.create(config, seed=1, dtype=torch.float64).eval()
    if settings is not None:
        attach(model, settings)
        reset_adapters(model, seed=2)
        for _, module in adapters(model):
            torch.nn.init.normal_(module.lora_B, std=0.2, generator=torch.Generator().manual_seed(3))
    return model


@pytest.mark.parametrize("name", STACKS)
def test_merged_it_is_the_model_that_was_trained(name: str, tmp_path: Path) -> None:
    model = make(name, LoraSettings(3, 7.5, rslora=name == "llama"))
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = TAUGHT
    save_adapter(model, tmp_path / "a", "base", tokenizer)
    save_adapter(model, tmp_path / "a", "base", tokenizer)  # in place of the one before
    plain, own = make(name), ByteTokenizer()
    changed = merge_adapter(plain, tmp_path / "a", own)
    assert own.chat_template == TAUGHT
    assert changed == len(load_file(tmp_path / "a" / "adapter_model.safetensors")) // 2
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS)[0], model(IDS)[0], rtol=1e-10, atol=1e-12)
        assert not torch.allclose(plain(IDS)[0], make(name)(IDS)[0], rtol=1e-2)


def test_what_is_no_adapter_of_this_model_is_told(tmp_path: Path) -> None:
    save_adapter(make("samba", LoraSettings(2, 4.0)), tmp_path / "a", None, ByteTokenizer())
    with pytest.raises(UserError, match="is no adapter: it has no adapter_config"):
        merge_adapter(make("samba"), tmp_path)
    with pytest.raises(UserError, match="does not have: give its base"):
        merge_adapter(make("llama"), tmp_path / "a")
    narrow = checkpoint.create(ModelConfig(name="n", d_model=64, vocab_size=257, layers=STACKS["samba"]))
    with pytest.raises(UserError, match="give its base"):
        merge_adapter(narrow, tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is no adapter: choose another folder"):
        save_adapter(make("samba", LoraSettings(2, 4.0)), tmp_path / "b")
    file = tmp_path / "a" / "adapter_config.json"
    config = json.loads(file.read_text())
    for change, told in (
        ({"use_dora": True}, "use_dora = True"),
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA'"),
        ({"r": 3}, "rank 3"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ):
        file.write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=told):
            merge_adapter(make("samba"), tmp_path / "a")
    file.write_text(json.dumps(config))
    weights = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "other": torch.ones(1)}, weights)
    with pytest.raises(UserError, match="holds 'other'"):
        merge_adapter(make("samba"), tmp_path / "a")
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(UserError, match="adapter_model"):
        merge_adapter(make("samba"), tmp_path / "a")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["llama", "mistral", "mamba"])
def test_the_real_peft_reads_ours_and_we_read_its(name: str, tmp_path: Path) -> None:
    hf = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    # peft refuses a Mamba's out_proj, whose weight transformers' fused kernels take as it lies.
    targets = ("in_proj", "x_proj") if name == "mamba" else ()
    model = make(name, LoraSettings(3, 7.5, targets, rslora=name == "llama"))
    save_adapter(model, tmp_path / "ours", "base", ByteTokenizer())
    to_transformers(make(name), tmp_path / "hf", ByteTokenizer())

    def theirs() -> torch.nn.Module:
        return hf.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float64).eval()

    put_on = peft.PeftModel.from_pretrained(theirs(), tmp_path / "ours", autocast_adapter_dtype=False)
    with torch.no_grad():
        torch.testing.assert_close(put_on(IDS).logits.double(), model(IDS)[0], rtol=1e-5, atol=2e-6)
    names = ["in_proj", "x_proj"] if name == "mamba" else ["q_proj", "up_proj"]  # q and not k: part of one map of ours
    settings = peft.LoraConfig(r=2, lora_alpha=5, target_modules=names, init_lora_weights=False, task_type="CAUSAL_LM")
    trained = peft.get_peft_model(theirs(), settings, autocast_adapter_dtype=False).eval()
    trained.save_pretrained(tmp_path / "theirs")
    ours = make(name)
    assert merge_adapter(ours, tmp_path / "theirs") == 4
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS)[0], trained(IDS).logits.double(), rtol=1e-5, atol=2e-6)
    samba_lm.save(ours, tmp_path / "merged")

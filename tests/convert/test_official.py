"""Reference checkpoints: which files and configs are read, and what is told of the others.

That the numbers are right is tests/test_golden.py's.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from samba_lm.config import Attention, GatedLinearAttention, Mamba, MegaS6, SwiGLU
from samba_lm.convert.official import read_official_config, read_official_tensors, rename_official
from samba_lm.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden"
ARCHS: dict[str, dict[str, Any]] = json.loads((GOLDEN / "manifest.json").read_text())["archs"]


def _config(arch: str = "samba_gqa", **fields: Any) -> dict[str, Any]:
    return {**ARCHS[arch]["config"], "size_overrides": ARCHS[arch]["size_overrides"], **fields}


def _kinds(**fields: Any) -> list[type]:
    return [type(spec) for spec in read_official_config(_config(**fields)).layers]


def test_fields_that_are_left_out_take_the_reference_defaults() -> None:
    config = read_official_config({"mamba": True})
    assert (config.d_model, len(config.layers), config.vocab_size) == (4096, 16, 50688)
    assert config.tie_embeddings


def test_the_vocabulary_is_padded_as_the_reference_does() -> None:
    assert read_official_config(_config(padded_vocab_size=None)).vocab_size == 128
    assert read_official_config(_config(padded_vocab_size=None, vocab_size=129)).vocab_size == 192


def test_where_attention_stands_may_be_a_string_or_a_list() -> None:
    expected = [Mamba, SwiGLU, Attention, SwiGLU, Mamba, SwiGLU, Attention, SwiGLU]
    assert _kinds(attn_layer_pos="[1, 3]") == _kinds(attn_layer_pos=[1, 3]) == expected


def test_size_overrides() -> None:
    gla = read_official_config(_config("sliding_gla", size_overrides={"gla_num_heads": 4})).layers[0]
    assert isinstance(gla, GatedLinearAttention)
    assert gla.heads == 4
    mega = read_official_config(_config("mega_s6", size_overrides={"mega_zdim": 16, "mega_chunk": 4})).layers[0]
    assert isinstance(mega, MegaS6)
    assert (mega.z_dim, mega.chunk) == (16, 4)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"n_hed": 4}, "n_hed = 4: unknown key. Did you mean 'n_head'?"),
        ({"n_layer": 0}, "n_layer = 0"),
        ({"n_layer": 10**30}, "n_layer = 1000"),
        ({"padded_vocab_size": 10**30}, "padded_vocab_size = 1000"),
        ({"intermediate_size": 2**62}, "intermediate_size = 46"),
        ({"_norm_clas": "RMSNorm"}, "Did you mean '_norm_class'?"),
        ({"attn_layer_pos": 100_000 * "["}, "must be a list of block numbers"),
        ({"n_embd": "wide"}, "n_embd = 'wide'"),
        ({"full_per_layer": 0}, "full_per_layer = 0"),
        ({"n_head": 3}, "heads=3 does not divide d_model=32"),
        ({"n_query_groups": 3}, "kv_heads=3 does not divide heads=4"),
        ({"rotary_percentage": 0.25}, "rotary_percentage = 0.25 is not supported: the paper's models have 1.0"),
        ({"parallel_residual": True}, "parallel_residual = True"),
        ({"bias": True}, "bias = True"),
        ({"mlp": False}, "mlp = False"),
        ({"_norm_class": "LayerNorm"}, "_norm_class = 'LayerNorm'"),
        ({"_mlp_class": "GptNeoxMLP"}, "_mlp_class = 'GptNeoxMLP'"),
        ({"attn_layer_pos": "__import__('os').getcwd()"}, "attn_layer_pos"),
        ({"attn_layer_pos": "3"}, "must be a list of block numbers"),
        ({"size_overrides": {"mega_zdims": 16}}, "size_overrides.mega_zdims = 16: unknown key"),
        ({"ret_per_layer": 1, "mb_per_layer": -1, "n_head": 1, "n_query_groups": 1}, "heads=0 must be at least 1"),
    ],
)
def test_bad_configs(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as error:
        read_official_config(_config(**fields))
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_files_with_and_without_the_prefix_hold_the_same(tmp_path: Path) -> None:
    golden = read_official_tensors(GOLDEN / "samba_gqa.safetensors")
    assert "transformer.wte.weight" in golden
    assert not any(name.startswith(("param.", "grad.")) or name == "logits" for name in golden)
    compiled = {f"_orig_mod.{name}": t for name, t in golden.items()}
    for wrapped in (golden, {"model": golden, "iter_num": 7}, {"state_dict": compiled}):
        torch.save(wrapped, tmp_path / "weights.pth")
        read = read_official_tensors(tmp_path / "weights.pth")
        assert read.keys() == golden.keys()
        assert all(torch.equal(read[name], golden[name]) for name in golden)


class _Bomb:
    """Unpickled without care, it would make a file."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.victim,)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    torch.save({"lm_head.weight": torch.ones(2), "bomb": _Bomb(victim)}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"holds more than tensors \(\S+\) and could run code, so it was not loaded"):
        read_official_tensors(tmp_path / "weights.pth")
    assert not victim.exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_pth_files(legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.ones(40)}, path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:length])
        # Cut in the middle of a class's name, it asks for something that torch does not know.
        with pytest.raises(UserError, match=r"is truncated or no PyTorch file|holds more than tensors"):
            read_official_tensors(path)
    for junk in (b"hello\n", b"\x80\x04junk", b"PK\x03\x04", bytes(range(256))):
        path.write_bytes(junk)
        with pytest.raises(UserError, match="is truncated or no PyTorch file"):
            read_official_tensors(path)


def test_other_files(tmp_path: Path) -> None:
    def told(name: str) -> str:
        with pytest.raises(UserError) as error:
            read_official_tensors(tmp_path / name)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "There is no file" in told("none.pth")
    assert "There is no file" in told("none.safetensors")
    assert "must end in .safetensors or .pth" in told("weights.npz")
    save_file({"a": torch.ones(40)}, tmp_path / "cut.safetensors")
    whole = (tmp_path / "cut.safetensors").read_bytes()
    for length in (0, 5, 20, len(whole) - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole[:length])
        assert "is truncated or no safetensors file" in told("cut.safetensors")
    for content in ([torch.ones(2)], {"lr": 0.1}, torch.ones(2)):
        torch.save(content, tmp_path / "odd.pth")
        assert "holds no state dict" in told("odd.pth")


@pytest.mark.parametrize("arch", ARCHS)
def test_every_tensor_is_needed_and_its_shape_is_checked(arch: str) -> None:
    config = read_official_config(_config(arch))
    tensors = read_official_tensors(GOLDEN / f"{arch}.safetensors")
    optional = {name for name in tensors if name.endswith("_float_tensor")}
    if config.tie_embeddings:
        optional.add("transformer.wte.weight")
    for name in tensors:
        without = {key: t for key, t in tensors.items() if key != name}
        if name in optional:
            rename_official(without, config)
            continue
        with pytest.raises(UserError, match=re.escape(f"no tensor {name!r}")):
            rename_official(without, config)
        with pytest.raises(UserError, match=re.escape(f"Tensor {name!r} has shape [1]")):
            rename_official({**without, name: torch.ones(1)}, config)


def test_tensors_that_do_not_belong() -> None:
    config = read_official_config(_config())
    tensors = read_official_tensors(GOLDEN / "samba_gqa.safetensors")
    with pytest.raises(UserError, match=r"hold 'transformer\.h\.9\.attn\.proj\.weight', which the config has no place"):
        rename_official({**tensors, "transformer.h.9.attn.proj.weight": torch.ones(1)}, config)
    with pytest.raises(UserError, match=r"ties the embeddings, but 'transformer\.wte\.weight' differs"):
        rename_official({**tensors, "transformer.wte.weight": tensors["lm_head.weight"] + 1}, config)
    with pytest.raises(UserError, match=r"dtype torch\.int64: only unquantized"):
        rename_official({**tensors, "lm_head.weight": tensors["lm_head.weight"].long()}, config)


def test_another_model_s_weights() -> None:
    tensors = read_official_tensors(GOLDEN / "samba_mqa.safetensors")
    with pytest.raises(UserError, match="has shape"):
        rename_official(tensors, read_official_config(_config("samba_gqa")))
    rename_official(tensors, read_official_config(_config("samba_mqa")))

"""``samba-lm convert``: checkpoints from the paper's reference code, and from and to `transformers`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional

from samba_lm.cli.model import CheckpointName
from samba_lm.cli.output import JsonFile, write_json
from samba_lm.cli.parse import parse
from samba_lm.errors import UserError

if TYPE_CHECKING:
    from samba_lm.model import SambaLM
    from samba_lm.tokenizer import Tokenizer

# torch, and what needs it, is imported once the options are known to be right: --help should not wait.


@dataclass(frozen=True)
class FromOfficial:
    """Read a checkpoint of the paper's reference code: its weights, and its Config's fields as a JSON object.

    A .pth is read without running the code that a pickle may hold. Where names in the file start with `param.`, only
    those are read.
    """

    weights: Positional[Annotated[Path, tyro.conf.arg(metavar="FILE")]]
    """The state dict, as .safetensors or .pth."""
    config: Path
    """The Config's fields, plus `size_overrides` (gla_num_heads, mega_zdim, mega_chunk) where these are not usual."""
    out: Path
    """The checkpoint folder to make."""
    tokenizer: Annotated[str | None, tyro.conf.arg(metavar="byte|FILE")] = None
    """The tokenizer to put into the checkpoint: byte, or a tokenizer.json or its folder."""
    eos: str | None = None
    """The token of the tokenizer's file that separates documents, where it has no usual name."""
    json: JsonFile = None
    """Write what was converted to this file too."""


@dataclass(frozen=True)
class FromTransformers:
    """Read a Llama, Mistral or Mamba folder of transformers: config.json, safetensors and, if there, tokenizer.json.

    The weights keep their dtype. Note that samba-lm adds no token to a text, such as the <s> of a Llama before it.
    """

    folder: Positional[Annotated[Path, tyro.conf.arg(metavar="FOLDER")]]
    """The folder that `save_pretrained` wrote, or a downloaded one."""
    out: Path
    """The checkpoint folder to make."""
    eos: str | None = None
    """The token of its tokenizer that separates documents, where the folder does not name one."""
    json: JsonFile = None
    """Write what was converted to this file too."""


@dataclass(frozen=True)
class ToTransformers:
    """Write a checkpoint as a Llama, Mistral or Mamba folder, for `AutoModelForCausalLM.from_pretrained`.

    Only models that one of these three computes too: all layers Mamba, or attention and SwiGLU in turn.
    """

    checkpoint: Positional[CheckpointName]
    """A checkpoint folder."""
    out: Path
    """The folder to make; it must not exist, or be empty."""
    json: JsonFile = None
    """Write what was converted to this file too."""


def main(argv: list[str]) -> None:
    """Run ``convert from-official``, ``convert from-transformers`` or ``convert to-transformers``."""
    commands: dict[str, Callable[[list[str]], None]] = {
        "from-official": _from_official,
        "from-transformers": _from_transformers,
        "to-transformers": _to_transformers,
    }
    commands[argv[0]](argv[1:])


def _from_official(argv: list[str]) -> None:
    options = parse(FromOfficial, argv, prog="samba-lm convert from-official")
    from samba_lm import checkpoint
    from samba_lm.convert.foreign import read_json_object
    from samba_lm.convert.official import read_official_config, read_official_tensors, rename_official
    from samba_lm.tokenizer import BpeSpec, parse_tokenizer

    checkpoint.check_replaceable(options.out)  # before the work and not after it
    config = read_official_config(read_json_object(options.config))
    tokenizer = None if options.tokenizer is None else parse_tokenizer(options.tokenizer, eos=options.eos)
    if isinstance(tokenizer, BpeSpec):
        raise UserError(f"--tokenizer {options.tokenizer}: give the file of a trained tokenizer, or byte.")
    model = checkpoint.build(config, rename_official(read_official_tensors(options.weights), config))
    checkpoint.save(model, options.out, tokenizer)
    _report(options.weights, options.out, model, tokenizer, options.json)


def _from_transformers(argv: list[str]) -> None:
    options = parse(FromTransformers, argv, prog="samba-lm convert from-transformers")
    from samba_lm import checkpoint
    from samba_lm.convert.transformers import from_transformers

    checkpoint.check_replaceable(options.out)
    model, tokenizer = from_transformers(options.folder, eos=options.eos)
    checkpoint.save(model, options.out, tokenizer)
    _report(options.folder, options.out, model, tokenizer, options.json)


def _to_transformers(argv: list[str]) -> None:
    options = parse(ToTransformers, argv, prog="samba-lm convert to-transformers")
    from samba_lm import checkpoint
    from samba_lm.convert.transformers import to_transformers

    model, tokenizer = checkpoint.load(options.checkpoint)
    to_transformers(model, options.out, tokenizer)
    _report(Path(options.checkpoint), options.out, model, tokenizer, options.json)


def _report(source: Path, out: Path, model: SambaLM, tokenizer: Tokenizer | None, json: Path | None) -> None:
    parameters, dtype = model.config.parameters(), str(model.embedding.dtype).removeprefix("torch.")
    vocabulary = "no tokenizer" if tokenizer is None else f"a tokenizer of {tokenizer.vocab_size:,}"
    print(f"{out}: {parameters:,} parameters ({dtype}) in {len(model.config.layers)} layers, {vocabulary}.")
    if json is not None:
        write_json(
            json,
            {
                "source": source,
                "out": out,
                "parameters": parameters,
                "dtype": dtype,
                "tokenizer": None if tokenizer is None else tokenizer.fingerprint(),
                "model": model.config.to_dict(),
            },
        )

"""A state to go on from: in memory, and as a file that loads only where it fits."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from samba_lm.contexts import file
from samba_lm.contexts.identity import identify, mismatch
from samba_lm.contexts.info import Info, check_title, info_of, now
from samba_lm.contexts.token_hash import TokenHash
from samba_lm.errors import UserError
from samba_lm.generation.prefill import Reader
from samba_lm.generation.sampling import DamagedModelError, History
from samba_lm.generation.stream import advance
from samba_lm.model import Layer, SambaLM
from samba_lm.span import Cursor
from samba_lm.state import State
from samba_lm.tokenizer import Tokenizer

DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What states may hold, as safetensors names it."""
_TORCH = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class Snapshot:
    """All that is needed to go on from what one sequence has read. Never changes: :meth:`reader` gives copies."""

    state: State
    logits: Tensor
    """[1, V], of the token that comes next."""
    read: TokenHash
    """Of the tokens read, from the first one on; it tells how many there are."""
    title: str = ""
    """What was read, for people: one line of at most 200 characters."""
    created: str = field(default_factory=now)
    """ISO 8601, UTC."""
    seen: Tensor | None = None
    """bool [1, V]: the tokens that were read, for repetition penalties; None where nobody noted them."""

    def __post_init__(self) -> None:
        check_title(self.title)

    @classmethod
    def of(cls, reader: Reader, read: TokenHash, title: str = "") -> Snapshot:
        """A copy of where one sequence stands; ``read``: the hash of the ``reader.lengths[0]`` tokens it has read.

        The reader's logits must be those after its last token; for what an engine gives back see :meth:`of_answer`.

        Raises UserError when nothing was read yet, and when the model's outputs are no numbers.
        """
        if reader.logits is None:
            raise UserError("Nothing was read yet, so there is no context to keep: read at least one token.")
        if not bool(reader.logits.max().isfinite()):
            raise DamagedModelError(
                "After this text the model's outputs are not finite numbers, so there is nothing to keep: its weights "
                "are damaged or diverged in training."
            )
        assert reader.lengths == [read.tokens], f"{reader.lengths} tokens were read, {read.tokens} hashed"
        seen = None if reader.history is None else reader.history.seen.clone()
        return cls(reader.state.fork(), reader.logits.clone(), read, title, seen=seen)

    @classmethod
    def of_answer(cls, model: SambaLM, reader: Reader, last: int, read: TokenHash, title: str = "") -> Snapshot:
        """A copy of where an engine's answer ended (``End.reader``), after its last token (``End.last``) too.

        ``read``: the hash of all its tokens, the last one among them.
        """
        reader = reader.fork()
        advance(model, reader, [last])
        return cls.of(reader, read, title)

    @property
    def tokens(self) -> int:
        """How many were read."""
        return self.read.tokens

    def reader(self) -> Reader:
        """A reader of its own that stands where this snapshot does.

        Penalties see what was read as prompt, if that was noted.
        """
        history = None
        if self.seen is not None:
            history = History(self.seen.clone(), torch.zeros_like(self.seen, dtype=torch.float32))
        return Reader(self.state.fork(), [self.tokens], self.logits, history)

    def nbytes(self) -> int:
        """Bytes held."""
        others = [self.logits] if self.seen is None else [self.logits, self.seen]
        return self.state.nbytes() + sum(t.numel() * t.element_size() for t in others)


def save(path: str | os.PathLike[str], snapshot: Snapshot, model: SambaLM, tokenizer: Tokenizer) -> None:
    """Write a snapshot that this model has made: one file, atomically, for its owner alone (mode 0600).

    Raises UserError when it cannot be written, or when ``path`` is there and is no context.
    """
    info = Info(
        snapshot.title, snapshot.created, snapshot.read, identify(model, tokenizer), snapshot.logits.device.type
    )
    tensors = {
        "cursor.segment": snapshot.state.cursor.segment,
        "cursor.position": snapshot.state.cursor.position,
        "logits": snapshot.logits,
        **({} if snapshot.seen is None else {"seen": snapshot.seen}),
        **{f"layers.{i}.{name}": t for i, layer in enumerate(snapshot.state.layers) for name, t in layer.items()},
    }
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise UserError(f"{name} is {tensor.dtype}, which no file can hold: keep one of {', '.join(_TORCH)}.")
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    file.write(path, info.to_metadata(), [(name, DTYPES[t.dtype], tuple(t.shape), _bytes(t)) for name, t in ordered])


def load(path: str | os.PathLike[str], model: SambaLM, tokenizer: Tokenizer) -> Snapshot:
    """Read a snapshot onto the model's device. The cost depends on the model alone (but with full attention).

    Raises UserError, in one line that names what differs and what to do: for another model, other weights (the first
    time, all of the model's are hashed), another tokenizer, dtype or format, and for a file that is damaged or cut off.
    """
    path = Path(path)
    contents = file.read(path, with_data=True)
    info = info_of(path, contents)
    differs = mismatch(info.made_by, model, tokenizer)
    if differs is not None:
        raise UserError(f"{path} {differs}")
    whole = torch.from_numpy(contents.data).to(model.device)  # once, not tensor by tensor
    try:
        tensors = {
            entry.name: whole[entry.begin : entry.end].view(_TORCH[entry.dtype]).view(entry.shape)
            for entry in contents.entries
        }
        state = _state(tensors, model, info.tokens)
        logits, seen = tensors.pop("logits"), tensors.pop("seen", None)
        expected = {(1, model.config.vocab_size)}
        shapes = {tuple(t.shape) for t in (logits, seen) if t is not None}
        numbers = logits.is_floating_point() and (seen is None or seen.dtype == torch.bool)
        if tensors or shapes != expected or not numbers:
            raise ValueError("other tensors than we write")
    except (KeyError, ValueError, RuntimeError):  # the last is what torch says of shapes and sizes
        raise UserError(
            f"{path} holds a state of another shape than {model.config.name!r} has, so another version of samba-lm "
            "(or of a mixer of your own) made it: read the text again."
        ) from None
    return Snapshot(state, logits, info.read, info.title, info.created, seen)


def _state(tensors: dict[str, Tensor], model: SambaLM, tokens: int) -> State:
    """Take a state's tensors. Raises KeyError, ValueError or RuntimeError when they are not the model's."""
    cursor = Cursor(tensors.pop("cursor.segment"), tensors.pop("cursor.position"))
    if any(t.shape != (1,) or t.dtype != torch.int64 for t in (cursor.segment, cursor.position)):
        raise ValueError("cursor")
    position = int(cursor.position)
    if not 0 < position <= tokens:
        raise ValueError("position")
    layers = []
    for i, module in enumerate(model.layers):
        assert isinstance(module, Layer)
        expected = module.mixer.init_tensors(1, torch.device("meta"), model.dtype)
        layer = {name: tensors.pop(f"layers.{i}.{name}") for name in expected}
        for name, tensor in layer.items():
            shape = list(expected[name].shape)
            if shape[1:2] == [0] and tensor.shape[1]:  # what grows with the text: full attention's keys and values
                shape[1] = max(position, tensor.shape[1])
            if tensor.dtype != expected[name].dtype or list(tensor.shape) != shape:
                raise ValueError(name)
        layers.append(layer)
    return State(cursor, layers)


def _bytes(tensor: Tensor) -> np.ndarray:
    data: np.ndarray = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return data

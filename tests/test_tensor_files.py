"""Tensors in files of pieces: what safetensors reads, the same bytes each time, and damage that is seen."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from samba_lm.tensor_files import DamagedError, Piece, StoppedError, TensorFiles, Written, sha256, write_pieces

TENSORS = {
    "rows": torch.arange(35, dtype=torch.float32).view(7, 5),
    "half": torch.arange(6, dtype=torch.bfloat16),
    "bytes": torch.arange(3, dtype=torch.uint8),
    "number": torch.tensor(3.5),
    "none": torch.zeros(0, 4),
}


def test_a_file_is_what_safetensors_writes(tmp_path: Path) -> None:
    written = write_pieces(tmp_path / "ours", [Piece.whole(name, t) for name, t in TENSORS.items()], {"a": "b"})
    save_file(TENSORS, tmp_path / "theirs", metadata={"a": "b"})
    data = (tmp_path / "ours").read_bytes()
    assert data == (tmp_path / "theirs").read_bytes()
    assert written == Written(len(data), hashlib.sha256(data).hexdigest())
    assert sha256(tmp_path / "ours", from_disk=True) == written.sha256
    files = TensorFiles([tmp_path / "ours"])
    assert files.metadata == {"a": "b"}
    for name, tensor in load_file(tmp_path / "ours").items():
        assert torch.equal(files.read(name), tensor)
        assert (files.shape(name), files.dtype(name)) == (tuple(tensor.shape), tensor.dtype)


def cut(rows: torch.Tensor, begin: int, end: int) -> Piece:
    part = rows[begin:end]
    return Piece("rows", part.dtype, tuple(part.shape), (begin, 0), lambda: part)


@pytest.fixture
def pieces(tmp_path: Path) -> list[Path]:
    """``rows`` in three files (rows 0-2, 3-5 and 6), ``half`` in the first of them alone."""
    rows, paths = TENSORS["rows"], [tmp_path / f"model-{n}.safetensors" for n in range(3)]
    write_pieces(paths[0], [cut(rows, 0, 3), Piece.whole("half", TENSORS["half"])], sharded=True)
    write_pieces(paths[1], [cut(rows, 3, 6)], sharded=True)
    write_pieces(paths[2], [cut(rows, 6, 7)], sharded=True)
    return paths


def test_pieces_are_read_whole_and_in_parts(pieces: list[Path]) -> None:
    files = TensorFiles(pieces)
    assert files.names() == {"rows", "half"}
    assert torch.equal(files.read("rows"), TENSORS["rows"])
    assert torch.equal(files.read("half"), TENSORS["half"])
    for begin, end in ((0, 7), (2, 4), (5, 7), (4, 5)):
        part = torch.full((end - begin, 5), -1.0, dtype=torch.float64)
        files.read_into("rows", part, (begin, 0))
        assert torch.equal(part, TENSORS["rows"][begin:end].double())
    corner = torch.full((3, 2), -1.0)
    files.read_into("rows", corner, (2, 3))
    assert torch.equal(corner, TENSORS["rows"][2:5, 3:5])


def test_what_is_open_outlives_the_files(pieces: list[Path]) -> None:
    files = TensorFiles(pieces)
    for path in pieces:
        path.unlink()
    assert torch.equal(files.read("rows"), TENSORS["rows"])


def test_damage_is_seen(pieces: list[Path], tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match="lacks a part of the tensor rows"):
        TensorFiles([pieces[0], pieces[2]])
    with pytest.raises(DamagedError, match=r"none\.safetensors is missing"):
        TensorFiles([tmp_path / "none.safetensors"])
    pieces[1].write_bytes(pieces[1].read_bytes()[:-1])
    with pytest.raises(DamagedError, match=r"model-1\.safetensors is truncated or damaged"):
        TensorFiles(pieces)
    save_file({"rows": torch.zeros(2, 5)}, tmp_path / "wrong", metadata={"DCP_SHARDING_INFO": '{"rows": 3}'})
    with pytest.raises(DamagedError, match="wrong is truncated or damaged"):
        TensorFiles([tmp_path / "wrong"])


def test_writing_can_be_stopped_and_replaces_nothing(tmp_path: Path) -> None:
    piece = Piece.whole("rows", TENSORS["rows"])
    with pytest.raises(StoppedError):
        write_pieces(tmp_path / "stopped", [piece], stopped=lambda: True)
    write_pieces(tmp_path / "there", [piece])
    with pytest.raises(FileExistsError):
        write_pieces(tmp_path / "there", [piece])

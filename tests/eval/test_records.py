"""Rows of JSON lines, packed or not, and every way in which they are none."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
from pathlib import Path

import pytest

from samba_lm.errors import UserError
from samba_lm.eval.records import read_records

TEXT = '{"a": "ä", "b": [{"c": "d"}]}\n\n{"a": 3}\n'.encode()


PACKERS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".BZ2": bz2.compress}


@pytest.mark.parametrize("ending", PACKERS)
def test_packed_or_not(tmp_path: Path, ending: str) -> None:
    pack = PACKERS[ending]
    path = tmp_path / f"x.jsonl{ending}"
    path.write_bytes(pack(TEXT))
    records = read_records(path)
    assert [record.row for record in records.rows] == [0, 1]
    assert records.rows[1].where == f"{path} line 3"
    assert records.rows[0].text("a") == "ä"
    (inner,) = records.rows[0].inner("b")
    assert (inner.text("c"), inner.where) == ("d", f"{path} line 1, b 1")
    assert records.sha256 == hashlib.sha256(TEXT).hexdigest()
    path.write_bytes(pack(TEXT)[:-6])
    with pytest.raises(UserError, match=r"not a whole|not valid JSON"):
        read_records(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [("x", "no field 'x'"), ("bb", "Did you mean 'b'"), ("n", "field 'n' is 3, not a text"), ("b", "not a text")],
)
def test_fields_that_are_not_there(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "x.jsonl").write_text('{"n": 3, "b": [1], "t": "text"}')
    (record,) = read_records(tmp_path / "x.jsonl").rows
    with pytest.raises(UserError, match=message) as told:
        record.text(name)
    assert "x.jsonl line 1" in str(told.value)
    with pytest.raises(UserError, match="field 't' is \"text\", not a list"):
        record.inner("t")
    with pytest.raises(UserError, match="line 1, b 1 is not a JSON object"):
        record.inner("b")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\n", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"3", "not a JSON object"),
        (b" \n", "no rows"),
    ],
)
def test_what_is_no_row(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_records(tmp_path / "x.jsonl")

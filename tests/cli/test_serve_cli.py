"""What ``samba-lm serve`` says of itself when it starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from serving import Server, make_model, wait_until

import samba_lm
from samba_lm.tokenizer import ByteTokenizer


@pytest.mark.parametrize(
    ("options", "warned"),
    [(("--host", "0.0.0.0"), True), (("--host", "0.0.0.0", "--api-key-file", "keys.txt"), False), ((), False)],
)
def test_without_keys_it_says_who_may_use_it(options: tuple[str, ...], warned: bool, tmp_path: Path) -> None:
    samba_lm.save(make_model(), tmp_path / "tiny", ByteTokenizer())
    (tmp_path / "keys.txt").write_text("a-key-that-is-long-enough\n")
    server = Server(tmp_path / "tiny", *(str(tmp_path / one) if one == "keys.txt" else one for one in options))
    try:
        assert wait_until(lambda: "serving tiny at http://" in "".join(server.log), 30), server.log
        assert any("whoever reaches 0.0.0.0" in line for line in server.log) == warned
    finally:
        server.close()

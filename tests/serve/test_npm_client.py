"""The openai npm package, as its users call it: tests/serve/js/openai.mjs, against a real server."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from serving import Server, wait_until

JS = Path(__file__).parent / "js"


def test_the_npm_client(plain: Server) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    if not (JS / "node_modules" / "openai").is_dir():
        pytest.skip("needs its packages: npm ci --prefix tests/serve/js")
    run = subprocess.run(
        [node, str(JS / "openai.mjs"), plain.url], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout)
    body = {"prompt": "the sea", "max_tokens": 8, "temperature": 0}
    assert seen["completion"] == plain.ask("POST", "/v1/completions", body)[1]["choices"][0]["text"]
    assert seen["usage"] == 15
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "temperature": 0}
    expected = plain.ask("POST", "/v1/chat/completions", body)[1]["choices"][0]["message"]["content"]
    assert seen["chat"]["message"]["content"] == seen["streamed"] == seen["gathered"] == expected
    assert len(seen["chat"]["logprobs"]["content"]) == seen["streamed_usage"] == 8
    assert (seen["error"]["kind"], seen["error"]["status"]) == ("BadRequestError", 400)
    assert "temperature = 9" in seen["error"]["message"]
    assert seen["left_after"] == 5
    assert wait_until(lambda: plain.gauge("samba_running") == 0, 10)

"""The web page in a real browser, on real servers. What is played there stands in js/scenarios.mjs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from serving import KEY, Server

import samba_lm
from samba_lm.config import Mamba, ModelConfig, SwiGLU
from samba_lm.tokenizer import ByteTokenizer

JS = Path(__file__).parent / "js"
PAGE = Path(samba_lm.__file__).parent / "serve" / "page"
SAYS = "<b id=xyz>"
"""No byte comes twice, so that a model that sees one byte of the past can say it; as HTML it would be an element."""
SCENARIOS = re.findall(r'^  "(.+)": \{$', (JS / "scenarios.mjs").read_text(encoding="utf-8"), re.MULTILINE)
Play = Callable[..., None]


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says the same over and over, without end: layers that add nothing, and a table of what follows."""
    layers = (Mamba(), SwiGLU(width=32))
    config = ModelConfig(name="talker", d_model=32, vocab_size=260, layers=layers, tie_embeddings=False)
    model = samba_lm.create(config)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in ("layers.0.mixer.out_proj.weight", "layers.1.mixer.w3.weight", "embedding", "unembedding"):
            parameters[name].zero_()
        parameters["embedding"][:, 0] = 1
        parameters["unembedding"][ord(SAYS[0]), 0] = 100
        for place, (byte, following) in enumerate(zip(SAYS, SAYS[1:] + SAYS[0], strict=True), 1):
            parameters["embedding"][ord(byte)] = torch.eye(32)[place]
            parameters["unembedding"][ord(following), place] = 100
    folder = tmp_path_factory.mktemp("page") / "tiny"
    samba_lm.save(model, folder, ByteTokenizer())
    return folder


@pytest.fixture(scope="module")
def endless(talker: Path) -> Iterator[Server]:
    server = Server(talker, "--max-body", "4", "--slots", "4", "--max-tokens", "100000000")
    yield server
    server.close()
    assert not any("Traceback" in line for line in server.log), "".join(server.log)


@pytest.fixture(scope="module")
def play() -> Iterator[Play]:
    """Plays a scenario, in one browser for all."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium")
    if shutil.which("node") is None:
        pytest.skip("needs Node.js")
    if not (JS / "node_modules" / "playwright-core").is_dir():
        pytest.skip("needs playwright-core: run `npm ci` in tests/serve/js")
    driver = subprocess.Popen(
        ["node", "driver.mjs", browser], cwd=JS, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert driver.stdin is not None
    assert driver.stdout is not None
    given, told = driver.stdin, driver.stdout

    def one(name: str, server: Server, **more: str | int) -> None:
        given.write(json.dumps({"name": name, "url": server.url, **more}) + "\n")
        given.flush()
        answer = told.readline()
        assert answer, f"the driver ended with {driver.wait()}"
        error = json.loads(answer)["error"]
        assert error is None, f"{name}: {error}"

    yield one
    given.close()
    driver.wait(20)
    told.close()


SPECIAL = {"again, edit, copy, export", "the model's text stays text", "an API key", "too busy", "the server is killed"}


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name not in SPECIAL])
def test_page(play: Play, endless: Server, name: str) -> None:
    play(name, endless)


def test_another_answer_is_another(play: Play, plain: Server) -> None:
    play("again, edit, copy, export", plain)


def test_what_the_model_says_is_not_html(play: Play, endless: Server) -> None:
    play("the model's text stays text", endless, says=SAYS)


def test_api_key(play: Play, talker: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(KEY + "\n")
    keys.chmod(0o600)
    server = Server(talker, "--api-key-file", str(keys))
    try:
        play("an API key", server, key=KEY)
    finally:
        server.close()


def test_busy_and_killed(play: Play, talker: Path) -> None:
    server = Server(talker, "--slots", "1", "--queue", "0", "--max-tokens", "100000000")
    try:
        play("too busy", server)
        play("the server is killed", server, pid=server.process.pid)
    finally:
        server.close()


def test_the_files_are_sent_with_a_strict_policy(endless: Server) -> None:
    """Without a key, cached only as long as they are the same; nothing beside them can be had."""
    for file in PAGE.iterdir():
        path = "/" if file.name == "index.html" else f"/page/{file.name}"
        status, headers, text = endless.ask_all("GET", path)
        assert status == 200, path
        assert text == file.read_text(encoding="utf-8")
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert endless.ask_all("GET", path, headers={"If-None-Match": headers["etag"]})[0] == 304
    for path in ("/page/", "/page/index.html", "/page/../webpage.py", "/page/..%2fwebpage.py", "/page/%2e%2e/app.py"):
        assert endless.ask("GET", path)[0] == 404, path
    assert "/" not in endless.ask("GET", "/openapi.json")[1]["paths"]


def test_every_file_is_used_and_none_comes_from_elsewhere() -> None:
    texts = {file.name: file.read_text(encoding="utf-8") for file in PAGE.iterdir()}
    used = {name for text in texts.values() for name in re.findall(r'(?:"page/|"\./)([\w.]+)"', text)}
    assert used == texts.keys() - {"index.html"}
    for name, text in texts.items():
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|\bstyle=", text), name
        assert len(text.splitlines()) <= 400, name

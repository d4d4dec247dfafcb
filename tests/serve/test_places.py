"""Where contexts are kept: what a kill left is cleared, what is deleted is gone, a place that fails is told."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import Server, Start, make_model, wait_until

from samba_lm.contexts.reading import read
from samba_lm.engine.engine import Engine
from samba_lm.errors import UserError
from samba_lm.files import atomic_file, write_text
from samba_lm.serve.auth import Keys
from samba_lm.serve.contexts import Contexts
from samba_lm.serve.errors import ApiError
from samba_lm.serve.places import FolderPlace, Place, UrlPlace
from samba_lm.serve.service import Service
from samba_lm.serve.settings import Settings
from samba_lm.serve.stores import LEFT_SECONDS, FileStore, MemoryStore
from samba_lm.templates import PlainTemplate
from samba_lm.tokenizer import ByteTokenizer
from samba_lm.urls import PlaceError

TOKENIZER = ByteTokenizer()
MOTO = shutil.which("moto_server", path=os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"])))
OWNER = "0123456789abcdef" * 2


def name(letter: str) -> str:
    return "ctx-" + letter * 22


def card(letter: str) -> dict[str, Any]:
    shown = {"object": "context", "title": "", "created": 1, "tokens": 3, "bytes": 3, "token_hash": "f"}
    return {"id": name(letter), **shown}


def open_store(place: str, cache: int = 0) -> FileStore:
    return FileStore(place, make_model(), TOKENIZER, cache)


@pytest.fixture(params=["folder", "file://", "memory://"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "folder":
        return FolderPlace(tmp_path / "at")
    if request.param == "memory://":
        return UrlPlace(f"memory://{tmp_path}")
    return UrlPlace(f"file://{tmp_path}/at")


def test_files_in_a_place(place: Place) -> None:
    assert place.owners() == place.names(OWNER) == []
    assert place.text(OWNER, "a.json") is None
    assert not place.remove(OWNER, "a.json")
    for text in ("one", "two"):
        with place.writing(OWNER, "a.json") as path:
            write_text(path, text)
        with place.writing(OWNER, "b.json") as path, atomic_file(path) as tmp:
            tmp.write_text(text)
            assert place.text(OWNER, "b.json") == (None if text == "one" else "one")
    assert place.remove(OWNER, "b.json")
    with contextlib.suppress(KeyError), place.writing(OWNER, "b.json") as path, atomic_file(path) as tmp:
        tmp.write_text("half")
        raise KeyError("it could not be made")
    assert place.owners() == [OWNER]
    assert place.names(OWNER) == ["a.json"]
    assert place.text(OWNER, "a.json") == "two"
    with place.reading(OWNER, "a.json") as path:
        assert path is not None
        assert path.read_text() == "two"
    with place.reading(OWNER, "b.json") as path:
        assert path is None
    assert not place.remove(OWNER, "a.json", older_than=60)
    assert place.remove(OWNER, "a.json")
    assert place.names(OWNER) == []


@pytest.mark.parametrize("kind", ["folder", "file://"])
def test_what_a_kill_left_is_cleared(tmp_path: Path, kind: str) -> None:
    """Only ours, and only what is too old for anybody to be writing it."""
    where = str(tmp_path) if kind == "folder" else f"file://{tmp_path}"
    store = open_store(where)
    store.put(OWNER, name("a"), card("a"), read(make_model(), TOKENIZER, "abc"))
    left = [
        f"{name('b')}.ctx",  # it was not listed yet, or its deletion was interrupted
        f"{name('c')}.ctx.tmp-x8_f3k2q",
        f"{name('d')}.json.tmp-x8_f3k2q",
        f".{name('e')}.ctx.tmp",
    ]
    foreign = ["notes.txt", "book.ctx", f"{name('f')}.ctx.bak", "x.tmp-abc"]
    for each in (*left, *foreign):
        (tmp_path / OWNER / each).write_text("?")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / left[0]).write_text("?")
    everything = {path for path in tmp_path.rglob("*") if path.is_file()}
    open_store(where)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == everything
    old = time.time() - LEFT_SECONDS - 10
    for path in everything:
        os.utime(path, (old, old))
    open_store(where)
    gone = {str(path.relative_to(tmp_path / OWNER)) for path in everything if not path.exists()}
    assert gone == set(left)
    assert store.cards(OWNER) == [card("a")]
    assert store.get(OWNER, name("a")) is not None


def test_one_deletes_what_another_loads(tmp_path: Path) -> None:
    """It is found whole, or it is not found; nothing else."""
    stores = [open_store(str(tmp_path)) for _ in range(2)]
    snapshot = read(make_model(), TOKENIZER, "abc")
    found: list[bool] = []
    failed: list[BaseException] = []
    going = True

    def load() -> None:
        try:
            while going:
                loaded = stores[1].get(OWNER, name("a"))
                found.append(loaded is not None)
                assert loaded is None or torch.equal(loaded.logits, snapshot.logits)
        except (UserError, AssertionError, PlaceError) as error:
            failed.append(error)

    thread = threading.Thread(target=load)
    thread.start()
    for _ in range(20):
        stores[0].put(OWNER, name("a"), card("a"), snapshot)
        time.sleep(0.002)
        stores[0].delete(OWNER, name("a"))
    going = False
    thread.join()
    assert not failed
    assert set(found) == {True, False}


def test_a_place_that_goes_away_is_told(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "contexts"
    server = start("--contexts", str(folder))
    status, made = server.ask("POST", "/v1/contexts", {"text": "abc"})
    assert status == 200
    shutil.rmtree(folder)
    folder.write_text("a file")
    for method, path, body in (
        ("GET", "/v1/contexts", None),
        ("POST", "/v1/contexts", {"text": "abc"}),
        ("DELETE", f"/v1/contexts/{made['id']}", None),
    ):
        status, answer = server.ask(method, path, body)
        assert status == 503, answer
        assert answer["error"]["code"] == "contexts_unavailable"
        assert str(tmp_path) not in answer["error"]["message"]
    assert any("Not a directory" in line for line in server.log)
    assert server.ask("POST", "/v1/completions", {"prompt": "a", "max_tokens": 1})[0] == 200


def test_a_place_that_does_not_answer_holds_up_nobody_else() -> None:
    class Silent(MemoryStore):
        def cards(self, owner: str) -> list[dict[str, Any]]:
            awake.wait(20)
            return []

    awake = threading.Event()

    async def run(service: Service) -> None:
        contexts = Contexts(service, "anyone")
        waiting = [asyncio.create_task(contexts.list()) for _ in range(30)]
        await asyncio.sleep(0)
        assert await asyncio.wait_for(asyncio.to_thread(lambda: 1), 2) == 1
        for each in waiting:
            with pytest.raises(ApiError, match="does not answer") as refused:
                await each
            assert refused.value.status == 503

    with Engine(make_model(), TOKENIZER, slots=1) as engine:
        settings = Settings("tiny", store_seconds=0.3)
        service = Service(engine, settings, Keys(), PlainTemplate(TOKENIZER), Silent(0))
        try:
            asyncio.run(run(service))
        finally:
            awake.set()


class ObjectStore:
    """A server that speaks S3's protocol, as a process."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        command = [MOTO or "", "-H", "127.0.0.1", "-p", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        assert wait_until(self._make_bucket, 60)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _make_bucket(self) -> bool:
        try:
            with urllib.request.urlopen(urllib.request.Request(f"{self.url}/bucket", method="PUT"), timeout=5) as made:
                return bool(made.status == 200)
        except OSError:
            return False

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    pytest.importorskip("s3fs", reason="needs s3fs")
    if MOTO is None:
        pytest.skip("needs moto's server")
    store = ObjectStore()
    for key, value in {
        "AWS_ENDPOINT_URL": store.url,
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(key, value)
    yield store
    store.close()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the object store's packages
def test_an_object_store(bucket: ObjectStore, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = UrlPlace("s3://bucket/some/contexts")
    test_files_in_a_place(place)
    with pytest.raises(UserError, match="Contexts cannot be kept at s3://nobodys"):
        UrlPlace("s3://nobodys/contexts")
    with pytest.raises(UserError) as refused:
        UrlPlace("s3://user:secret@bucket/contexts")
    assert "secret" not in str(refused.value)
    servers = [Server(checkpoint, "--contexts", "s3://bucket/contexts", environment=dict(os.environ)) for _ in range(2)]
    try:
        _, made = servers[0].ask("POST", "/v1/contexts", {"text": "It was a dark and stormy night."})
        body = {"prompt": "Then", "context_id": made["id"], "max_tokens": 10, "temperature": 0}
        answers = [server.ask("POST", "/v1/completions", body) for server in servers]
        assert [status for status, _ in answers] == [200, 200]
        assert answers[0][1]["choices"] == answers[1][1]["choices"]
        assert [server.ask("GET", "/v1/contexts")[1]["data"] for server in servers] == [[made]] * 2
        assert servers[1].ask("DELETE", f"/v1/contexts/{made['id']}")[0] == 200
        assert [server.ask("POST", "/v1/completions", body)[0] for server in servers] == [404, 404]
        # The object store goes away.
        _, made = servers[0].ask("POST", "/v1/contexts", {"text": "abc"})
        bucket.close()
        for server, path in ((servers[1], f"/v1/contexts/{made['id']}"), (servers[0], "/v1/contexts")):
            began = time.monotonic()
            status, answer = server.ask("GET", path)
            assert (status, answer["error"]["code"]) == (503, "contexts_unavailable")
            assert time.monotonic() - began < 70
            assert server.ask("POST", "/v1/completions", {"prompt": "a", "max_tokens": 1})[0] == 200
    finally:
        for server in servers:
            server.close()

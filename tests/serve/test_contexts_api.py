"""Contexts over HTTP: read once, gone on from, kept in memory, in a folder that replicas share, and at a URL."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import Server, Start, make_model, wait_until

import samba_lm
from samba_lm.contexts.reading import read
from samba_lm.errors import UserError
from samba_lm.serve.stores import FileStore, MemoryStore, Store
from samba_lm.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
BOOK = "It was a dark and stormy night; the rain fell in torrents. " * 40
NAME = "ctx-" + "a" * 22
CARD = {"id": NAME, "object": "context", "title": "", "created": 1, "tokens": 2, "bytes": 3, "token_hash": "f"}


def make(server: Server, **body: Any) -> Any:
    status, answer = server.ask("POST", "/v1/contexts", body)
    assert status == 200, answer
    return answer


def test_a_context_is_gone_on_from(plain: Server) -> None:
    made = make(plain, text=BOOK, title="A book")
    assert made["id"].startswith("ctx-")
    assert (made["title"], made["tokens"], made["object"]) == ("A book", len(BOOK), "context")
    expected = samba_lm.generate(make_model(), TOKENIZER, BOOK + "Then", max_tokens=10, temperature=0)
    body = {"prompt": "Then", "context_id": made["id"], "max_tokens": 10, "temperature": 0}
    for _ in range(2):
        _, answer = plain.ask("POST", "/v1/completions", body)
        assert answer["choices"][0]["text"] == expected
        assert answer["usage"]["prompt_tokens"] == len(BOOK) + 4
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == len(BOOK)
    assert plain.ask("POST", "/v1/completions", body | {"prompt": ""})[0] == 200
    chat = {"messages": [{"role": "user", "content": "Who?"}], "context_id": made["id"], "max_tokens": 3}
    _, answer = plain.ask("POST", "/v1/chat/completions", chat | {"repetition_penalty": 1.2})
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == len(BOOK)


def test_every_way_to_make_one_reads_the_same(plain: Server) -> None:
    first = make(plain, text=BOOK)
    ids = TOKENIZER.encode(BOOK).tolist()
    upload = plain.ask(
        "POST", "/v1/contexts?title=Upload", BOOK.encode(), {"Content-Type": "application/octet-stream"}
    )[1]
    half = make(plain, text=BOOK[:1000])
    rest = make(plain, text=BOOK[1000:], context_id=half["id"])
    hashes = {one["token_hash"] for one in (first, make(plain, tokens=ids), upload, rest)}
    assert len(hashes) == 1
    assert upload["title"] == "Upload"
    assert read(make_model(), TOKENIZER, BOOK).read.hexdigest() in hashes


def test_progress_is_told(plain: Server) -> None:
    _, text = plain.ask("POST", "/v1/contexts", {"text": BOOK * 5, "stream": True})
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    told = [json.loads(event) for event in events]
    assert told.pop()["object"] == "context"
    assert told[-1] == {"object": "context.progress", "read": len(BOOK) * 5, "total": len(BOOK) * 5}
    assert [one["read"] for one in told] == sorted({one["read"] for one in told})
    assert len(told) > 3


def test_fork_show_list_delete(plain: Server) -> None:
    made = make(plain, text="abc", title="one")
    path = f"/v1/contexts/{made['id']}"
    _, fork = plain.ask("POST", f"{path}/fork", {"title": "two"})
    assert (fork["title"], fork["token_hash"]) == ("two", made["token_hash"])
    assert fork["id"] != made["id"]
    assert plain.ask("GET", path) == (200, made)
    assert plain.ask("DELETE", path) == (200, {"id": made["id"], "object": "context.deleted", "deleted": True})
    for method, where in (("GET", path), ("DELETE", path), ("POST", f"{path}/fork")):
        assert plain.ask(method, where, {} if method == "POST" else None)[0] == 404
    listed = [one["id"] for one in plain.ask("GET", "/v1/contexts")[1]["data"]]
    assert fork["id"] in listed
    assert made["id"] not in listed


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "either text or tokens"),
        ({"text": "a", "tokens": [1]}, "either text or tokens"),
        ({"text": ""}, "empty"),
        ({"text": "\ud800"}, "JSON"),
        ({"text": "a", "title": "two\nlines"}, "title"),
        ({"text": "a", "title": "x" * 201}, "title"),
        ({"tokens": [257, 260]}, "Token id 260"),
        ({"text": "a", "context_id": "../x"}, "context_id"),
        ({"text": "a", "context_id": NAME}, "no context"),
    ],
)
def test_what_is_refused(plain: Server, body: dict[str, Any], message: str) -> None:
    status, answer = plain.ask("POST", "/v1/contexts", body)
    assert status in (400, 404)
    assert message in answer["error"]["message"]
    assert plain.ask("POST", "/v1/contexts", b"\xff", {"Content-Type": "application/octet-stream"})[0] == 400


def test_replicas_share_a_folder_and_a_kill_leaves_nothing_half_written(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "contexts"
    servers = [start("--contexts", str(folder)) for _ in range(2)]
    body = {"prompt": "Then", "max_tokens": 10, "temperature": 0}
    made = make(servers[0], text=BOOK)
    answers = [server.ask("POST", "/v1/completions", body | {"context_id": made["id"]})[1] for server in servers]
    assert answers[0]["choices"] == answers[1]["choices"]
    # One is killed while it writes many.
    killed, left = servers

    def make_many() -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            while True:
                make(killed, text="abc")

    writer = threading.Thread(target=make_many)
    writer.start()
    assert wait_until(lambda: len(list(folder.rglob("*.json"))) > 20, 20)
    killed.process.send_signal(signal.SIGKILL)
    killed.process.wait()
    writer.join()
    listed = left.ask("GET", "/v1/contexts")[1]["data"]
    assert len(listed) > 20
    for one in listed:
        assert left.ask("POST", "/v1/completions", body | {"context_id": one["id"]})[0] == 200
    # A damaged one is told, not used.
    file = next(folder.glob(f"*/{listed[0]['id']}.ctx"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    again = start("--contexts", str(folder))
    status, answer = again.ask("POST", "/v1/completions", body | {"context_id": listed[0]["id"]})
    assert status == 400
    assert "damaged" in answer["error"]["message"]
    assert str(tmp_path) not in answer["error"]["message"]


@pytest.mark.parametrize("kind", ["memory", "folder", "url"])
def test_stores(tmp_path: Path, kind: str) -> None:
    model = make_model()
    snapshot = read(model, TOKENIZER, "abc", "title")
    places = {"folder": str(tmp_path / "new" / "folder"), "url": f"file://{tmp_path}/at"}

    def open_store() -> Store:
        return MemoryStore(1 << 20) if kind == "memory" else FileStore(places[kind], model, TOKENIZER, 1 << 20)

    store = open_store()
    assert store.cards("ann") == []
    assert store.get("ann", NAME) is None
    assert not store.delete("ann", NAME)
    store.put("ann", NAME, CARD, snapshot)
    for each in (store,) if kind == "memory" else (store, open_store()):
        assert each.cards("ann") == [CARD]
        assert each.card("ann", NAME) == CARD
        assert each.cards("bob") == []
        assert each.get("bob", NAME) is None
        found = each.get("ann", NAME)
        assert found is not None
        assert torch.equal(found.logits, snapshot.logits)
        assert found.read == snapshot.read
    assert store.delete("ann", NAME)
    assert store.get("ann", NAME) is None
    assert store.cards("ann") == []
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("place", ["nonsense://x", "/proc/nowhere"])
def test_places_that_do_not_work(place: str) -> None:
    with pytest.raises(UserError, match="Contexts cannot be kept"):
        FileStore(place, make_model(), TOKENIZER, 0)


def test_memory_for_contexts_is_limited(start: Start) -> None:
    server = start("--context-memory", "0")
    status, answer = server.ask("POST", "/v1/contexts", {"text": "abc"})
    assert (status, answer["error"]["code"]) == (400, "too_many_contexts")


def test_a_reading_stops_when_its_client_leaves(plain: Server) -> None:
    with plain.connect() as connection:
        body = json.dumps({"text": "a" * 3_000_000}).encode()
        head = "POST /v1/contexts HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert wait_until(lambda: plain.gauge("samba_reading") == 1, 10)
    assert wait_until(lambda: plain.gauge("samba_reading") == 0, 10)


def test_what_somebody_else_put_there_is_no_context(tmp_path: Path) -> None:
    """Not ours, or damaged: it is left out of the list, and nothing else fails for it."""
    store = FileStore(str(tmp_path), make_model(), TOKENIZER, 0)
    snapshot = read(make_model(), TOKENIZER, BOOK)
    store.put("me", NAME, CARD, snapshot)
    folder = next(path.parent for path in tmp_path.rglob(f"{NAME}.json"))
    bad = {
        "b": json.dumps({"id": "ctx-" + "b" * 22}),
        "c": json.dumps(CARD | {"id": "ctx-" + "c" * 22, "tokens": "many"}),
        "d": "[" * 200_000,
        "e": "",
        "f": json.dumps(CARD),  # another's id
    }
    for letter, text in bad.items():
        (folder / f"ctx-{letter * 22}.json").write_text(text)
    (folder / f"ctx-{'g' * 22}.json").write_bytes(b"\xff\xfe")
    (folder / f"ctx-{'h' * 22}.json").mkdir()
    (folder / f"ctx-{'i' * 22}.json").symlink_to(folder / f"ctx-{'i' * 22}.json")
    assert [one["id"] for one in store.cards("me")] == [NAME]
    assert all(store.card("me", "ctx-" + letter * 22) is None for letter in "bcdefghi")
    assert store.card("me", NAME) == CARD

"""``/v1/contexts``: texts that are read once, to be gone on from by any number of requests."""

from __future__ import annotations

import asyncio
import datetime
import logging
import secrets
from collections.abc import AsyncGenerator
from dataclasses import dataclass

import numpy as np
import torch

from samba_lm.contexts.reading import NOTING
from samba_lm.contexts.snapshot import Snapshot
from samba_lm.contexts.token_hash import TokenHash
from samba_lm.engine.request import End, Progress, Request
from samba_lm.errors import UserError
from samba_lm.generation.prefill import Reader
from samba_lm.generation.prompt import TokenIds, encode_pieces
from samba_lm.generation.sampling import History
from samba_lm.serve import models, sse
from samba_lm.serve.answers import reason
from samba_lm.serve.errors import ApiError
from samba_lm.serve.jobs import Job
from samba_lm.serve.service import Service
from samba_lm.serve.stores import NAME, FullError
from samba_lm.tokenizer import Tokenizer

PIECE = 1 << 16
"""Characters of a long text that are turned into tokens at once."""


@dataclass(frozen=True)
class Context:
    """A context in use."""

    id: str
    snapshot: Snapshot

    @property
    def tokens(self) -> int:
        return self.snapshot.tokens

    def reader(self) -> Reader:
        """Where to begin; the engine copies it."""
        history = None
        if self.snapshot.seen is not None:
            history = History(self.snapshot.seen, torch.zeros_like(self.snapshot.seen, dtype=torch.float32))
        return Reader(self.snapshot.state, [self.snapshot.tokens], self.snapshot.logits, history)


class Contexts:
    """One client's contexts."""

    def __init__(self, service: Service, owner: str) -> None:
        self._store, self._stored, self._owner = service.store, service.stored, owner
        self._most = service.settings.max_contexts

    async def get(self, name: str | None) -> Context | None:
        """The context of a request that names one. Raises ApiError (404) where there is none."""
        if name is None:
            return None
        _check(name)
        snapshot = await self._stored(self._store.get, self._owner, name)
        if snapshot is None:
            raise _absent(name)
        return Context(name, snapshot)

    async def show(self, name: str) -> models.Context:
        _check(name)
        card = await self._stored(self._store.card, self._owner, name)
        if card is None:
            raise _absent(name)
        return models.Context.model_validate(card)

    async def list(self) -> models.ContextList:
        """The newest first."""
        cards = await self._stored(self._store.cards, self._owner)
        found = [models.Context.model_validate(card) for card in cards]
        return models.ContextList(data=sorted(found, key=lambda one: (-one.created, one.id)))

    async def delete(self, name: str) -> models.ContextDeleted:
        _check(name)
        if not await self._stored(self._store.delete, self._owner, name):
            raise _absent(name)
        return models.ContextDeleted(id=name)

    async def fork(self, name: str, title: str | None) -> models.Context:
        """The same under another id, so that one may be deleted and the other kept."""
        context = await self.get(name)
        assert context is not None
        old = context.snapshot
        made = Snapshot(old.state, old.logits, old.read, old.title if title is None else title, seen=old.seen)
        return await self.add(made)

    async def add(self, snapshot: Snapshot) -> models.Context:
        """Keep one."""
        await self.check_room()
        name = "ctx-" + secrets.token_urlsafe(16)
        created = int(datetime.datetime.fromisoformat(snapshot.created).timestamp())
        shown = models.Context(
            id=name,
            title=snapshot.title,
            created=created,
            tokens=snapshot.tokens,
            bytes=snapshot.nbytes(),
            token_hash=snapshot.read.hexdigest(),
        )
        try:
            await self._stored(self._store.put, self._owner, name, shown.model_dump(), snapshot)
        except FullError as error:
            raise ApiError(400, str(error), code="too_many_contexts") from None
        except UserError as error:
            logging.getLogger("samba_lm.serve").error("a context could not be kept: %s", error)
            raise ApiError(503, "The server could not keep the context; its log says why.") from None
        return shown

    async def check_room(self) -> None:
        """Raise ApiError where the client has too many."""
        if await self._stored(self._store.count, self._owner) >= self._most:
            raise ApiError(
                400,
                f"There are {self._most} contexts already, this server's limit: delete some.",
                code="too_many_contexts",
            )


class Reading:
    """A text on its way to become a context. Made, it is in the engine's queue; raises what refuses it."""

    def __init__(
        self, service: Service, contexts: Contexts, tokens: list[TokenIds], title: str, after: Context | None
    ) -> None:
        self._total = sum(chunk.size for chunk in tokens)
        if not self._total:
            raise ApiError(400, "The text is empty: there is nothing to read.", param="text")
        self._service, self._contexts, self._tokens, self._title, self._after = service, contexts, tokens, title, after
        begin = None if after is None else after.reader()
        request = Request(tokens, NOTING.replace(max_tokens=0), begin, keep=True)
        self._job = Job(service.bridge, [request])

    async def whole(self) -> models.Context:
        """The context, when it is read and kept."""
        async for piece in self.steps():
            if isinstance(piece, models.Context):
                return piece
        raise AssertionError("a reading ends with its context")

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """How far it is, and then the context, as events."""
        async for piece in self.steps():
            yield sse.KEEP_ALIVE if piece is None else sse.data(piece.model_dump())
        yield sse.DONE

    async def steps(self) -> AsyncGenerator[models.ContextProgress | models.Context | None, None]:
        reader = None
        async for batch in self._job.events(self._service.settings.keep_alive_seconds):
            if not batch:
                yield None
            read = [event.read for _, event in batch if isinstance(event, Progress)]
            if read:
                yield models.ContextProgress(read=read[-1], total=self._total)
            for _, event in batch:
                if isinstance(event, End):
                    reason(event)
                    reader = event.reader
        assert reader is not None
        yield await self._contexts.add(await asyncio.to_thread(self._snapshot, reader))

    def close(self) -> None:
        """Cancel what still runs."""
        self._job.close()

    @torch.inference_mode()
    def _snapshot(self, reader: Reader) -> Snapshot:
        read = TokenHash() if self._after is None else self._after.snapshot.read
        for chunk in self._tokens:
            read = read.add(chunk)
        return Snapshot.of(reader, read, self._title)


def encode_long(tokenizer: Tokenizer, text: str) -> list[TokenIds]:
    """The tokens of a long text, in pieces, so that no other thread waits long."""
    pieces = (text[begin : begin + PIECE] for begin in range(0, len(text), PIECE))
    return [ids.astype(np.int64) for ids in encode_pieces(pieces, tokenizer)]


def _check(name: str) -> None:
    if not NAME.fullmatch(name):
        raise _absent(name)


def _absent(name: str) -> ApiError:
    return ApiError(
        404,
        f"There is no context {name[:64]!r}: GET /v1/contexts lists those there are.",
        param="context_id",
        code="context_not_found",
    )

"""What all endpoints share: the engine, the limits, and the words for tokens."""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import numpy as np

from samba_lm.engine.engine import Engine
from samba_lm.generation.params import SamplingParams
from samba_lm.generation.prefill import check_ids
from samba_lm.generation.prompt import TokenIds
from samba_lm.serve.auth import Keys
from samba_lm.serve.errors import ApiError
from samba_lm.serve.jobs import Bridge
from samba_lm.serve.metrics import Metrics
from samba_lm.serve.models import Sampling, Usage
from samba_lm.serve.settings import Settings
from samba_lm.serve.stores import Store
from samba_lm.serve.turns import Turns
from samba_lm.serve.words import Words
from samba_lm.templates import Template
from samba_lm.urls import PlaceError

P = ParamSpec("P")
T = TypeVar("T")
STORING = 16
"""Threads for contexts."""


class Service:
    """One server's parts.

    Attributes:
        draining: the server is shutting down, and refuses new work.
        active: requests that are being worked on.
        arriving: what gives up the bodies that have not come whole, see :meth:`stop`.
    """

    def __init__(self, engine: Engine, settings: Settings, keys: Keys, template: Template, store: Store) -> None:
        self.engine, self.settings, self.keys, self.template, self.store = engine, settings, keys, template, store
        self.metrics = Metrics(engine)
        self.words = Words(engine.tokenizer)
        self.bridge = Bridge(engine, self.metrics)
        self.turns = Turns(settings.cache_bytes)
        self.started = int(time.time())
        self.draining = False
        self.active = 0
        self.arriving: set[Callable[[], None]] = set()
        self._storing = ThreadPoolExecutor(STORING, "samba-lm contexts")

    def stop(self) -> None:
        """Tell all that still runs or arrives that the server is shutting down."""
        self.bridge.stop_all()
        for give_up in list(self.arriving):
            give_up()

    def close(self) -> None:
        """End what still runs, and the engine."""
        self.engine.close()
        self._storing.shutdown(wait=False, cancel_futures=True)

    async def stored(self, work: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Do work with the place where contexts are kept, in one of the threads that do nothing else: a place that
        does not answer holds up nobody who does not need it. Raises ApiError (503) where it fails or takes too long.
        """
        call = functools.partial(work, *args, **options)
        waiting = asyncio.get_running_loop().run_in_executor(self._storing, call)
        try:
            async with asyncio.timeout(self.settings.store_seconds):
                return await waiting
        except TimeoutError:
            why = f"no answer within {self.settings.store_seconds:g} seconds"
        except (PlaceError, OSError) as error:
            why = str(error)
        logging.getLogger("samba_lm.serve").error("the place where contexts are kept fails: %s", why)
        raise ApiError(
            503,
            "The place where this server keeps contexts does not answer; the server's log says why. Try again later.",
            code="contexts_unavailable",
        )

    def check_model(self, name: str | None) -> None:
        """Raise ApiError for another model's name."""
        if name is not None and name != self.settings.model_name:
            raise ApiError(
                404,
                f"There is no model {name[:100]!r}: this server has {self.settings.model_name!r}.",
                param="model",
                code="model_not_found",
            )

    def token_ids(self, ids: list[int]) -> TokenIds:
        """Token ids that a client gave. Raises UserError for one that the model does not know, and ApiError for one
        that it could read but that stands for nothing: models have more rows than their tokenizers tokens."""
        array = np.array(ids, dtype=np.int64)
        check_ids(array, self.engine.model.config.vocab_size, 0)
        known = self.engine.tokenizer.vocab_size
        for position in np.flatnonzero(array >= known)[:1].tolist():
            raise ApiError(
                400,
                f"Token id {ids[position]} at position {position} is no token of the model's tokenizer, which has "
                f"{known} (0 to {known - 1}).",
                param="prompt",
            )
        return array

    def check_length(self, tokens: TokenIds) -> None:
        """Raise ApiError for a prompt above the limit."""
        most = self.settings.max_prompt_tokens
        if tokens.size > most:
            raise ApiError(
                400,
                f"The prompt has {tokens.size:,} tokens, the limit is {most:,}: shorten it, or make a context of it "
                "(POST /v1/contexts).",
                param="prompt",
                code="context_length_exceeded",
            )

    def params(self, request: Sampling, max_tokens: int | None, default: int) -> SamplingParams:
        """How a request wants its texts. Raises ApiError for more than is allowed."""
        most = self.settings.max_tokens
        if max_tokens is None:
            max_tokens = min(default, most)
        if max_tokens > most:
            raise ApiError(400, f"max_tokens={max_tokens} is above this server's limit of {most}.", param="max_tokens")
        copies = request.n or 1
        if copies > self.settings.max_choices:
            raise ApiError(400, f"n={copies} is above this server's limit of {self.settings.max_choices}.", param="n")
        given = {
            name: value
            for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
                         "frequency_penalty")
            if (value := getattr(request, name)) is not None
        }  # fmt: skip
        stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
        seed = secrets.randbits(63) if request.seed is None else request.seed
        bias = tuple((int(token_id), value) for token_id, value in (request.logit_bias or {}).items())
        return SamplingParams(
            max_tokens=max_tokens,
            stop=stop,
            seed=seed % 2**64,
            logit_bias=bias,
            stop_at_eos=not request.ignore_eos,
            **given,
        )

    def usage(self, prompt: int, made: int, cached: int) -> Usage:
        details = {"cached_tokens": cached}
        return Usage.model_validate(
            {
                "prompt_tokens": prompt,
                "completion_tokens": made,
                "total_tokens": prompt + made,
                "prompt_tokens_details": details,
            }
        )

"""What the server counts, for Prometheus."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from samba_lm.engine.engine import Engine
from samba_lm.engine.request import End, Event, Piece

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counters of one server."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("samba_requests", "HTTP requests answered", ("path", "status"), registry=self.registry)
        self.prompt_tokens = Counter("samba_prompt_tokens", "Prompt tokens read", registry=self.registry)
        self.cached_tokens = Counter(
            "samba_cached_tokens", "Prompt tokens that a context or an earlier turn had read", registry=self.registry
        )
        self.new_tokens = Counter("samba_generated_tokens", "Tokens made", registry=self.registry)
        self.sequences = Counter("samba_sequences", "Texts that ended, and how", ("finish",), registry=self.registry)
        self.first = Histogram(
            "samba_time_to_first_token_seconds",
            "From the request to its first token",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.between = Histogram(
            "samba_time_between_tokens_seconds",
            "Between two tokens of one text, where they are made",
            buckets=SECONDS,
            registry=self.registry,
        )
        for name, text in (
            ("waiting", "Texts that wait for a slot"),
            ("reading", "Texts whose prompts are being read"),
            ("running", "Texts that are being continued"),
        ):
            gauge = Gauge(f"samba_{name}", text, registry=self.registry)
            gauge.set_function(lambda name=name: engine.counts()[name])  # type: ignore[misc]
        slots = Gauge("samba_slots", "Texts that may be continued at once", registry=self.registry)
        slots.set(engine.slots.capacity)
        memory = Gauge("samba_slots_bytes", "Memory of the slots' states", registry=self.registry)
        memory.set_function(engine.slots.nbytes)

    def note(self, event: Event, times: list[float]) -> None:
        """Count an event of one text. ``times``: when it was asked for, and its last token was made; kept here."""
        if isinstance(event, Piece):
            now = time.perf_counter()
            asked, last = times
            if last:
                self.between.observe(now - last)
            else:
                self.first.observe(now - asked)
            times[1] = now
        elif isinstance(event, End):
            self.prompt_tokens.inc(event.prompt_tokens)
            self.new_tokens.inc(event.new_tokens)
            self.sequences.labels(event.finish).inc()

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self.registry)

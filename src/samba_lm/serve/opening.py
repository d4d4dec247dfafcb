"""From a checkpoint that was loaded to a service: the engine, the place for contexts, the chat template."""

from __future__ import annotations

from pathlib import Path

from samba_lm.checkpoint import latest_step
from samba_lm.engine.engine import Engine
from samba_lm.model import SambaLM
from samba_lm.serve.auth import Keys
from samba_lm.serve.service import Service
from samba_lm.serve.settings import Settings
from samba_lm.serve.stores import FileStore, MemoryStore, Store
from samba_lm.templates import find_template
from samba_lm.tokenizer import Tokenizer


def open_service(model: SambaLM, tokenizer: Tokenizer, checkpoint: Path, settings: Settings, keys: Keys) -> Service:
    """A service whose engine runs; :meth:`Service.close` ends it.

    ``checkpoint``: where the model came from, as the chat template may lie there.

    Raises UserError for a template or a place for contexts that cannot be used.
    """
    template = find_template(latest_step(checkpoint) or checkpoint, tokenizer)
    if settings.contexts is None:
        store: Store = MemoryStore(settings.context_bytes)
    else:
        store = FileStore(settings.contexts, model, tokenizer, settings.cache_bytes)
    engine = Engine(
        model,
        tokenizer,
        slots=settings.slots,
        queue_limit=settings.queue,
        batch_invariant=settings.batch_invariant,
    )
    return Service(engine, settings, keys, template, store)

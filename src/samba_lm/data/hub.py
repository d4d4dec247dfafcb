"""Documents from a data set of the Hugging Face hub, or any that its package `datasets` reads, as a stream.

Nothing is stored: rows come over the network as they are read, from the beginning, and no more of them than are asked
for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeGuard, TypeVar

from samba_lm.data.sources import Piece, ReadOptions, pieces
from samba_lm.errors import UserError, did_you_mean, one_line

T = TypeVar("T")

PREFIX = "hf:"


@dataclass(frozen=True)
class HubStream:
    """One split of a data set.

    Attributes:
        name: of the data set (``user/name``), or a folder of files that `datasets` reads.
        config: which of its configurations; None: the only one.
        split: such as "train".
        take: how many rows, the first ones; None: all.
        words: what was written after the name, where it is still to be found out what it means.
    """

    name: str
    config: str | None = None
    split: str = "train"
    take: int | None = None
    words: str | None = None

    def __str__(self) -> str:
        words = [self.words] if self.words else [*([self.config] if self.config else []), self.split]
        return PREFIX + ":".join([self.name, *words])

    @property
    def size(self) -> None:
        """Bytes of a stream are known when it has been read."""
        return

    def read(self, options: ReadOptions) -> Iterator[Piece]:
        """Yield its documents, one a row, piece by piece; null is an empty one.

        Raises:
            UserError: the package, the data set, its configuration, split or column is missing, or the network fails.
        """
        rows = self._rows(options.field)
        position = number = 0
        while True:
            row = self._told(lambda: next(rows, None))
            if row is None:
                if not number:
                    raise UserError(f"{self} has no rows: take another split.")
                return
            number += 1
            if options.field not in row:
                raise UserError(f"{self} row {number} has no field {options.field!r}.{_known(options.field, row)}")
            text = row[options.field]
            if text is not None and not isinstance(text, str):
                raise UserError(f"{self} row {number}: field {options.field!r} is {str(text)[:40]!r}, not a text.")
            position += len((text or "").encode())
            yield from pieces(text or "", position)

    def _rows(self, field: str) -> Iterator[dict[str, Any]]:
        try:
            import datasets
        except ImportError as error:
            raise UserError(f'{self} needs datasets to be read: pip install "samba-lm[datasets]".') from error
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is raised, and told once
        stream = self
        if self.words:
            # One word may be either; a configuration goes first.
            configs = self._told(lambda: datasets.get_dataset_config_names(self.name))
            config, split = (self.words, self.split) if self.words in configs else (None, self.words)
            stream = replace(self, words=None, config=config, split=split)
        rows = self._told(lambda: datasets.load_dataset(stream.name, stream.config, split=stream.split, streaming=True))
        columns = rows.column_names
        if columns is not None:  # not known of some files before they are read
            if field not in columns:
                raise UserError(f"{self} has no column {field!r}: name the text's column.{_known(field, columns)}")
            rows = rows.select_columns([field])
        return iter(rows if self.take is None else rows.take(self.take))

    def _told(self, task: Callable[[], T]) -> T:
        """What ``task`` gives; raises UserError: `datasets` and what it reads with raise errors of all kinds."""
        try:
            return task()
        except Exception as error:
            told = one_line(str(error)).rstrip(".") or type(error).__name__
            raise UserError(
                f"{self} cannot be read ({told}): check its name, configuration and split (hf:NAME:CONFIG:SPLIT), the "
                "network, and HF_TOKEN where it is not public."
            ) from error


def is_hub(given: str | os.PathLike[str]) -> TypeGuard[str]:
    """Whether an input names a data set to stream."""
    return isinstance(given, str) and given.startswith(PREFIX)


def parse_stream(given: str, take: int | None = None) -> HubStream:
    """Read ``hf:NAME[:CONFIG][:SPLIT]``. Raises UserError for anything else."""
    name, *words = given.removeprefix(PREFIX).split(":")
    if not name or len(words) > 2 or not all(words):
        raise UserError(f"{given!r} names no data set: write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT.")
    if take is not None and take < 1:
        raise UserError(f"take is {take}: it must be at least 1.")
    if len(words) == 2:
        return HubStream(name, config=words[0], split=words[1], take=take)
    return HubStream(name, take=take, words=words[0] if words else None)


def _known(field: str, names: Collection[str]) -> str:
    return did_you_mean(field, names) + " Use --field NAME."

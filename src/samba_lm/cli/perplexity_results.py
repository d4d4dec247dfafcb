"""The results of `eval perplexity` on disk: what was measured of each model at each length."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samba_lm.cli.results import Model, Results
from samba_lm.eval.protocols import MEANING, Settings

if TYPE_CHECKING:
    from samba_lm.eval.perplexity import LengthResult

MOST_MEANS = 2000
"""Windows whose own means are written; of more, only the mean of all."""


@dataclass(frozen=True)
class Measured:
    """What was measured at a length; where each window is a document's beginning, the names of these documents."""

    result: LengthResult
    documents: tuple[str, ...] = ()


class PerplexityResults(Results[Measured]):
    """The lengths of several models; see :class:`Results`."""

    task = "perplexity"
    items = "results"

    def __init__(self, path: Path | None, settings: Settings, data_sha256: str, data: Mapping[str, object]) -> None:
        self.lengths = settings.lengths
        facts = {"task": self.task, **settings.facts(), "data_sha256": data_sha256}
        super().__init__(path, facts, {"meaning": MEANING[settings.protocol], "data": data})

    def of(self, model: Model) -> list[Measured]:
        """What was measured of a model at the lengths of the settings, rising."""
        return [item for item in super().of(model) if item.result.length in self.lengths]

    def key(self, item: Measured) -> Hashable:
        return item.result.length

    def order(self, item: Measured) -> Any:
        return item.result.length

    def row(self, item: Measured) -> dict[str, object]:
        means = [round(mean, 7) for mean in item.result.means]
        row = self.csv_row(item)
        if len(means) > MOST_MEANS:
            return row
        if not item.documents:
            return {**row, "means": means}
        by_document = [{"document": name, "loss": mean} for name, mean in zip(item.documents, means, strict=True)]
        return {**row, "by_document": by_document}

    def item(self, row: Any) -> Measured | None:
        from samba_lm.eval.perplexity import LengthResult

        if row["skipped"]:  # that may have changed
            return None
        by_document = row.get("by_document", [])
        result = LengthResult(
            length=int(row["length"]),
            positions=(int(row["from"]), int(row["to"])),
            windows=int(row["windows"]),
            tokens=int(row["tokens"]),
            loss=_number(row["loss"]),
            standard_error=_number(row["standard_error"]),
            # A loss too large for exp is an infinite perplexity, for which JSON has no word.
            perplexity=math.inf
            if row["perplexity"] is None and row["loss"] is not None
            else _number(row["perplexity"]),
            bits_per_byte=None if row["bits_per_byte"] is None else float(row["bits_per_byte"]),
            note=str(row["note"]),
            means=tuple(map(_number, row.get("means", [each["loss"] for each in by_document]))),
            seconds=float(row["seconds"]),
        )
        return Measured(result, tuple(str(each["document"]) for each in by_document))

    def csv_row(self, item: Measured) -> dict[str, object]:
        result = item.result
        (low, high), (loss_low, loss_high) = result.interval, result.loss_interval
        bits_low, bits_high = result.bits_interval
        return {
            "length": result.length,
            "from": result.positions[0],
            "to": result.positions[1],
            "windows": result.windows,
            "tokens": result.tokens,
            "perplexity": result.perplexity,
            "low": low,
            "high": high,
            "loss": result.loss,
            "loss_low": loss_low,
            "loss_high": loss_high,
            "standard_error": result.standard_error,
            "bits_per_byte": result.bits_per_byte,
            "bits_low": bits_low,
            "bits_high": bits_high,
            "seconds": round(result.seconds, 3),
            "note": result.note if result.windows else "",
            "skipped": "" if result.windows else result.note,
        }


def _number(value: float | None) -> float:
    """What JSON's null stands for, too."""
    return math.nan if value is None else float(value)

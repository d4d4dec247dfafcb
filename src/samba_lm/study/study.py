"""A study as data: which recipes are trained, at which learning rates, and what is measured. Imports no torch."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from samba_lm.data.shards import TokenDataset, open_splits
from samba_lm.errors import UserError, did_you_mean
from samba_lm.eval.protocols import OF_DOCUMENTS, Documents, Protocol, Settings
from samba_lm.train.recipe import PathText, Recipe, Section, read_toml
from samba_lm.validation import explain

FILE = "study.toml"


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]{0,99}", text, re.ASCII):
        raise ValueError("a name has letters, digits and . _ + - only, at most 100, and begins with a letter or digit")
    return text


Name = Annotated[str, AfterValidator(_name)]
"""What may name a folder."""
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0, lt=2**32)], ...], Field(strict=False, min_length=1)]


class Sweep(Section):
    """Short trainings at several learning rates; the one of the lowest validation loss is taken for the whole ones."""

    lrs: Annotated[tuple[Rate, ...], Field(strict=False, min_length=2)]
    """Peak learning rates."""
    budget: float = Field(default=0.25, gt=0, le=1)
    """Steps of such a training, as a share of the recipe's."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    extend: int = Field(default=0, ge=0, le=8)
    """How many rates more are tried, one after the other, while the best is the lowest or the highest that was."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len({f"{lr:g}" for lr in self.lrs}) < len(self.lrs):
            raise ValueError(f"lrs = {list(self.lrs)}: two of them are the same")
        return self


class Evaluation(Section):
    """Perplexity against context length, measured of every whole training."""

    name: Name
    data: PathText
    """Folder made by `samba-lm data prepare` with the models' tokenizer (of train and val, val)."""
    protocol: Protocol = "full-window"
    lengths: Annotated[tuple[int, ...], Field(strict=False, min_length=1)]
    """Context lengths in tokens."""
    stride: int | None = None
    window: int | None = None
    documents: Documents = "same"
    """Of prefix and stream: the documents that reach the longest length, or of each as much as there is."""
    max_tokens: int | None = None
    """Bounds the text at each length, and so the time."""
    max_length_growing: int | None = None
    """Longest length for models whose state grows with the text (full attention); none: all lengths."""
    title: str = ""
    """What the tables call it."""
    apart: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Of prefix and stream: what the documents measured are called, in their order. Tables and figures then show each
    by itself: of a few unlike texts a mean says little, and its interval nothing."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.settings()
        # Elsewhere a window's number says nothing of whose text it is: another length has other windows.
        if self.apart and (self.protocol not in OF_DOCUMENTS or self.documents != "same"):
            raise ValueError(
                "apart names documents that are measured at every length: leave it out, or use prefix or stream and "
                'documents = "same"'
            )
        if self.protocol == "last-stride" and self.max_length_growing is not None:
            raise ValueError("last-stride scores the same tokens at every length: leave max_length_growing out")
        return self

    def settings(self) -> Settings:
        """The protocol with its settings checked. Raises UserError."""
        return Settings.of(
            self.protocol,
            self.lengths,
            stride=self.stride,
            window=self.window,
            max_tokens=self.max_tokens,
            documents=self.documents,
        )

    def lengths_for(self, constant_state: bool) -> tuple[int, ...]:
        """The lengths that a model is measured at."""
        limit = self.max_length_growing
        return self.lengths if constant_state or limit is None else tuple(n for n in self.lengths if n <= limit)


def documents_measured(evaluation: Evaluation, dataset: TokenDataset) -> tuple[list[int], int]:
    """Of prefix and stream with ``documents = "same"``: the documents that all lengths are measured on, and the longest
    length; none and 0 where no document has any of the lengths."""
    bounds = [dataset.document_bounds(i) for i in range(dataset.num_documents)]
    sizes = [stop - start for start, stop in bounds]
    # A length that no document has is left out for all models, and chooses none.
    longest = max((length for length in evaluation.lengths if length <= max(sizes)), default=0)
    if not longest:
        return [], 0
    reaching = [i for i, size in enumerate(sizes) if size >= longest]
    return reaching[: evaluation.settings().samples(len(reaching), longest)], longest


class Run(Section):
    """An architecture of the study."""

    name: Name
    recipe: PathText
    """The recipe's file, relative to the study's folder."""
    title: str = ""
    """What the tables call it; none: its name."""
    groups: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """The tables it stands in."""
    seeds: Seeds | None = None
    """Whole trainings, one for each; none: the study's."""
    lr: Rate | None = None
    """Peak learning rate, without a sweep."""
    lr_from: str | None = None
    """The run whose sweep decides this one's learning rate too."""
    keep: bool = False
    """Keep the final weights (of the first seed)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.lr is not None and self.lr_from is not None:
            raise ValueError(f"lr = {self.lr:g} and lr_from = {self.lr_from!r} are both given: keep one")
        return self


class PaperTable(Section):
    """A published table, to stand beside ours."""

    group: str
    source: str
    """Where it is printed, and what was measured."""
    columns: Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
    rows: dict[str, Annotated[tuple[float | str, ...], Field(strict=False)]]
    """Its figures by the name of our run."""
    evaluation: str | None = None
    """Ours that stands beside it."""
    lengths: Annotated[tuple[int, ...], Field(strict=False)] = ()
    """Of our evaluation: those that stand beside the last so many columns."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, row in self.rows.items():
            if len(self.lengths) > len(self.columns):
                raise ValueError(f"there are {len(self.lengths)} lengths for {len(self.columns)} columns")
            if len(row) != len(self.columns):
                raise ValueError(f"row {name!r} has {len(row)} figures for {len(self.columns)} columns")
        return self


class Study(Section):
    """Runs, how their learning rates are found, and what is measured of them."""

    title: str = "A study"
    seeds: Seeds = (0,)
    reference: str | None = None
    """The run that the tables compare the others with."""
    sweep: Sweep | None = None
    """None: runs that give no lr take their recipe's."""
    evaluations: Annotated[tuple[Evaluation, ...], Field(strict=False)] = ()
    runs: Annotated[tuple[Run, ...], Field(strict=False, min_length=1)]
    paper: Annotated[tuple[PaperTable, ...], Field(strict=False)] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = {run.name: run for run in self.runs}
        for kind, each in (("runs", [r.name for r in self.runs]), ("evaluations", [e.name for e in self.evaluations])):
            twice = [name for name, count in Counter(each).items() if count > 1]
            if twice:
                raise ValueError(f"two of the {kind} are named {twice[0]!r}")
        for run in self.runs:
            if run.lr_from is None:
                continue
            if run.lr_from not in names:
                raise ValueError(f"{run.name}: lr_from = {run.lr_from!r} is no run.{did_you_mean(run.lr_from, names)}")
            source = names[run.lr_from]
            if source.lr_from is not None or run.lr_from == run.name:
                raise ValueError(f"{run.name}: lr_from = {run.lr_from!r} has no learning rate of its own")
        if self.reference is not None and self.reference not in names:
            raise ValueError(f"reference = {self.reference!r} is no run.{did_you_mean(self.reference, names)}")
        groups = {group for run in self.runs for group in run.groups}
        for table in self.paper:
            measured = [each.name for each in self.evaluations]
            if table.evaluation is not None and table.evaluation not in measured:
                near = did_you_mean(table.evaluation, measured)
                raise ValueError(f"paper, {table.group}: evaluation {table.evaluation!r} is not in the study.{near}")
            if table.group not in groups:
                raise ValueError(f"paper: no run is of group {table.group!r}.{did_you_mean(table.group, groups)}")
            for name in table.rows:
                if name not in names:
                    raise ValueError(f"paper, {table.group}: {name!r} is no run.{did_you_mean(name, names)}")
        return self

    @classmethod
    def from_dict(cls, data: dict[str, Any], source: str = "Study") -> Study:
        """Check plain data. Raises UserError naming ``source``, the bad key and its value."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise UserError(f"{source}: {explain(error, cls)}") from None

    def run(self, name: str) -> Run:
        """The run of that name. Raises UserError with the nearest one."""
        for run in self.runs:
            if run.name == name:
                return run
        raise UserError(f"No run {name!r} in the study.{did_you_mean(name, [run.name for run in self.runs])}")

    def family(self, run: Run) -> Run:
        """The run whose sweep decides the learning rate of ``run``."""
        return run if run.lr_from is None else self.run(run.lr_from)

    def seeds_of(self, run: Run) -> tuple[int, ...]:
        """Of its whole trainings."""
        return self.seeds if run.seeds is None else run.seeds


def read_study(path: Path) -> tuple[Study, dict[str, Recipe]]:
    """A study's file (or the folder with its study.toml), and the recipe of every run.

    Raises UserError for a file that is missing or wrong, also among the recipes.
    """
    if path.is_dir():
        if not (path / FILE).is_file():
            raise UserError(f"{path} has no {FILE}: give a study's folder, or its file.")
        path = path / FILE
    study = Study.from_dict(read_toml(path, "study"), source=str(path))
    return study, {run.name: Recipe.from_toml(path.parent / run.recipe) for run in study.runs}


def check_recipes(study: Study, recipes: dict[str, Recipe]) -> None:
    """Raise UserError for a recipe that the study cannot train."""
    for run in study.runs:
        recipe = recipes[run.name]
        _ = recipe.train.total_steps
        if recipe.data.recall is not None or recipe.model.init_from is not None:
            what = "model.init_from" if recipe.model.init_from is not None else "data.passkey or data.phonebook"
            raise UserError(
                f"Run {run.name}: its recipe has {what}, and a study trains new models on prepared text: take "
                "`samba-lm train` for it."
            )
        swept = study.sweep is not None and run.lr is None and run.lr_from is None
        if swept and recipe.data.val is None:
            raise UserError(
                f"Run {run.name}: its recipe gives no data.val, and a sweep takes the lowest validation loss: give "
                "data.val, or the run an lr."
            )


class StudyData:
    """The prepared data of a study, each folder opened once."""

    def __init__(self) -> None:
        self._opened: dict[tuple[str, bool], TokenDataset] = {}

    def open(self, folder: str, what: str, held_out: bool = False) -> TokenDataset:
        """A data set; ``held_out``: of train and val, val. Raises UserError, naming ``what`` asks for it."""
        key = (folder, held_out)
        if key not in self._opened:
            try:
                if held_out:
                    first, val = open_splits(folder)
                    self._opened[key] = val or first
                else:
                    self._opened[key] = TokenDataset.open(folder)
            except UserError as error:
                raise UserError(f"{what}: {error}") from None
        return self._opened[key]

    def check(self, study: Study, recipes: dict[str, Recipe], names: set[str]) -> None:
        """Raise UserError unless the data of the named runs is all there and made with one tokenizer."""
        made_with: dict[str, str] = {}
        for run in study.runs:
            section = recipes[run.name].data
            if run.name not in names:
                continue
            held_out = {f"data.val.{name}" if name else "data.val": path for name, path in section.validation.items()}
            for field, folder in (section.sources | held_out).items():
                opened = self.open(folder, f"Run {run.name}, {field} = {folder!r}")
                made_with[opened.tokenizer.fingerprint()] = folder
        for evaluation in study.evaluations:
            opened = self.open(evaluation.data, f"Evaluation {evaluation.name}, data = {evaluation.data!r}", True)
            made_with[opened.tokenizer.fingerprint()] = evaluation.data
            if evaluation.apart:
                _check_names(evaluation, opened)
        for (first, a), (second, b) in itertools.pairwise(made_with.items()):
            raise UserError(
                f"{a!r} was made with tokenizer {first[:12]} and {b!r} with {second[:12]}: perplexities compare only "
                "with one, so prepare all of a study's data with it."
            )


def _check_names(evaluation: Evaluation, dataset: TokenDataset) -> None:
    (documents, longest), names = documents_measured(evaluation, dataset), len(evaluation.apart)
    if len(documents) != names:
        raise UserError(
            f"Evaluation {evaluation.name}: apart has {names} name(s), and {len(documents)} document(s) of "
            f"{evaluation.data!r} are measured, of {longest} tokens or more: give a name for each."
        )

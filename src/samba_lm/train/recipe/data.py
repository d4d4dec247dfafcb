"""[data]: what it is trained on."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from samba_lm.data.cache import DEFAULT_GB
from samba_lm.train.recipe.section import PathText, Section


class RecallSection(Section):
    """Rows that are made as they are needed, each with one thing to find again; only the answer counts."""

    lengths: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False)] = ()
    """Tokens of a row, one length after the other, each dividing train.length; none: train.length, always. Batches of
    shorter rows have more of them, and as many tokens."""
    shares: Annotated[tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], Field(strict=False)] = ()
    """Share of the steps for each of the lengths; none: equal ones."""
    review: float = Field(default=0.0, ge=0, lt=1)
    """Share of the steps that read rows of an earlier length instead, of one after the other, so that none is
    forgotten: what ends with long rows alone no longer answers short ones."""
    lm_weight: float = Field(default=0.0, ge=0, le=1)
    """Weight of the other tokens' loss beside the answers': for each token of an answer so many others count too."""
    share: float = Field(default=1.0, gt=0, le=1)
    """Share of the steps that such rows are made for; the others read data.train."""
    apart: float = Field(default=0.0, ge=0, le=1)
    """Share of the rows that a hybrid's attention sees only from a place drawn at random on, as it sees the end of a
    text that is longer than its windows reach: what is asked about the rest, its states must answer."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.shares and len(self.shares) != len(self.lengths):
            raise ValueError(f"there are {len(self.lengths)} lengths but {len(self.shares)} shares: give one for each")
        if self.review and len(set(self.lengths)) < 2:
            raise ValueError(
                f"review = {self.review:g} reads earlier lengths again, and there is but one: give lengths"
            )
        return self


class PasskeySection(RecallSection):
    """A five-digit key in much that does not matter."""

    filler: PathText | None = None
    """Text file whose sentences hide the key, which is harder; none: the few sentences of the well-known form."""
    stretch: float = Field(default=1.0, ge=1, le=1e6)
    """Train for texts up to so many times as long as the rows: in each step a token of the filler is to Mamba's states
    what a number of them would be, drawn between 1 and this one; attention does not look across a run of them that
    stands for more tokens than its windows reach, one after another."""


class PhonebookSection(RecallSection):
    """One number of a phonebook."""

    names: Annotated[tuple[PathText, ...], Field(strict=False)] = ()
    """Files with a name a line: one of whole names, or one of first and one of last names; none: faker's."""
    questions: int = Field(default=1, ge=1, le=1000)
    """Numbers asked for in a row, one after the other, all of which count; fewer in short rows. One number of a row of
    thousands of tokens teaches little."""


DEFAULT_TRAIN = "data/train"


class SourceSection(Section):
    """One data set of a mixture."""

    path: PathText
    """Folder or URL of token shards that `samba-lm data prepare` wrote."""
    weight: float = Field(gt=0, allow_inf_nan=False)
    """How much of each step is read from here, in proportion to the sum of all weights."""
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """How often it may be read; then the others go on alone. None: as often as it takes."""


class ChatSection(Section):
    """Conversations, of which the answers are learnt."""

    files: Annotated[tuple[PathText, ...], Field(strict=False)] = ()
    """JSON lines (messages, or prompt and completion; also .gz, .xz, .bz2, .zst), or one folder of
    `samba-lm data chat`."""
    val: Annotated[tuple[PathText, ...], Field(strict=False)] = ()
    """The same, held out, to measure the answers' loss on; none: no validation."""


class DataSection(Section):
    """What it is trained on."""

    train: PathText = DEFAULT_TRAIN
    """Folder or URL (s3://, gs://, hf://, https://) of token shards that `samba-lm data prepare` wrote; not read where
    all rows are made (passkey, ...), or where there is a mixture."""
    mixture: dict[str, SourceSection] = Field(default_factory=dict)
    """Several data sets instead, by name, each with a path and a weight."""
    val: PathText | dict[str, PathText] | None = None
    """Folder or URL of token shards to measure the validation loss on, or several by name, the first of which is the
    one that counts; none: no validation."""
    shuffle_shards: Annotated[int, Field(ge=1)] | None = None
    """Read so many shards at a time, shuffled among themselves: for data that one machine cannot hold, at a URL. None:
    each epoch all rows in one order."""
    cache: PathText | None = None
    """Where shards from a URL are kept on this machine; none: samba-lm/shards in the user's folder for caches."""
    cache_gb: float = Field(default=DEFAULT_GB, gt=0, allow_inf_nan=False)
    """How large that may grow, in GB; what was not read for the longest time goes first."""
    documents: bool = False
    """Reset attention and state at document boundaries instead of reading over them (the paper reads over them)."""
    tokenizer: PathText | None = None
    """Where rows are made: byte, or a tokenizer.json or its folder; none: that of data.train, if that is read too, or
    of model.init_from."""
    passkey: PasskeySection | None = None
    """Train on passkey texts instead of shards, or now and then."""
    phonebook: PhonebookSection | None = None
    """Train on phonebook texts instead of shards, or now and then."""
    chat: ChatSection | None = None
    """Fine-tune on conversations instead of shards."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.passkey is not None and self.phonebook is not None:
            raise ValueError("passkey and phonebook are both given: keep one")
        if self.chat is not None and self.recall is not None:
            raise ValueError("chat is given beside passkey or phonebook: keep one")
        if self.chat is not None and self.val is not None:
            raise ValueError(f"val = {self.val!r} is given beside chat, which has its own: give chat.val")
        if self.mixture and self.train != DEFAULT_TRAIN:
            raise ValueError(
                f"train = {self.train!r} and mixture ({', '.join(self.mixture)}) are both given: make train one of the "
                "mixture's, or leave one out"
            )
        for kind, names in (("mixture", [*self.mixture]), ("val", [*self.validation])):
            for name in names:
                if name != name.strip() or not name.isprintable() or (not name and kind == "mixture"):
                    raise ValueError(f"{kind} has the name {name!r}: use letters, digits and - or _")
        if self.mixture and not self.reads_shards:
            raise ValueError("mixture is given, but all rows are made: give passkey or phonebook a share below 1")
        if not self.reads_shards and self.validation:
            raise ValueError(
                f"val = {self.val!r} is given, but made rows have no validation: leave it out, and measure with "
                "`samba-lm eval passkey` or `eval phonebook`"
            )
        return self

    @property
    def recall(self) -> PasskeySection | PhonebookSection | None:
        """What rows are made of; none: all are read from shards."""
        return self.passkey or self.phonebook

    @property
    def sources(self) -> dict[str, str]:
        """Where shards are read from, if any are: data.train, or the paths of data.mixture.NAME."""
        if not self.mixture:
            return {"data.train": self.train}
        return {f"data.mixture.{name}": source.path for name, source in self.mixture.items()}

    @property
    def validation(self) -> dict[str, str]:
        """The validation sets by name; a single one has the name ""."""
        if self.val is None:
            return {}
        return {"": self.val} if isinstance(self.val, str) else dict(self.val)

    @property
    def reads_shards(self) -> bool:
        """Whether data.train is read at all."""
        return self.chat is None and (self.recall is None or self.recall.share < 1)

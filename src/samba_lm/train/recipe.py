"""A training run as data: what a recipe's TOML file holds, checked. Imports no torch."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from samba_lm import zoo
from samba_lm.config import ModelConfig
from samba_lm.errors import UserError
from samba_lm.validation import explain

VOCAB_MULTIPLE = 64
"""An "auto" vocabulary is rounded up to this: matrix units like it, and the unused rows cost next to nothing."""

MAX_NAME_BYTES = 255
"""Of one file's or folder's name, on all common file systems."""


class Section(BaseModel):
    """Frozen, no unknown keys, no silent conversion between types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


def _path(text: str) -> str:
    if not text or "\0" in text:
        raise ValueError(f"{text!r} names no folder")
    if any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in Path(text).parts):
        raise ValueError(f"a name in it is longer than {MAX_NAME_BYTES} bytes")
    return text


PathText = Annotated[str, AfterValidator(_path)]
"""A path that a file system can hold."""


class ModelSection(Section):
    """What is trained."""

    name: str = "samba-tiny"
    """Architecture from the zoo (`samba-lm models` lists them)."""
    vocab_size: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Rows of the embedding; auto: the data's vocabulary, rounded up to a multiple of 64."""
    overrides: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Other fields of the model config to replace, such as norm_eps or tie_embeddings."""
    slow_channels: float = Field(default=0.0, ge=0, le=1)
    """Share of a new model's Mamba channels whose step begins at 1e-6 to 1e-3 instead of 1e-3 to 1e-1: they hold what
    they have read for far longer than a training row."""
    init_from: PathText | None = None
    """Checkpoint folder to fine-tune: architecture and weights come from it, name and vocab_size are not used."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("slow_channels", "overrides"):
            if self.init_from is not None and getattr(self, name):
                raise ValueError(
                    f"{name} is of new models, and init_from = {self.init_from!r} brings one that is made: leave "
                    "either out"
                )
        return self

    def config(self, data_vocab: int) -> ModelConfig:
        """The config of a new model for data of ``data_vocab`` tokens. Raises UserError for unknown names."""
        if self.vocab_size == "auto":
            vocab = -(-data_vocab // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        else:
            vocab = self.vocab_size
        return zoo.get(self.name).with_overrides(**{"vocab_size": vocab, **self.overrides})


class RecallSection(Section):
    """Rows that are made as they are needed, each with one thing to find again; only the answer counts."""

    lengths: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False)] = ()
    """Tokens of a row, one length after the other, each dividing train.length; none: train.length, always. Batches of
    shorter rows have more of them, and as many tokens."""
    shares: Annotated[tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], Field(strict=False)] = ()
    """Share of the steps for each of the lengths; none: equal ones."""
    lm_weight: float = Field(default=0.0, ge=0, le=1)
    """Weight of the other tokens' loss beside the answers': for each token of an answer so many others count too."""
    stretch: float = Field(default=1.0, ge=1, le=1e6)
    """Train for texts up to so many times as long as the rows: in each step Mamba's states forget faster by a factor
    drawn between 1 and this one."""
    share: float = Field(default=1.0, gt=0, le=1)
    """Share of the steps that such rows are made for; the others read data.train."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.shares and len(self.shares) != len(self.lengths):
            raise ValueError(f"there are {len(self.lengths)} lengths but {len(self.shares)} shares: give one for each")
        return self


class PasskeySection(RecallSection):
    """A five-digit key in much that does not matter."""

    filler: PathText | None = None
    """Text file whose sentences hide the key, which is harder; none: the few sentences of the well-known form."""


class PhonebookSection(RecallSection):
    """One number of a phonebook."""

    names: Annotated[tuple[PathText, ...], Field(strict=False)] = ()
    """Files with a name a line: one of whole names, or one of first and one of last names; none: faker's."""


class DataSection(Section):
    """What it is trained on."""

    train: PathText = "data/train"
    """Folder of token shards that `samba-lm data prepare` wrote; not read where all rows are made (passkey, ...)."""
    val: PathText | None = None
    """Folder of token shards to measure the validation loss on; none: no validation."""
    documents: bool = False
    """Reset attention and state at document boundaries instead of reading over them (the paper reads over them)."""
    tokenizer: PathText | None = None
    """Where rows are made: byte, or a tokenizer.json or its folder; none: that of data.train, if that is read too, or
    of model.init_from."""
    passkey: PasskeySection | None = None
    """Train on passkey texts instead of shards, or now and then."""
    phonebook: PhonebookSection | None = None
    """Train on phonebook texts instead of shards, or now and then."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.passkey is not None and self.phonebook is not None:
            raise ValueError("passkey and phonebook are both given: keep one")
        if not self.reads_shards and self.val is not None:
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
    def reads_shards(self) -> bool:
        """Whether data.train is read at all."""
        return self.recall is None or self.recall.share < 1


class TrainSection(Section):
    """How it is trained."""

    out: PathText = "runs/samba"
    """Folder for checkpoints and metrics. A run found there is continued."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps; give this or tokens."""
    tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens to train on, rounded up to whole steps; give this or steps."""
    batch_size: int = Field(default=16, ge=1)
    """Sequences per optimizer step."""
    micro_batch: Annotated[int, Field(ge=1)] | None = None
    """Sequences computed at once, to save memory; none: all. Must divide batch_size. Changes only rounding."""
    length: int = Field(default=512, ge=1)
    """Tokens per sequence."""
    lr: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    """Peak learning rate."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the end, as a fraction of the peak."""
    warmup_fraction: float = Field(default=0.01, ge=0, lt=1)
    """Fraction of the steps in which the learning rate climbs to its peak."""
    betas: Annotated[tuple[float, float], Field(strict=False)] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(default=0.1, ge=0)
    """AdamW's weight decay."""
    decay_all: bool = False
    """Decay every parameter, as the paper did; otherwise norms, biases, A_log and D are left out."""
    clip: float = Field(default=1.0, ge=0)
    """Largest global norm of the gradient; 0: no clipping."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters and optimizer stay float32."""
    float8: bool = False
    """Compute the large linear maps by float8 products, forward and backward: on NVIDIA GPUs of compute capability 8.9
    or higher (H100), with dtype bfloat16. Parameters, optimizer, head and everything else stay as they are.
    Experimental: a step is a fifth shorter, but after 300 steps of samba-421m the loss was 0.09 nats behind."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What backward computes again to save memory. none: nothing; selective: what costs next to nothing, on a GPU and
    without compile; full: each layer from its input, much less memory, about a third slower."""
    compile: bool = False
    """Compile each layer with torch.compile: slow start, faster steps on a GPU."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the initial weights and of the order of the data."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    eval_every: int = Field(default=100, ge=0)
    """Steps between validations; 0: only at the end."""
    eval_batches: int = Field(default=16, ge=1)
    """Batches of the validation data, from its beginning, that a validation reads."""
    save_every: int = Field(default=100, ge=0)
    """Steps between checkpoints; 0: only at the end."""
    keep: int = Field(default=3, ge=1)
    """Checkpoints kept; older ones are deleted once a new one is on the disk."""
    log_every: int = Field(default=10, ge=1)
    """Steps between lines of metrics.jsonl and of plain output."""
    tensorboard: bool = False
    """Also write TensorBoard event files (extra: tensorboard)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.steps is not None and self.tokens is not None:
            raise ValueError(
                f"steps = {self.steps} and tokens = {self.tokens} are both given: keep one "
                "(on the command line, --train.tokens None or --train.steps None drops the other)"
            )
        if self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch = {self.micro_batch} does not divide batch_size = {self.batch_size}")
        if self.float8 and self.dtype != "bfloat16":
            raise ValueError(f'float8 = true needs dtype = "bfloat16", not "{self.dtype}"')
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas = {list(self.betas)} must both be at least 0 and below 1")
        return self

    @property
    def micro_batch_size(self) -> int:
        """Sequences computed at once."""
        return self.micro_batch or self.batch_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens read by one optimizer step."""
        return self.batch_size * self.length

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run. Raises UserError when the recipe gives neither steps nor tokens."""
        if self.steps is not None:
            return self.steps
        if self.tokens is None:
            raise UserError("The recipe gives neither train.steps nor train.tokens: say how long to train.")
        return -(-self.tokens // self.tokens_per_step)


class Recipe(Section):
    """A training run: model, data, and how to train."""

    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()

    @classmethod
    def from_dict(cls, data: dict[str, Any], source: str = "Recipe") -> Recipe:
        """Check plain data. Raises UserError naming ``source``, the bad key and its value."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise UserError(f"{source}: {explain(error, cls)}") from None

    @classmethod
    def from_toml(cls, path: str | Path) -> Recipe:
        """Read a recipe file, and the one that its ``base`` names, whose values stand where it says nothing.

        Raises UserError for a missing, unreadable or wrong one.
        """
        return cls.from_dict(_with_base(Path(path), ()), source=str(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return self.model_dump(mode="json")

    def differences(self, before: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """``{"train.lr": (mine, before's)}`` for every field whose value is not what ``to_dict`` once gave.

        Of two passkeys, or phonebooks, each field by itself: ``data.passkey.share``. A field that recipes did not have
        yet then had its default.
        """
        found: dict[str, tuple[Any, Any]] = {}
        for section, fields in self.to_dict().items():
            then = {**DEFAULTS[section], **before[section]}
            for key, value in fields.items():
                pairs = {f"{section}.{key}": (value, then[key])}
                if key in MADE and value is not None and isinstance(then[key], dict):
                    held = {**MADE[key], **then[key]}
                    pairs = {f"{section}.{key}.{name}": (each, held[name]) for name, each in value.items()}
                found |= {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
        return found


DEFAULTS = Recipe().to_dict()
MADE = {"passkey": PasskeySection().model_dump(mode="json"), "phonebook": PhonebookSection().model_dump(mode="json")}
"""The sections of made rows, at their defaults."""


def read_toml(path: Path, kind: str = "recipe") -> dict[str, Any]:
    """What a TOML file holds. Raises UserError, which says that a ``kind`` was looked for, when it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"No {kind} at {path}: give the path of a TOML file.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: give the path of a {kind}'s TOML file.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}: a {kind} is a TOML text file.") from None
    except OSError as error:
        raise UserError(f"Cannot read the {kind} {path}: {error.strerror}.") from None
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise UserError(f"{path} is not a {kind}: it is nested too deeply.") from None
    except ValueError as error:  # TOMLDecodeError, and a number of thousands of digits
        raise UserError(f"{path} is not valid TOML: {error}") from None


EITHER = {"train": ({"steps", "tokens"},), "data": ({"passkey", "phonebook"},)}
"""Keys of which a recipe has one: where it gives it, the base's other one is dropped."""


def _with_base(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """A recipe file's data over that of its base; ``above``: the recipes that led here."""
    if not above:
        data = read_toml(path)
    else:
        try:
            data = read_toml(path)
        except UserError as error:
            raise UserError(f"{above[-1]}: its base cannot be read. {error}") from None
    base = data.pop("base", None)
    if base is None:
        return data
    if not isinstance(base, str) or not base or "\0" in base:
        raise UserError(f"{path}: base = {base!r}: give the path of another recipe, relative to this one's folder.")
    below = path.parent / base
    for other in (*above, path):
        if os.path.realpath(below) == os.path.realpath(other):  # Path.resolve refuses links that go in a circle
            raise UserError(f"{path}: base = {base!r} leads back to {other}: a recipe cannot be its own base.")
    return _over(_with_base(below, (*above, path)), data)


def _over(base: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``data`` in their place, sections and their tables merged."""
    merged = dict(base)
    for key, value in data.items():
        below = merged.get(key)
        if not isinstance(value, dict) or not isinstance(below, dict):
            merged[key] = value
            continue
        # A table of the same name is merged with the base's; its neighbour of the group is dropped.
        dropped = {name for group in EITHER.get(key, ()) if group & value.keys() for name in group} - value.keys()
        kept = {name: each for name, each in below.items() if name not in dropped}
        merged[key] = _over(kept, value)
    return merged

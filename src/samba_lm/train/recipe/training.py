"""[train]: how it is trained."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from samba_lm.errors import UserError
from samba_lm.train.recipe.section import PathText, Section


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
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the weights of the layers' linear maps, AdamW for all else; lr and weight_decay are both's."""
    lr: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """How the learning rate goes from its peak to min_lr_ratio: half a cosine, a line, not at all (constant), or wsd:
    it stays at the peak and falls in the last decay_fraction of the steps."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the end, as a fraction of the peak."""
    warmup_fraction: float = Field(default=0.01, ge=0, lt=1)
    """Fraction of the steps in which the learning rate climbs to its peak."""
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """Fraction of the steps, at the end, in which wsd's learning rate falls."""
    decay_shape: Literal["sqrt", "linear"] = "sqrt"
    """How it falls: as 1 - sqrt, fast first, or as a line."""
    betas: Annotated[tuple[float, float], Field(strict=False)] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(default=0.1, ge=0)
    """AdamW's weight decay."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Muon's decay rate of the mean gradient."""
    decay_all: bool = False
    """Decay every parameter, as the paper did; otherwise norms, biases, A_log and D are left out."""
    clip: float = Field(default=1.0, ge=0)
    """Largest global norm of the gradient; 0: no clipping."""
    spike: Literal["skip", "rollback"] | None = None
    """What to do about a step whose loss or gradient stands out, or is not finite. skip: leave its update out;
    rollback: go back to the last checkpoint and pass over the batches since; none: nothing, and what is not finite
    ends the run."""
    spike_factor: float = Field(default=6.0, gt=0, allow_inf_nan=False)
    """Robust standard deviations above the median at which a step stands out."""
    spike_window: int = Field(default=128, ge=8)
    """Accepted steps that the median and the deviation are of."""
    spike_limit: int = Field(default=5, ge=1)
    """Steps in a row that may be skipped, or times that the run may go back to one checkpoint. After that what stands
    out is taken for how things are, and what is not finite ends the run."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters and optimizer stay float32."""
    float8: bool = False
    """Compute the large linear maps by float8 products, forward and backward: on NVIDIA GPUs of compute capability 8.9
    or higher (H100), with dtype bfloat16. Parameters, optimizer, head and everything else stay as they are.
    Experimental: a step is a fifth shorter, but after 300 steps of samba-421m the loss was 0.09 nats behind."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What backward computes again to save memory. none: nothing; selective: what costs next to nothing, on a GPU and
    without compile; full: each layer from its input, much less memory, a step about a third longer."""
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
    """Checkpoints kept; older ones are deleted once a new one is on the disk and was read back."""
    keep_every: int = Field(default=0, ge=0)
    """Keep the checkpoints after every so many steps for good, besides the newest; 0: none."""
    log_every: int = Field(default=10, ge=1)
    """Steps between lines of metrics.jsonl and of plain output."""
    tensorboard: bool = False
    """Also write TensorBoard event files (extra: tensorboard)."""
    wandb: Annotated[str, Field(min_length=1)] | None = None
    """Also report to this project of Weights & Biases (extra: wandb); WANDB_MODE=offline keeps it on this machine."""

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
        if self.schedule == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError(
                f"warmup_fraction = {self.warmup_fraction} and decay_fraction = {self.decay_fraction} are more than "
                "the whole run: their sum may be at most 1"
            )
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

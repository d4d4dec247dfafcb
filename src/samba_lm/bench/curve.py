"""``samba-lm bench curve``: one training run taken several ways, loss beside loss.

The ways start from the same weights (made on the CPU) and read the same batches through the trainer's own loop; only
where and in which dtype they compute differs. Rounding makes any two runs drift apart, so the bound on a way's distance
from the CPU is that of a bf16 run which has none of our kernels: so far does rounding alone lead.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from samba_lm import checkpoint
from samba_lm.bench.figure import Figure
from samba_lm.bench.gpu import NotMeasured, attempt, release
from samba_lm.config import Attention, LayerSpec, ModelConfig, SwiGLU
from samba_lm.data.loader import Batch, Loader
from samba_lm.errors import UserError
from samba_lm.files import read_json
from samba_lm.model import SambaLM
from samba_lm.ops.backend import preferring
from samba_lm.train.loop import fit
from samba_lm.train.observer import Observer, StepRecord
from samba_lm.train.parallel import Parallel
from samba_lm.train.recipe import TrainSection

TAIL = 100
"""Steps at the end over which differences are averaged; a third of a short run."""
FACTOR = 3.0
"""How much further than plain bf16 a run may be from the CPU's."""
FLOOR = 1e-3
"""Differences up to this many nats are never more than noise."""
PLAIN_BOUND = 2e-2
"""How far plain bf16 may be from the CPU in the mean over the last steps, nats, so that anything is not noise."""
DEFINITION_STEPS, DEFINITION_BOUND = 3, 1e-4
"""How far the CPU's fast path is followed by the definitions, and to how many nats."""


@dataclass(frozen=True)
class Way:
    """How a run is computed."""

    title: str
    on_gpu: bool
    dtype: Literal["float32", "bfloat16"]
    backend: Literal["reference", "cpu"] | None = None
    """What ``auto`` stands for; None: the fastest."""
    steps: int | None = None
    """Steps after which to stop; None: all."""


WAYS = {
    "cpu": Way("CPU, fp32, the fast PyTorch path", False, "float32", "cpu"),
    "definition": Way("CPU, fp32, every operation by its definition", False, "float32", "reference", DEFINITION_STEPS),
    "gpu fp32": Way("GPU, fp32, kernels", True, "float32"),
    "gpu bf16": Way("GPU, bf16 on fp32 weights, kernels", True, "bfloat16"),
    "gpu bf16 plain": Way("GPU, bf16 on fp32 weights, PyTorch and no kernels", True, "bfloat16", "cpu"),
}
PLAIN = "gpu bf16 plain"


@dataclass(frozen=True)
class Curve:
    """The losses of one run, nats a token, and what is worth knowing of it."""

    losses: list[float]
    grad_norms: list[float]
    seconds: float
    device: str


@dataclass(frozen=True)
class Run:
    """What all ways share."""

    model: SambaLM
    """The initial weights, fp32 on the CPU."""
    loader: Loader
    settings: TrainSection

    def identity(self) -> dict[str, object]:
        """What two runs must have in common to be compared: settings, and sha256 of initial weights and batches."""
        settings = self.settings.model_dump(
            mode="json",
            include={
                *("steps", "batch_size", "length", "lr", "min_lr_ratio", "warmup_fraction", "betas", "eps"),
                *("weight_decay", "decay_all", "clip", "seed"),
            },
        )
        return {
            **settings,
            "model": self.model.config.fingerprint(),
            "weights": weights_hash(self.model),
            "batches": batches_hash(self.loader, self.settings.total_steps),
        }


def cut(
    config: ModelConfig, *, layers: int, d_model: int, head_dim: int, mlp: int, window: int, vocab_size: int
) -> ModelConfig:
    """The first layers of ``config`` at another width. Raises UserError where the sizes do not fit together."""
    if d_model % head_dim:
        raise UserError(f"--head-dim {head_dim} does not divide --d-model {d_model}.")

    def resized(spec: LayerSpec) -> LayerSpec:
        if isinstance(spec, Attention):
            heads = d_model // head_dim
            fewer = {"heads": heads, "kv_heads": max(1, heads * spec.groups // spec.heads)}
            return spec.model_copy(update={**fewer, "window": None if spec.window is None else window})
        return spec.model_copy(update={"width": mlp}) if isinstance(spec, SwiGLU) else spec

    stack = tuple(spec.changed(resized).model_dump() for spec in config.layers[:layers])
    return config.with_overrides(name=f"{config.name} cut", d_model=d_model, vocab_size=vocab_size, layers=stack)


def initial_model(config: ModelConfig, seed: int, folder: Path | None) -> SambaLM:
    """The initial weights: read from the checkpoint ``folder`` if there, else drawn from the seed and saved there.

    Two machines may draw weights that differ in a last bit, so weights that are to be the same travel as a file.
    Raises UserError for a checkpoint of another model.
    """
    if folder is None or not folder.exists():
        model = checkpoint.create(config, seed=seed)
        if folder is not None:
            checkpoint.save(model, folder)
        return model
    model, _ = checkpoint.load(folder, dtype=torch.float32)
    if model.config.fingerprint() != config.fingerprint():
        raise UserError(f"{folder} holds the weights of another model ({model.config.name}): give another folder.")
    return model


def weights_hash(model: SambaLM) -> str:
    """sha256 (hex) of all weights in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def batches_hash(loader: Loader, steps: int) -> str:
    """sha256 (hex) of the tokens read and the targets of the first ``steps`` batches."""
    digest = hashlib.sha256()
    for step in range(steps):
        batch: Batch = loader.batch(step)
        for ids in (batch.input_ids, batch.targets):
            digest.update(ids.contiguous().numpy().tobytes())
    return digest.hexdigest()


def follow(run: Run, way: Way, device: torch.device, report: Callable[[int, float], None] | None = None) -> Curve:
    """Train a copy of the run's model in one way. ``report`` is told of each step and its loss."""
    seen = _Losses(report or (lambda step, loss: None))
    settings = run.settings.model_copy(update={"dtype": way.dtype, "save_every": 0, "eval_every": 0})
    last = min(way.steps or settings.total_steps, settings.total_steps)
    with preferring(way.backend):
        progress = fit(
            copy.deepcopy(run.model),
            run.loader,
            settings,
            parallel=Parallel(device=device),
            observer=seen,
            stop=lambda: len(seen.losses) >= last,
        )
    return Curve(seen.losses, seen.grad_norms, progress.seconds, str(device))


class _Losses(Observer):
    def __init__(self, report: Callable[[int, float], None]) -> None:
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self.report = report

    def step(self, record: StepRecord) -> None:
        self.losses.append(record.loss)
        self.grad_norms.append(record.grad_norm)
        self.report(record.step, record.loss)


def run_curve(
    run: Run,
    names: Sequence[str],
    gpu: torch.device | None,
    known: Mapping[str, Curve],
    *,
    report: Callable[[str, int, float], None] = lambda name, step, loss: None,
    save: Callable[[dict[str, Curve]], None] = lambda curves: None,
) -> tuple[dict[str, Curve], list[Figure]]:
    """Take the ways ``names``, beside the curves already ``known``, and compare all of them.

    A way that fails is a figure that says why. ``save`` is called after each with everything so far.
    """
    curves, failures = dict(known), []
    for name in names:
        way = WAYS[name]
        device = gpu if way.on_gpu and gpu is not None else torch.device("cpu")
        try:
            curves[name] = attempt(lambda: follow(run, way, device, lambda *told: report(name, *told)))  # noqa: B023
        except NotMeasured as failure:
            failures.append(Figure(f"{name}: {way.title}", None, "nats", note=str(failure)))
        else:
            save(curves)
        release(device)
    return curves, [*failures, *compare({name: curve.losses for name, curve in curves.items()})]


def compare(curves: Mapping[str, Sequence[float]]) -> list[Figure]:
    """How far apart the runs' losses are, and whether that is noise.

    The fast path of the CPU must follow the definitions for as long as these were run. Noise is what plain bf16, which
    has no kernel of ours, is from the CPU (itself at most PLAIN_BOUND). A run by kernels may be from the CPU, step by
    step, at most FACTOR times as far (or FLOOR), in the mean over the last steps and in the largest of all; and its
    mean signed difference, for noise has no sign, at most as far as noise is in the mean. So may the bf16 run be from
    the fp32 run on the same GPU, which is what fp32 master weights are for. Last, without a bound, the spread between
    the two bf16 runs.
    """
    figures = []
    if "cpu" in curves and "definition" in curves:
        steps = len(curves["definition"])
        off_by = max(abs(a - b) for a, b in zip(curves["cpu"], curves["definition"], strict=False))
        what = f"cpu against the definitions, first {steps} steps, largest difference"
        figures.append(Figure(what, off_by, "nats", DEFINITION_BOUND, check=True))
    for name, losses in curves.items():
        if name != "definition":
            last = losses[-_tail(losses) :]
            facts: dict[str, object] = {"first": losses[0], "last": losses[-1]}
            figures.append(Figure(f"{name}: mean loss, last {len(last)} steps", _mean(last), "nats", facts=facts))
    pairs = [(name, "cpu") for name in curves if WAYS[name].on_gpu and name != PLAIN]
    if {"gpu bf16", "gpu fp32"} <= curves.keys():
        pairs.append(("gpu bf16", "gpu fp32"))
    if not pairs or "cpu" not in curves:
        return figures
    if PLAIN not in curves:
        return [*figures, Figure(f"{PLAIN} against cpu", None, "nats", note="not measured, so there is no bound")]
    noise = distance(curves[PLAIN], curves["cpu"])
    tail = _tail(curves["cpu"])
    figures += _figures(f"{PLAIN} against cpu, which is noise", noise, tail, PLAIN_BOUND, None, None)
    largest, mean = max(FACTOR * noise.largest, FLOOR), max(FACTOR * noise.mean, FLOOR)
    for name, other in pairs:
        off = distance(curves[name], curves[other])
        figures += _figures(f"{name} against {other}", off, tail, mean, largest, max(noise.mean, FLOOR))
    if "gpu bf16" in curves:
        spread = distance(curves["gpu bf16"], curves[PLAIN])
        figures += _figures(f"gpu bf16 against {PLAIN}", spread, tail, None, None, None)
    return figures


def _figures(
    what: str, off: Distance, tail: int, mean: float | None, largest: float | None, signed: float | None
) -> list[Figure]:
    """The three numbers of a distance, and their bounds if any."""
    return [
        Figure(f"{what}: mean |difference|, last {tail}", off.mean, "nats", mean, check=mean is not None),
        Figure(f"{what}: largest |difference|", off.largest, "nats", largest, check=largest is not None),
        Figure(
            f"{what}: |mean difference|, last {tail}", abs(off.signed), "nats", signed, check=signed is not None,
            facts={"signed": off.signed},
        ),
    ]  # fmt: skip


@dataclass(frozen=True)
class Distance:
    """Between two curves, in nats; NaN where either has one."""

    mean: float
    """Of absolute differences over the last steps."""
    largest: float
    """Absolute difference of all."""
    signed: float
    """Mean difference over the last steps."""


def distance(curve: Sequence[float], other: Sequence[float]) -> Distance:
    """How far ``curve`` is from ``other``, of the same length."""
    assert len(curve) == len(other), "curves of runs of one length"
    differences = [a - b for a, b in zip(curve, other, strict=True)]
    last = differences[-_tail(differences) :]
    finite = all(d == d for d in differences)  # max() would pass over a NaN
    largest = max(map(abs, differences)) if finite else float("nan")
    return Distance(_mean([abs(d) for d in last]), largest, _mean(last))


def _tail(losses: Sequence[float]) -> int:
    return max(1, min(TAIL, len(losses) // 3))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def record(run: Run, curves: Mapping[str, Curve], figures: Sequence[Figure]) -> dict[str, object]:
    """Plain data for JSON."""
    config = run.model.config
    return {
        "identity": run.identity(),
        "model": config.to_dict(),
        "parameters": config.parameters(),
        "data": {"tokens": run.loader.dataset.num_tokens, "tokenizer": run.loader.dataset.meta.tokenizer},
        "curves": {name: {"way": WAYS[name].title, **asdict(curve)} for name, curve in curves.items()},
        "figures": [figure.record() for figure in figures],
    }


def read_curves(path: Path, run: Run) -> tuple[dict[str, Curve], dict[str, Any]]:
    """The CPU's curves that another run wrote, and where they are from (versions, machine, commit).

    Raises UserError, in one line, for another file, or a run with other settings, initial weights or batches.
    """
    told = read_json(path)
    try:
        identity, found = dict(told["identity"]), told["curves"]
        curves = {
            name: Curve(**{key: value for key, value in found[name].items() if key != "way"})
            for name in found
            if not WAYS[name].on_gpu
        }
        for curve in curves.values():
            curve.losses[:] = map(float, curve.losses)  # a NaN was written as null, which is no float
        steps = [len(curve.losses) for name, curve in curves.items() if name == "cpu"]
        origin = {key: told.get(key) for key in ("torch", "python", "platform", "threads", "time", "commit")}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path} is not what `samba-lm bench curve --json` writes: give such a file.") from None
    for key, ours in run.identity().items():
        theirs = identity.get(key)
        if theirs == ours:
            continue
        if key in ("weights", "batches"):
            fix = "--weights" if key == "weights" else "data"
            raise UserError(f"{path} is of a run with other {_NAMES[key]} (their sha256 differs): give the same {fix}.")
        shown = "another model" if key == "model" else f"{key} {theirs}, and this one has {ours}"
        raise UserError(f"{path} is of a run with {shown}: give the same options.")
    if steps != [run.settings.total_steps]:
        raise UserError(f"{path} holds no whole run of the CPU: make it again with `--path cpu`.")
    return curves, origin


_NAMES = {"weights": "initial weights", "batches": "batches"}

"""``samba-lm bench decode``: steps of up to 16 texts on a GPU, flat in their length; prompts and contexts on their way.

Everything runs through the engine's own parts, as a server runs them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from samba_lm import zoo
from samba_lm.bench.bars import DECODE, FLAT, NONE, PREFILL_TOKENS
from samba_lm.bench.ceilings import Ceilings
from samba_lm.bench.engine_prompts import run_prompts, run_streams
from samba_lm.bench.figure import Figure
from samba_lm.bench.gpu import NotMeasured, attempt, release
from samba_lm.bench.loading import run_loading
from samba_lm.bench.parity import ParityError, require_noise
from samba_lm.bench.steps import GREEDY, WARM_UP, Steps
from samba_lm.bench.training import kernel_table, narrow, new_model
from samba_lm.checkpoint import create, place
from samba_lm.config import ModelConfig
from samba_lm.engine.decoder import Decoder
from samba_lm.engine.prefiller import Prefiller
from samba_lm.engine.slots import Slots
from samba_lm.errors import UserError
from samba_lm.generation.params import SamplingParams
from samba_lm.generation.prefill import Reader
from samba_lm.model import SambaLM
from samba_lm.quantization import quantize, weight_bytes

BATCHES = (16, 8, 4, 2, 1)
CONTEXTS = (4096, 16_384, 65_536, 262_144, 1_048_576)
NUCLEUS = SamplingParams(temperature=1.0, top_p=0.9)
ROUNDS = 9
"""Visits to each context; their median counts."""
PARITY_PROMPTS, PARITY_CHUNK = (3, 69, 150), 64
PARITY_GIVEN, PARITY_OWN = 6, 4
"""Steps that read given tokens, then steps that read what the one before drew."""


def run_decode(
    name: str,
    ceilings: Ceilings,
    device: torch.device,
    *,
    tokens: int = PREFILL_TOKENS,
    contexts: Sequence[int] = CONTEXTS,
    steps: int = 40,
    quantized: str | None = None,
    profile: bool = False,
    report: Callable[[str], None] = lambda what: None,
) -> tuple[list[Figure], list[dict[str, object]]]:
    """Time a bf16 model of the zoo with random weights; what fails is a figure without a value.

    Args:
        tokens: of the long prompt. contexts: lengths of text, steps at which are compared. steps: timed of each kind.
        quantized: "int8" or "int4" weights. profile: list the kernels of a step of 16 too. report: told what is
            measured next.

    Raises UserError for a model whose state grows with the text.
    """
    config = zoo.get(name)
    if not config.constant_state:
        raise UserError(f"{name} has full attention, whose steps cost more with every token: `samba-lm bench paper`.")
    label = name if quantized is None else f"{name} in {quantized}"
    report(f"{name}: parity")
    try:
        figures = attempt(lambda: check(config, device, quantized))
        model = attempt(lambda: _with(place(new_model(config, device), device, torch.bfloat16), quantized))
    except NotMeasured as failure:
        return [Figure(f"{label}, a step", None, "ms", note=str(failure))], []
    kernels: list[dict[str, object]] = []

    def part(what: str, unit: str, measure: Iterator[Figure]) -> None:
        """Take figures as they come; what fails ends this part and not the others."""
        report(f"{name}: {what}")
        try:
            while (figure := attempt(lambda: next(measure, None))) is not None:
                figures.append(figure)
        except NotMeasured as failure:
            figures.append(Figure(f"{label}, {what}", None, unit, note=str(failure)))
        release(device)

    part("prompts", "ms", run_prompts(model, tokens))
    part("streams", "ms", run_streams(model, max(BATCHES)))
    texts = Steps(model, max(BATCHES))  # after the engines, which let go of the parameters they had fixed
    part("a step", "ms", _steps(texts, model, label, ceilings, max(contexts), steps))
    part("steps at several contexts", "", _flat(texts, label, contexts, steps))
    part("a context's file", "ms", run_loading(model, texts, (contexts[0], tokens)))
    if profile:
        try:
            kernels = attempt(lambda: kernel_table(lambda: texts.queued(max(BATCHES), contexts[0], 1), device))
        except NotMeasured as failure:
            figures.append(Figure(f"{label}, profile", None, "ms", note=str(failure)))
    return figures, kernels


def _with(model: SambaLM, quantized: str | None) -> SambaLM:
    """With such weights, and for reading only."""
    return model.eval() if quantized is None else quantize(model, quantized)


def check(config: ModelConfig, device: torch.device, quantized: str | None = None) -> list[Figure]:
    """A narrow twin's steps against fp64, and against what bf16 costs the plain path on the CPU.

    Texts of several lengths are read in pieces, put into slots and stepped together, with given tokens first and their
    own then. Raises ParityError where the device's error is more than rounding explains, or a token drawn is not the
    likeliest.
    """
    small = narrow(config)
    draw = np.random.default_rng(0).integers
    prompts = [draw(0, small.vocab_size, length) for length in PARITY_PROMPTS]
    given = draw(0, small.vocab_size, (PARITY_GIVEN, len(prompts)))
    places = device, torch.device("cpu")
    rounded = [_with(place(create(small), where, torch.bfloat16), quantized) for where in places]
    ours, fed = _engine(rounded[0], prompts, given)
    noise = _plain(rounded[1], prompts, fed)
    exact = _plain(_with(create(small).to(device), quantized).double(), prompts, fed)
    what = "logits of steps"
    own, plain = require_noise({what: ours}, {what: exact}, {what: noise})[what]
    return [
        Figure(f"{small.name}, {what}, relative error", own, ""),
        Figure("the same of plain bf16 on the CPU", plain, "", by="PyTorch"),
    ]


@torch.inference_mode()
def _engine(model: SambaLM, prompts: list[np.ndarray], given: np.ndarray) -> tuple[Tensor, np.ndarray]:
    """Logits [steps, rows, V] of the engine's parts, and the tokens [steps, rows] that the steps have read."""
    model.fix_parameters()
    device = model.device
    on_gpu = device.type == "cuda" and model.config.constant_state
    prefiller, slots = Prefiller(model, PARITY_CHUNK, graphs=on_gpu), Slots(model, len(prompts))
    for prompt in prompts:
        reader = Reader.create(model, GREEDY, batch=1)
        for begin in range(0, prompt.size, PARITY_CHUNK):
            prefiller.read(reader, prompt[begin : begin + PARITY_CHUNK])
        slots.put(reader.state, prompt.size)
    decoder = Decoder(slots, model.config.vocab_size, device)
    decoder.set_options([GREEDY] * len(prompts))
    fed, found, drawn = [], [], None
    for i in range(PARITY_GIVEN + PARITY_OWN):
        if drawn is None or i < PARITY_GIVEN:
            fed.append(given[i])
            drawn, logits = decoder.step(given[i].tolist(), [prompt.size + i + 1 for prompt in prompts])
        else:
            fed.append(drawn.cpu().numpy().copy())
            drawn, logits = decoder.again()
        if not torch.equal(logits.gather(1, drawn[:, None])[:, 0], logits.max(dim=1).values):
            raise ParityError(f"step {i}: a token was drawn that is not the likeliest")
        found.append(logits.clone())
    return torch.stack(found), np.stack(fed)


@torch.inference_mode()
def _plain(model: SambaLM, prompts: list[np.ndarray], fed: np.ndarray) -> Tensor:
    """The same by the definition, each text by itself."""
    rows = []
    for column, prompt in enumerate(prompts):
        state = model.features(torch.from_numpy(prompt).to(model.device)[None])[1]
        ids = torch.from_numpy(fed[:, column]).to(model.device)
        rows.append(torch.stack([model.step(token[None], state)[0] for token in ids]))
    return torch.stack(rows, dim=1)


def least_bytes(config: ModelConfig, batch: int, context: int, weights: int | None = None) -> int:
    """What a step in bf16 moves at least: weights and states read, recurrent states written. ``weights``: the bytes of
    all of them where they are not bf16."""
    unread = 0 if config.tie_embeddings else 2 * config.vocab_size * config.d_model
    written = sum(4 * spec.state_elements(config.d_model, context)[1] for spec in config.layers)
    held = 2 * config.parameters() if weights is None else weights
    return held - unread + batch * (config.state_bytes(context) + written)


def _steps(texts: Steps, model: SambaLM, label: str, ceilings: Ceilings, context: int, count: int) -> Iterator[Figure]:
    config, weights = model.config, weight_bytes(model) if model.quantized else None
    texts.fill(context)
    note = f"by model.step, not by the kernels for steps: {texts.plain}" if texts.plain else ""
    for params, how in ((GREEDY, "greedy"), (NUCLEUS, "top-p 0.9")):
        texts.sampled(params)
        for batch in BATCHES:
            queued, answered = texts.both(batch, context, count)
            bar = DECODE.get((label, batch), NONE) if params is GREEDY else NONE
            what = f"{label}, batch {batch}, {how}, a step"
            moved = least_bytes(config, batch, context, weights)
            rates = ceilings.shares(queued.median, moved, batch * config.flops_per_token(context), matmul=False)
            facts = {**queued.facts(), **rates, "ms at the copy bandwidth": 1e3 * moved / ceilings.copy}
            yield Figure(f"{what}: GPU", queued.median, "ms", bar.bar, True, bar.stretch, note=note, facts=facts)
            yield Figure(
                f"{what}: token to token", answered.median, "ms", bar.bar, True, bar.stretch, note=note,
                facts={**answered.facts(), "tokens/s": 1e3 * batch / answered.median},
            )  # fmt: skip


def _flat(texts: Steps, name: str, contexts: Sequence[int], count: int) -> Iterator[Figure]:
    """The largest time over the smallest, less 1, of steps at several lengths of text, visited in turn, so that a GPU
    that slows down does so for all."""
    texts.fill(max(contexts))
    texts.sampled(GREEDY)
    for batch in (max(BATCHES), 1):
        texts.queued(batch, contexts[0], WARM_UP)
        visits: dict[int, list[float]] = {context: [] for context in contexts}
        for _ in range(ROUNDS):
            for context in contexts:
                visits[context].append(texts.queued(batch, context, count // 2).median)
        medians = {context: statistics.median(times) for context, times in visits.items()}
        spread = max(medians.values()) / min(medians.values()) - 1
        facts = {"ms by context": medians, "visits": visits}
        title = f"{name}, batch {batch}, {contexts[0]:,} .. {contexts[-1]:,} tokens: spread"
        yield Figure(title, spread, "", FLAT.bar, facts=facts)

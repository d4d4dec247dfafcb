"""Our models as lm-evaluation-harness's model class ``samba_lm``: importing this module registers it.

The package lm_eval is an extra (``pip install 'samba-lm[harness]'``). Its versions after 0.4.13 find this class by an
entry point of ours (pyproject.toml); those before have no way for another package to announce a model: see
``__main__.py`` beside this file for its command with ours in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from samba_lm import checkpoint
from samba_lm.errors import UserError
from samba_lm.eval.harness.answers import Answers
from samba_lm.eval.harness.scoring import Likelihood, Question, Scorer, windows
from samba_lm.eval.harness.writing import Prompt, sampling, write
from samba_lm.model import SambaLM
from samba_lm.quantization import quantize as quantize_model
from samba_lm.templates import FolderTemplate, Said, folder_template
from samba_lm.tokenizer import Tokenizer

OnProgress = Callable[[float], None]

MAX_GEN_TOKENS = 256
"""Tokens of an answer, where a task does not say how many."""


@register_model("samba_lm")
class HarnessLM(TemplateLM):
    """A checkpoint, as ``--model samba_lm --model_args pretrained=CKPT,...`` names it.

    Args:
        pretrained: a checkpoint's folder, or a model (then with its ``tokenizer``).
        device: auto (the GPU if there is one), cpu, cuda or cuda:N.
        dtype: float32 or bfloat16; by default the weights stay as they are.
        quantize: int8 or int4: the large weights are kept in so many bits.
        batch_size: texts read or written at once; auto: as many as fit. Changes results by no more than rounding.
        max_length: tokens that a prediction may be made from; None: all there are, or what full attention holds. With
            it, longer contexts lose their beginning, and rolling likelihoods are taken in windows, as the harness does.
        max_gen_toks: tokens of an answer where a task says nothing.
        seed: of drawn answers.
        chunk: tokens of a text read at once.

    Raises UserError for a checkpoint that is none, or has no tokenizer.
    """

    def __init__(
        self,
        pretrained: str | SambaLM,
        tokenizer: Tokenizer | None = None,
        device: str | None = None,
        dtype: str | None = None,
        quantize: str | None = None,
        batch_size: int | str | None = "auto",
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = MAX_GEN_TOKENS,
        seed: int = 0,
        chunk: int = 4096,
    ) -> None:
        super().__init__()
        self.name = "The model"
        self.chat: FolderTemplate | None = None
        if isinstance(pretrained, SambaLM):
            model = pretrained
        else:
            self.name = str(pretrained)
            model, tokenizer = checkpoint.load(self.name, device=_device(device), dtype=_dtype(dtype))
            if quantize is not None:
                quantize_model(model, quantize)
        if tokenizer is None:
            raise UserError(f"{self.name} has no tokenizer, so it cannot read text: put its tokenizer.json there.")
        if not isinstance(pretrained, SambaLM):
            folder = Path(self.name)
            self.chat = folder_template(checkpoint.latest_step(folder) or folder, tokenizer)
        self.samba, self._own = model.eval(), tokenizer
        self._device = model.device
        self._batch = None if batch_size in (None, "auto") else _whole("batch_size", batch_size)
        self._limit = None if max_length is None else _whole("max_length", max_length)
        if self._limit is None and not model.config.constant_state:
            self._limit = model.config.max_context
        self._max_gen_toks, self._seed = _whole("max_gen_toks", max_gen_toks), seed
        self._scorer = Scorer(model, batch=self._batch, chunk=_whole("chunk", chunk))
        self._templated = False
        self.progress: OnProgress | None = None
        """Told of the share that is done of each kind of request; None: a bar of the harness's kind shows it."""
        self.answers: Answers | None = None
        """What keeps the answers, and knows some already."""

    # What TemplateLM asks for.

    @property
    def eot_token_id(self) -> int:
        return self._own.eos_id

    @property
    def max_length(self) -> int:
        return self._limit or 1 << 40

    @property
    def max_gen_toks(self) -> int:
        return self._max_gen_toks

    @property
    def batch_size(self) -> int | str:
        return self._batch or "auto"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; none is added. Special tokens are such only in what the chat template wrote."""
        if self._templated and self.chat is not None:
            return self.chat.encode_text(string).tolist()
        ids: list[int] = self._own.encode(string).tolist()
        return ids

    def tok_decode(self, tokens: Sequence[int], **_: Any) -> str:
        return self._own.decode(tokens)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """How likely continuations are after contexts; the harness's rules say where the one ends in tokens."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str] | None, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        questions = [Question(self._fit(context, len(after)), after) for _, context, after in requests]
        with self._told("likelihoods") as tell:
            return [(answer.logprob, answer.greedy) for answer in self._likelihoods(questions, tell)]

    def _likelihoods(self, questions: list[Question], tell: OnProgress) -> list[Likelihood]:
        if self.answers is None:
            return self._scorer.ask(questions, tell)
        return self.answers.likelihoods(self._scorer, questions, tell)

    def _fit(self, context: list[int], room: int) -> list[int]:
        """As much of the end of a context as is read before ``room`` tokens."""
        if self._limit is None or len(context) + room <= self._limit + 1:
            return context
        if room > self._limit:
            raise UserError(
                f"A continuation has {room} tokens, but at most {self._limit} can be read at once: give a larger "
                "max_length, raise max_context in the model's config.json, or use a model with a window."
            )
        return context[-(self._limit + 1 - room) :]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts: each token after all before it, or all that ``max_length`` lets in."""
        questions: list[Question] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            own = windows(self.tok_encode(request.args[0]), self.prefix_token_id, self._limit)
            questions += own
            owners += [i] * len(own)
        sums = [0.0] * len(requests)
        with self._told("rolling likelihoods") as tell:
            for i, answer in zip(owners, self._likelihoods(questions, tell), strict=True):
                sums[i] += answer.logprob
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context; see ``writing.sampling`` for what a task may ask."""
        prompts = []
        for i, request in enumerate(requests):
            context, options = request.args
            params = sampling(options, self._max_gen_toks, self._seed + i)
            ids = self.tok_encode(context) or [self._own.eos_id]
            if self._limit is not None:
                most = self._limit - (params.max_tokens or 0)
                if most < 1:
                    raise UserError(
                        f"A task asks for {params.max_tokens} new tokens, but the model holds {self._limit}: ask for "
                        "fewer with max_gen_toks, or raise max_length."
                    )
                ids = ids[-most:]
            prompts.append(Prompt(ids, params))
        with self._told("texts") as tell:
            make = write if self.answers is None else self.answers.texts
            return make(self.samba, self._own, prompts, slots=self._batch, progress=tell)

    @contextmanager
    def _told(self, what: str) -> Iterator[OnProgress]:
        """Yield what is to be told of the progress."""
        if self.progress is not None:
            yield self.progress
            return
        with tqdm(total=100, desc=what, unit="%", disable=None) as bar:  # None: only on a terminal
            yield lambda share: bar.update(100 * share - bar.n) and None

    # Conversations, and what the harness writes down.

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Raises UserError for a checkpoint without a template."""
        return self._template().text([Said(one["role"], one["content"]) for one in chat_history], add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        self._templated = bool(chat_template)
        return self._template().source if chat_template else None

    def _template(self) -> FolderTemplate:
        if self.chat is None:
            raise UserError(
                f"{self.name} has no chat template, being a base model: ask it without one, or put a "
                "chat_template.jinja beside its tokenizer."
            )
        self._templated = True
        return self.chat

    @property
    def tokenizer_name(self) -> str:
        template = "" if self.chat is None else f"-{self.chat.sha256[:16]}"
        return f"samba_lm-{self._own.fingerprint()[:16]}{template}"

    def get_model_info(self) -> dict[str, Any]:
        config = self.samba.config
        return {
            "model_num_parameters": config.parameters(),
            "model_dtype": str(self.samba.dtype),
            "model_quantized": self.samba.quantized,
            "model_config_sha256": config.fingerprint(),
            "tokenizer_sha256": self._own.fingerprint(),
            "max_length": self._limit,
        }


def unchanged(documents: Any) -> Any:
    """A task's ``process_docs`` that does nothing: a task file that names it has this module imported."""
    return documents


def _device(name: str | None) -> str:
    """What to run on. The harness's command says cuda:0 where nothing was said, GPU or not."""
    if not torch.cuda.is_available():
        return "cpu"
    return "cuda" if name in (None, "auto") else str(name)


def _dtype(name: str | None) -> torch.dtype | None:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name in (None, "auto"):
        return None
    if name not in known:
        raise UserError(f"dtype={name}: expected {' or '.join(known)}.")
    return known[str(name)]


def _whole(name: str, value: int | str) -> int:
    if not str(value).isdecimal() or int(value) < 1:
        raise UserError(f"{name}={value}: expected a whole number of at least 1.")
    return int(value)

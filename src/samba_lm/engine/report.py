"""How likely tokens were, and which would have been the likeliest."""

from __future__ import annotations

from torch import Tensor

from samba_lm.engine.request import Token
from samba_lm.engine.transfer import Arriving


class Report:
    """On tokens [n] in the light of logits [n, V]: worked out on their device, told when it is asked for."""

    def __init__(self, logits: Tensor, ids: Tensor, count: int, vocab_size: int) -> None:
        """``count``: of the likeliest tokens in each place. ``vocab_size``: columns from here on are padding."""
        logprobs = logits[:, :vocab_size].float().log_softmax(-1)
        own = logprobs.gather(1, ids.clamp(0, vocab_size - 1)[:, None])[:, 0]
        values, top = logprobs.topk(min(count, vocab_size), dim=-1)
        self._arriving = Arriving(ids, own, values, top)

    def tokens(self) -> list[Token]:
        """The tokens, with their log-probabilities and the likeliest in their places."""
        return [
            Token(token, logprob, tuple(zip(best, value, strict=True)))
            for token, logprob, value, best in zip(*self._arriving.lists(), strict=True)
        ]

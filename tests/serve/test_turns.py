"""Which conversation's state the next turn starts from."""

from __future__ import annotations

import numpy as np
from serving import make_model

from samba_lm.generation.prefill import Reader
from samba_lm.serve.turns import Turns


def test_turns_are_found_by_their_longest_beginning() -> None:
    model = make_model()
    size = model.init_state(1).nbytes()
    turns = Turns(3 * size)
    tokens = np.arange(100)

    def reader(length: int) -> Reader:
        return Reader(model.init_state(1), [length])

    assert turns.find("a", tokens) is None
    for length in (10, 50, 100):
        turns.put("a", tokens[:length], reader(length))
    assert [getattr(turns.find("a", tokens[:n]), "length", None) for n in (5, 10, 11, 50, 51, 100)] == [
        None, None, 10, 10, 50, 50,
    ]  # fmt: skip
    assert turns.find("b", tokens) is None
    other = tokens.copy()
    other[20] = 0
    found = turns.find("a", other)
    assert found is not None
    assert (found.length, found.reader.lengths) == (10, [10])
    turns.put("a", tokens[:60], reader(60))  # 50 was used longest ago... but for 100, which nobody asked for since
    assert turns.nbytes == 3 * size
    assert len(turns) == 3
    turns.put("a", tokens[:60], reader(60))
    assert len(turns) == 3
    none = Turns(size - 1)
    none.put("a", tokens, reader(100))
    assert len(none) == 0

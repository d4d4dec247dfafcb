"""Chat: the state between turns is that of a model which has read exactly the conversation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from samba_lm.errors import UserError
from samba_lm.generation import chat
from samba_lm.generation.chat import ChatSession, ChatTemplate
from samba_lm.generation.params import SamplingParams
from samba_lm.tokenizer import Tokenizer

# Stop strings that begin often and are complete seldom, out of the letters the model is kept to.
TEMPLATE = ChatTemplate(user="Q{text}A:", end="|", stop=("\nab", "ba\n\n"))


def assert_state_is_the_text(session: ChatSession, model, tokenizer: Tokenizer) -> None:
    ids = model.tokens(session.reader.lengths[0])
    assert tokenizer.decode(ids) == session.text
    # A fork reads a probe; so does a fresh state that has read the same tokens in one go.
    probe = torch.tensor([[1, 2, 3, 97, 98, 10]])
    with torch.inference_mode():
        want, _ = type(model).__mro__[1].forward(model, torch.tensor([ids + probe[0].tolist()]))
        state = session.reader.state.fork()
        got = torch.stack([model.step(token, state) for token in probe.T], dim=1)
    torch.testing.assert_close(got, want[:, -probe.shape[1] :], rtol=1e-4, atol=1e-4)


@pytest.fixture(params=["byte", "bpe"])
def either(request: pytest.FixtureRequest, tokenizer: Tokenizer, bpe: Tokenizer) -> Tokenizer:
    return tokenizer if request.param == "byte" else bpe


@pytest.fixture
def talker(make_model: Callable, either: Tokenizer):
    model = make_model(either.vocab_size)
    letters = [i for i in range(either.vocab_size) if set(either.decode([i]) or "?") <= set("ab\nse t")]
    model.allow([*letters, either.eos_id])
    return model


def test_after_every_ending_the_state_is_that_of_reading_the_conversation(talker, either) -> None:
    endings = set()
    for seed in range(12):
        params = SamplingParams(seed=seed, max_tokens=25, repetition_penalty=1.2)
        session = ChatSession(talker, either, system="be kind", template=TEMPLATE, params=params)
        for message in ("sea?", "salt", "tea"):
            answer = "".join(session.ask(message))
            assert session.text.endswith(f"Q{message}A:{answer}")
            assert not any(stop in answer for stop in TEMPLATE.stop)
            assert_state_is_the_text(session, talker, either)
            endings.add(len(either.encode(answer)) >= 20)
        assert session.text.startswith("be kind\n\nQsea?A:")
    assert endings == {True, False}  # some answers ran to their limit, some were stopped


def test_leaving_an_answer_keeps_exactly_what_was_shown(talker, either) -> None:
    for stay in range(1, 12):
        params = SamplingParams(seed=stay, max_tokens=None, stop_at_eos=False)
        session = ChatSession(talker, either, template=TEMPLATE, params=params)
        answer = session.ask("sea")
        shown = "".join(piece for piece, _ in zip(answer, range(stay), strict=False))
        answer.close()
        assert session.text.startswith("QseaA:" + shown)
        assert len(session.text) - len("QseaA:" + shown) <= 12  # zip may have taken one piece more
        assert_state_is_the_text(session, talker, either)
        left = session.ask("and now")
        next(left)
        next(session.ask("again"))  # ends the turn that was left open
        assert session.text.count("Q") == 3
        session.reset()
        assert (session.text, session.tokens_fed) == ("", 0)


def test_half_a_character_is_taken_back(model, tokenizer) -> None:
    model.allow([*"😀".encode()])
    for limit in range(1, 9):
        session = ChatSession(model, tokenizer, params=SamplingParams(max_tokens=limit, seed=limit))
        list(session.ask("a"))
        assert_state_is_the_text(session, model, tokenizer)


def test_a_turn_feeds_only_its_new_tokens(model, tokenizer) -> None:
    model.allow(list(b"abc"))
    session = ChatSession(model, tokenizer, params=SamplingParams(max_tokens=20))
    list(session.ask("x" * 500))
    first = session.tokens_fed
    assert first == len("User: " + "x" * 500 + "\nAssistant:") + 20
    list(session.ask("y"))
    assert session.tokens_fed - first == len("\nUser: y\nAssistant:") + 20
    assert session.tokens_fed == session.reader.lengths[0]


def test_an_error_takes_the_whole_turn_back(model, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    model.allow(list(b"abc"))
    session = ChatSession(model, tokenizer, params=SamplingParams(max_tokens=8))
    list(session.ask("first"))
    before = session.text
    advance, calls = chat.advance, []

    def interrupted(*args: object) -> None:
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        advance(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(chat, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(session.ask("second"))
    assert session.text == before
    assert_state_is_the_text_after_reread(session, model, tokenizer)


def assert_state_is_the_text_after_reread(session: ChatSession, model, tokenizer: Tokenizer) -> None:
    # The record of positions was overwritten by the turn taken back; bytes are their own record.
    model.read.update(enumerate(tokenizer.encode(session.text).tolist()))
    assert_state_is_the_text(session, model, tokenizer)


def test_braces_in_a_message_are_text(model, tokenizer) -> None:
    session = ChatSession(model, tokenizer, params=SamplingParams(max_tokens=1))
    list(session.ask("what is {text} or {0}?"))
    assert session.text.startswith("User: what is {text} or {0}?\nAssistant:")


def test_a_template_without_a_place_for_the_text_is_refused() -> None:
    with pytest.raises(UserError, match="user='Hello' has no place"):
        ChatTemplate(user="Hello")

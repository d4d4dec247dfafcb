"""Chat: the state between turns is that of a model which has read exactly the conversation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from samba_lm.errors import UserError
from samba_lm.generation import chat
from samba_lm.generation.chat import ChatSession
from samba_lm.generation.params import SamplingParams
from samba_lm.templates import PlainTemplate, PlainWords
from samba_lm.tokenizer import Tokenizer

# Stop strings that begin often and are complete seldom, out of the letters the model is kept to.
WORDS = PlainWords(user="Q{text}A:", end="|", stop=("\nab", "ba\n\n"))


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
        session = ChatSession(talker, either, system="be kind", template=PlainTemplate(either, WORDS), params=params)
        for message in ("sea?", "salt", "tea"):
            answer = "".join(session.ask(message))
            assert session.text.endswith(f"Q{message}A:{answer}")
            assert not any(stop in answer for stop in WORDS.stop)
            assert_state_is_the_text(session, talker, either)
            endings.add(len(either.encode(answer)) >= 20)
        assert session.text.startswith("be kind\n\nQsea?A:")
    assert endings == {True, False}  # some answers ran to their limit, some were stopped


def test_leaving_an_answer_keeps_exactly_what_was_shown(talker, either) -> None:
    for stay in range(1, 12):
        params = SamplingParams(seed=stay, max_tokens=None, stop_at_eos=False)
        session = ChatSession(talker, either, template=PlainTemplate(either, WORDS), params=params)
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
        PlainWords(user="Hello")


def talk(session: ChatSession, *messages: str) -> list[str]:
    return ["".join(session.ask(message)) for message in messages]


def test_a_turn_is_taken_back_as_if_it_had_never_been(talker, either) -> None:
    params = SamplingParams(seed=3, max_tokens=20, repetition_penalty=1.3)
    session = ChatSession(talker, either, system="be kind", template=PlainTemplate(either, WORDS), params=params)
    texts, answers = [""], []
    for message in ("sea?", "salt", "tea"):
        answers += talk(session, message)
        texts.append(session.text)
    for text, message, answer in reversed(list(zip(texts, ("sea?", "salt", "tea"), answers, strict=False))):
        assert session.undo() == message
        assert session.text == text
        assert talk(session, message) == [answer]  # the same draw from the same state, penalties included
        session.undo()
    assert session.turns == 0
    assert session.token_ids.size == session.reader.lengths[0] == 0
    with pytest.raises(UserError, match="no turn to take back"):
        session.undo()


def test_the_states_for_taking_back_do_not_pile_up(model, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    session = ChatSession(model, tokenizer, params=SamplingParams(max_tokens=2))
    talk(session, *"abcdefghijkl")
    assert "".join(session.undo() for _ in range(chat.UNDO_TURNS)) == "lkjihgfe"
    with pytest.raises(UserError, match="Only the last 8 turns"):
        session.undo()
    monkeypatch.setattr(chat, "UNDO_BYTES", 1)
    talk(session, *"xyz")
    assert session.undo() == "z"
    with pytest.raises(UserError, match="Only the last"):
        session.undo()


def test_a_fork_goes_its_own_way(talker, either) -> None:
    params = SamplingParams(max_tokens=15, presence_penalty=0.5)
    session, twin = (
        ChatSession(talker, either, template=PlainTemplate(either, WORDS), params=params) for _ in range(2)
    )
    talk(session, "sea?"), talk(twin, "sea?")
    fork = session.fork()
    talk(fork, "another", "way")
    fork.undo()
    assert talk(session, "and", "so on") == talk(twin, "and", "so on")
    assert session.text == twin.text
    assert fork.text.startswith("Qsea?A:")
    assert "Qanother" in fork.text
    assert "Qway" not in fork.text
    fork.undo()
    fork.undo()
    assert (fork.turns, session.turns) == (0, 3)


def test_the_token_ids_are_those_in_the_state(talker, either) -> None:
    for seed in range(8):
        session = ChatSession(
            talker, either, template=PlainTemplate(either, WORDS), params=SamplingParams(seed=seed, max_tokens=25)
        )
        talk(session, "sea?", "salt", "tea")
        assert session.token_ids.tolist() == talker.tokens(session.reader.lengths[0])
        session.undo()
        assert either.decode(session.token_ids) == session.text


def test_options_change_from_the_next_answer_on(model, tokenizer) -> None:
    model.allow(list(b"abcdef"))
    calm, other = SamplingParams(max_tokens=30), SamplingParams(max_tokens=30, repetition_penalty=3, seed=5)
    session = ChatSession(model, tokenizer, params=calm)
    talk(session, "one")
    session.params = other
    later = talk(session, "two")
    # The same tokens, with the penalty from the start on.
    both = ChatSession(model, tokenizer, params=calm.replace(repetition_penalty=1.0001))
    talk(both, "one")
    both.params = other
    assert talk(both, "two") == later
    assert session.params is other


def test_a_system_text_may_come_later(model, tokenizer) -> None:
    session = ChatSession(model, tokenizer, params=SamplingParams(max_tokens=0))
    talk(session, "one")
    session.system = "Be kind."
    talk(session, "two", "three")
    assert session.text == ("User: one\nAssistant:\nBe kind.\n\nUser: two\nAssistant:\nUser: three\nAssistant:")
    session.undo()
    session.undo()
    talk(session, "again")  # what was taken back with its message is said with the next
    assert session.text.endswith("\nBe kind.\n\nUser: again\nAssistant:")
    session.reset()
    talk(session, "first")
    assert session.text.startswith("Be kind.\n\nUser: first")
    session.system = None
    session.reset()
    talk(session, "first")
    assert session.text.startswith("User: first")


def test_a_text_is_gone_on_with(model, tokenizer) -> None:
    model.allow(list(b"abc"))
    params = SamplingParams(max_tokens=10, repetition_penalty=2)
    session = ChatSession(model, tokenizer, system="Be kind.", params=params)
    talk(session, "one", "two")
    other = ChatSession(model, tokenizer, system="Be kind.", params=params)
    other.resume(session.text)
    assert (other.turns, other.token_ids.tolist()) == (0, session.token_ids.tolist())
    assert talk(other, "three") == talk(session, "three")
    assert other.text == session.text
    for text, message in (("", "empty"), ("\ud800", "surrogate")):
        with pytest.raises(UserError, match=message):
            other.resume(text)
    talk(other, "anew")
    assert other.text.startswith("Be kind.\n\nUser: anew")


def test_the_time_of_a_turn(model, tokenizer) -> None:
    session = ChatSession(model, tokenizer, params=SamplingParams(max_tokens=9, stop_at_eos=False))
    model.allow(list(b"abc"))
    talk(session, "hello")
    timing = session.timing
    assert (timing.prompt_tokens, timing.new_tokens, timing.finish) == (22, 9, "length")
    assert timing.read_seconds > 0
    assert timing.decode_seconds > 0
    next(session.ask("more"))
    session.leave()
    assert (session.timing.new_tokens, session.timing.finish, session.turns) == (1, None, 2)

"""The openai package, as its users call it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

openai = pytest.importorskip("openai")

from serving import Server, make_model, wait_until  # noqa: E402

import samba_lm  # noqa: E402
from samba_lm.generation.chat import ChatSession  # noqa: E402
from samba_lm.generation.params import SamplingParams  # noqa: E402
from samba_lm.tokenizer import ByteTokenizer  # noqa: E402

TOKENIZER = ByteTokenizer()
TEXT = "the sea is salt "
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def client(plain: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{plain.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def model() -> samba_lm.SambaLM:
    return make_model()


def test_completions_are_the_models(client: openai.OpenAI, model: samba_lm.SambaLM) -> None:
    params = SamplingParams(max_tokens=20, temperature=0.7, top_p=0.9, seed=5, stop_at_eos=False)
    expected = samba_lm.generate(model, TOKENIZER, TEXT, params)
    options = {"max_tokens": 20, "temperature": 0.7, "top_p": 0.9, "seed": 5, "extra_body": {"ignore_eos": True}}
    whole = client.completions.create(model="tiny", prompt=TEXT, **options)
    assert whole.choices[0].text == expected
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (16, 20, 36)
    ids = TOKENIZER.encode(TEXT).tolist()
    assert client.completions.create(model="tiny", prompt=ids, **options).choices[0].text == expected
    several = client.completions.create(model="tiny", prompt=[TEXT, "x", TEXT], **options)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert several.choices[0].text == several.choices[2].text == expected
    copies = client.completions.create(model="tiny", prompt=[ids, [65]], n=3, **options)
    assert len({choice.text for choice in copies.choices}) == 6
    assert copies.choices[0].text == expected
    assert copies.usage is not None
    assert copies.usage.prompt_tokens == 17
    chunks = list(
        client.completions.create(
            model="tiny", prompt=TEXT, stream=True, stream_options={"include_usage": True}, **options
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == expected
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


def test_the_model_says_what_it_is(client: openai.OpenAI, model: samba_lm.SambaLM) -> None:
    (told,) = client.models.list().data
    assert told.id == "tiny"
    facts = told.model_extra
    assert facts is not None
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["vocab_size"] == model.config.vocab_size
    assert facts["state_bytes"] == model.init_state(1).nbytes()
    assert facts["constant_state"] is True
    assert facts["chat_template"] is False
    assert client.models.retrieve("tiny") == told
    with pytest.raises(openai.BadRequestError, match=f"limit of {facts['max_tokens']}"):
        client.completions.create(model="tiny", prompt="a", max_tokens=facts["max_tokens"] + 1)


def test_echo_and_logprobs(client: openai.OpenAI, model: samba_lm.SambaLM) -> None:
    got = client.completions.create(model="tiny", prompt=TEXT, max_tokens=3, temperature=0, echo=True, logprobs=2)
    choice = got.choices[0]
    assert choice.text.startswith(TEXT)
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert logprobs.tokens[:16] == list(TEXT)
    assert logprobs.text_offset == sorted(logprobs.text_offset or [])
    expected = model(torch.tensor(TOKENIZER.encode(TEXT))[None])[0][0, :, :257].detach().log_softmax(-1)
    assert logprobs.token_logprobs[0] is None
    for place, token in enumerate(TOKENIZER.encode(TEXT).tolist()[1:]):
        assert logprobs.token_logprobs[place + 1] == pytest.approx(float(expected[place, token]), abs=1e-4)
        assert max(logprobs.top_logprobs[place + 1].values()) == pytest.approx(float(expected[place].max()), abs=1e-4)
    scored = client.completions.create(model="tiny", prompt=[TEXT, TEXT], max_tokens=0, echo=True, logprobs=0, n=2)
    assert [one.text for one in scored.choices] == [TEXT] * 4
    assert all(
        one.logprobs and one.logprobs.token_logprobs[1:] == logprobs.token_logprobs[1:16] for one in scored.choices
    )  # type: ignore[index]


def test_offsets_count_characters(client: openai.OpenAI) -> None:
    told = client.completions.create(model="tiny", prompt="\u00e9a\u20acb", max_tokens=0, echo=True, logprobs=0)
    logprobs = told.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.text_offset == [0, 0, 1, 2, 2, 2, 3]  # two bytes, one, three, one


def test_stop_and_bias(client: openai.OpenAI) -> None:
    free = client.completions.create(model="tiny", prompt="a", max_tokens=30, temperature=0, logit_bias={"120": 100})
    assert free.choices[0].text == "x" * 30
    stopped = client.completions.create(model="tiny", prompt="a", logit_bias={"120": 100}, stop=["no", "xxx"])
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == ("", "stop")


def test_chat_is_the_terminals(client: openai.OpenAI, model: samba_lm.SambaLM) -> None:
    session = ChatSession(model, TOKENIZER, "Be brief.", params=SamplingParams(max_tokens=12, temperature=0))
    expected = "".join(session.ask("hi"))
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
    ]
    options = {"model": "tiny", "messages": messages, "max_tokens": 12, "temperature": 0}
    assert client.chat.completions.create(**options).choices[0].message.content == expected
    chunks = client.chat.completions.create(stream=True, **options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


def test_a_turn_is_not_read_twice(client: openai.OpenAI, plain: Server) -> None:
    letters = {str(i): -100.0 for i in range(257) if not 97 <= i <= 122}
    options = {"model": "tiny", "max_tokens": 30, "temperature": 0, "logit_bias": letters}
    messages = [{"role": "user", "content": "a story that nobody has told, " * 20}]
    first = client.chat.completions.create(messages=messages, **options)
    assert first.usage is not None
    assert first.usage.prompt_tokens_details is not None
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    # The plain template puts a space before what a person wrote; the model's own words begin as they are.
    content = " " + (first.choices[0].message.content or "")
    messages += [{"role": "assistant", "content": content}, {"role": "user", "content": "go on"}]
    second = client.chat.completions.create(messages=messages, **options)
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens
    third = client.chat.completions.create(messages=messages, **options)
    assert third.choices[0].message.content == second.choices[0].message.content
    before = plain.gauge("samba_prompt_tokens_total")
    client.chat.completions.create(messages=[*messages, {"role": "user", "content": "!"}], **options)
    assert plain.gauge("samba_prompt_tokens_total") - before < 60


def test_chat_logprobs(client: openai.OpenAI) -> None:
    got = client.chat.completions.create(model="tiny", messages=HI, max_tokens=5, logprobs=True, top_logprobs=2, n=2)
    assert len(got.choices) == 2
    for choice in got.choices:
        assert choice.logprobs is not None
        tokens = choice.logprobs.content
        assert tokens is not None
        assert bytes(byte for token in tokens for byte in token.bytes or []).decode(errors="replace")
        assert all(len(token.top_logprobs) == 2 for token in tokens)


def test_json_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}, "n": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["colour", "n"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "paint", "schema": schema, "strict": True}}
    for seed in range(3):
        got = client.chat.completions.create(
            model="tiny", messages=HI, response_format=wanted, seed=seed, max_tokens=60
        )
        answer = json.loads(got.choices[0].message.content or "")
        assert answer["colour"] in ("red", "green")
        assert 0 <= answer["n"] <= 9
        assert got.choices[0].finish_reason == "stop"
    chunks = client.chat.completions.create(
        model="tiny", messages=HI, response_format=wanted, max_tokens=60, stream=True
    )
    assert set(json.loads("".join(chunk.choices[0].delta.content or "" for chunk in chunks))) == {"colour", "n"}
    wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objekt"}}}
    with pytest.raises(openai.BadRequestError, match="cannot be followed"):
        client.chat.completions.create(model="tiny", messages=HI, response_format=wrong)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": 3}, openai.BadRequestError, "temperature = 3"),
        ({"model": "gpt-4"}, openai.NotFoundError, "There is no model 'gpt-4'"),
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "Did you mean 'temperature'"),
        ({"suffix": "x"}, openai.BadRequestError, "suffix"),
        ({"best_of": 3}, openai.BadRequestError, "best_of"),
        ({"prompt": []}, openai.BadRequestError, "prompt must be"),
        ({"prompt": [[]]}, openai.BadRequestError, "prompt must be"),
        ({"prompt": [300]}, openai.BadRequestError, "Token id 300"),
        ({"max_tokens": 100000}, openai.BadRequestError, "limit of 4096"),
        ({"n": 100}, openai.BadRequestError, "limit of 16"),
        ({"logit_bias": {"900": 1}}, openai.BadRequestError, "token 900"),
        ({"logprobs": 1, "echo": True, "stream": True}, openai.BadRequestError, "cannot be streamed"),
        ({"extra_body": {"context_id": "ctx-" + "a" * 22}}, openai.NotFoundError, "There is no context"),
    ],
)
def test_errors(client: openai.OpenAI, options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        client.completions.create(**({"model": "tiny", "prompt": "a"} | options))  # type: ignore[call-overload]
    assert isinstance(caught.value, openai.APIStatusError)
    assert caught.value.body["type"]  # type: ignore[index]


def test_leaving_a_stream_frees_its_slot(client: openai.OpenAI, plain: Server) -> None:
    for _ in range(3):
        stream = client.completions.create(
            model="tiny", prompt="a", max_tokens=4096, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        assert plain.gauge("samba_running") == 1
        stream.close()
        assert wait_until(lambda: plain.gauge("samba_running") == 0, 10)


def test_leaving_a_whole_answer_frees_its_slot(client: openai.OpenAI, plain: Server) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).completions.create(
            model="tiny", prompt="a", max_tokens=4096, n=4, extra_body={"ignore_eos": True}
        )
    assert wait_until(lambda: plain.gauge("samba_running") == 0, 10)

"""What goes over the wire, field by field; the OpenAPI document is made from these classes.

A field that OpenAI's interface does not have is refused, so that a misspelling is no silent default. Those that it has
and that would change nothing here (``user``, ``metadata``, ``store``, ``service_tier``) are taken and ignored; those
that we cannot honour are refused unless they are at their default.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from samba_lm.templates import Said

Int = Annotated[int, Field(ge=-(2**63), lt=2**63)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Text = str
StopText = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
ContextId = Annotated[str, StringConstraints(pattern=r"^ctx-[A-Za-z0-9_-]{22}$")]
# A list is given up at its first wrong member: a list of them all would be a thousand times as long as the request.
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


UNIONS = {
    "prompt": "prompt must be a text, a list of texts, token ids, or a list of lists of token ids, none of them empty.",
    "stop": "stop must be a text or a list of at most 16, each of 1 to 1000 characters.",
}
"""What to say of fields that may be of several kinds."""


class Wire(BaseModel):
    """Exact types, no unknown fields, no infinities."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Wire):
    include_usage: bool = False
    include_obfuscation: bool = Field(False, description="Taken and ignored.")


class Sampling(Wire):
    """What completions and chat have in common."""

    model: str | None = Field(None, description="What GET /v1/models names; absent: that model.")
    context_id: ContextId | None = Field(None, description="A context to begin after, see /v1/contexts.")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(None, description="Not OpenAI's.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="Not OpenAI's.")
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = Field(None, description="Not OpenAI's.")
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        dict[Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]]
        | None
    ) = Field(None, max_length=1024)
    seed: Int | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16, fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = Field(False, description="Go on after the end-of-text token. Not OpenAI's.")
    user: str | None = Field(None, description="Taken and ignored.")
    metadata: dict[str, Any] | None = Field(None, description="Taken and ignored.")
    store: bool | None = Field(None, description="Taken and ignored.")
    service_tier: str | None = Field(None, description="Taken and ignored.")


class CompletionRequest(Sampling):
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
    ) = ""
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(None, description="16 where it is absent.")
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = Field(None, description="Only 1.")
    suffix: None = Field(None, description="Not supported.")


class TextPart(Wire):
    type: Literal["text"]
    text: str


class Message(Wire):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    name: str | None = Field(None, description="Taken and ignored.")
    refusal: None = None


def said(messages: Sequence[Message]) -> list[Said]:
    """Messages as a chat template takes them."""
    texts = (
        one.content if isinstance(one.content, str) else "".join(part.text for part in one.content) for one in messages
    )
    return [Said(one.role, text) for one, text in zip(messages, texts, strict=True)]


class JsonSchema(Wire):
    name: Annotated[str, StringConstraints(max_length=64)] = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextFormat(Wire):
    type: Literal["text"]


class JsonObjectFormat(Wire):
    type: Literal["json_object"]


class JsonSchemaFormat(Wire):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class ChatRequest(Sampling):
    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(
        None, description="Where it is absent: as many as the server allows."
    )
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")] | None = (
        None
    )


class PromptDetails(BaseModel):
    cached_tokens: int = Field(description="Tokens of the prompt that were not read again.")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class Likely(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatToken(Likely):
    top_logprobs: list[Likely]


class ChatLogprobs(BaseModel):
    content: list[ChatToken]
    refusal: None = None


class Answer(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: Answer
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["samba-lm"] = "samba-lm"
    vocab_size: int
    parameters: int
    state_bytes: int = Field(description="Memory of one sequence's state.")
    constant_state: bool = Field(description="It stays the same however long a text is.")
    chat_template: bool = Field(description="The model has a template for conversations; else it is a base model.")
    max_tokens: int = Field(description="The most that one answer may have on this server.")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


Title = Annotated[str, StringConstraints(max_length=200)]


class ContextRequest(Wire):
    """A text to read: ``text`` or ``tokens``."""

    text: str | None = None
    tokens: TokenIds | None = None
    title: Title = Field("", description="One printable line.")
    context_id: ContextId | None = Field(None, description="Go on after this one, which stays as it is.")
    stream: bool = Field(False, description="Tell how far it is, as server-sent events.")
    model: str | None = None


class ForkRequest(Wire):
    title: Title | None = None


class Context(BaseModel):
    id: str
    object: Literal["context"] = "context"
    title: str
    created: int
    tokens: int
    bytes: int = Field(description="Memory of its state.")
    token_hash: str = Field(description="sha256 over the token ids that were read.")


class ContextProgress(BaseModel):
    object: Literal["context.progress"] = "context.progress"
    read: int
    total: int


class ContextList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Context]


class ContextDeleted(BaseModel):
    id: str
    object: Literal["context.deleted"] = "context.deleted"
    deleted: Literal[True] = True


class Health(BaseModel):
    status: Literal["ok", "stopping", "failed"]
    waiting: int
    reading: int
    running: int

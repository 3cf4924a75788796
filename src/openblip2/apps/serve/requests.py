"""The fields of requests: the forms of our own endpoints, and the JSON bodies that OpenAI's clients send.

Fields that are not declared here are refused.
"""

import base64
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal
from urllib.parse import unquote

from fastapi import UploadFile
from pydantic import BaseModel, BeforeValidator, Field, model_validator

from openblip2.apps.serve.http import ServeError
from openblip2.inference.attend import By
from openblip2.model.decoding import Decoding

MAX_TEXTS = 64  # in one request, to match or to embed
MAX_TOKENS = 256  # limit of new tokens in one answer
Text = Annotated[str, Field(max_length=20_000)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Inputs = Annotated[list[str], Field(min_length=1, max_length=MAX_TEXTS)]  # the limit on the body limits each text
Tokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
# OpenAI's parameters that the classes below do not declare, with the value that has no effect.
NEUTRAL = {"presence_penalty": 0, "frequency_penalty": 0, "echo": False, "tool_choice": "none"}
NEUTRAL |= {"response_format": {"type": "text"}, "modalities": ["text"]}
NO_EFFECT = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
NO_EFFECT |= {"parallel_tool_calls", "include_obfuscation", "detail"}  # `detail`: the resolution is fixed

# Any media type is accepted, because the content is checked: clients send "image/*" or "application/octet-stream".
DATA_URL = re.compile(r"\s*data:\s*([\w.+-]+/[\w.+*-]+)?\s*(;\s*[\w-]+=(\"[^\"]*\"|[\w.-]+)\s*)*;\s*base64\s*,", re.I)


def is_data_url(text: str) -> bool:
    """Whether a text is a data URL in base64."""
    return DATA_URL.match(text[:300]) is not None


def read_data_url(url: str) -> bytes:
    """The bytes of a data URL. White space, URL-safe and percent-encoded base64, and missing padding are accepted.

    Raises:
        ServeError: it is not a data URL, or its data is not base64.
    """
    if found := DATA_URL.match(url[:300]):
        data = re.sub(r"\s", "", unquote(url[found.end() :])).translate(str.maketrans("-_", "+/")).rstrip("=")
        try:
            return base64.b64decode(data + "=" * (-len(data) % 4), validate=True)
        except ValueError:
            problem = "the data URL of the picture is not valid base64"
    elif url[:20].strip().lower().startswith("data:"):
        problem = "the data URL of the picture is not in base64"
    else:
        problem = "this server does not download pictures from URLs"
    raise ServeError(f"{problem}: send a data URL, data:image/png;base64,...")


def text_as(make: Callable[[str], Any]) -> BeforeValidator:
    """Returns a validator that replaces a text by `make(text)`."""
    return BeforeValidator(lambda value: make(value) if isinstance(value, str) else value)


def refuse_token_ids(value: Any) -> Any:
    """Raises a `ServeError` for token ids, which LangChain sends by default."""
    if isinstance(value, list) and any(isinstance(one, int | list) for one in value):
        raise ServeError("send texts, not token ids (LangChain: check_embedding_ctx_length=False)", param="input")
    return value


class Body(BaseModel, extra="forbid", strict=True):
    """The body of an OpenAI request, or a part of it. An undeclared field is refused if it could change the answer.

    Types are those of JSON: "yes" is not a boolean, and true is not a number. In forms, all fields are texts.
    """

    @model_validator(mode="before")
    @classmethod
    def drop_without_effect(cls, fields: Any) -> Any:
        """Removes null values and undeclared fields without effect. Other undeclared fields are refused."""
        if not isinstance(fields, dict):
            return fields

        def has_effect(name: str, value: Any) -> bool:
            return name not in NO_EFFECT and value not in ({}, [], NEUTRAL.get(name))

        given = {name: value for name, value in fields.items() if value is not None}
        return {name: value for name, value in given.items() if name in cls.model_fields or has_effect(name, value)}


class Sampling(BaseModel, extra="forbid"):
    """How texts are generated: the fields of `/caption`, `/answer` and chats. None = the default."""

    beams: Annotated[int, Field(ge=1, le=5)] | None = None
    max_tokens: Tokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    n: Annotated[int, Field(ge=1, le=8)] = 1
    seed: int | None = None

    def decodings(self, default: Decoding) -> list[Decoding]:
        """How each of the `n` texts is decoded: `default` with the requested changes.

        Texts are sampled if `temperature` is above 0, `top_p` below 1 or `n` above 1; text k has the seed `seed` + k.
        At temperature 0, decoding is greedy unless `beams` is given.

        Raises:
            ServeError: some fields exclude each other.
        """
        changes = {"max_new_tokens": self.max_tokens, "repetition_penalty": self.repetition_penalty}
        how = replace(default, **{name: value for name, value in changes.items() if value is not None})
        if self.temperature == 0 and self.n > 1:
            raise ServeError("n: at temperature 0 all answers are the same; set a higher temperature", param="n")
        if self.temperature == 0:
            return [replace(how, beams=self.beams or 1)]
        if self.temperature is None and self.top_p in (None, 1) and self.n == 1:
            return [replace(how, beams=self.beams or default.beams)]
        if self.beams not in (None, 1):
            raise ServeError("beams: unused by sampling; leave out beams, or temperature, top_p and n", param="beams")
        how = replace(how, beams=1, sample=True, temperature=self.temperature or 1.0, top_p=self.top_p or 1.0)
        return [replace(how, seed=None if self.seed is None else self.seed + k) for k in range(self.n)]


class CaptionForm(Sampling):
    """POST /caption."""

    image: UploadFile
    prompt: Annotated[str, Field(max_length=1000)] | None = None


class AnswerForm(Sampling):
    """POST /answer."""

    image: UploadFile
    question: Text


class MatchForm(BaseModel, extra="forbid"):
    """POST /match."""

    image: UploadFile
    text: Annotated[list[str], Field(min_length=1, max_length=MAX_TEXTS)]


class AttendForm(BaseModel, extra="forbid"):
    """POST /attend."""

    image: UploadFile
    text: Text | None = None
    by: By = "itc"


class SearchForm(BaseModel, extra="forbid"):
    """POST /search."""

    text: Text | None = None
    image: UploadFile | None = None
    best: Annotated[int, Field(ge=1, le=100)] = 12
    rerank: Annotated[int, Field(ge=0, le=64)] = 0

    @model_validator(mode="after")
    def check_query(self) -> "SearchForm":
        """Raises `ServeError` unless there is exactly one query, and if an image is given with `rerank`."""
        if (self.text is None) == (self.image is None):
            raise ServeError("give either a text or an image")
        if self.image is not None and self.rerank:
            raise ServeError("rerank: only possible when the query is a text; leave it out", param="rerank")
        return self


class ImageUrl(Body):
    """A picture as a data URL."""

    url: Annotated[bytes, text_as(read_data_url)]


class MessagePart(Body):
    """A part of a message."""

    type: Literal["text", "image_url"]
    text: Text = ""
    image_url: Annotated[ImageUrl, text_as(lambda url: {"url": url})] | None = None

    @model_validator(mode="after")
    def check_type(self) -> "MessagePart":
        """Raises `ServeError` for a part with a text and a picture, because one of them would be ignored."""
        if self.image_url and (self.text or self.type == "text"):
            message = "a part is either a text or a picture: send the picture alone, in a part of type image_url"
            raise ServeError(message, param="messages")
        return self


class Message(Body):
    """A message of a dialogue."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[MessagePart], text_as(lambda text: [{"type": "text", "text": text}])] = []

    @property
    def text(self) -> str:
        """All texts of the message."""
        return " ".join(part.text for part in self.content if part.type == "text").strip()


class StreamOptions(Body):
    """Options for the end of a stream."""

    include_usage: bool = False


class ChatRequest(Body, Sampling):
    """POST /v1/chat/completions."""

    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=200)]
    max_completion_tokens: Tokens | None = None
    stop: Annotated[list[Stop], text_as(lambda text: [text]), Field(max_length=4)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0

    @model_validator(mode="after")
    def check_combinations(self) -> "ChatRequest":
        """Raises `ServeError` for parameters that exclude each other."""
        if self.stream and self.logprobs:
            raise ServeError("logprobs: streams have none; use stream=false", 400, "unsupported_parameter", "logprobs")
        if self.stream and self.n > 1:
            raise ServeError("n: a stream has only one answer; use stream=false", 400, "unsupported_parameter", "n")
        if self.top_logprobs and not self.logprobs:
            raise ServeError("top_logprobs: set logprobs=true as well", param="top_logprobs")
        if self.messages[-1].role != "user":
            message = f"the last message has the role {self.messages[-1].role}: end with the user's question"
            raise ServeError(message, param="messages")
        if self.max_tokens and self.max_completion_tokens not in (None, self.max_tokens):
            raise ServeError("max_tokens: differs from max_completion_tokens; give only one", param="max_tokens")
        self.max_tokens = self.max_completion_tokens or self.max_tokens
        return self


class EmbeddingRequest(Body):
    """POST /v1/embeddings. An input is a text, or a picture as a data URL."""

    model: str | None = None
    input: Annotated[Inputs, text_as(lambda text: [text]), BeforeValidator(refuse_token_ids)]
    encoding_format: Literal["float", "base64"] = "float"

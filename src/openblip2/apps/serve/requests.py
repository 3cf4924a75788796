"""The bodies of requests that OpenAI's clients send: what is accepted, and which parameters are refused."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from openblip2.apps.serve.http import ServeError

Text = Annotated[str, Field(max_length=20_000)]
Url = Annotated[str, Field(max_length=2**27)]  # the limit of the body is lower
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
# Parameters that we do not have, with the value that changes nothing; None and {} or [] change nothing either.
UNSUPPORTED = {"presence_penalty": 0, "frequency_penalty": 0, "echo": False, "tool_choice": "none"}
UNSUPPORTED |= {"response_format": {"type": "text"}, "modalities": ["text"]}
NO_EFFECT = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
NO_EFFECT |= {"parallel_tool_calls", "include_obfuscation", "detail"}  # `detail`: an image encoder has one resolution


class Strict(BaseModel):
    """A body or a part of one. Parameters that could change the answer and are not declared are refused."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="after")
    def refuse_unsupported(self) -> "Strict":
        """Raises `ServeError` for a parameter that this server cannot honour."""
        for name, value in (self.model_extra or {}).items():
            if name not in NO_EFFECT and value not in (None, {}, [], UNSUPPORTED.get(name)):
                message = f"this server does not support {name[:100]!r}: leave it out"
                message += ", or use repetition_penalty" if name in ("frequency_penalty", "presence_penalty") else ""
                raise ServeError(message, code="unsupported_parameter", param=name[:100])
        return self


class ImageUrl(Strict):
    """Where a picture is."""

    url: Url


class Part(Strict):
    """A part of a message."""

    type: Literal["text", "image_url"]
    text: Text | None = None
    image_url: ImageUrl | Url | None = None

    @model_validator(mode="after")
    def require_image(self) -> "Part":
        """Raises `ServeError` for a picture's part without one."""
        if self.type == "image_url" and self.image_url is None:
            raise ServeError("a part of type image_url has no image_url", param="messages")
        return self


class Message(Strict):
    """A message of a dialogue."""

    role: Literal["system", "developer", "user", "assistant"]
    content: list[Part] = []

    @field_validator("content", mode="before")
    @classmethod
    def make_parts(cls, value: Any) -> Any:
        """A text is one part."""
        return [{"type": "text", "text": value}] if isinstance(value, str) else [] if value is None else value

    @property
    def text(self) -> str:
        """All texts of the message."""
        return " ".join(part.text or "" for part in self.content if part.type == "text").strip()


class StreamOptions(Strict):
    """What a stream ends with."""

    include_usage: bool = False


class ChatRequest(Strict):
    """POST /v1/chat/completions."""

    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=200)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    n: Annotated[int, Field(ge=1, le=8)] | None = None
    seed: int | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def check_combinations(self) -> "ChatRequest":
        """Raises `ServeError` for parameters that exclude each other."""
        if self.logprobs and self.stream:
            raise ServeError("logprobs: a stream has none; use stream=false", 400, "unsupported_parameter", "logprobs")
        if self.stream and (self.n or 1) > 1:
            raise ServeError("n: a stream has one answer; use stream=false", 400, "unsupported_parameter", "n")
        if (self.n or 1) > 1 and self.temperature == 0:
            raise ServeError("n: at temperature 0 all answers are the same; set a higher temperature", param="n")
        if self.top_logprobs and not self.logprobs:
            raise ServeError("top_logprobs: set logprobs=true as well", param="top_logprobs")
        return self


class EmbeddingRequest(Strict):
    """POST /v1/embeddings. An input is a text, or a picture as a data URL."""

    model: str | None = None
    input: Url | Annotated[list[Url], Field(min_length=1, max_length=2048)]
    encoding_format: Literal["float", "base64"] = "float"

    @field_validator("input", mode="before")
    @classmethod
    def refuse_token_ids(cls, value: Any) -> Any:
        """Raises `ServeError` for token ids, which LangChain sends by default."""
        first = value[0] if isinstance(value, list) and value else None
        if isinstance(first, list) or (isinstance(first, int) and not isinstance(first, bool)):
            message = "input: send texts, not token ids (LangChain: check_embedding_ctx_length=False)"
            raise ServeError(message, param="input")
        return value

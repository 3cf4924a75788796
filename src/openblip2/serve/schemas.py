"""What requests of the OpenAI-compatible part may hold. What is not listed is ignored, as other servers do."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

Text = Annotated[str, Field(max_length=20_000)]
Url = Annotated[str, Field(max_length=2**27)]  # the body's own limit is less


class ImageUrl(BaseModel):
    """Where a picture is."""

    url: Url


class Part(BaseModel):
    """A piece of a message."""

    type: Literal["text", "image_url"]
    text: Text | None = None
    image_url: ImageUrl | Url | None = None


class Message(BaseModel):
    """One of a dialogue."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part] | None = None


class StreamOptions(BaseModel):
    """What a stream is to end with."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """POST /v1/chat/completions."""

    model: str = ""
    messages: Annotated[list[Message], Field(min_length=1, max_length=200)]
    max_tokens: Annotated[int, Field(ge=1, le=4096)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=4096)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None


class EmbeddingRequest(BaseModel):
    """POST /v1/embeddings. An input is a text, or a picture as a data URL."""

    model: str = ""
    input: Url | Annotated[list[Url], Field(min_length=1, max_length=2048)]
    encoding_format: Literal["float", "base64"] = "float"

"""The part of the API that OpenAI's clients use: /v1/chat/completions, /v1/embeddings, /v1/models."""

import asyncio
import base64
import json
import struct
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from openblip2.apps.serve.batcher import Limits
from openblip2.apps.serve.errors import ServeError, error_response
from openblip2.apps.serve.jobs import Embed, Write, Written
from openblip2.apps.serve.remote import is_data_url, read_url
from openblip2.apps.serve.requests import ChatRequest, EmbeddingRequest, Message
from openblip2.captioner import CHAT, greedy
from openblip2.model.decoding import Decoding


@dataclass
class Models:
    """What a server's models are called; None where there is none.

    Attributes:
        writer: the stage-2 run.
        matcher: the stage-1 run.
    """

    writer: str | None
    matcher: str | None

    def __post_init__(self) -> None:
        self.created = int(time.time())

    def listed(self) -> dict[str, dict[str, Any]]:
        """The models as OpenAI lists them, by name."""
        about = {"object": "model", "created": self.created, "owned_by": "openblip2"}
        return {name: {"id": name, **about} for name in (self.writer, self.matcher) if name is not None}

    def require(self, name: str | None, asked: str | None = None) -> str:
        """The name of a model that is needed, `writer` or `matcher`.

        Args:
            name: `writer` or `matcher`.
            asked: the model that the client asks for; None or empty = any.

        Raises:
            ServeError: there is none, or the client asks for another.
        """
        stage, option = ("stage-2", "one as RUN") if name == "writer" else ("stage-1", "--matcher")
        model = self.writer if name == "writer" else self.matcher
        if model is None:
            raise ServeError(f"this server has no {stage} run: start it with {option}")
        if asked and asked != model:
            raise ServeError(f"no model {asked[:100]!r} here: use {model!r}", 404, "model_not_found", "model")
        return model


router = APIRouter(prefix="/v1")


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """The models that are served."""
    return {"object": "list", "data": list(request.app.state.models.listed().values())}


@router.get("/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    """One of the models."""
    listed = request.app.state.models.listed()
    if name not in listed:
        raise ServeError(f"no model {name[:100]!r} here: see /v1/models", 404, "model_not_found", "model")
    return listed[name]


@router.post("/chat/completions")
async def chat(request: Request, body: ChatRequest) -> Any:
    """An answer in a dialogue about one picture, as a whole or as a stream."""
    model, batcher = request.app.state.models.require("writer", body.model), request.app.state.batcher
    job = await asyncio.to_thread(write_job, body, batcher.limits)  # a picture may have to be fetched
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        events = _events(batcher.stream(job), job, stop, {**about, "object": "chat.completion.chunk"}, usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
    (written,) = await batcher.answer(request, job)
    text = before(written.text, stop)
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": _reason(written, text, job)}
    choice["logprobs"] = _logprobs(written, text) if body.logprobs else None
    return {**about, "object": "chat.completion", "choices": [choice], "usage": _usage(written)}


@router.post("/embeddings")
async def embeddings(request: Request, body: EmbeddingRequest) -> dict[str, Any]:
    """One vector of length 1 for each text or picture."""
    model, batcher = request.app.state.models.require("matcher", body.model), request.app.state.batcher
    inputs = [body.input] if isinstance(body.input, str) else body.input
    if len(inputs) > batcher.limits.texts:
        raise ServeError(f"{len(inputs)} inputs: send at most {batcher.limits.texts}", param="input")
    jobs = [Embed(picture=read_url(one, False, 0)) if is_data_url(one) else Embed(text=one) for one in inputs]
    data = [
        {"object": "embedding", "index": n, "embedding": vector if body.encoding_format == "float" else _base64(vector)}
        for n, vector in enumerate(await batcher.answer(request, *jobs))
    ]
    return {"object": "list", "model": model, "data": data, "usage": {"prompt_tokens": 0, "total_tokens": 0}}


def write_job(body: ChatRequest, limits: Limits) -> Write:
    """The job of a chat request: the last user message is the question, and system messages are put in front of it.

    Args:
        body: the request. Its picture may be in any message, and the same one in several.
        limits: of tokens and of pictures' addresses.

    Raises:
        ServeError: no picture or several ones, no question, or a parameter that cannot be honoured.
        UserError: a picture that cannot be fetched.
    """
    urls: list[str] = []
    messages = [(message.role, _text(message, urls)) for message in body.messages]
    # The same picture may be written in several ways, so it is compared by content.
    pictures = {read_url(url, False, 0) if is_data_url(url) else url for url in urls}
    if not pictures:
        raise ServeError("no picture: send one in a part of type image_url", param="messages")
    if len(pictures) > 1:
        message = f"{len(pictures)} different pictures: a dialogue is about one, which may come in several messages; "
        raise ServeError(message + "start a new dialogue for another picture", param="messages")
    if messages[-1][0] != "user":
        raise ServeError(
            f"the last message has the role {messages[-1][0]}: end with the user's question", param="messages"
        )
    system = " ".join(text for role, text in messages if role in ("system", "developer"))
    turns: list[tuple[str, str]] = []
    question = ""
    for role, text in messages:
        if role == "user":
            question = f"{question} {text}".strip()
        elif role == "assistant":
            turns.append((question, text))
            question = ""
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    tokens = getattr(body, name) or CHAT.max_new_tokens
    if tokens > limits.tokens:
        raise ServeError(f"{name} {tokens}: this server writes at most {limits.tokens} tokens", param=name)
    how = replace(decoding(body.temperature, body.top_p), max_new_tokens=tokens)
    if body.seed is not None and how.sample:
        raise ServeError(
            "seed: answers cannot be repeated when sampling; use temperature 0", 400, "unsupported_parameter", "seed"
        )
    (picture,) = pictures
    if isinstance(picture, str):
        picture = read_url(picture, limits.remote, limits.bytes)
    best = (body.top_logprobs or 0) if body.logprobs else None
    return Write(picture, how, f"{system} {question}".strip(), tuple(turns), stream=bool(body.stream), logprobs=best)


def decoding(temperature: float | None, top_p: float | None) -> Decoding:
    """As the command line decodes; greedy at temperature 0; sampling if a higher one or a nucleus is asked for."""
    if temperature is None and top_p in (None, 1):
        return CHAT
    if temperature == 0:
        return greedy(CHAT)
    return Decoding(beams=1, sample=True, temperature=temperature or 1.0, top_p=top_p or 1.0)


def before(text: str, stop: tuple[str, ...]) -> str:
    """The text before the first of the stop sequences."""
    return text[: min((at for one in stop if (at := text.find(one)) >= 0), default=None)]


def _text(message: Message, urls: list[str]) -> str:
    if message.content is None or isinstance(message.content, str):
        return (message.content or "").strip()
    for part in message.content:
        if part.type == "image_url":
            if part.image_url is None:
                raise ServeError("a part of type image_url has no image_url", param="messages")
            urls.append(part.image_url if isinstance(part.image_url, str) else part.image_url.url)
    return " ".join(part.text or "" for part in message.content if part.type == "text").strip()


async def _events(
    pieces: AsyncIterator[Any], job: Write, stop: tuple[str, ...], about: dict[str, Any], usage: bool
) -> AsyncIterator[str]:
    def event(delta: dict[str, Any], reason: str | None = None) -> str:
        return _line({**about, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})

    yield event({"role": "assistant", "content": ""})
    text, sent = "", 0
    held = max(map(len, stop), default=1) - 1  # characters that may be the beginning of a stop sequence
    try:
        async for piece in pieces:
            written = None if isinstance(piece, str) else piece
            text += piece if written is None else ""
            shown = before(text, stop)
            end = len(shown) if written is not None or len(shown) < len(text) else len(text) - held
            if end > sent:
                yield event({"content": text[sent:end]})
                sent = end
            if written is not None:
                yield event({}, _reason(written, before(written.text, stop), job))
                if usage:
                    yield _line({**about, "choices": [], "usage": _usage(written)})
    except Exception as error:  # the status is sent already, so the error is an event
        yield f"data: {bytes(error_response(error).body).decode()}\n\n"
    yield "data: [DONE]\n\n"


def _line(event: dict[str, Any]) -> str:
    return f"data: {json.dumps(event, ensure_ascii=False)}\n\n"


def _reason(written: Written, text: str, job: Write) -> str:
    return "length" if text == written.text and written.completion_tokens >= job.decoding.max_new_tokens else "stop"


def _logprobs(written: Written, text: str) -> dict[str, Any]:
    """The tokens of the part of the text that is sent, as OpenAI lists them."""

    def entry(token: str, logprob: float) -> dict[str, Any]:
        return {"token": token, "logprob": max(logprob, -9999.0), "bytes": list(token.encode())}  # JSON has no -inf

    content, length = [], 0
    for token in written.tokens:
        if length >= len(text):  # after a stop sequence
            break
        best = [entry(*one) for one in token.best]
        content.append({**entry(token.text, token.logprob), "top_logprobs": best})
        length += len(token.text)
    return {"content": content, "refusal": None}


def _usage(written: Written) -> dict[str, int]:
    counts = {"prompt_tokens": written.prompt_tokens, "completion_tokens": written.completion_tokens}
    return {**counts, "total_tokens": sum(counts.values())}


def _base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()

"""The part of the API that OpenAI's clients use: /v1/chat/completions, /v1/embeddings, /v1/models."""

import base64
import json
import time
import uuid
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from openblip2.apps.serve.engine import Engine, Reply, Write
from openblip2.apps.serve.http import ServeError, error_response
from openblip2.apps.serve.requests import ChatRequest, EmbeddingRequest, is_data_url, read_data_url
from openblip2.inference.captioner import CHAT

# What a server may lack, and the option that adds it.
LACKS = {"captioner": "no stage-2 run: start it with one", "matcher": "no stage-1 run: start it with --matcher"}
LACKS |= {"index": "no index: start it with --index"}
STARTED = int(time.time())

router = APIRouter(prefix="/v1")


def require_served(request: Request, kind: str, model: str | None = None) -> str:
    """The name of the `captioner`, `matcher` or `index`. Raises `ServeError` if it is missing or not `model`."""
    name = request.app.state.served.get(kind)
    if name is None:
        raise ServeError(f"this server has {LACKS[kind]}")
    if model and model != name:
        raise ServeError(f"there is no model {model[:100]!r}: use {name!r}", 404, "model_not_found", "model")
    return name


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """The models that are served."""
    about = {"object": "model", "created": STARTED, "owned_by": "openblip2"}
    names = dict.fromkeys(name for kind, name in request.app.state.served.items() if kind != "index")
    return {"object": "list", "data": [{"id": name, **about} for name in names]}


@router.get("/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    """One of the models."""
    for one in (await models(request))["data"]:
        if one["id"] == name:
            return one
    raise ServeError(f"there is no model {name[:100]!r}: see /v1/models", 404, "model_not_found", "model")


@router.post("/chat/completions")
async def chat(request: Request, body: ChatRequest) -> Any:
    """An answer in a dialogue about one picture, as a whole or as a stream."""
    name, batcher = require_served(request, "captioner", body.model), request.app.state.batcher
    jobs = write_jobs(body)
    about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
    if body.stream:
        events = _events(batcher.stream(jobs[0]), body, jobs[0], about | {"object": "chat.completion.chunk"})
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
    texts = await batcher.answers(request, jobs)
    choices = []
    for n, written in enumerate(texts):
        text = before_stop(written.text, body)
        message = {"role": "assistant", "content": text, "refusal": None}
        logprobs = _logprobs(written, text) if body.logprobs else None
        reason = _finish_reason(written, text, jobs[n])
        choices.append({"index": n, "message": message, "logprobs": logprobs, "finish_reason": reason})
    return {**about, "object": "chat.completion", "choices": choices, "usage": _usage(texts)}


@router.post("/embeddings")
async def embeddings(request: Request, body: EmbeddingRequest) -> dict[str, Any]:
    """One vector of length 1 for each text or picture."""
    name = require_served(request, "matcher", body.model)
    inputs = [read_data_url(one) if is_data_url(one) else one for one in body.input]
    (vectors,) = await request.app.state.batcher.answers(request, [partial(Engine.embed, inputs=inputs)])
    if body.encoding_format == "base64":
        vectors = [base64.b64encode(np.array(vector, "<f4").tobytes()).decode() for vector in vectors]
    data = [{"object": "embedding", "index": n, "embedding": vector} for n, vector in enumerate(vectors)]
    return {"object": "list", "model": name, "data": data, "usage": {"prompt_tokens": 0, "total_tokens": 0}}


def write_jobs(body: ChatRequest) -> list[Write]:
    """Returns one job for each of the `n` answers of a chat request.

    The user messages after the last answer are the question. The system messages are put before it.

    Raises:
        ServeError: there is no picture or more than one, or some fields exclude each other.
    """
    picture = _picture(body)
    system = " ".join(one.text for one in body.messages if one.role in ("system", "developer"))
    turns: list[tuple[str, str]] = []
    question = ""
    for message in body.messages:
        if message.role == "user":
            question = f"{question} {message.text}".strip()
        elif message.role == "assistant":
            turns.append((question, message.text))
            question = ""
    question = f"{system} {question}".strip()
    best = body.top_logprobs if body.logprobs else None
    return [Write(picture, how, question, turns, stream=body.stream, logprobs=best) for how in body.decodings(CHAT)]


def before_stop(text: str, body: ChatRequest) -> str:
    """The text before the first of the stop sequences."""
    found = [text.find(one) for one in body.stop]
    return text[: min((at for at in found if at >= 0), default=len(text))]


def _picture(body: ChatRequest) -> bytes:
    parts = [part.image_url for message in body.messages for part in message.content if part.type == "image_url"]
    pictures = {part.url for part in parts if part is not None}  # the bytes: one picture can have several data URLs
    if not pictures or None in parts:
        raise ServeError("no picture: send one in a part of type image_url", param="messages")
    if len(pictures) > 1:
        message = f"{len(pictures)} different pictures: a dialogue has only one, which may be sent several times; "
        raise ServeError(message + "start a new dialogue for another picture", param="messages")
    return pictures.pop()


async def _events(
    progress: AsyncIterator[Any], body: ChatRequest, job: Write, about: dict[str, Any]
) -> AsyncIterator[str]:
    """Yields the stream as server-sent events."""

    def event(choices: list[Any], **more: Any) -> str:
        return f"data: {json.dumps({**about, 'choices': choices, **more}, ensure_ascii=False)}\n\n"

    def choice(delta: dict[str, str], reason: str | None = None) -> list[Any]:
        return [{"index": 0, "delta": delta, "finish_reason": reason}]

    yield event(choice({"role": "assistant", "content": ""}))
    sent = 0
    held = max(map(len, body.stop), default=1) - 1  # characters that may be the beginning of a stop sequence
    try:
        async for written in progress:  # the text so far, then the complete `Reply`
            done = isinstance(written, Reply)
            shown = before_stop(written.text if done else written, body)
            if not done:
                shown = shown[: max(0, len(written) - held)]
            if len(shown) > sent:
                yield event(choice({"content": shown[sent:]}))
                sent = len(shown)
            if done:
                yield event(choice({}, _finish_reason(written, shown, job)))
                if body.stream_options.include_usage:
                    yield event([], usage=_usage([written]))
    except Exception as error:  # the status is already sent, so the error is sent as an event
        yield f"data: {bytes(error_response(error).body).decode()}\n\n"
    yield "data: [DONE]\n\n"


def _finish_reason(written: Reply, text: str, job: Write) -> str:
    return "length" if text == written.text and written.completion_tokens >= job.decoding.max_new_tokens else "stop"


def _logprobs(written: Reply, text: str) -> dict[str, Any]:
    """The log-probabilities of the tokens of the sent `text`, in OpenAI's format."""

    def entry(token: str, logprob: float) -> dict[str, Any]:
        return {"token": token, "logprob": max(logprob, -9999.0), "bytes": list(token.encode())}  # JSON has no -inf

    content, length = [], 0
    for token in written.tokens:
        if length >= len(text):  # the tokens from a stop sequence on are not sent
            break
        content.append(entry(token.text, token.logprob) | {"top_logprobs": [entry(*one) for one in token.best]})
        length += len(token.text)
    return {"content": content, "refusal": None}


def _usage(texts: list[Reply]) -> dict[str, int]:
    prompt, completion = texts[0].prompt_tokens, sum(written.completion_tokens for written in texts)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

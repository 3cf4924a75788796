"""The part of the API that OpenAI's clients use: /v1/chat/completions, /v1/embeddings, /v1/models."""

import asyncio
import base64
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from openblip2.apps.serve.batcher import Limits
from openblip2.apps.serve.http import ServeError, error_response
from openblip2.apps.serve.jobs import Call, Write, Written
from openblip2.apps.serve.remote import is_data_url, read_url
from openblip2.apps.serve.requests import ChatRequest, EmbeddingRequest
from openblip2.inference.captioner import CHAT, greedy
from openblip2.model.decoding import Decoding

# What a server may lack, and how it gets it.
LACKS = {"captioner": "no stage-2 run: start it with one as RUN", "matcher": "no stage-1 run: start it with --matcher"}
LACKS |= {"index": "no index: start it with --index"}

router = APIRouter(prefix="/v1")


def require(request: Request, kind: str, model: str | None = None) -> str:
    """The name of the `captioner`, `matcher` or `index`. Raises `ServeError` if there is none, or not this `model`."""
    name = request.app.state.served.get(kind)
    if name is None:
        raise ServeError(f"this server has {LACKS[kind]}")
    if model and model != name:
        raise ServeError(f"no model {model[:100]!r} here: use {name!r}", 404, "model_not_found", "model")
    return name


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """The models that are served."""
    state = request.app.state
    about = {"object": "model", "created": state.created, "owned_by": "openblip2"}
    names = dict.fromkeys(name for kind, name in state.served.items() if kind != "index")
    return {"object": "list", "data": [{"id": name, **about} for name in names]}


@router.get("/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    """One of the models."""
    for one in (await models(request))["data"]:
        if one["id"] == name:
            return one
    raise ServeError(f"no model {name[:100]!r} here: see /v1/models", 404, "model_not_found", "model")


@router.post("/chat/completions")
async def chat(request: Request, body: ChatRequest) -> Any:
    """An answer in a dialogue about one picture, as a whole or as a stream."""
    name, batcher = require(request, "captioner", body.model), request.app.state.batcher
    job = await asyncio.to_thread(write_job, body, batcher.limits)  # a picture may have to be fetched
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        events = _events(batcher.stream(job), job, stop, {**about, "object": "chat.completion.chunk"}, usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
    seeds = [None if body.seed is None else body.seed + n for n in range(body.n or 1)]
    texts = await batcher.answers(request, [replace(job, decoding=replace(job.decoding, seed=seed)) for seed in seeds])
    choices = []
    for n, written in enumerate(texts):
        text = before(written.text, stop)
        choice = {"index": n, "finish_reason": _reason(written, text, job)}
        choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        choice["logprobs"] = _logprobs(written, text) if body.logprobs else None
        choices.append(choice)
    return {**about, "object": "chat.completion", "choices": choices, "usage": _usage(*texts)}


@router.post("/embeddings")
async def embeddings(request: Request, body: EmbeddingRequest) -> dict[str, Any]:
    """One vector of length 1 for each text or picture."""
    name, batcher = require(request, "matcher", body.model), request.app.state.batcher
    inputs = [body.input] if isinstance(body.input, str) else body.input
    if len(inputs) > batcher.limits.texts:
        raise ServeError(f"{len(inputs)} inputs: send at most {batcher.limits.texts}", param="input")
    inputs = [read_url(one, False, 0) if is_data_url(one) else one for one in inputs]
    vectors = await batcher.answer(request, Call("embed", (inputs,)))
    if body.encoding_format == "base64":
        vectors = [base64.b64encode(np.array(vector, "<f4").tobytes()).decode() for vector in vectors]
    data = [{"object": "embedding", "index": n, "embedding": vector} for n, vector in enumerate(vectors)]
    return {"object": "list", "model": name, "data": data, "usage": {"prompt_tokens": 0, "total_tokens": 0}}


def write_job(body: ChatRequest, limits: Limits) -> Write:
    """The job of a chat request: the last user message is the question, and system messages are put in front of it.

    Raises:
        ServeError: no picture or several ones, no question, or a parameter that cannot be honoured.
        UserError: a picture that cannot be fetched.
    """
    if body.messages[-1].role != "user":
        message = f"the last message has the role {body.messages[-1].role}: end with the user's question"
        raise ServeError(message, param="messages")
    picture = _picture(body, limits)
    system = " ".join(one.text for one in body.messages if one.role in ("system", "developer"))
    turns: list[tuple[str, str]] = []
    question = ""
    for message in body.messages:
        if message.role == "user":
            question = f"{question} {message.text}".strip()
        elif message.role == "assistant":
            turns.append((question, message.text))
            question = ""
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    tokens = getattr(body, name) or CHAT.max_new_tokens
    if tokens > limits.tokens:
        raise ServeError(f"{name} {tokens}: this server writes at most {limits.tokens} tokens", param=name)
    how = replace(decoding(body), max_new_tokens=tokens, repetition_penalty=body.repetition_penalty or 1.0)
    best = (body.top_logprobs or 0) if body.logprobs else None
    return Write(picture, how, f"{system} {question}".strip(), tuple(turns), stream=bool(body.stream), logprobs=best)


def decoding(body: ChatRequest) -> Decoding:
    """As the command line decodes; greedy at temperature 0; sampling if a higher one, a nucleus or several answers are
    asked for."""
    if body.temperature == 0:
        return greedy(CHAT)
    if body.temperature is None and body.top_p in (None, 1) and body.n in (None, 1):
        return CHAT
    heat, nucleus = body.temperature or 1.0, body.top_p or 1.0
    return Decoding(beams=1, sample=True, temperature=heat, top_p=nucleus, seed=body.seed)


def before(text: str, stop: tuple[str, ...]) -> str:
    """The text before the first of the stop sequences."""
    return text[: min((at for one in stop if (at := text.find(one)) >= 0), default=None)]


def _picture(body: ChatRequest, limits: Limits) -> bytes:
    parts = [part.image_url for message in body.messages for part in message.content if part.type == "image_url"]
    urls = [part if isinstance(part, str) else part.url for part in parts if part is not None]
    # The same picture may be written in several ways, so it is compared by content.
    pictures = {read_url(url, False, 0) if is_data_url(url) else url for url in urls}
    if not pictures:
        raise ServeError("no picture: send one in a part of type image_url", param="messages")
    if len(pictures) > 1:
        message = f"{len(pictures)} different pictures: a dialogue is about one, which may come in several messages; "
        raise ServeError(message + "start a new dialogue for another picture", param="messages")
    (picture,) = pictures
    return read_url(picture, limits.remote, limits.bytes) if isinstance(picture, str) else picture


async def _events(
    written: AsyncIterator[Any], job: Write, stop: tuple[str, ...], about: dict[str, Any], usage: bool
) -> AsyncIterator[str]:
    """The stream as server-sent events."""

    def event(delta: dict[str, Any], reason: str | None = None) -> str:
        return _line({**about, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})

    yield event({"role": "assistant", "content": ""})
    text, sent = "", 0
    held = max(map(len, stop), default=1) - 1  # characters that may be the beginning of a stop sequence
    try:
        async for piece in written:
            done = isinstance(piece, Written)
            text += "" if done else piece
            shown = before(text, stop)
            end = len(shown) if done or len(shown) < len(text) else len(text) - held
            if end > sent:
                yield event({"content": text[sent:end]})
                sent = end
            if done:
                yield event({}, _reason(piece, before(piece.text, stop), job))
                if usage:
                    yield _line({**about, "choices": [], "usage": _usage(piece)})
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
        content.append(entry(token.text, token.logprob) | {"top_logprobs": [entry(*one) for one in token.best]})
        length += len(token.text)
    return {"content": content, "refusal": None}


def _usage(*texts: Written) -> dict[str, int]:
    prompt, completion = texts[0].prompt_tokens, sum(written.completion_tokens for written in texts)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

"""The part of the API that OpenAI's clients speak: /v1/chat/completions, /v1/embeddings, /v1/models."""

import base64
import json
import struct
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from openblip2.captioner import ANSWER
from openblip2.errors import UserError
from openblip2.model.decoding import Decoding
from openblip2.serve.jobs import Embed, Write, Written
from openblip2.serve.limits import Limits
from openblip2.serve.pictures import from_url, is_picture
from openblip2.serve.schemas import ChatRequest, EmbeddingRequest, Message
from openblip2.serve.service import Service, in_thread

router = APIRouter(prefix="/v1")


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """The one model that is served."""
    return {"object": "list", "data": [{"id": _service(request).name, "object": "model", "owned_by": "openblip2"}]}


@router.post("/chat/completions")
async def chat(request: Request, asked: ChatRequest) -> Any:
    """An answer behind a dialogue about one picture, whole or as it is written."""
    service = _service(request)
    service.require_writer()
    job = await in_thread(_job, asked, service.limits)
    about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}
    if not asked.stream:
        written = await service.do(job, request)
        message = {"role": "assistant", "content": written.text}
        choice = {"index": 0, "message": message, "finish_reason": _reason(written, job), "logprobs": None}
        return {**about, "object": "chat.completion", "choices": [choice], "usage": _usage(written)}
    pieces = await service.stream(job)
    usage = asked.stream_options is not None and asked.stream_options.include_usage
    events = _events(service, pieces, job, {**about, "object": "chat.completion.chunk"}, usage)
    return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})


@router.post("/embeddings")
async def embeddings(request: Request, asked: EmbeddingRequest) -> dict[str, Any]:
    """One direction of length 1 for each text or picture."""
    service = _service(request)
    inputs = [asked.input] if isinstance(asked.input, str) else asked.input
    if len(inputs) > service.limits.texts:
        raise UserError(f"{len(inputs)} inputs; at most {service.limits.texts} at once")
    jobs = [Embed(picture=from_url(one, service.limits)) if is_picture(one) else Embed(text=one) for one in inputs]
    vectors = await service.do_all(jobs, request)
    data = [
        {"object": "embedding", "index": n, "embedding": _encoded(vector, asked.encoding_format)}
        for n, vector in enumerate(vectors)
    ]
    return {"object": "list", "model": service.name, "data": data, "usage": {"prompt_tokens": 0, "total_tokens": 0}}


def _service(request: Request) -> Service:
    return request.app.state.service


def _job(asked: ChatRequest, limits: Limits) -> Write:
    """Turns before the last question, which is the last user message; one picture, wherever it stands.

    What a system message says is put in front of the question.
    """
    pictures: list[str] = []
    said = [(message.role, _text(message, pictures)) for message in asked.messages]
    if len(pictures) != 1:
        raise UserError(f"{len(pictures)} pictures; a dialogue about one: a part of type image_url")
    if said[-1][0] != "user":
        raise UserError(f"the last message is the {said[-1][0]}'s; a question of the user's")
    first = " ".join(text for role, text in said if role in ("system", "developer") and text)
    turns: list[tuple[str, str]] = []
    question = ""
    for role, text in said[:-1]:
        if role == "user":
            question = f"{question} {text}".strip()
        elif role == "assistant":
            turns.append((question, text))
            question = ""
    question = f"{first} {question} {said[-1][1]}".strip()
    most = asked.max_completion_tokens or asked.max_tokens or ANSWER.max_new_tokens
    how = replace(decoding(asked.temperature, asked.top_p), max_new_tokens=min(most, limits.tokens))
    return Write(from_url(pictures[0], limits), how, question, tuple(turns))


def decoding(temperature: float | None, top_p: float | None) -> Decoding:
    """Greedy unless a temperature above 0 or a nucleus is asked for."""
    plain = Decoding(beams=1)
    if not temperature and (top_p is None or top_p == 1):
        return plain
    return replace(plain, sample=True, temperature=temperature or 1.0, top_p=top_p or 1.0)


def _text(message: Message, pictures: list[str]) -> str:
    if message.content is None or isinstance(message.content, str):
        return (message.content or "").strip()
    texts: list[str] = []
    for part in message.content:
        if part.type == "text":
            texts.append(part.text or "")
        elif part.image_url is None:
            raise UserError("a part of type image_url has no image_url")
        else:
            pictures.append(part.image_url if isinstance(part.image_url, str) else part.image_url.url)
    return " ".join(texts).strip()


async def _events(
    service: Service, pieces: AsyncIterator[Any], job: Write, about: dict[str, Any], usage: bool
) -> AsyncIterator[str]:
    def event(delta: dict[str, Any], reason: str | None = None) -> str:
        return _line({**about, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})

    yield event({"role": "assistant", "content": ""})
    try:
        async for piece in pieces:
            if isinstance(piece, str):
                yield event({"content": piece})
            else:
                written = service.checked(piece)
                yield event({}, _reason(written, job))
                if usage:
                    yield _line({**about, "choices": [], "usage": _usage(written)})
    except Exception as error:  # the status is sent already: what went wrong is told as an event
        yield _line({"error": {"message": service.said_of(error), "type": "server_error"}})
    yield "data: [DONE]\n\n"


def _line(found: dict[str, Any]) -> str:
    return f"data: {json.dumps(found, ensure_ascii=False)}\n\n"


def _reason(written: Written, job: Write) -> str:
    return "length" if written.wrote >= job.decoding.max_new_tokens else "stop"


def _usage(written: Written) -> dict[str, int]:
    total = written.read + written.wrote
    return {"prompt_tokens": written.read, "completion_tokens": written.wrote, "total_tokens": total}


def _encoded(vector: list[float], form: str) -> list[float] | str:
    return vector if form == "float" else base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()

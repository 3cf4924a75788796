"""The server: its answers equal those of the models, and no request can crash it."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

import openblip2
import tiny_runs
from openblip2.apps.search import update_index
from openblip2.apps.serve.batcher import Limits, Worker
from openblip2.apps.serve.engine import Engine, Job, Served, Write
from openblip2.apps.serve.http import ServeError
from openblip2.cli import app as cli
from openblip2.errors import UserError
from openblip2.inference.captioner import ANSWER, CAPTION, CHAT, Captioner, greedy
from openblip2.inference.chat import Chat
from openblip2.inference.load import load
from openblip2.inference.matcher import Matcher
from openblip2.model.token_rows import embed_rows
from openblip2.progress import Progress

pytest.importorskip("fastapi")
pytest.importorskip("faiss")
from starlette.testclient import TestClient

from openblip2.apps.serve.app import find_runs, make_app

MAX = 300_000  # bytes, the request limit in these tests


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each stage and an index of the pictures."""
    root = tiny_runs.trained(tmp_path_factory.mktemp("serve"))
    update_index(root / "data", str(root / "stage1"), root / "index", Progress(quiet=True))
    return root


@pytest.fixture(scope="module")
def client(home: Path) -> Iterator[TestClient]:
    worker = Worker(Served(*(str(home / name) for name in ("stage2", "stage1", "index"))), 120.0)
    app = make_app(worker, Limits(bytes=MAX), None, ["testserver"])
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def picture(home: Path, number: int = 0) -> dict[str, bytes]:
    return {"image": (home / "data" / f"{number}.png").read_bytes()}


def data_url(home: Path, number: int = 0) -> str:
    return "data:image/png;base64," + base64.b64encode(picture(home, number)["image"]).decode()


def test_it_says_what_the_models_say(home: Path, client: TestClient) -> None:
    captioner, matcher = load(home / "stage2"), load(home / "stage1")
    assert isinstance(captioner, Captioner)
    assert isinstance(matcher, Matcher)
    path = home / "data" / "0.png"
    said = client.post("/caption", files=picture(home)).json()
    assert said == {"caption": captioner.caption([path])[0]}
    prompted = client.post("/caption", files=picture(home), data={"prompt": "a red", "beams": 2}).json()
    assert prompted["caption"] == captioner.caption([path], "a red", replace(CAPTION, beams=2))[0]
    asked = client.post("/answer", files=picture(home), data={"question": "what colour is it?"}).json()
    assert asked == {"answer": captioner.answer([path], ["what colour is it?"])[0]}
    found = client.post("/match", files=picture(home), data={"text": ["a red dog", "a blue bus"]}).json()["texts"]
    cosines = matcher.similarity([path], ["a red dog", "a blue bus"])[0].tolist()
    assert [row["similarity"] for row in found] == pytest.approx(sorted(cosines, reverse=True), abs=1e-5)
    drawn = client.post("/attend", files=picture(home), data={"text": "a red dog", "by": "itm"})
    assert Image.open(io.BytesIO(drawn.content)).size == (20, 16)


def chat(home: Path, *texts: str, **more: Any) -> dict[str, Any]:
    """Builds a dialogue of alternating questions and answers; the first question includes the picture."""
    messages: list[dict[str, Any]] = [
        {"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)
    ]
    url = {"type": "image_url", "image_url": {"url": data_url(home)}}
    messages[0]["content"] = [{"type": "text", "text": texts[0]}, url]
    return {"model": "stage2", "messages": messages, **more}


def test_a_dialogue_is_the_chats(home: Path, client: TestClient) -> None:
    captioner = load(home / "stage2")
    assert isinstance(captioner, Captioner)
    talk = Chat(captioner, home / "data" / "0.png")
    first = client.post("/v1/chat/completions", json=chat(home, "what is it?")).json()
    assert first["choices"][0]["message"]["content"] == talk.ask("what is it?")
    talk.turns[-1] = ("what is it?", "a dog")
    second = client.post("/v1/chat/completions", json=chat(home, "what is it?", "a dog", "what colour is it?")).json()
    prompt = talk.prompt("what colour is it?")
    assert second["choices"][0]["message"]["content"] == talk.ask("what colour is it?")
    length = captioner.model.language.length(prompt) + 5
    assert second["usage"]["prompt_tokens"] == length
    assert second["object"] == "chat.completion"
    plain = client.post("/v1/chat/completions", json=chat(home, "what is it?", temperature=0)).json()
    talk = Chat(captioner, home / "data" / "0.png", greedy(CHAT))
    assert plain["choices"][0]["message"]["content"] == talk.ask("what is it?")


def test_in_bf16_on_a_cpu_an_answer_does_not_depend_on_other_requests(home: Path) -> None:
    engine = Engine(Served(str(home / "stage2")), send_text=print, stopped=lambda: False)
    engine.captioner = load(home / "stage2", "cpu", precision="bf16")
    language: Any = engine.captioner.model.language
    rows: list[int] = []
    generate = language.generate
    language.generate = lambda soft, prompts, *more: rows.append(len(prompts)) or generate(soft, prompts, *more)
    jobs = [Write(picture(home, n)["image"], CAPTION, question="what is it?") for n in range(5)]
    together = engine.run(jobs)
    assert rows == [1] * len(jobs)
    assert together == [engine.run([job])[0] for job in jobs]


def test_recent_pictures_are_encoded_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openblip2.apps.serve.engine.CACHED", 2)
    engine = Engine(Served(str(home / "stage2"), str(home / "stage1")), send_text=print, stopped=lambda: False)
    captioner, matcher = load(home / "stage2"), load(home / "stage1")
    assert isinstance(captioner, Captioner)
    assert isinstance(matcher, Matcher)
    encoded: list[int] = []

    def counting(encode: Any) -> Any:
        return lambda pixels: encoded.append(len(pixels)) or encode(pixels)

    for model in (engine.captioner, engine.matcher):
        monkeypatch.setattr(model.model.vision, "_encode", counting(model.model.vision._encode))
    texts, paths = ["a red dog", "a blue bus"], [home / "data" / f"{n}.png" for n in range(4)]
    for _ in range(2):
        rows = engine.match(paths[0].read_bytes(), texts)
        assert [row["similarity"] for row in rows] == matcher.similarity([paths[0]], texts)[0].tolist()
    assert encoded == [1]
    engine.match(paths[1].read_bytes(), texts)
    engine.match(paths[2].read_bytes(), texts)
    engine.match(paths[0].read_bytes(), texts)  # encoded again, because the oldest picture was dropped
    assert encoded == [1] * 4
    encoded.clear()
    jobs = [Write(paths[n].read_bytes(), CAPTION) for n in (0, 1, 0, 2)]
    for _ in range(2):  # one batch may have more pictures than the cache keeps
        assert [one.text for one in engine.run(jobs)] == captioner.caption([paths[n] for n in (0, 1, 0, 2)])
    assert encoded == [3, 1]
    # Attention maps need gradients, even if features were computed without gradients for a caption before.
    alone = Engine(Served(str(home / "stage2")), send_text=print, stopped=lambda: False)
    fresh = alone.attend(paths[3].read_bytes(), None, "itc")
    alone.run([Write(paths[0].read_bytes(), CAPTION)])
    assert alone.attend(paths[0].read_bytes(), None, "itc") != fresh
    assert alone.attend(paths[3].read_bytes(), None, "itc") == fresh


@pytest.mark.parametrize("more", [{}, {"temperature": 0}])
def test_a_stream_is_the_whole_in_pieces(home: Path, client: TestClient, more: dict[str, Any]) -> None:
    whole = client.post("/v1/chat/completions", json=chat(home, "what is it?", max_tokens=12, **more)).json()
    asked = chat(home, "what is it?", max_tokens=12, stream=True, stream_options={"include_usage": True}, **more)
    lines = client.post("/v1/chat/completions", json=asked).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events if event["choices"])
    assert text == whole["choices"][0]["message"]["content"]
    assert events[-1]["usage"] == whole["usage"]
    assert events[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]


def test_embeddings_as_numbers_and_as_base64(home: Path, client: TestClient) -> None:
    asked = {"input": ["a red dog", data_url(home)], "model": "stage1"}
    plain = client.post("/v1/embeddings", json=asked).json()["data"]
    coded = client.post("/v1/embeddings", json=asked | {"encoding_format": "base64"}).json()["data"]
    for one, other in zip(plain, coded, strict=True):
        assert np.linalg.norm(one["embedding"]) == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(
            np.frombuffer(base64.b64decode(other["embedding"]), "<f4"), one["embedding"], atol=1e-6
        )


def test_the_openai_client_speaks_to_it(home: Path, client: TestClient) -> None:
    openai = pytest.importorskip("openai")
    theirs = openai.OpenAI(base_url="http://testserver/v1", api_key="any", http_client=client)
    given = chat(home, "what is it?")
    whole = theirs.chat.completions.create(**given).choices[0].message.content
    pieces = theirs.chat.completions.create(**given, stream=True)
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices).split() == whole.split()
    assert len(theirs.embeddings.create(model="stage1", input="a red dog").data[0].embedding) == 9
    assert [model.id for model in theirs.models.list()] == ["stage2", "stage1"]
    assert theirs.models.retrieve("stage1").created > 10**9


def test_search_by_text_and_by_picture(home: Path, client: TestClient) -> None:
    found = client.post("/search", data={"text": "a red dog", "best": 3, "rerank": 4}).json()["pictures"]
    assert len(found) == 3
    assert all(0 <= row["match"] <= 1 for row in found)
    alike = client.post("/search", files=picture(home), data={"best": 16}).json()["pictures"]
    assert len(alike) == 16
    small = client.get(f"/pictures/{found[0]['id']}")
    assert Image.open(io.BytesIO(small.content)).format == "JPEG"
    whole = client.get(f"/pictures/{found[0]['id']}?whole=true")
    assert whole.content == (home / "data" / found[0]["path"]).read_bytes()
    for wrong in ("99999", "-1"):
        assert client.get(f"/pictures/{wrong}").status_code == 404
    for wrong in ("..%2f..%2findex.json", "0/../../index.json"):
        assert client.get(f"/pictures/{wrong}").status_code in (400, 404)
    assert client.get("/assets/..%2fapp.py").status_code == 404
    assert client.post("/search", data={}).status_code == 400


def test_the_page_brings_its_own_and_nothing_runs(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert "script-src 'self'" in page.headers["content-security-policy"]
    for name in ("page.js", "page.css"):
        assert f"assets/{name}" in page.text
        asset = client.get(f"/assets/{name}")
        assert asset.headers["x-content-type-options"] == "nosniff"
        for outside in ("http://", "https://", "innerHTML", "eval("):
            assert outside not in page.text + asset.text


def cmyk(home: Path) -> bytes:
    stream = io.BytesIO()
    Image.new("CMYK", (9, 9), (0, 200, 200, 0)).save(stream, "JPEG")
    return stream.getvalue()


def animated(home: Path) -> bytes:
    stream = io.BytesIO()
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:])
    return stream.getvalue()


def bomb(home: Path) -> bytes:
    stream = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(stream, "PNG")
    return stream.getvalue()


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'


@pytest.mark.parametrize("make", [cmyk, animated])
def test_all_kinds_of_pictures_are_taken(home: Path, client: TestClient, make: Any) -> None:
    assert client.post("/caption", files={"image": make(home)}).status_code == 200


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "is not a picture"), (SVG, "is not a picture"), (b"GIF89a", "is not a picture"), (bomb, "pixels")],
)
def test_what_is_no_picture_is_refused(home: Path, client: TestClient, content: Any, says: str) -> None:
    content = content(home) if callable(content) else content
    for path, data in (("/caption", {}), ("/attend", {}), ("/match", {"text": "a"}), ("/search", {})):
        answer = client.post(path, files={"image": ("a.png", content)}, data=data)
        assert answer.status_code == 400
        assert says in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "hello"}]}, 400, "no picture: send one"),
        ({"presence_penalty": 0.5}, 400, "does not support 'presence_penalty'"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"temperature": 9}, 400, "temperature"),
    ],
)
def test_what_is_wrong_is_said(home: Path, client: TestClient, change: dict[str, Any], status: int, says: str) -> None:
    answer = client.post("/v1/chat/completions", json=chat(home, "what is it?") | change)
    assert answer.status_code == status
    assert says in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1/a.png", "file:///etc/passwd", "data:image/png;base64,%%%", "data:text/html,x"]
)
def test_addresses_are_not_fetched(home: Path, client: TestClient, url: str) -> None:
    asked = chat(home, "what is it?")
    asked["messages"][0]["content"][1]["image_url"]["url"] = url
    assert client.post("/v1/chat/completions", json=asked).status_code == 400


def test_sizes_are_limited(home: Path, client: TestClient) -> None:
    assert client.post("/caption", files={"image": b"x" * (MAX + 1)}).status_code == 413

    def pieces() -> Iterator[bytes]:  # no Content-Length that could be checked
        for _ in range(100):
            yield b"x" * 10_000

    assert client.post("/v1/embeddings", content=pieces()).status_code == 413
    assert client.post("/match", files=picture(home), data={"text": ["a"] * 65}).status_code == 400
    assert client.post("/v1/embeddings", json={"input": ["a"] * 65}).status_code == 400


def test_a_full_queue_is_told_before_anything_is_read(home: Path, client: TestClient) -> None:
    batcher = client.app.state.batcher  # pyright: ignore
    full, batcher.limits = batcher.limits, Limits(queue=0)
    try:
        refused = client.post("/caption", files=picture(home))
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert client.get("/health").status_code == 200
    finally:
        batcher.limits = full
    assert client.post("/caption", files=picture(home)).status_code == 200


def test_a_token_and_a_name_are_asked_for(home: Path) -> None:
    app = make_app(Worker(Served(None, str(home / "stage1")), 120.0), Limits(), "secret", ["testserver"])
    with TestClient(app, raise_server_exceptions=False) as client:
        assert client.get("/").status_code == client.get("/health").status_code == 200
        for shown in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Bearer ü".encode("latin-1").decode("latin-1")},
        ):
            assert (
                client.post("/match", files=picture(home), data={"text": "a"}, headers=_raw(shown)).status_code == 401
            )
        right = {"Authorization": "Bearer secret"}
        assert client.post("/match", files=picture(home), data={"text": "a dog"}, headers=right).status_code == 200
        # A request with another host name that resolves to this server (DNS rebinding) is refused.
        assert client.get("/health", headers={"Host": "evil.example"}).status_code == 400
        # A request that needs a missing run gets a message that says so, not an internal server error.
        for path, data in (("/caption", {}), ("/answer", {"question": "a"})):
            answer = client.post(path, files=picture(home), data=data, headers=right)
            assert "no stage-2 run" in answer.json()["error"]["message"]


def _raw(headers: dict[str, str]) -> Any:
    return {name: value.encode("latin-1") for name, value in headers.items()}


class Killer:
    """Ends the process that unpacks it."""

    def __reduce__(self) -> Any:
        return os._exit, (1,)


class Sleeper:
    """Takes longer than the time limit of the worker."""

    def __reduce__(self) -> Any:
        return time.sleep, (60,)


def embed(text: str) -> Job:
    return partial(Engine.embed, inputs=[text])


@pytest.mark.slow
def test_a_process_that_dies_is_started_anew_and_others_are_served(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def restarts() -> int:
        return capsys.readouterr().err.count("the process with the models is started again")

    worker = Worker(Served(None, str(home / "stage1")), 20.0)
    try:
        killer: Any = Killer()
        first, second, third = worker.run([embed("a dog"), killer, embed("a cat")])
        assert isinstance(second, ServeError)
        assert "crashed" in second.detail
        assert len(first[0]) == len(third[0]) == 9
        assert restarts() == 2
        worker.seconds = 0.5
        sleeper: Any = Sleeper()
        assert "longer than" in worker.run([sleeper])[0].detail
        worker.seconds = 20.0
        assert len(worker.run([embed("a dog")])[0][0]) == 9
        assert restarts() == 1
        with ThreadPoolExecutor(1) as thread:
            running = thread.submit(worker.run, [sleeper])
            time.sleep(0.5)
            worker.close()
            with pytest.raises(ServeError, match="the server is stopping"):
                running.result()
        assert restarts() == 0
    finally:
        worker.close()


def test_models_that_cannot_be_loaded_are_one_line(home: Path) -> None:
    with pytest.raises(UserError, match="is a Matcher, not a Captioner"):
        Worker(Served(str(home / "stage1")), 20.0)


def test_which_run_is_which(home: Path, tmp_path: Path) -> None:
    one, two = str(home / "stage1"), str(home / "stage2")
    assert find_runs(one, None, None) == Served(None, one)
    assert find_runs(two, None, home / "index") == Served(two, one, str(home / "index"))
    assert find_runs(two, one, None) == Served(two, one)
    with pytest.raises(UserError, match="is a stage-1 run: leave out --matcher"):
        find_runs(one, one, None)
    with pytest.raises(UserError, match="is a stage-2 run: give a stage-1 run"):
        find_runs(two, two, None)
    refused = CliRunner().invoke(cli, ["serve", two, "--host", "0.0.0.0"])
    assert "set --token" in str(refused.exception)


@pytest.mark.parametrize(("kind", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_server_in_one_line(home: Path, kind: signal.Signals, code: int) -> None:
    words = [sys.executable, "-m", "openblip2", "serve", str(home / "stage2"), "--port", "0"]
    environment = os.environ | {"PYTHONPATH": str(Path(openblip2.__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # background processes of a shell ignore SIGINT
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, env=environment, preexec_fn=heard, **pipes) as server:
        assert server.stdout is not None
        assert server.stderr is not None
        address = server.stdout.readline().split()[1]
        with urllib.request.urlopen(f"{address}health") as answer:
            assert answer.status == 200
        server.send_signal(kind)
        assert server.stderr.read() == "openblip2: loading the models ...\nopenblip2: interrupted\n"
    assert server.returncode == code


PATHS = ["/caption", "/answer", "/match", "/attend", "/search", "/v1/chat/completions", "/v1/embeddings", "/v1/models"]
PATHS += ["/", "/health", "/openapi.json", "/pictures/0", "/assets/page.js", "/nowhere"]
TEXTS = st.one_of(st.text(max_size=40), st.sampled_from(["", "itc", "a dog", "user", "\x00", "../..", "9" * 400, "-1"]))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=8,
)
NAMES = st.sampled_from(
    ["image", "text", "question", "prompt", "beams", "n", "seed", "temperature", "best", "rerank", "by", "messages"]
)


@pytest.fixture(scope="module")
def tries() -> int:
    return int(os.environ.get("OPENBLIP2_FUZZ", "150"))


def test_nothing_that_is_sent_is_an_error_of_the_servers(home: Path, client: TestClient, tries: int) -> None:
    """Sends random requests. Set OPENBLIP2_FUZZ=2000 for more of them."""
    image = picture(home)["image"]

    @settings(
        max_examples=tries,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
        database=None,
        derandomize=True,
    )
    @given(st.data())
    def one(data: st.DataObject) -> None:
        path, method = data.draw(st.sampled_from(PATHS)), data.draw(st.sampled_from(["POST", "POST", "GET", "PUT"]))
        kind = data.draw(st.sampled_from(["json", "chat", "form", "bytes"]))
        sent: dict[str, Any] = {}
        if kind == "json":
            sent["json"] = data.draw(VALUES)
        elif kind == "chat":
            sent["json"] = chat(home, *data.draw(st.lists(TEXTS, min_size=1, max_size=4)))
            sent["json"] |= data.draw(st.dictionaries(st.sampled_from(["max_tokens", "stream", "top_p", "n"]), VALUES))
        elif kind == "form":
            sent["data"] = data.draw(st.dictionaries(NAMES, st.one_of(TEXTS, st.lists(TEXTS, max_size=3)), max_size=4))
            sent["files"] = {"image": data.draw(st.one_of(st.just(image), st.binary(max_size=50)))}
        else:
            sent["content"] = data.draw(st.binary(max_size=200))
            sent["headers"] = {
                "Content-Type": data.draw(st.sampled_from(["application/json", "multipart/form-data; boundary=x", "a"]))
            }
        answer = client.request(method, path, **sent)
        assert answer.status_code < 500, (method, path, sent, answer.text)

    one()
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "gpt-4o"}, 404, "model"),
        ({"logprobs": True, "stream": True}, 400, "logprobs"),
        ({"top_logprobs": 2}, 400, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, 400, "top_logprobs"),
        ({"top_k": 5}, 400, "top_k"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"seed": 1, "temperature": 1}, 200, None),
        ({"n": 2, "stream": True}, 400, "n"),
        ({"n": 2, "temperature": 0}, 400, "n"),
        ({"n": 9}, 400, "n"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
        ({"repetition_penalty": 0}, 400, "repetition_penalty"),
        ({"temperature": 1e-320}, 200, None),
        ({"max_tokens": 10_000}, 400, "max_tokens"),
        ({"logprobs": "yes"}, 400, "logprobs"),
        ({"logprobs": 1}, 400, "logprobs"),
        ({"stream": "true"}, 400, "stream"),
        ({"max_tokens": True}, 400, "max_tokens"),
        ({"max_tokens": "12"}, 400, "max_tokens"),
        ({"temperature": "0.5"}, 400, "temperature"),
        ({"temperature": 1, "seed": True}, 400, "seed"),
        ({"n": "2"}, 400, "n"),
        ({"beams": True}, 400, "beams"),
        ({"stop": [1]}, 400, "stop.0"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, 400, "stream_options.include_usage"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 400, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, 200, None),
        ({"temperature": 1}, 200, None),
        ({"n": 1, "presence_penalty": 0.0, "tools": [], "user": "a", "seed": 1, "logprobs": False}, 200, None),
    ],
)
def test_parameters_are_honoured_or_refused(
    home: Path, client: TestClient, change: dict[str, Any], status: int, param: str | None
) -> None:
    answer = client.post("/v1/chat/completions", json=chat(home, "what is it?") | change)
    assert answer.status_code == status
    assert answer.json().get("error", {}).get("param") == param


def test_seed_n_and_repetition_penalty_are_honoured(home: Path, client: TestClient) -> None:
    def texts(**more: Any) -> list[str]:
        answer = client.post("/v1/chat/completions", json=chat(home, "what is it?", max_tokens=8, **more)).json()
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
        return [choice["message"]["content"] for choice in answer["choices"]]

    drawn = texts(n=3, seed=5)
    assert len(set(drawn)) > 1
    assert texts(n=3, seed=5) == drawn
    assert texts(seed=6, temperature=1, top_p=1) == drawn[1:2]
    assert len({str(texts(n=2)) for _ in range(3)}) > 1  # without a seed, the texts vary
    free, punished = (
        [text.split() for text in texts(n=8, seed=0, temperature=2, repetition_penalty=penalty)] for penalty in (1, 9)
    )
    repeats, fewer = (sum(len(words) - len(set(words)) for words in rows) for rows in (free, punished))
    assert fewer < repeats


def test_captions_and_answers_are_written_as_asked(home: Path, client: TestClient) -> None:
    """The fields have the same names as for chats, and the texts equal those of the Python API."""
    captioner = load(home / "stage2")
    assert isinstance(captioner, Captioner)
    path = home / "data" / "0.png"

    def texts(where: str, **fields: Any) -> Any:
        data = fields if where == "caption" else {"question": "what is it?", **fields}
        answer = client.post(f"/{where}", files=picture(home), data=data)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def python(where: str, **changes: Any) -> str | None:
        if where == "caption":
            return captioner.caption([path], None, replace(CAPTION, **changes))[0]
        return captioner.answer([path], ["what is it?"], replace(ANSWER, **changes))[0]

    for where in ("caption", "answer"):
        drawn = {"sample": True, "beams": 1, "max_new_tokens": 8, "temperature": 1.5, "top_p": 0.8}
        many = [python(where, **drawn, seed=seed) for seed in (5, 6, 7)]
        sampling = {"max_tokens": 8, "temperature": 1.5, "top_p": 0.8}
        assert texts(where, **sampling, n=3, seed=5) == {f"{where}s": many}
        assert texts(where, **sampling, seed=6) == {where: many[1]}
        assert texts(where, temperature=0, max_tokens=6) == {where: python(where, beams=1, max_new_tokens=6)}
        changed = {where: python(where, beams=2, repetition_penalty=3.0)}
        assert texts(where, beams=2, repetition_penalty=3) == changed


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"beams": 3, "temperature": 1}, "beams"),
        ({"n": 2, "temperature": 0}, "n"),
        ({"n": 9}, "n"),
        ({"max_tokens": 257}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"top_k": 5}, "top_k"),
        ({"user": "a"}, "user"),
    ],
)
def test_wrong_sampling_fields_are_named(home: Path, client: TestClient, fields: dict[str, Any], param: str) -> None:
    for path, question in (("/caption", {}), ("/answer", {"question": "what is it?"})):
        answer = client.post(path, files=picture(home), data={**question, **fields})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param


def test_stop_ends_the_text_and_the_stream(home: Path, client: TestClient) -> None:
    whole = client.post("/v1/chat/completions", json=chat(home, "what is it?")).json()["choices"][0]["message"][
        "content"
    ]
    stop = whole[len(whole) // 2 :][:3]
    asked = chat(home, "what is it?", stop=[stop])
    choice = client.post("/v1/chat/completions", json=asked).json()["choices"][0]
    assert choice["message"]["content"] == whole.split(stop)[0]
    assert choice["finish_reason"] == "stop"
    lines = client.post("/v1/chat/completions", json=asked | {"stream": True}).text.split("\n\n")[:-2]
    events = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]
    text = "".join(event["delta"].get("content", "") for event in events)
    assert stop not in text
    assert text == whole.split(stop)[0]


def test_errors_have_openais_shape(home: Path, client: TestClient) -> None:
    answers = [client.get("/nowhere"), client.put("/caption"), client.post("/caption"), client.get("/v1/models/none")]
    answers.append(client.post("/caption", files=picture(home), data={"beam": 2}))
    answers.append(client.post("/v1/embeddings", content=b"{", headers={"Content-Type": "application/json"}))
    assert [answer.status_code for answer in answers] == [404, 405, 400, 404, 400, 400]
    for answer in answers:
        assert answer.json().keys() == {"error"}
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert answers[4].json()["error"]["param"] == "beam"
    assert client.get("/v1/models/stage1").json()["id"] == "stage1"


@pytest.mark.parametrize(
    "form",
    [
        "data:;base64,{}",
        "data:image/png;charset=utf-8;base64,{}",
        'data:image/png; charset="utf-8"; base64,{}',
        "data:image/png;base64,\n{}",
        " DATA:Image/PNG;BASE64,{}\n",
        "data:image/*;base64,{}",
        "data:text/plain;base64,{}",
    ],
)
def test_data_urls_of_real_clients_are_taken(home: Path, client: TestClient, form: str) -> None:
    asked = chat(home, "what is it?", "a dog", "what colour is it?")
    url = form.format(data_url(home).partition(",")[2].rstrip("="))
    part = {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}
    asked["messages"][0]["content"][1] = part
    asked["messages"][2]["content"] = [{"type": "text", "text": "what colour is it?"}, part]  # the same picture again
    assert client.post("/v1/chat/completions", json=asked).status_code == 200
    asked["messages"][2]["content"][1] = {"type": "image_url", "image_url": {"url": data_url(home, 1)}}
    refused = client.post("/v1/chat/completions", json=asked)
    assert "2 different pictures: a dialogue has only one" in refused.json()["error"]["message"]
    assert refused.json()["error"]["param"] == "messages"


def test_one_picture_in_several_spellings_counts_once(home: Path, client: TestClient) -> None:
    asked = chat(home, "what is it?", "a dog", "what colour is it?")
    code = data_url(home).partition(",")[2]
    for url in (code.rstrip("="), code.replace("+", "-").replace("/", "_"), code[:40] + "\r\n" + code[40:]):
        part = {"type": "image_url", "image_url": {"url": "data:image/png;name=a.png;base64," + url}}
        asked["messages"][2]["content"] = [{"type": "text", "text": "what colour is it?"}, part]
        assert client.post("/v1/chat/completions", json=asked).status_code == 200


def test_logprobs_are_the_language_models_own(home: Path, client: TestClient) -> None:
    captioner = load(home / "stage2")
    assert isinstance(captioner, Captioner)
    choice = client.post(
        "/v1/chat/completions", json=chat(home, "what is it?", logprobs=True, top_logprobs=3, temperature=0)
    ).json()["choices"][0]
    tokens, text = choice["logprobs"]["content"], choice["message"]["content"]
    assert text
    assert "".join(one["token"] for one in tokens) == text
    assert all(bytes(one["bytes"]).decode() == one["token"] for one in tokens)
    # Decoding is greedy. The log-probability of each token must equal that of one forward pass over the whole text.
    language = captioner.model.language
    prompt = Chat(captioner, home / "data" / "0.png").prompt("what is it?")
    soft = captioner.soft_prompt([home / "data" / "0.png"])
    ids = language._caption(prompt, text)  # pyright: ignore
    rows = [[*language._head(prompt, soft.shape[1]), *ids]]
    embeds, mask = embed_rows(language.llm, rows, soft, left=False)
    with torch.no_grad():
        logs = language.llm(inputs_embeds=embeds, attention_mask=mask).logits[0].float().log_softmax(1)
    first = len(rows[0]) - len(ids)
    own = [float(logs[first + n - 1, token]) for n, token in enumerate(ids[: len(tokens)])]
    assert [one["logprob"] for one in tokens] == pytest.approx(own, abs=0.02)
    for one in tokens:
        best = [other["logprob"] for other in one["top_logprobs"]]
        assert len(best) == 3
        assert best == sorted(best, reverse=True)
    plain = client.post("/v1/chat/completions", json=chat(home, "what is it?", logprobs=True)).json()["choices"][0]
    assert all(one["top_logprobs"] == [] for one in plain["logprobs"]["content"])
    assert client.post("/v1/chat/completions", json=chat(home, "what is it?")).json()["choices"][0]["logprobs"] is None
    cut = client.post("/v1/chat/completions", json=chat(home, "what is it?", logprobs=True, stop=text[3:6])).json()
    kept = "".join(one["token"] for one in cut["choices"][0]["logprobs"]["content"])
    assert kept.startswith(cut["choices"][0]["message"]["content"])
    assert len(kept) < len(text)


@pytest.mark.parametrize(
    ("path", "change", "param", "says"),
    [
        ("embeddings", {"input": [15339, 1917]}, "input", "not token ids"),
        ("embeddings", {"input": [[15339, 1917]]}, "input", "not token ids"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "type", "Field required"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "type",
            "'image_url'",
        ),
    ],
)
def test_wrong_parts_are_named(client: TestClient, path: str, change: dict[str, Any], param: str, says: str) -> None:
    error = client.post(f"/v1/{path}", json=change).json()["error"]
    assert says in error["message"]
    assert error["param"] == (param if param == "input" else f"messages.0.content.0.{param}")


def test_a_part_is_a_text_or_a_picture(home: Path, client: TestClient) -> None:
    picture = {"image_url": {"url": data_url(home)}}
    for part in ({"type": "text", "text": "a", **picture}, {"type": "image_url", "text": "a", **picture}):
        asked = chat(home, "what is it?")
        asked["messages"][0]["content"].append(part)
        answer = client.post("/v1/chat/completions", json=asked)
        assert answer.status_code == 400
        assert "a part is either a text or a picture" in answer.json()["error"]["message"]


def test_only_a_text_is_reranked(home: Path, client: TestClient) -> None:
    answer = client.post("/search", files=picture(home), data={"rerank": 4})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "rerank")


@pytest.mark.parametrize("url", ["data:image/png,abc", "DATA:text/html,x"])
def test_data_urls_that_are_not_base64_are_named_as_such(home: Path, client: TestClient, url: str) -> None:
    asked = chat(home, "what is it?")
    asked["messages"][0]["content"][1]["image_url"]["url"] = url
    assert "is not in base64" in client.post("/v1/chat/completions", json=asked).json()["error"]["message"]

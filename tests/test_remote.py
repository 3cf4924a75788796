"""Addresses of pictures: nothing of this machine or a network behind it is ever reached."""

import http.server
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from openblip2.apps.serve import remote
from openblip2.errors import UserError

INNER = [
    "127.0.0.1",
    "127.8.8.8",
    "0.0.0.0",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "224.0.0.1",
    "255.255.255.255",
    "::1",
    "::",
    "fe80::1%eth0",
    "fc00::1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "2002:7f00:1::",
    "64:ff9b::7f00:1",
    "ff02::1",
]


def answering(*numbers: str) -> Any:
    def found(host: str, port: int, **options: Any) -> list[Any]:
        kinds = {True: socket.AF_INET6, False: socket.AF_INET}
        return [(kinds[":" in n], socket.SOCK_STREAM, 6, "", (n, port)) for n in numbers]

    return found


@pytest.mark.parametrize("number", INNER)
def test_inner_addresses_are_refused(number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", answering(number))
    with pytest.raises(UserError, match="not a public address"):
        remote.fetch_image("http://picture.example/a.png", 1000)


def test_one_inner_address_among_others_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", answering("93.184.216.34", "127.0.0.1"))
    with pytest.raises(UserError, match="not a public address"):
        remote.public_address("picture.example", 80)


@pytest.mark.parametrize("number", ["93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946"])
def test_public_addresses_are_taken(number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", answering(number))
    assert remote.public_address("picture.example", 80) == number


@pytest.mark.parametrize(
    "address",
    [
        "file:///etc/passwd",
        "ftp://a.example/b",
        "gopher://a/",
        "http://",
        "http://user@a.example/",
        "http://a:b/",
        "//a",
    ],
)
def test_other_addresses_are_refused(address: str) -> None:
    with pytest.raises(UserError, match="not an address"):
        remote.fetch_image(address, 1000)


def test_numbers_written_otherwise_are_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The resolver takes 2130706433 and 0x7f.1 for 127.0.0.1; what it answers is what is judged."""
    for address in ("http://2130706433/", "http://0x7f.1/", "http://[::1]/", "http://localhost/"):
        with pytest.raises(UserError, match=r"not a public address|no such host"):
            remote.fetch_image(address, 1000)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A server that passes for a public one."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/to/"):
                self.send_response(302)
                self.send_header("Location", self.path[4:])
                self.end_headers()
            elif self.path == "/gone":
                self.send_error(404)
            else:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"x" * int(self.path[1:]))

        def log_message(self, format: str, *args: Any) -> None:
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    inner = remote.public_address

    def public(host: str, port: int) -> str:
        return "127.0.0.1" if host == "picture.example" else inner(host, port)

    monkeypatch.setattr(remote, "public_address", public)
    yield httpd.server_address[1]
    httpd.shutdown()


def test_a_picture_is_fetched_within_limits(server: int, monkeypatch: pytest.MonkeyPatch) -> None:
    at = f"http://picture.example:{server}"
    assert remote.fetch_image(f"{at}/500", 1000) == b"x" * 500
    assert remote.fetch_image(f"{at}/to//7", 1000) == b"x" * 7
    with pytest.raises(UserError, match="more than 1,000 bytes"):
        remote.fetch_image(f"{at}/1001", 1000)
    with pytest.raises(UserError, match="answers 404"):
        remote.fetch_image(f"{at}/gone", 1000)
    with pytest.raises(UserError, match="not a public address"):
        remote.fetch_image(f"{at}/to/http://127.0.0.1:{server}/5", 1000)
    with pytest.raises(UserError, match="more than 3 redirects"):
        remote.fetch_image(f"{at}/to//to//to//to//to//5", 1000)
    monkeypatch.setattr(remote, "SECONDS", -1.0)
    with pytest.raises(UserError, match="TimeoutError"):
        remote.fetch_image(f"{at}/5", 1000)

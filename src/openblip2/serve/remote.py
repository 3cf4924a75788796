"""Pictures from other servers, where that is switched on: never from this machine or a network behind it.

A name is looked up once, every address that it has must be a public one, and the connection goes to the very address
that was looked at: a second look-up could answer otherwise. Each redirect is a new address and held to the same.
"""

import http.client
import ipaddress
import socket
import ssl
import time
from urllib.parse import urljoin, urlsplit

from openblip2.errors import UserError

REDIRECTS = 3
SECONDS = 10.0  # for all of it


def fetch(address: str, most: int) -> bytes:
    """The bytes at an http or https address, `most` at most.

    Raises:
        UserError: another kind of address, one that is not public, an error of the other server, too many bytes, too
            many redirects, or too much time.
    """
    until = time.monotonic() + SECONDS
    for _ in range(REDIRECTS + 1):
        found = _get(address, most, until)
        if isinstance(found, bytes):
            return found
        address = found
    raise UserError(f"{address[:100]}: more than {REDIRECTS} redirects; the picture's own address")


def public_address(host: str, port: int) -> tuple[str, int]:
    """The address of a host, as a number and its family.

    Raises:
        UserError: it has none, or one that is not public.
    """
    try:
        found = {(info[4][0], info[0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError) as error:
        raise UserError(f"{host[:100]}: no such host; a public one") from error
    for number, _ in found:
        if not _is_public(str(number)):
            raise UserError(f"{host[:100]}: is not a public address; one on the open internet")
    number, family = sorted(found)[0]
    return str(number), family


def _is_public(number: str) -> bool:
    address = ipaddress.ip_address(number.partition("%")[0])
    inner = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None)
    if isinstance(address, ipaddress.IPv6Address) and address in ipaddress.ip_network("64:ff9b::/96"):
        inner = ipaddress.ip_address(int(address) & 0xFFFFFFFF)
    return address.is_global and not address.is_multicast and (inner is None or inner.is_global)


def _get(address: str, most: int, until: float) -> bytes | str:
    """The body, or where a redirect leads."""
    try:
        parts = urlsplit(address)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)
    except ValueError as error:
        raise UserError(f"{address[:100]}: is no address; http://... or https://...") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise UserError(f"{address[:100]}: is no address that is fetched; http://... or https://...")
    number, family = public_address(parts.hostname, port)
    try:
        plain = socket.socket(family, socket.SOCK_STREAM)
        with plain:
            plain.settimeout(_left(until))
            plain.connect((number, port))
            secure = parts.scheme == "https"
            line = ssl.create_default_context().wrap_socket(plain, server_hostname=parts.hostname) if secure else plain
            with line:
                connection = http.client.HTTPConnection(parts.hostname, port)
                connection.sock = line
                path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                connection.request("GET", path, headers={"Accept": "image/*", "User-Agent": "openblip2"})
                return _read(connection.getresponse(), line, address, most, until)
    except UserError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UserError(f"{address[:100]}: cannot be fetched ({type(error).__name__}); a picture's address") from error


def _read(answer: http.client.HTTPResponse, line: socket.socket, address: str, most: int, until: float) -> bytes | str:
    if answer.status in (301, 302, 303, 307, 308) and (to := answer.getheader("Location")):
        return urljoin(address, to)
    if answer.status != 200:
        raise UserError(f"{address[:100]}: answers {answer.status}; a picture's address")
    found = bytearray()
    while True:
        line.settimeout(_left(until))
        piece = answer.read1(2**16)
        if not piece:
            return bytes(found)
        found += piece
        if len(found) > most:
            raise UserError(f"{address[:100]}: has more than {most:,} bytes; a picture of at most that")


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left

"""Pictures by URL: data URLs, and http(s) addresses where that is switched on.

An address must not lead to this machine or its network. A host is resolved once, all of its addresses must be public,
and the connection goes to one of these: a second look-up could give another. The same holds for each redirect.
"""

import base64
import binascii
import http.client
import ipaddress
import re
import socket
import ssl
import time
from urllib.parse import unquote, urljoin, urlsplit

from openblip2.errors import UserError

REDIRECTS = 3
SECONDS = 10.0  # for all of a picture
# Any type is accepted, because the content tells what it is: clients also send "image/*" or "application/octet-stream".
DATA_URL = re.compile(r"\s*data:\s*([\w.+-]+/[\w.+*-]+)?\s*(;\s*[\w-]+=(\"[^\"]*\"|[\w.-]+)\s*)*;\s*base64\s*,", re.I)


def is_data_url(text: str) -> bool:
    """Whether a text is the data URL of a picture."""
    return DATA_URL.match(text[:300]) is not None


def read_url(url: str, remote: bool, limit: int) -> bytes:
    """The bytes of a data URL, or of an address.

    Args:
        url: of a picture. White space, URL-safe and percent-encoded base64, and missing padding are accepted.
        remote: whether addresses are fetched.
        limit: bytes that an address may have.

    Raises:
        UserError: neither of them, or the picture cannot be fetched.
    """
    if found := DATA_URL.match(url[:300]):
        data = re.sub(r"\s", "", unquote(url[found.end() :])).translate(str.maketrans("-_", "+/")).rstrip("=")
        try:
            return base64.b64decode(data + "=" * (-len(data) % 4), validate=True)
        except (binascii.Error, ValueError) as error:
            raise UserError("the data URL of the picture is not valid base64: use data:image/png;base64,...") from error
    if url[:20].strip().lower().startswith("data:"):
        raise UserError("the data URL of the picture is not in base64: use data:image/png;base64,...")
    if not remote:
        raise UserError("this server does not fetch addresses of pictures: send a data URL, data:image/png;base64,...")
    return fetch(url, limit)


def fetch(address: str, limit: int) -> bytes:
    """The bytes at an http(s) address.

    Args:
        address: of a picture.
        limit: bytes that it may have.

    Raises:
        UserError: another kind of address, one that is not public, an error of the other server, too many bytes, too
            many redirects, or too much time.
    """
    deadline = time.monotonic() + SECONDS
    for _ in range(REDIRECTS + 1):
        body_or_redirect = _get(address, limit, deadline)
        if isinstance(body_or_redirect, bytes):
            return body_or_redirect
        address = body_or_redirect
    raise UserError(f"{address[:100]}: more than {REDIRECTS} redirects: give the address of the picture itself")


def public_address(host: str, port: int) -> tuple[str, int]:
    """The numeric address of a host, and its family.

    Raises:
        UserError: the host has no address, or one that is not public.
    """
    try:
        resolved = {(info[4][0], info[0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError) as error:
        raise UserError(f"{host[:100]}: no such host: give a public one") from error
    for number, _ in resolved:
        if not _is_public(str(number)):
            raise UserError(f"{host[:100]}: not a public address: give one on the internet")
    number, family = sorted(resolved)[0]
    return str(number), family


def _is_public(number: str) -> bool:
    address = ipaddress.ip_address(number.partition("%")[0])
    inner = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None)
    if isinstance(address, ipaddress.IPv6Address) and address in ipaddress.ip_network("64:ff9b::/96"):
        inner = ipaddress.ip_address(int(address) & 0xFFFFFFFF)
    return address.is_global and not address.is_multicast and (inner is None or inner.is_global)


def _get(address: str, limit: int, deadline: float) -> bytes | str:
    """The body, or the address of a redirect."""
    try:
        parts = urlsplit(address)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)
    except ValueError as error:
        raise UserError(f"{address[:100]}: not an address: use http://... or https://...") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise UserError(f"{address[:100]}: not an address that is fetched: use http://... or https://...")
    number, family = public_address(parts.hostname, port)
    try:
        with socket.socket(family, socket.SOCK_STREAM) as plain:
            plain.settimeout(_left(deadline))
            plain.connect((number, port))
            secure = ssl.create_default_context() if parts.scheme == "https" else None
            with secure.wrap_socket(plain, server_hostname=parts.hostname) if secure else plain as connected:
                connection = http.client.HTTPConnection(parts.hostname, port)
                connection.sock = connected
                path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                connection.request("GET", path, headers={"Accept": "image/*", "User-Agent": "openblip2"})
                return _read(connection.getresponse(), connected, address, limit, deadline)
    except UserError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        problem = type(error).__name__
        raise UserError(
            f"{address[:100]}: cannot be fetched ({problem}): check the address, or send the file"
        ) from error


def _read(
    response: http.client.HTTPResponse, connected: socket.socket, address: str, limit: int, deadline: float
) -> bytes | str:
    if response.status in (301, 302, 303, 307, 308) and (target := response.getheader("Location")):
        return urljoin(address, target)
    if response.status != 200:
        raise UserError(f"{address[:100]}: its server answers {response.status}: check the address")
    body = bytearray()
    while True:
        connected.settimeout(_left(deadline))
        piece = response.read1(2**16)
        if not piece:
            return bytes(body)
        body += piece
        if len(body) > limit:
            raise UserError(f"{address[:100]}: more than {limit:,} bytes: use a smaller picture")


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left

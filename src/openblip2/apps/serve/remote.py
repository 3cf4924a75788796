"""Pictures by URL: data URLs, and http(s) addresses where that is switched on.

An address must not lead to this machine or its network. A host is resolved once, all of its addresses must be public,
and the connection goes to one of these: a second look-up could give another. The same holds for each redirect.
"""

import base64
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


def read_url(url: str, limit: int) -> bytes:
    """The bytes of a data URL, or at most `limit` bytes of an address; 0 = addresses are not fetched.

    In a data URL, white space, URL-safe and percent-encoded base64, and missing padding are accepted.

    Raises:
        UserError: there are no such bytes.
    """
    if found := DATA_URL.match(url[:300]):
        data = re.sub(r"\s", "", unquote(url[found.end() :])).translate(str.maketrans("-_", "+/")).rstrip("=")
        try:
            return base64.b64decode(data + "=" * (-len(data) % 4), validate=True)
        except ValueError as error:
            raise UserError("the data URL of the picture is not valid base64: use data:image/png;base64,...") from error
    if url[:20].strip().lower().startswith("data:"):
        raise UserError("the data URL of the picture is not in base64: use data:image/png;base64,...")
    if not limit:
        raise UserError("this server does not fetch addresses of pictures: send a data URL, data:image/png;base64,...")
    return fetch_image(url, limit)


def fetch_image(address: str, limit: int) -> bytes:
    """At most `limit` bytes of a public http(s) address. Raises `UserError` if they cannot be had."""
    deadline = time.monotonic() + SECONDS
    for _ in range(REDIRECTS + 1):
        try:
            content = _get(address, limit, deadline)
        except UserError:
            raise
        except (OSError, http.client.HTTPException) as error:
            problem = f"cannot be fetched ({type(error).__name__}): check the address, or send the file"
            raise UserError(f"{address[:100]}: {problem}") from error
        except ValueError as error:
            problem = "not an address that is fetched: use http://... or https://..."
            raise UserError(f"{address[:100]}: {problem}") from error
        if isinstance(content, bytes):
            return content
        address = urljoin(address, content)
    raise UserError(f"{address[:100]}: more than {REDIRECTS} redirects: give the address of the picture itself")


def public_address(host: str, port: int) -> str:
    """The numeric address of a host. Raises `UserError` if it has none, or one that is not public."""
    try:
        numbers = sorted({str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)})
    except (OSError, UnicodeError) as error:
        raise UserError(f"{host[:100]}: no such host: give a public one") from error
    if not all(map(_is_public, numbers)):
        raise UserError(f"{host[:100]}: not a public address: give one on the internet")
    return numbers[0]


def _is_public(number: str) -> bool:
    address = ipaddress.ip_address(number.partition("%")[0])
    inner = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None)
    if isinstance(address, ipaddress.IPv6Address) and address in ipaddress.ip_network("64:ff9b::/96"):
        inner = ipaddress.ip_address(int(address) & 0xFFFFFFFF)
    return address.is_global and not address.is_multicast and (inner is None or inner.is_global)


def _get(address: str, limit: int, deadline: float) -> bytes | str:
    """The content of an address, or the address that it redirects to."""
    shown, parts = address[:100], urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise ValueError
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    connected = socket.create_connection((public_address(parts.hostname, port), port), _left(deadline))
    if parts.scheme == "https":
        connected = ssl.create_default_context().wrap_socket(connected, server_hostname=parts.hostname)
    connection = http.client.HTTPConnection(parts.hostname, port)
    connection.sock = connected
    with connected:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", path, headers={"Accept": "image/*", "User-Agent": "openblip2"})
        response = connection.getresponse()
        target = response.getheader("Location")
        if response.status in (301, 302, 303, 307, 308) and target:
            return target
        if response.status != 200:
            raise UserError(f"{shown}: its server answers {response.status}: check the address")
        body = bytearray()
        while len(body) <= limit:
            connected.settimeout(_left(deadline))
            piece = response.read1(2**16)
            if not piece:
                return bytes(body)
            body += piece
        raise UserError(f"{shown}: more than {limit:,} bytes: use a smaller picture")


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left

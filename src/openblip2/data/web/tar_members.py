"""The members of a tar file by their headers: where each lies and how long it is. No content is read.

Our own reader and not `tarfile`, which reads a header of any length into memory, and has no use for one bad member.
Read are POSIX (ustar, pax) and GNU archives, uncompressed, as img2dataset, webdataset and tar itself write them.
"""

import re
import zlib
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

from openblip2.errors import UserError

BLOCK = 512
MOST_HEADER = 64 * 2**10  # bytes of a long name or of pax keywords: real ones have some hundred
_REGULAR, _FOLDER, _LONG_NAME, _LONG_LINK, _PAX, _PAX_ALL = b"0\x007", b"5", b"L", b"K", b"x", b"g"
_KEYWORD = re.compile(rb"(\d{1,6}) ([^=]{1,200})=")
_KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"}


class Member(NamedTuple):
    """A file in a tar file: its name, where its content begins, and how many bytes it has."""

    name: str
    offset: int
    size: int


def tar_members(file: BinaryIO, size: int, problem: Callable[[str], object]) -> list[Member]:
    """The regular files of a tar file of `size` bytes, in its order.

    What is left out is said to `problem`, "name: what", and no more than that happens: links, devices, names that
    lead out of a folder, headers beyond `MOST_HEADER`. A member that is cut off, or bytes that are no header, end it.
    """
    found: list[Member] = []
    place, name, told_size = 0, None, None  # name, size: what an extra header says of the next member
    while True:
        file.seek(place)
        block = file.read(BLOCK)
        if block == bytes(BLOCK):
            return found
        try:
            length, kind, own = _header(block, place)
        except UserError as error:
            problem(str(error))
            return found
        content = place + BLOCK
        if kind in (_LONG_NAME, _PAX):
            if length > MOST_HEADER:
                problem(
                    f"byte {place}: a header of {length:,} bytes, with its member left out; at most {MOST_HEADER:,}"
                )
                name = ""
            else:
                said = _long_name(file.read(length)) if kind == _LONG_NAME else _pax(file.read(length))
                name = name if said[0] is None else said[0]
                told_size = told_size if said[1] is None else said[1]
        elif kind not in (_LONG_LINK, _PAX_ALL):
            length = length if told_size is None else told_size
            own = own if name is None else name
            if content + length > size:
                problem(f"{shown(own)}: the file is cut off in it; a whole tar file")
                return found
            if own and kind != _FOLDER and not own.endswith("/"):
                wrong = _wrong(own) if kind in _REGULAR else _KINDS.get(kind, f"of type {kind!r}")
                if wrong:
                    problem(f"{shown(own)}: is {wrong}; a file with a relative path inside the archive")
                else:
                    found.append(Member(own, content, length))
            name = told_size = None
        place = content + -(-length // BLOCK) * BLOCK


def shown(name: str) -> str:
    """A member's name in a message: one line, not long."""
    return name[:80] if name.isprintable() else ascii(name)[:80]


def _header(block: bytes, place: int) -> tuple[int, bytes, str]:
    """Size, type and name."""
    if len(block) < BLOCK:
        what = "the file is cut off" if block else "the file has no end mark, it may be cut off"
        raise UserError(f"byte {place}: {what}; a whole tar file")
    try:
        # The sum of all bytes, the sum's own eight as spaces. Adler-32 has it, too, and sooner: in its low half.
        told = int(block[148:156].rstrip(b"\0 ") or b"-", 8) + sum(block[148:156]) - 8 * 32
        if (told + 1) % 65521 != zlib.adler32(block) & 0xFFFF:
            raise ValueError
        digits = block[124:136]
        # Sizes of 8 GiB and more stand in base 256.
        size = int.from_bytes(digits[1:], "big") if digits[0] & 0x80 else int(digits.strip(b"\0 ") or b"0", 8)
    except ValueError:
        raise UserError(f"byte {place}: no tar header, what follows is lost; a plain tar file") from None
    name = _text(block[:100])
    prefix = _text(block[345:500]) if block[345] and block[257:263] == b"ustar\0" else ""
    return size, block[156:157], f"{prefix}/{name}" if prefix else name


def _long_name(content: bytes) -> tuple[str | None, int | None]:
    return _text(content), None


def _pax(content: bytes) -> tuple[str | None, int | None]:
    """The path and the size among pax keywords ("27 path=a/b.jpg\\n" each), None where not told."""
    name = size = None
    place = 0
    while match := _KEYWORD.match(content, place):
        end = place + int(match[1])
        value = content[match.end() : end - 1]
        if match[2] == b"path":
            name = _text(value)
        elif match[2] == b"size" and value.isdigit() and len(value) < 20:
            size = int(value)
        if end <= place:
            break
        place = end
    return name, size


def _text(field: bytes) -> str:
    # A name that is no UTF-8 keeps its bytes as lone surrogates, by which it is told and refused.
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _wrong(name: str) -> str:
    """What is wrong with a name; "" = nothing."""
    if not name.isprintable():
        return "named with bytes that are no text"
    if name.startswith(("/", "\\")) or (":" in name[:2] and name[0].isalpha()):
        return "named by an absolute path"
    return "named by a path that leads out (..)" if ".." in name.replace("\\", "/").split("/") else ""

"""Pictures as clients send them: files, data URLs, addresses. Bytes only; they are decoded where the models are."""

import base64
import binascii
import re

from openblip2.errors import UserError
from openblip2.serve.limits import Limits
from openblip2.serve.remote import fetch

_DATA = re.compile(r"data:image/[\w.+-]{1,40};base64,", re.IGNORECASE)


def is_picture(text: str) -> bool:
    """Whether a text is a data URL of a picture."""
    return _DATA.match(text[:100]) is not None


def from_url(url: str, limits: Limits) -> bytes:
    """The bytes of a data URL, or of an address where these are switched on.

    Raises:
        UserError: neither, or it cannot be had.
    """
    if found := _DATA.match(url[:100]):
        try:
            return base64.b64decode(url[found.end() :], validate=True)
        except (binascii.Error, ValueError) as error:
            raise UserError("the data URL of a picture is not base64; data:image/png;base64,...") from error
    if not limits.remote:
        raise UserError("addresses of pictures are not fetched here; a data URL: data:image/png;base64,...")
    return fetch(url, limits.bytes)

"""Fetch a picture from the web: http and https alone, with limits on time and size."""

from __future__ import annotations

import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

MAX_BYTES = 200 << 20
TIMEOUT = 30.0
"""Seconds of silence after which a server is given up."""


def is_url(source: str) -> bool:
    """Whether this text is the address of something on the web."""
    return source.lower().startswith(("http://", "https://"))


def fetch(url: str) -> bytes:
    """The bytes behind an http or https address.

    Raises ConnectionError where nothing comes, ValueError where it is larger than MAX_BYTES or leads elsewhere than to
    http or https.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "fastris"})
    try:
        with urllib.request.build_opener(_WebOnly).open(request, timeout=TIMEOUT) as response:
            content: bytes = response.read(MAX_BYTES + 1)
    except ValueError as error:
        raise ValueError(f"image {url}: {error}") from None
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise ConnectionError(
            f"image {url} could not be fetched ({reason}); fetch it yourself, give its path"
        ) from error
    if len(content) > MAX_BYTES:
        raise ValueError(f"image {url} is larger than {MAX_BYTES >> 20} MiB; shrink it first")
    return content


class _WebOnly(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urlsplit(newurl).scheme not in ("http", "https"):
            raise ValueError(f"it leads to {newurl[:200]}, which is not on the web; give the address of a picture")
        return super().redirect_request(req, fp, code, msg, headers, newurl)

"""Fetches a JSON document of an issuer, such as its keys: one GET request, without redirects, bounded in size."""

import re
import ssl

import httpx

MAX_DOCUMENT_BYTES = 262_144
_LONGEST_SHOWN = 200  # characters of a URL
_USER = re.compile(r"(?<=://)[^/]*@")
_TIMEOUT = 5.0  # seconds for each step; the caller limits the whole


class DocumentUnavailable(Exception):
    """The document cannot be fetched; the message has the cause."""


def shown_url(url: str) -> str:
    """Return a URL for messages: without user and query, which may contain secrets, and not longer than a line."""
    place, question, _ = url.partition("?")
    place = _USER.sub("", place)
    return place[:_LONGEST_SHOWN] + ("…" if len(place) > _LONGEST_SHOWN else "?…" if question else "")


async def fetch_document(url: str, context: ssl.SSLContext) -> bytes:
    """Return the body of a response with the status 200.

    Redirects are not followed: the documents decide whose tokens are valid, so they come from the configured place.
    `HTTPS_PROXY` and `NO_PROXY` of the environment apply. Raises DocumentUnavailable.
    """
    try:
        async with (
            httpx.AsyncClient(verify=context, timeout=_TIMEOUT, follow_redirects=False) as client,
            client.stream("GET", url, headers={"accept": "application/json"}) as response,
        ):
            if response.status_code != httpx.codes.OK:
                raise DocumentUnavailable(f"{shown_url(url)}: status {response.status_code}")
            body = bytearray()
            async for piece in response.aiter_bytes():
                body += piece
                if len(body) > MAX_DOCUMENT_BYTES:
                    raise DocumentUnavailable(f"{shown_url(url)}: larger than {MAX_DOCUMENT_BYTES} bytes")
            return bytes(body)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise DocumentUnavailable(f"{shown_url(url)}: {error or type(error).__name__}") from error

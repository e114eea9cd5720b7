"""Fetches a JSON document of an issuer, such as its keys: one GET request, without redirects, bounded in size."""

import ssl

import httpx

MAX_DOCUMENT_BYTES = 262_144
_TIMEOUT = 5.0  # seconds for each step; the caller limits the whole


class DocumentUnavailable(Exception):
    """The document cannot be fetched; the message has the cause."""


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
                raise DocumentUnavailable(f"{url}: status {response.status_code}")
            body = bytearray()
            async for piece in response.aiter_bytes():
                body += piece
                if len(body) > MAX_DOCUMENT_BYTES:
                    raise DocumentUnavailable(f"{url}: larger than {MAX_DOCUMENT_BYTES} bytes")
            return bytes(body)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise DocumentUnavailable(f"{url}: {error or type(error).__name__}") from error

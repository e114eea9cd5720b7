"""Builds actions of routes other than forwarding: editing of heads, rewriting of paths, responses, and compression."""

import importlib
from collections.abc import Iterable
from functools import lru_cache, partial

from api_gateway.errors import StartupError
from api_gateway.proxy.compression import GZIP, ZSTD, Compression, GzipEncoder, NewEncoder, ZstdContexts
from api_gateway.proxy.direct_responses import DirectResponse
from api_gateway.proxy.head_editing import HeadEditor, HeaderEdits
from api_gateway.proxy.mirroring import Mirroring
from api_gateway.proxy.path_rewriting import PathRewriting
from api_gateway.proxy.path_table import PATH_TEMPLATE
from api_gateway.proxy.route_table import Route
from api_gateway.proxy.url_rewriting import UrlRewriter
from api_gateway.proxy.value_template import OF_ANY_REQUEST, ValueTemplate
from api_gateway.settings.route_actions import (
    CompressionSection,
    MirrorSection,
    RequestHeadersSection,
    ResponseHeadersSection,
)
from api_gateway.settings.routes import RouteSection

_NO_EDITS = HeaderEdits()
_ZSTD_LEVEL_OF_GZIP = {1: 1, 2: 1, 3: 2, 4: 3, 5: 3, 6: 4, 7: 5, 8: 6, 9: 7}  # of about the same time


def editor_of(section: RouteSection, urls: UrlRewriter | None) -> UrlRewriter | HeadEditor | None:
    """Return the editor of the heads of a route's requests and responses; `urls` rewrites URLs in them."""
    request, response = _edits(section.request_headers), _edits(section.response_headers)
    if request == _NO_EDITS and response == _NO_EDITS:
        return urls
    uses_path = section.match.path == PATH_TEMPLATE and (request.names | response.names) - OF_ANY_REQUEST
    return HeadEditor(request, response, urls, section.path if uses_path else "")


def _edits(section: RequestHeadersSection | ResponseHeadersSection) -> HeaderEdits:
    return HeaderEdits(
        frozenset(name.lower().encode() for name in section.remove),
        tuple((name.encode(), ValueTemplate.of(text)) for name, text in section.set.items()),
        tuple((name.encode(), ValueTemplate.of(text)) for name, text in section.add.items()),
    )


def rewriting_of(section: RouteSection) -> PathRewriting | None:
    """Return the rewriting of the path for the upstream, None if it is not rewritten."""
    rewrite = section.rewrite
    if rewrite is None:
        return None
    if rewrite.path is not None:
        return PathRewriting(section.path, template=ValueTemplate.of(rewrite.path))
    return PathRewriting(section.path, prefix=(rewrite.prefix or "").rstrip("/").encode())


def response_of(section: RouteSection) -> DirectResponse | None:
    """Return the response in place of an upstream, None if there is an upstream."""
    if section.redirect is not None:
        path = section.path if section.match.path == PATH_TEMPLATE else ""
        return DirectResponse(section.redirect.status, location=ValueTemplate.of(section.redirect.to), path=path)
    if section.respond is None:
        return None
    headers = tuple((name.encode(), value.encode()) for name, value in section.respond.headers.items())
    return DirectResponse(section.respond.status, headers, section.respond.body.encode())


def mirroring_of(section: MirrorSection | None) -> Mirroring | None:
    """Return which requests of a route are copied, None if none is."""
    if section is None:
        return None
    removed = frozenset(name.lower().encode() for name in section.remove)
    return Mirroring(
        section.upstream,
        section.share,
        section.max_in_flight,
        section.max_body_bytes,
        section.max_response_bytes,
        section.timeout,
        section.credentials,
        Mirroring.edits_of(removed, keeps_credentials=section.credentials),
    )


def mirrored_routes(routes: Iterable[Route]) -> list[str]:
    """Return the names of the routes whose requests are copied."""
    return [route.name for route in routes if route.mirroring is not None]


def compression_of(route: str, section: CompressionSection) -> Compression:
    """Return the compression of a route. Raises StartupError if a library is missing."""
    makers = {"gzip": _gzip, "zstd": _zstd}
    names = {"gzip": GZIP, "zstd": ZSTD}
    return Compression(
        tuple((names[coding], makers[coding](route, section.level)) for coding in dict.fromkeys(section.codings)),
        frozenset(one.lower().encode() for one in section.types),
        section.min_bytes,
    )


def _gzip(_route: str, level: int) -> NewEncoder:
    return partial(GzipEncoder, level)


def _zstd(route: str, level: int) -> NewEncoder:
    level = _ZSTD_LEVEL_OF_GZIP[level]
    for name in ("compression.zstd", "zstandard"):
        try:
            return _zstd_contexts(name, level).encoder
        except ImportError:
            continue
    raise StartupError(
        f"route {route!r}: compression by zstd needs Python 3.14 or newer, or pip install 'api-gateway[zstd]'"
    )


@lru_cache
def _zstd_contexts(module: str, level: int) -> ZstdContexts:
    """Return the contexts that all routes of a level share, also after a reload."""
    return ZstdContexts(importlib.import_module(module), level)

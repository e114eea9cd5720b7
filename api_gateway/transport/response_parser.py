"""The general parser of responses: llhttp, as connections to upstreams use it."""

from typing import Any

import httptools


def response_parser(connection: object) -> Any:
    """Return a parser that expects a response, and calls the methods of `connection`.

    By itself it would refuse what follows an interim response with `Connection: close`. That nothing follows a final
    response is checked by the connection.
    """
    parser = httptools.HttpResponseParser(connection)
    parser.set_dangerous_leniencies(lenient_keep_alive=True)
    return parser

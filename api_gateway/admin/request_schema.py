"""The base of the bodies that operators send."""

from typing import Any

from pydantic import ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema

from api_gateway.models import Body
from api_gateway.settings.boolean_refusal import without_booleans


def one_line(text: str) -> str:
    """Return the text. Raises ValueError if a terminal would execute a part of it, or show it on several lines."""
    if not text.isprintable():
        raise ValueError("must have no control characters or line breaks")
    return text


class RequestBody(Body):
    """Base of request bodies. The limit on text also makes pydantic refuse lone surrogates."""

    model_config = ConfigDict(str_max_length=65_536)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return the schema of the body, in which true and false are not numbers."""
        schema: CoreSchema = without_booleans(handler(source), cls)
        return schema

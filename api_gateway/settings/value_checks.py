"""Functions that read or check values: as metadata of a type, and before a section.

They replace pydantic's `BeforeValidator` and `AfterValidator`, which inspect the signature of each function at each
use: hundreds of times in the configuration, a tenth of the time to build it. These functions take the value alone.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema
from pydantic_core.core_schema import no_info_after_validator_function, no_info_before_validator_function


class ValueReader(NamedTuple):
    """Turns what is written into a value of the type, or leaves it to the type to refuse it."""

    read: Callable[[Any], Any]
    json_schema_input_type: Any = None  # what may be written, for the JSON Schema; by default the type

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return the schema of the type with the function before it."""
        schema = handler(source)
        written = self.json_schema_input_type
        given = None if written is None else handler.generate_schema(written)
        return no_info_before_validator_function(self.read, schema, json_schema_input_schema=given)


class ValueCheck(NamedTuple):
    """Checks or normalises a value of the type; a ValueError is a mistake."""

    check: Callable[[Any], Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return the schema of the type with the function after it."""
        return no_info_after_validator_function(self.check, handler(source))


def prepared(schema: CoreSchema, preparations: Iterable[Callable[[Any], Any]]) -> CoreSchema:
    """Return the schema of a section whose values pass these functions, the first one first, before all else."""
    model: Any = schema
    while model["type"] != "model":  # within validators of the whole section
        model = model["schema"]
    for prepare in reversed(list(preparations)):
        model["schema"] = no_info_before_validator_function(prepare, model["schema"])
    return schema

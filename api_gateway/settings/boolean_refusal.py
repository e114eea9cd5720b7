"""Numbers of settings and request bodies that must not be true or false: pydantic would read them as 1 and 0."""

from typing import Any

from pydantic_core import PydanticKnownError
from pydantic_core.core_schema import no_info_before_validator_function


def without_booleans(schema: Any) -> Any:
    """Return a core schema in which every number, at any depth, refuses true and false."""
    if isinstance(schema, list | tuple):
        return type(schema)(map(without_booleans, schema))
    if not isinstance(schema, dict) or _is_refusing(schema):
        return schema
    inner = {
        key: value if key in ("metadata", "default") else without_booleans(value) for key, value in schema.items()
    }
    kind = inner.get("type")
    if kind == "int":
        return no_info_before_validator_function(_whole_number, inner)
    if kind == "float":
        return no_info_before_validator_function(_number, inner)
    return inner


def _is_refusing(schema: dict[str, Any]) -> bool:
    """Return whether a schema refuses booleans already: that of a section within another one."""
    function = schema.get("function")
    return isinstance(function, dict) and function.get("function") in (_whole_number, _number)


def _whole_number(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticKnownError("int_type")
    return value


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticKnownError("float_type")
    return value

"""Numbers of settings and request bodies that must not be true or false: pydantic would read them as 1 and 0."""

from typing import Any

from pydantic_core import PydanticKnownError
from pydantic_core.core_schema import no_info_before_validator_function

_NO_SCHEMAS = frozenset({"metadata", "default"})  # keys of a schema


def without_booleans(schema: Any, model: type) -> Any:
    """Return the core schema of a model in which every number, at any depth, refuses true and false.

    The models within it have schemas of their own, which have passed this function already.
    """
    if isinstance(schema, list | tuple):
        return type(schema)([without_booleans(one, model) for one in schema])
    if not isinstance(schema, dict):
        return schema
    kind = schema.get("type")
    if kind == "model" and schema["cls"] is not model:
        return schema
    inner = {key: value if key in _NO_SCHEMAS else without_booleans(value, model) for key, value in schema.items()}
    if kind == "int":
        return no_info_before_validator_function(_whole_number, inner)
    if kind == "float":
        return no_info_before_validator_function(_number, inner)
    return inner


def _whole_number(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticKnownError("int_type")
    return value


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticKnownError("float_type")
    return value

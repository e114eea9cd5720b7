"""What is wrong with a value, in words: of a setting, or of a member of a request's body."""

import re
from collections.abc import Mapping
from typing import Any

_CHOICES = ("literal_error", "enum")
_WORDS = {
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "is too large a number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
}


def error_words(kind: str, message: str, context: Mapping[str, Any], own: Mapping[str, str]) -> str:
    """Return what is wrong, in the gateway's terms and without names of classes.

    `kind`, `message` and `context` are those of an error of pydantic. `own` has words by kind, which are preferred.
    """
    if kind in _CHOICES:
        values = re.split(r", | or ", context["expected"].replace("'", ""))
        return f"must be one of {', '.join(values)}" if values[1:] else f"must be {values[0]}"
    message = own.get(kind) or _WORDS.get(kind) or message.removeprefix("Value error, ")
    message = re.sub(r"^(Input|String|List|Value|Dictionary|Tuple|Set) should ", "must ", message)
    message = re.sub(r" after validation, not \d+$", "", message)
    return f"{message[0].lower()}{message[1:]}"

"""Secrets: the type of a setting that is never shown, and the file that it may be read from.

Every setting `x` of the type `Secret` is accompanied by `x_file` in the same section:

    token: Annotated[Secret, ValueCheck(long_enough)] | None = None
    token_file: SecretFile = None

`read_secret_files` sets `x` to the content of the file before the section is validated, so that all rules for `x`
apply to the content too. The file is read whenever a configuration is loaded, at start and on reload.
"""

import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, Field, SecretStr

from api_gateway.settings.value_checks import ValueReader

MAX_FILE_BYTES = 65_536
SUFFIX = "_file"
MAY_HOLD_PASSWORD = "may hold a password"  # noqa: S105 - metadata of a type: a wrong value of it is not shown

PEM_BEGINNING = "-----BEGIN"  # of a file that may be a private key
_PEM_IN_TEXT = re.compile(f"{PEM_BEGINNING}.*?(?:-----END[A-Z ]*-----|$)", re.DOTALL)
# A path that begins with /, ./, ../ or ~/, or one in small letters: a secret in base64 may contain slashes, too.
_PLAIN_PATH = re.compile(r"(?:~|\.{0,2})/[^@:%+=\s]*|[^@:%+=\sA-Z/]+/[^@:%+=\sA-Z]*")

_noted: ContextVar[set[Path] | None] = ContextVar("_noted", default=None)
_exposed: ContextVar[dict[Path, int] | None] = ContextVar("_exposed", default=None)


class SecretFileError(Exception):
    """The file cannot be used; the message names the file and the cause, and quotes none of the content."""


@dataclass(frozen=True, slots=True)
class Unusable:
    """Placeholder for a value that could not be read, until validation reports it as a mistake."""

    cause: str
    names_file: bool = False  # the cause names the file already


def _text(value: Any) -> Any:
    if isinstance(value, Unusable):
        raise ValueError(value.cause)  # noqa: TRY004 - it becomes a message of the validation
    if not isinstance(value, str | SecretStr):
        raise ValueError("must be text; put it in quotes")  # noqa: TRY004 - as above
    return value


Secret = Annotated[SecretStr, ValueReader(_text)]
SecretFile = Annotated[
    Path | None,
    MAY_HOLD_PASSWORD,
    Field(default=None, description="A file that contains the setting of the same name without _file, on one line."),
]


@contextmanager
def noting_files(files: set[Path]) -> Iterator[None]:
    """Within this block, add every file that is read to `files`, except the main one, even if it cannot be used."""
    token = _noted.set(files)
    try:
        yield
    finally:
        _noted.reset(token)


@contextmanager
def noting_exposed(files: dict[Path, int]) -> Iterator[None]:
    """Within this block, add every secret file that all users of the machine can read to `files`, with its mode.

    Those of a file system that is mounted read-only are left out: an orchestrator has put them there.
    """
    token = _exposed.set(files)
    try:
        yield
    finally:
        _exposed.reset(token)


def without_pem(text: str) -> str:
    """Return a text without contents of PEM files, also if their ends are cut off."""
    return _PEM_IN_TEXT.sub(f"{PEM_BEGINNING}...", text) if PEM_BEGINNING in text else text


def without_passwords(message: str) -> str:
    """Return a message without the quoted values that may contain a password."""
    return re.sub(r"'[^']*@[^']*'", "a value that is not shown because it may contain a password", message)


def note_file(path: Path) -> None:
    """Add a file, or a path with wildcards, to those that `noting_files` collects."""
    noted = _noted.get()
    if noted is not None:
        noted.add(path)


def shown_path(path: object) -> str:
    """Return the path of a secret file for a message; hide it if it may be the secret itself, set by mistake."""
    text = str(path)
    is_plain = _PLAIN_PATH.fullmatch(text) is not None
    return f"'{text}'" if is_plain else "a path that is not shown, as it may be a secret"


def read_secret(path: Path) -> str:
    """Return the only line of the file, without its line end. Blocks. Raises SecretFileError."""
    note_file(path)
    shown = shown_path(path)
    try:
        # A pipe without a writer must not block the start.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise SecretFileError(f"is not a regular file, got {shown}")
            exposed = _exposed.get()
            if exposed is not None and mode & stat.S_IROTH and not os.fstatvfs(file.fileno()).f_flag & os.ST_RDONLY:
                exposed[path] = stat.S_IMODE(mode)
            content = file.read(MAX_FILE_BYTES + 1)
    except IsADirectoryError:
        raise SecretFileError(f"is a folder, got {shown}") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        cause = getattr(error, "strerror", None) or "it is not a path"
        raise SecretFileError(f"cannot be read: {cause.lower()}, got {shown}") from None
    if len(content) > MAX_FILE_BYTES:
        raise SecretFileError(f"is too large, a secret has at most {MAX_FILE_BYTES} bytes, got {shown}")
    return _only_line(shown, content)


def _only_line(shown: str, content: bytes) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = None
    if text is None:
        raise SecretFileError(f"is not UTF-8 text, got {shown}")
    text = text.rstrip("\r\n")
    if not text.strip():
        raise SecretFileError(f"is empty, got {shown}")
    if "\n" in text or "\0" in text:
        raise SecretFileError(f"must contain one line of text, got {shown}")
    return text


def read_secret_files(section: type[BaseModel], given: Any) -> Any:
    """Return the values of a section with secrets read from their files."""
    if not isinstance(given, Mapping):
        return given
    read = dict(given)
    for name in secret_names(section):
        path = read.get(name + SUFFIX)
        if not isinstance(path, str | Path):
            continue
        read[name + SUFFIX] = None
        if read.get(name) is not None:
            read[name] = Unusable(f"{name} and {name}{SUFFIX} are both given; keep one of them", names_file=True)
            continue
        try:
            read[name] = read_secret(Path(path))
        except SecretFileError as error:
            read[name] = Unusable(str(error))
    return read


def secret_names(section: type[BaseModel]) -> list[str]:
    """Return the names of the settings of a section that can be read from a file."""
    fields = section.model_fields
    return [name for name, field in fields.items() if name + SUFFIX in fields and holds_secret(field.annotation)]


def holds_secret(annotation: Any) -> bool:
    """Return whether a value of this type is or contains a secret."""
    return _contains(annotation, lambda one: isinstance(one, type) and issubclass(one, SecretStr))


def may_hold_password(annotation: Any) -> bool:
    """Return whether a wrong value of this type may contain a password, as a URL does."""
    return _contains(annotation, lambda one: isinstance(one, str) and one == MAY_HOLD_PASSWORD)


def _contains(annotation: Any, is_found: Callable[[Any], bool]) -> bool:
    if is_found(annotation):
        return True
    inner = get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        inner = tuple(
            part for field in annotation.model_fields.values() for part in (field.annotation, *field.metadata)
        )
    return any(_contains(part, is_found) for part in inner)


def revealed(value: Any, shown: Any) -> Any:
    """Return `shown`, a configuration in JSON's types, with the secrets of `value`, the same in Python's types."""
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, Mapping):
        return {name: revealed(value.get(name), inner) for name, inner in shown.items()}
    if isinstance(value, list):
        return [revealed(one, inner) for one, inner in zip(value, shown, strict=True)]
    return shown

"""The condition of `--fail-if`: comparisons of a client's figures, joined by `and`, `or` and `not`.

Parsed by Python's `ast`. Only some forms are allowed, and this module evaluates them.
"""

import ast
import operator
import warnings
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

from api_gateway.replay.errors import ReplayError

MAX_LENGTH = 1000  # characters
CONDITION_FIELDS: dict[str, type] = {
    "client": str,
    "tier": str,
    "requests": float,
    "limited": float,
    "limited_before": float,
    "newly_limited": float,
    "newly_allowed": float,
    "not_evaluable": float,
    "longest_wait_seconds": float,
    "limited_seconds": float,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_NAMES: dict[type, str] = {str: "text", float: "a number", bool: "a condition"}

Evaluate = Callable[[Mapping[str, Any]], Any]


class ClientCondition:
    """A condition on the figures of one client. `CONDITION_FIELDS` are the names that it may use."""

    def __init__(self, text: str) -> None:
        """Raises ReplayError with the column of the mistake."""
        self.text = text
        self._evaluate = _Parser(text).parsed()

    def __repr__(self) -> str:
        return f"<ClientCondition {self.text}>"

    def holds(self, figures: Mapping[str, Any]) -> bool:
        """Return whether the condition is true of these figures. Raises ReplayError if it cannot be computed."""
        try:
            return bool(self._evaluate(figures))
        except ZeroDivisionError:
            raise ReplayError(f"--fail-if: division by zero for client {figures['client']!r}") from None
        except OverflowError:
            raise ReplayError(f"--fail-if: a number is too large for client {figures['client']!r}") from None


class _Parser:
    """Builds functions from the nodes of an expression, each with the type of its value."""

    def __init__(self, text: str) -> None:
        self._text = text

    def parsed(self) -> Evaluate:
        if len(self._text) > MAX_LENGTH:
            raise ReplayError(f"--fail-if: at most {MAX_LENGTH} characters, got {len(self._text)}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", SyntaxWarning)  # such as of 0x1for, or of an unknown escape
                warnings.simplefilter("error", DeprecationWarning)  # the same before Python 3.12
                tree = ast.parse(self._text.strip(), mode="eval")
            kind, evaluate = self._node(tree.body)
        except SyntaxError as error:
            column = error.offset or len(self._text.strip()) + 1  # 0: at the end
            raise self._error(column, error.msg) from None
        except (ValueError, RecursionError, MemoryError):
            raise ReplayError("--fail-if: the expression cannot be read") from None
        if kind is not bool:
            raise self._error(1, f"a condition is needed, such as newly_limited > 0, got {_NAMES[kind]}")
        return evaluate

    def _node(self, node: ast.expr) -> tuple[type, Evaluate]:  # noqa: PLR0911 - one for each form
        if isinstance(node, ast.BoolOp):
            return self._joined(node)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            inner = self._typed(node.operand, bool)
            return bool, lambda figures: not inner(figures)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            number = self._typed(node.operand, float)
            return float, lambda figures: -number(figures)
        if isinstance(node, ast.Compare):
            return self._compared(node)
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            left, right = self._typed(node.left, float), self._typed(node.right, float)
            apply = _ARITHMETIC[type(node.op)]
            return float, lambda figures: apply(left(figures), right(figures))
        if isinstance(node, ast.Name):
            return self._name(node)
        if isinstance(node, ast.Constant) and type(node.value) in (int, float, str):
            value = node.value
            return (str if isinstance(value, str) else float), lambda _figures: value
        raise self._error(
            node.col_offset + 1, f"{type(node).__name__} is not allowed; use names, values, comparisons and arithmetic"
        )

    def _joined(self, node: ast.BoolOp) -> tuple[type, Evaluate]:
        parts = [self._typed(value, bool) for value in node.values]
        if isinstance(node.op, ast.And):
            return bool, lambda figures: all(part(figures) for part in parts)
        return bool, lambda figures: any(part(figures) for part in parts)

    def _compared(self, node: ast.Compare) -> tuple[type, Evaluate]:
        sides = [self._node(side) for side in (node.left, *node.comparators)]
        for (kind, _), (other, _), place in zip(sides, sides[1:], node.comparators, strict=False):
            if kind is not other or kind is bool:
                raise self._error(place.col_offset + 1, f"{_NAMES[kind]} is compared with {_NAMES[other]}")
        for op in node.ops:
            if type(op) not in _COMPARISONS:
                raise self._error(
                    node.col_offset + 1, f"{type(op).__name__} is not allowed; use ==, !=, <, <=, > or >="
                )
        tests = [_COMPARISONS[type(op)] for op in node.ops]
        values = [value for _, value in sides]

        def evaluate(figures: Mapping[str, Any]) -> bool:
            found = [value(figures) for value in values]
            return all(test(*pair) for test, pair in zip(tests, pairwise(found), strict=True))

        return bool, evaluate

    def _name(self, node: ast.Name) -> tuple[type, Evaluate]:
        name = node.id
        if name not in CONDITION_FIELDS:
            near = get_close_matches(name, CONDITION_FIELDS, 1)
            known = f"known are {', '.join(CONDITION_FIELDS)}; text needs quotes"
            hint = f"did you mean {near[0]}?" if near else known
            raise self._error(node.col_offset + 1, f"unknown name {name!r}; {hint}")
        return CONDITION_FIELDS[name], lambda figures: figures[name]

    def _typed(self, node: ast.expr, wanted: type) -> Evaluate:
        kind, evaluate = self._node(node)
        if kind is not wanted:
            raise self._error(node.col_offset + 1, f"{_NAMES[wanted]} is needed, got {_NAMES[kind]}")
        return evaluate

    def _error(self, column: int, cause: str) -> ReplayError:
        return ReplayError(f"--fail-if: column {column} of {self._text.strip()!r}: {cause}")

"""Which variant of the package runs: pure Python, or with the request path compiled (`make compiled`)."""

from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec

_COMPILED = "api_gateway.rate_limiter"  # one of the modules that `pyproject.toml` names for mypyc


@cache
def variant() -> str:
    """Return `compiled` or `pure Python`. Nothing is imported for it."""
    spec = find_spec(_COMPILED)
    is_compiled = spec is not None and str(spec.origin).endswith(tuple(EXTENSION_SUFFIXES))
    return "compiled" if is_compiled else "pure Python"

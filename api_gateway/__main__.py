"""The command line: `python -m api_gateway`, the console script `api-gateway`, and run_gateway.py.

Only the handling of signals is imported at first, because importing the gateway takes half a second.
"""

import importlib

from api_gateway.system.held_signals import block_signals, end_quietly


def main() -> int:
    """Run the command line; return the exit code."""
    block_signals()
    end_quietly()
    code: int = importlib.import_module("api_gateway.cli").main()
    return code


if __name__ == "__main__":
    raise SystemExit(main())

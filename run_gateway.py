"""Start the gateway: `python run_gateway.py --help` tells the options."""

import signal

if __name__ == "__main__":
    # What asks for a reload must not end a process that is still importing; see `api_gateway.held_signals`.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2})

from api_gateway.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

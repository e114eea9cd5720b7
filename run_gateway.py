"""Start the gateway: `python run_gateway.py --help` tells the options."""

from api_gateway.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main())

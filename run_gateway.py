"""Start the gateway; for the options see `python run_gateway.py --help`."""

from api_gateway.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main())

"""`python -m api_gateway` is the command line."""

from api_gateway.cli import main

raise SystemExit(main())

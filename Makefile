.DEFAULT_GOAL := help
COMPILE = uv pip compile $(UPGRADE) --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-emit-index-url \
	--custom-compile-command "make lock"
# A build takes place in a copy of what is under version control; the commit and its time are those of the clone.
IN_COPY = tree=$$(mktemp -d) && git ls-files -z | xargs -0 cp --parents -t $$tree && \
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) \
	API_GATEWAY_COMMIT=$$(git describe --always --abbrev=40 --exclude='*' --dirty=-modified)
REMOVE_COPY = status=$$?; rm -rf $$tree; exit $$status
.PHONY: help check format unit wire test heavy interop cover dist compiled run load bench scale chaos soak fuzz mutations probe heads lives site lock audit

help:    ## list the commands
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'
check:   ## linters and strict types
	ruff check .
	ruff format --check .
	mypy
format:  ## format the code and apply automatic fixes
	ruff format .
	ruff check --fix .
unit:    ## tests of logic, without sockets and processes
	pytest -n 2 --hypothesis-profile quick tests/unit
wire:    ## tests on real sockets, with a gateway in the test process
	pytest tests/wire
test:    ## all tests, except those that build environments or use all cores (pytest -n 0 -m "install or heavy")
	pytest
heavy:   ## tests that need all cores: benchmarks and chaos, each for seconds
	pytest -n 0 -m heavy
interop: ## tests with real peers (extra "interop"; npm packages in the folder INTEROP_NODE_MODULES)
	pytest -n 0 -m interop tests/interop
cover:   ## tests with coverage by module
	pytest --cov --cov-report=term-missing
dist:    ## source distribution and wheel in dist/, equal byte for byte for the same commit (extra "release")
	$(IN_COPY) uv build --quiet --out-dir dist $$tree; $(REMOVE_COPY)
compiled: ## a wheel in dist/ whose request path is compiled by mypyc; needs a C compiler
	$(IN_COPY) HATCH_BUILD_HOOK_ENABLE_MYPYC=1 pip wheel --no-deps --wheel-dir dist $$tree; $(REMOVE_COPY)
run:     ## the gateway with its demo upstreams, on port 8000
	python run_gateway.py
load:    ## load test against a running gateway
	python load_test.py
bench:   ## CPU time, rate, latency and memory, compared with other proxies
	python -m benchmarks.compare
scale:   ## a thousand routes and upstreams, compared with one: start, CPU time, memory and scrape
	python -m benchmarks.scale
chaos:   ## one of three targets fails: the effect on clients, compared with other proxies
	python -m benchmarks.chaos
soak:    ## an hour of mixed load; fails if memory, descriptors or other resources grow
	python -m benchmarks.soak --minutes 60
fuzz:    ## invalid messages from both peers: make fuzz MINUTES=10 SEED=1
	python -m tests.fuzz --minutes $(or $(MINUTES),10) --seed $(or $(SEED),1)
mutations: ## changes of the limiting code, each of which its tests must catch: make mutations WORDS=lua
	python -m tests.mutations $(WORDS)
probe:   ## a black-box HTTP probe, which starts a gateway: make probe PROBE=path/to/probe_proxy.py
	python -m benchmarks.probe $(PROBE)
heads:   ## a million request heads, read by both parsers: make heads COUNT=1000000 SEED=1
	python -m tests.unit.test_request_heads $(or $(COUNT),1000000) $(or $(SEED),1)
lives:   ## a million requests in random lives of a client's connection: make lives COUNT=130000 SEED=0 (the number of the first)
	python -m tests.unit.test_connection_walk $(or $(COUNT),130000) $(or $(SEED),0)
site:    ## the documentation as a web site in site/ (extra "site")
	rm -rf build/site && mkdir -p build/site && git ls-files README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md LICENSE docs examples | \
	xargs cp --parents -t build/site && zensical build --clean --strict
lock:    ## update the lock files from pyproject.toml; UPGRADE=--upgrade selects newer versions (extra "release")
	$(COMPILE) pyproject.toml --output-file requirements.lock
	$(COMPILE) --constraints requirements.lock --extra dev pyproject.toml --output-file requirements-dev.lock
	$(COMPILE) --constraints requirements.lock --extra jwt pyproject.toml --output-file deploy/docker/requirements.lock
audit:   ## known vulnerabilities in the locked packages; fails if the database cannot be reached (extra "release")
	pip-audit --strict --disable-pip --require-hashes --requirement requirements.lock

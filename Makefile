.DEFAULT_GOAL := help
COMPILE = uv pip compile $(UPGRADE) --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-emit-index-url \
	--custom-compile-command "make lock"
.PHONY: help check format test cover load bench chaos soak fuzz probe lock audit

help:    ## list the commands
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'
check:   ## linters and strict types
	ruff check .
	ruff format --check .
	mypy
format:  ## bring the code into shape
	ruff format .
	ruff check --fix .
test:    ## all tests but those that build environments or take all cores (pytest -n 0 -m "install or heavy")
	pytest
cover:   ## tests with coverage by module
	pytest --cov --cov-report=term-missing
load:    ## load test against a running gateway
	python load_test.py
bench:   ## CPU, rate, latency and memory, beside nine others
	python -m benchmarks.compare
chaos:   ## one target of three fails: what clients notice, beside four others
	python -m benchmarks.chaos
soak:    ## an hour of mixed load, for every night: fails if memory, descriptors or anything else rises
	python -m benchmarks.soak --minutes 60
fuzz:    ## both peers send what they should not: make fuzz MINUTES=10 SEED=1
	python -m tests.fuzz --minutes $(or $(MINUTES),10) --seed $(or $(SEED),1)
probe:   ## a black-box HTTP probe against a running gateway: make probe PROBE=path/to/probe_proxy.py
	python -m benchmarks.probe $(PROBE)
lock:    ## bring the lock files up to date with pyproject.toml; UPGRADE=--upgrade takes newer versions (extra "release")
	$(COMPILE) pyproject.toml --output-file requirements.lock
	$(COMPILE) --constraints requirements.lock --extra dev pyproject.toml --output-file requirements-dev.lock
audit:   ## known vulnerabilities in the locked packages; fails if the database cannot be reached (extra "release")
	pip-audit --strict --disable-pip --require-hashes --requirement requirements.lock

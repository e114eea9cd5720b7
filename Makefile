.DEFAULT_GOAL := help
.PHONY: help check format test cover load bench chaos soak probe

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
probe:   ## a black-box HTTP probe against a running gateway: make probe PROBE=path/to/probe_proxy.py
	python -m benchmarks.probe $(PROBE)

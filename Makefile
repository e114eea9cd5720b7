.DEFAULT_GOAL := help
.PHONY: help check format test cover load bench

help:    ## list the commands
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'
check:   ## linters and strict types
	ruff check .
	ruff format --check .
	mypy
format:  ## bring the code into shape
	ruff format .
	ruff check --fix .
test:    ## all tests but those that build environments
	pytest
cover:   ## tests with coverage by module
	pytest --cov --cov-report=term-missing
load:    ## load test against a running gateway
	python load_test.py
bench:   ## requests a second and CPU a request, beside nginx
	python -m benchmarks.compare

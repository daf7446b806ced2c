.DEFAULT_GOAL := help
.PHONY: help dev lint type test test-all test-gpu coverage bench clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*?## ' $(MAKEFILE_LIST) | awk -F ':.*?## ' '{printf "  make %-12s %s\n", $$1, $$2}'

dev:  ## virtual environment .venv with everything a developer needs, and the commit hooks
	python3 -m venv .venv
	.venv/bin/pip install --upgrade pip
	.venv/bin/pip install -e ".[dev]"
	.venv/bin/pre-commit install

lint:  ## ruff (lint and format) and the import contracts
	ruff check .
	ruff format --check .
	lint-imports

type:  ## mypy, strict
	mypy

test:  ## the fast tests: no network, no GPU, a few minutes
	pytest

test-all:  ## the fast and the slow tests
	pytest -m "slow or not slow"

test-gpu:  ## only the tests that need a CUDA device
	pytest -m gpu

coverage:  ## the fast tests with line coverage of the package
	pytest --cov --cov-report=term-missing:skip-covered

bench:  ## speed of attacks, ours against peers (takes a while; see benchmarks/RESULTS.md)
	python benchmarks/attacks.py

clean:  ## remove caches (runs in outputs/ stay)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache dist build *.egg-info

.DEFAULT_GOAL := help
.PHONY: help dev lint type test test-all test-gpu coverage bench bench-compare clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*?## ' $(MAKEFILE_LIST) | awk -F ':.*?## ' '{printf "  make %-14s %s\n", $$1, $$2}'

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

bench:  ## all benchmarks, about an hour; QUICK=1: two minutes. ARGS="--only training data" takes some
	python benchmarks/run.py $(if $(QUICK),--quick) $(ARGS)

A ?= HEAD
B ?= benchmarks/results.json
bench-compare:  ## two results of the benchmarks, files or commits: A=HEAD~5 B=benchmarks/results.json
	python benchmarks/compare.py $(A) $(B) $(ARGS)

clean:  ## remove caches (runs in outputs/ stay)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache dist build *.egg-info

# Every target sets up its own virtual environment, once, and again when the requirements change.

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
TO ?= runs/first

# pyright's wrapper asks the network for a newer version before it starts
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help study test lint style types tests benchmarks

help: ## these lines
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,interp]'
	touch $@

study: $(READY) ## the main job: tune a real model, cut it open, judge it (TO=runs/first)
	$(VENV)/bin/surgery study --to $(TO)

lint: style types ## style, types and the direction of imports

test: style ## lint and every test, types being looked at beside the tests
	$(MAKE) --no-print-directory -j2 types tests

style: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(READY)
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports

tests: $(READY)
	$(VENV)/bin/python -m pytest -n logical --dist loadfile --no-loadscope-reorder

benchmarks: $(READY) ## the figures of tests/benchmarks/RESULTS.md, measured again
	$(VENV)/bin/python -m tests.benchmarks

# Two targets do all set-up on a fresh machine: `make demo` (ask the demo documents) and `make test` (lint, types, tests).
# Nothing outside this folder is changed but the package caches.

PYTHON ?= python3
VENV ?= .venv
# An extra package index for torch, for example one with CPU-only builds. Empty: the index pip is set up with.
TORCH_INDEX ?=

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
PYTEST_ARGS ?=
# For gpu-check, such as --quick or --skip-sanitizer.
GPU_CHECK_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test lint types unit format bench gpu-check docs clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F '\t' '{ printf "  make %-9s %s\n", $$1, $$2 }'

demo: $(VENV)/.demo ## Set up, index the demo documents and ask them four questions (CPU, offline once installed)
	$(BIN)/exl2-rag demo

test: lint types unit ## Everything CI runs: lint, types, tests

lint: $(VENV)/.test ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test ## Check types (mypy, strict)
	$(BIN)/mypy

unit: $(VENV)/.test ## Run the tests (PYTEST_ARGS="-k name" for some of them)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

format: $(VENV)/.test ## Rewrite the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.test ## Run the CPU benchmarks; results go to benchmarks/results
	$(BIN)/python benchmarks/run_all.py

gpu-check: ## On a machine with a card: tests, compute-sanitizer and benchmarks, with PYTHON's own torch (no .venv)
	$(PYTHON) tools/gpu_check.py $(GPU_CHECK_ARGS)

docs: $(VENV)/.test ## Check that every relative link in the documentation leads somewhere
	$(BIN)/python tools/check_docs.py

clean: ## Remove what was built and indexed here (the virtual environment stays)
	rm -rf build dist .exl2-rag .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("exl2-rag needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0]) if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) --editable '.[demo]'
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) --editable '.[test]'
	touch $@ $(VENV)/.demo

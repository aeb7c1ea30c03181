# Everything here needs Python >= 3.11 and make, nothing else: each target sets up `.venv` by itself.
#
#   make PYTHON=python3.12 setup     another interpreter
#   make DALI=cuda12 setup           DALI for older drivers; DALI= leaves it out
#   make test ARGS="-k geometry"     further arguments for pytest

PYTHON ?= python3
DALI   ?= cuda13
# Test processes. Each gets its share of the cores (tests/conftest.py), so more of them than cores only costs memory.
JOBS   ?= 2
ARGS   ?=

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
# Without a comma in a function's argument, `$(if)` cannot write "cuda13,dev".
COMMA := ,
EXTRAS := $(if $(DALI),$(DALI)$(COMMA))dev

.DEFAULT_GOAL := help
.PHONY: help setup demo lint test test-all test-gpu docs clean

help: ## list the targets
	@echo "usage: make TARGET"
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 12

setup: $(STAMP) ## install everything into .venv (the other targets do it by themselves)

demo: $(STAMP) ## from photographs to a trained model and its pictures, in runs/demo
	$(BIN)/crisp demo $(ARGS)

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint ## lint, then every test that is quick
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow and not gpu" $(ARGS)

test-all: $(STAMP) ## the slow tests that `make test` leaves out
	$(BIN)/python -m pytest -n $(JOBS) -m "slow and not gpu" $(ARGS)

test-gpu: $(STAMP) ## what needs a CUDA device; skipped with the reason where there is none
	$(BIN)/python -m pytest -m gpu $(ARGS)

docs: $(STAMP) ## the pages of docs/ as HTML, in docs/_build
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build

clean: ## remove .venv
	rm -rf $(VENV)

# Redone when what is to be installed changes; pip then only brings what is missing.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || \
	  { echo "crisp needs Python 3.11 or newer, and there is no '$(PYTHON)' here; name one with 'make PYTHON=python3.12 …'" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "crisp needs Python 3.11 or newer, '$(PYTHON)' is $$($(PYTHON) --version 2>&1); name another with 'make PYTHON=python3.12 …'" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

# `make` lists the targets. Everything is installed into .venv in this directory; PYTHON chooses the interpreter
# it is made from, and ARGS is passed on: make test ARGS='tests/groups -x', make demo ARGS='--calibration-tokens 4096'.

PYTHON ?= python3
ARGS ?=

# Relative paths throughout: a checkout whose path has spaces works.
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
PYTEST := $(BIN)/python -m pytest

# One stamp for each set of installed packages; a newer pyproject.toml or constraints.txt installs again.
REQUIREMENTS := pyproject.toml constraints.txt
TEST_STAMP := $(VENV)/.installed-test
DEV_STAMP := $(VENV)/.installed-dev
PARITY_STAMP := $(VENV)/.installed-parity
BROWSER_STAMP := $(VENV)/.installed-browser
DOCS_STAMP := $(VENV)/.installed-docs

# The Chromium of the browser tests; playwright's own is not downloaded.
CHROMIUM ?= $(shell command -v chromium || command -v chromium-browser)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast parity test-browser test-slow test-all lint format typecheck docs clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'

setup: $(TEST_STAMP) ## make .venv and install ngc-jax into it (CPU)

demo: $(TEST_STAMP) ## convert, evaluate and try a small real model, and print what came out
	@$(BIN)/ngc-jax demo --config configs/demo.yaml $(ARGS)

# No worker is replaced that crashed: with --dist loadfile, pytest-xdist 3.8 would wait for ever at the end.
WORKERS := -n auto --max-worker-restart=0
# A file's tests share models and compiled programs; tests/conftest.py has the order.
BY_FILE := $(WORKERS) --dist loadfile --no-loadscope-reorder

test: $(TEST_STAMP) ## the tests that a change must keep green
	@$(PYTEST) $(BY_FILE) --ignore=tests/parity $(ARGS)

# Something of every package, of the files that compile little.
FAST := $(addprefix tests/, \
  commands/test_config_file.py \
  conversion/test_factorisations.py conversion/test_methods.py conversion/test_statistics_file.py \
  conversion/test_symmetric_sums.py docs/test_commands.py evaluation/test_perplexity.py exporting/test_docs.py \
  groups/test_modules.py groups/test_plan.py groups/test_topology.py \
  models/gguf/test_source.py models/test_config.py models/test_keys.py models/test_load.py models/test_rope.py \
  models/test_safetensors.py models/test_sampling.py \
  planning reporting stability/test_contraction.py stability/test_equilibria.py \
  test_files.py test_text.py training/test_packing.py training/test_sources.py)

test-fast: $(TEST_STAMP) ## a part of `make test` that takes less than a minute, for every save
	@$(PYTEST) $(BY_FILE) $(or $(ARGS),$(FAST))

parity: $(PARITY_STAMP) ## compare with transformers' own models and lm-eval (installs torch)
	@$(PYTEST) -m '' $(WORKERS) --dist worksteal $(or $(ARGS),tests/parity)

test-slow: $(TEST_STAMP) ## the tests marked slow or real_model (downloads a small model); none is no failure
	@$(PYTEST) -m 'slow or real_model' $(WORKERS) --dist worksteal --ignore=tests/parity $(ARGS) || [ $$? -eq 5 ]

test-browser: $(BROWSER_STAMP) ## open the report in a headless Chromium (CHROMIUM chooses which)
	@"$(CHROMIUM)" --version >/dev/null 2>&1 || { echo "There is no Chromium ('$(CHROMIUM)'): install one, on Debian with 'apt-get install chromium', or name one with CHROMIUM=/path/to/it." >&2; exit 1; }
	@CHROMIUM="$(CHROMIUM)" $(PYTEST) -m browser $(or $(ARGS),tests/browser)

test-all: test parity test-browser test-slow ## every test

lint: $(DEV_STAMP) ## check style, format, declared dependencies and which package imports which
	@$(BIN)/ruff check .
	@$(BIN)/deptry .
	@$(BIN)/lint-imports --no-cache --no-logo
	@$(BIN)/ruff format --check .

format: $(DEV_STAMP) ## repair style and format where that can be done safely
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

typecheck: $(DEV_STAMP) ## check the types
	@$(BIN)/mypy

docs: $(DOCS_STAMP) ## build the documentation site into site/, strictly
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

clean: ## remove .venv and what tools left behind; runs/ stays
	rm -rf $(VENV) site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(TEST_STAMP): $(REQUIREMENTS)
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "ngc-jax needs Python 3.11 or later, and '$(PYTHON)' is not that: choose one with 'make $(or $(MAKECMDGOALS),setup) PYTHON=python3.11'." >&2; exit 1; }
	@echo "Installing ngc-jax into $(VENV) (a minute or two the first time) ..."
	@"$(PYTHON)" -m venv $(VENV)
	@$(PIP_INSTALL) -e '.[test]'
	@touch $@

$(DEV_STAMP): $(TEST_STAMP)
	@echo "Installing the development tools into $(VENV) ..."
	@$(PIP_INSTALL) -e '.[dev]'
	@touch $@

$(PARITY_STAMP): $(TEST_STAMP)
	@echo "Installing torch and lm-eval into $(VENV), for the parity tests only ..."
	@$(PIP_INSTALL) -e '.[parity]'
	@touch $@

$(BROWSER_STAMP): $(TEST_STAMP)
	@echo "Installing playwright into $(VENV), for the browser tests only ..."
	@$(PIP_INSTALL) -e '.[browser]'
	@touch $@

$(DOCS_STAMP): $(TEST_STAMP)
	@echo "Installing the documentation tools into $(VENV) ..."
	@$(PIP_INSTALL) -e '.[docs]'
	@touch $@

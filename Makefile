# Every target sets up what it needs: a virtual environment in .venv with the versions of requirements/constraints.txt.
#
#   make test PYTHON=python3.12     another interpreter (3.10 or newer)
#   make test ARGS="-k ties -x"     further arguments for pytest

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c requirements/constraints.txt
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install test test-all demo bench lint format typecheck check pins clean

help:  ## Show the targets.
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | awk -F '\t' '{printf "  make %-10s %s\n", $$1, $$2}'

# setuptools and wheel first: the package is then built with the pinned ones, not with whatever is newest.
$(INSTALLED): pyproject.toml requirements/constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 10) or sys.exit("raymerge needs Python 3.10 or newer; $(PYTHON) is %d.%d (choose another with make PYTHON=...)" % v)'
	@echo "Installing the pinned environment into $(VENV) (minutes on the first run, most of it torch and ray) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) setuptools wheel
	@$(PIP_INSTALL) --no-build-isolation -e '.[dev]'
	@touch $@

install: $(INSTALLED)  ## Create .venv with the pinned environment.

test: $(INSTALLED)  ## Run the tests (CPU, offline).
	$(BIN)/python -m pytest $(ARGS)

test-all: $(INSTALLED)  ## Run the tests including those marked slow.
	$(BIN)/python -m pytest -m "slow or not slow" $(ARGS)

demo: $(INSTALLED)  ## Fine-tune, merge and evaluate a real encoder (minutes; then cached in .demo).
	@$(BIN)/python examples/demo/demo.py $(ARGS)

bench: $(INSTALLED)  ## Run the benchmark (makes its models under .bench on the first run).
	$(BIN)/python benchmarks/run.py $(ARGS)

lint: $(INSTALLED)  ## Check style and formatting.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)  ## Mend style and formatting.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(INSTALLED)  ## Check types (mypy, strict).
	$(BIN)/mypy

check: lint typecheck test  ## All of the above, as .ci/run does.

# One file for every Python: versions that need a newer Python are split by markers. Kept versions stay where they can.
pins: $(INSTALLED)  ## Resolve requirements/constraints.txt anew (needs the network).
	$(BIN)/python -m pip install -qq --disable-pip-version-check uv
	$(BIN)/uv pip compile --universal --python-version 3.10 --no-header --no-annotate --extra dev \
		--output-file requirements/constraints.txt pyproject.toml

clean:  ## Remove the environment, caches and the demo's files.
	rm -rf $(VENV) .demo .bench build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

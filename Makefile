# `make help` lists what there is to do. Set PYTHON to use another interpreter: make test PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-all lint benchmarks clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | while IFS="$$(printf '\t')" read -r name text; do \
		printf '  make %-12s %s\n' "$$name" "$$text"; done

quickstart: $(VENV)/.installed  ## install, then compare merging methods on four small image tasks
	$(BIN)/merge-ray sweep sweeps/quickstart.yaml

test: lint  ## all checks but the slow ones and those that need a GPU
	$(BIN)/python -m pytest -m "not slow and not gpu" --numprocesses 2 --dist loadfile

test-all: lint  ## `make test` and the slow tests
	$(BIN)/python -m pytest -m "not gpu"

lint: $(VENV)/.installed-dev  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

benchmarks: $(VENV)/.installed-dev  ## print the figures that benchmarks/README.md explains
	set -e; for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python "$$file"; done

clean:  ## remove the environment and the tools' caches; results stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "merge-ray needs Python 3.11 or newer; name one with: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) --editable '.[dev]'
	@touch $@

# `make` lists what there is. Everything happens inside $(VENV); only Python 3.11 or newer has to be there.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Processes that tests are spread over.
JOBS ?= 2
# A file's tests stay together, in the order of the files; slow ones are few and long, and whoever is idle takes some.
PYTEST := -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder
PYTEST_SLOW := -m pytest -q -n $(JOBS) --dist worksteal -m slow
# Files without a slow test need not be imported; those that ARGS names are.
SLOW_FILES = $(if $(findstring tests/,$(ARGS)),,$(shell grep -l 'mark\.slow' tests/test_*.py))

BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# -qq: silent unless something fails. hatchling comes from the constraints too, hence no build isolation.
PIP_INSTALL := $(BIN)/python -m pip install -qq --constraint constraints.txt
INSTALL := $(PIP_INSTALL) --no-build-isolation --editable

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow docs lint types pytest bench bench-training clean distclean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo-installed  ## Make a small world, write its train chips, check them (output: ./demo)
	@$(BIN)/rasteret-dask demo $(ARGS)

test: lint  ## Lint, type-check and run the tests, but for the slow ones
	@$(MAKE) --no-print-directory -j 2 types pytest

test-slow: $(VENV)/.test-installed $(VENV)/.docs-installed  ## The slow tests: wheels on each Python, lowest and newest versions, notebooks, site
	@$(BIN)/python $(PYTEST_SLOW) $(SLOW_FILES) $(ARGS)

docs: $(VENV)/.docs-installed  ## Build the documentation site, strictly (output: docs/_build/html)
	@$(BIN)/python -m sphinx -b html -W --keep-going -q docs docs/_build/html
	@echo "docs/_build/html/index.html"

lint: $(VENV)/.test-installed  ## ruff check and ruff format --check
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(VENV)/.test-installed  ## mypy, strict
	@$(BIN)/mypy

pytest: $(VENV)/.test-installed  ## The tests alone, e.g. make pytest ARGS="-k grid"
	@$(BIN)/python $(PYTEST) -m "not slow" $(ARGS)

bench: $(VENV)/.bench-installed  ## The benchmark against the peers, e.g. make bench ARGS="--jobs J1 --runs 5 --write"
	@$(BIN)/python tests/benchmarks/bench.py $(ARGS)

bench-training: $(VENV)/.bench-installed $(VENV)/.torch-installed  ## Streams against bare loops, xbatcher and to_zarr; stores against tensorstore and others
	@$(BIN)/python tests/benchmarks/bench_train.py --rounds 5
	@$(BIN)/python tests/benchmarks/bench_store.py --rounds 5
	@$(BIN)/python tests/benchmarks/bench_starts.py
	@$(BIN)/python tests/benchmarks/bench_stream.py --rounds 5

clean:  ## Remove what builds, tests and the demo leave behind
	rm -rf build dist demo *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis dask-worker-space
	rm -rf docs/_build docs/_made docs/api
	find rasteret_dask tests notebooks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## The same, and the virtual environment
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "rasteret_dask needs Python 3.11 or newer; '$(PYTHON)' is: $$($(PYTHON) --version 2>/dev/null || echo not there)."; \
	  echo "Name another one, for example: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "Creating $(VENV) with $$($(PYTHON) --version 2>&1)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "Python could not create $(VENV). On Debian and Ubuntu: apt install python3-venv"; exit 1; }

$(VENV)/.%-installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing rasteret_dask[$*] into $(VENV) (the first time takes a few minutes)"
	@$(PIP_INSTALL) hatchling editables
	@$(INSTALL) ".[$*]"
	@touch $@

.PRECIOUS: $(VENV)/.%-installed

# Works on a fresh machine with Python >= 3.11, make and a network. Everything is installed into
# .venv at the versions of constraints.txt, once, and again only when those files change.
#
#   make quickstart QUICKSTART_ARGS="--seeds 3"
#   make test PYTHON=python3.12
#   make test PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"   # no CUDA wheels

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
QUICKSTART_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=

BIN := $(VENV)/bin
# Tests run two at a time, each on one thread: the numbers then do not depend on the thread count.
WORKERS ?= 2
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-slow lint bench docs clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: $(VENV)/.installed ## pretrain, find the window, score, change the data, train again, report
	$(BIN)/mda-lightning quickstart $(QUICKSTART_ARGS)

test: $(VENV)/.installed-dev ## every test but the slow ones
	$(ONE_THREAD) $(BIN)/python -m pytest -m "not slow" -n $(WORKERS) $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-dev ## the slow tests: whole runs, minutes each
	$(ONE_THREAD) $(BIN)/python -m pytest -m slow -n $(WORKERS) $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev ## style, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed-dev ## time and memory, as reported in benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

docs: $(VENV)/.installed-docs ## build the site into site/, strictly
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## remove the environment, caches and built files; runs are kept
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v >= (3, 11) else "mda-lightning needs Python 3.11 or newer and $(PYTHON) is %d.%d: make PYTHON=..." % v)'
	$(PYTHON) -m venv $(VENV)

# One stamp per set of extras, so that the quickstart does not wait for test and docs tools.
$(VENV)/.installed: EXTRAS := [wandb]
$(VENV)/.installed-dev: EXTRAS := [dev]
$(VENV)/.installed-docs: EXTRAS := [docs]
$(VENV)/.installed $(VENV)/.installed-dev $(VENV)/.installed-docs: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".$(EXTRAS)"
	touch $@

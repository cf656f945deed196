# The commands that contributors, hooks and CI share. `make` alone lists them.
# VENV names the environment (default .venv-test; made where it is missing), ARGS are handed to pytest:
#     make quick ARGS="-k nt_xent"
VENV ?= $(or $(CA2CL_VENV),.venv-test)
BIN := $(VENV)/bin
SHELL := bash
# One intra-op thread a process: the tests start processes of their own, and results must not depend on the machine.
export OMP_NUM_THREADS = 1
export MLFLOW_DISABLE_TELEMETRY = true
export HF_HUB_OFFLINE = 1

.PHONY: help environment lint format quick test slow docs site

help:  ## list these commands
	@grep -E '^[a-z]+:.*##' Makefile | sed 's/:.*## /\t/'

environment:  ## make or update the environment
	. launch/environment.sh && make_environment $(VENV) "[test]"

$(BIN)/python:
	$(MAKE) environment

lint: | $(BIN)/python  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: | $(BIN)/python  ## rewrite the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quick: lint  ## style, types and unit tests
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/unit $(ARGS)

test:  ## everything that CI runs
	CA2CL_VENV=$(VENV) bash tests/run.sh $(ARGS)

slow:  ## tests that take minutes each
	CA2CL_VENV=$(VENV) bash tests/run.sh -m slow $(ARGS)

docs: | $(BIN)/python  ## draw docs/architecture.svg and its table again
	$(BIN)/python -m benchmarks.architecture

site: | $(BIN)/python  ## build the documentation site, docs/_build/html/index.html
	PYTHON=$(abspath $(BIN)/python) bash docs/build.sh

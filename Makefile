# `make demo` and `make test` install what they need into .venv first; see scripts/bootstrap.

export PYTHON TORCH_INDEX
SHELL := bash
BIN := .venv/bin
# Tiny models: a process a core with one thread each is faster than one process with many.
CORES := $(shell n=$$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))
PYTEST := $(BIN)/python -m pytest
# Plugins that pytest finds by itself it also rewrites, all of hypothesis in each process. A process
# begins with one half of the tests, so that neighbours share what is made once.
PLUGINS := -p xdist.plugin -p _hypothesis_pytestplugin --dist worksteal

.PHONY: help demo test lint format slow gpu bench clean
.DEFAULT_GOAL := help

help:  ## show this
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

demo:  ## convert a real model, repair it, measure it, chat with it; leaves demo/
	@scripts/bootstrap demo
	@$(BIN)/tamba run recipes/demo.toml --out demo

test:  ## the fast test suite (1 to 3 minutes on 2 cores)
	@scripts/bootstrap test
	@OMP_NUM_THREADS=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 $(PYTEST) $(PLUGINS) -n $(CORES) $(ARGS)

lint:  ## style, formatting and types, as CI checks them
	@scripts/bootstrap test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format:  ## put formatting and imports right
	@scripts/bootstrap test
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

slow:  ## the long tests: a real small teacher through the whole way
	@scripts/bootstrap demo
	@scripts/bootstrap test
	@$(PYTEST) -m slow $(ARGS)

gpu:  ## the tests that need a CUDA device
	@scripts/bootstrap test
	@$(PYTEST) -m gpu $(ARGS)

bench:  ## the operators beside other libraries; ARGS="--peers DIR --out FILE"
	@scripts/bootstrap test
	@$(BIN)/tamba bench kernels $(ARGS)

clean:  ## remove caches and .venv; demo/ and runs/ stay
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Set on the command line: PYTHON, GPU=1, VENV, PORT, RAY=1, REPLICAS, ARGS.
PYTHON ?= python3
VENV ?= $(if $(GPU),.venv-gpu,.venv)
RUN := $(VENV)/bin/python

# Everything that selects tests, the GPU's included only where GPU=1 says there is one.
ALL_TESTS := $(if $(GPU),,not gpu)

.DEFAULT_GOAL := help
.PHONY: help install serve demo bench test test-all lint check clean

help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "  Variables: ARGS='--flag value', PORT=8000, GPU=1 (CUDA stack), PYTHON=python3.11, VENV=.venv"

install: ## create the environment, or return at once if it is up to date
	@$(PYTHON) setup/install.py $(if $(GPU),--gpu) --venv "$(VENV)"

serve: install ## start the server in the foreground; RAY=1 on Ray
	@exec $(RUN) -m serving $(if $(RAY),--ray --replicas $(or $(REPLICAS),1-3)) $(if $(PORT),--port $(PORT)) $(ARGS)

demo: install ## train a tiny LLaVA and its adapters from nothing
	@exec $(RUN) -m train demo $(ARGS)

bench: install ## measure a running server; ARGS are those of `python -m bench`
	@exec $(RUN) -m bench $(ARGS)

test: install ## the quick tests, the real engine among them
	@$(RUN) -m pytest $(ARGS)

test-all: install ## also what is long, starts Ray or needs a browser
	@$(RUN) -m pytest -m "$(ALL_TESTS)" $(ARGS)

lint: install ## ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

check: lint test ## what CI runs

clean: ## remove caches and build outputs; the environment and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage
	find serving patches train bench tests setup -name __pycache__ -type d -prune -exec rm -rf {} +

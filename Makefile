# make demo   the whole path once, with a real model: checkpoint, fine-tuning on two processes, export, answers
# make test   every check: lint, formatting, types, tests
# Both set up what they need by themselves, in .venv/. PYTHON=python3.12 chooses another interpreter.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
BUILT := $(VENV)/.built
SOURCES := $(shell find csrc -type f -not -name '*.o')
VLLM := .venv-vllm
OLD_PEFT := .peft-0.18
LOG := $(VENV)/setup.log
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo lint test test-all clean

help:
	@sed -n 's/^# make/make/p' Makefile
	@echo "others:     make setup, make lint, make test-all (with the slow tests), make clean"

setup: $(BUILT)

$(STAMP): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is missing or older than 3.11; install Python 3.11 or newer, or name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "error: $(PYTHON) cannot make virtual environments; apt-get install python3-venv" >&2; exit 2; }
	@echo "[setup] virtual environment in $(VENV)/ with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@echo "[setup] $$(grep -c == requirements.lock) pinned packages; the first time takes some minutes ($(LOG) has the details)"
	@$(BIN)/pip install -r requirements.lock 2>&1 | tee $(LOG) | awk -v total=$$(grep -c == requirements.lock) \
		'/^(Collecting|Processing)/ && ++n % 10 == 0 { print "[setup] " n " of " total " packages found" } \
		 /^Installing collected/ { print "[setup] installing" } /^ERROR/ { print } { fflush() }'
	@touch $(STAMP)

$(BUILT): $(STAMP) pyproject.toml setup.py $(SOURCES)
	@echo "[setup] mswift itself, from this folder, and its kernels"
	@$(BIN)/pip install --no-deps --no-build-isolation -v -e . >> $(LOG) 2>&1 || { cat $(LOG) >&2; exit 2; }
	@echo "[setup] kernels: $$(cat mswift/kernels/lib/build.txt)"
	@touch $(BUILT)

demo: setup
	@$(BIN)/python examples/demo.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -m "not slow"

test-all: lint $(VLLM)/.set-up $(OLD_PEFT)/.set-up
	$(BIN)/python -m pytest

$(OLD_PEFT)/.set-up: | $(STAMP)
	@echo "[setup] $(OLD_PEFT)/: the peft before 0.19, which a test loads adapters of experts with"
	@$(BIN)/pip install --quiet --no-deps --target $(OLD_PEFT) peft==0.18.1
	@touch $@

$(VLLM)/.set-up: tests/vllm.lock
	@echo "[setup] $(VLLM)/: vLLM for CPU, which a slow test serves an export with; some minutes"
	@$(PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/pip install --quiet --no-deps -r tests/vllm.lock
	@touch $@

clean:
	rm -rf build dist *.egg-info mswift/kernels/lib $(BUILT) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	@echo "$(VENV)/ and output/ stay; remove them by hand if they are not needed"

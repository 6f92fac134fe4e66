# `make quickstart`: from nothing to a trained model and sampled text. `make test`: what CI runs.
#
#   PYTHON=python3.12    the interpreter that makes the environment (3.11 or newer)
#   VENV=.venv           where the environment lies
#   TORCH_INDEX=URL      another index for torch, as https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
BIN := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
FAULTS := $(PYTEST) -m faults --faults build/faults.jsonl

.DEFAULT_GOAL := help
.PHONY: help env env-dev quickstart test test-fast test-all faults lint types size clean

help:
	@echo "make quickstart   environment, corpus, tokenizer, shards, training, sampled text"
	@echo "make env          the environment alone, in $(VENV); env-dev adds what tests need"
	@echo "make test         lint, types and the tests that CI runs (20 minutes on 2 cores)"
	@echo "make test-fast    the tests of under 2 minutes"
	@echo "make test-all     every test, with the long ones"
	@echo "make faults       kills, damage, full disks at full scale; writes docs/reliability.md"
	@echo "make lint types   ruff; mypy"
	@echo "make size         lines per file and the longest functions"

env: $(VENV)/.installed
env-dev: $(VENV)/.installed-dev

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(0 if sys.version_info >= (3, 11) else f"error: $(PYTHON) is Python {v}, this project needs 3.11 or newer: make env PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade "pip>=25" "setuptools>=77" wheel
	$(BIN)/python -m pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[corpus,report]"
	@touch $@

# what tests, lint and types need beside it
$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[dev]"
	@touch $@

quickstart: env
	VENV=$(VENV) bash scripts/quickstart.sh

# two halves beside each other, for two cores; both must pass
test: env-dev lint types
	@$(PYTEST) -m "not full" tests/test_[a-d]*.py & half=$$!; \
	$(PYTEST) -m "not full" tests/test_[e-z]*.py; other=$$?; \
	wait $$half && exit $$other

test-fast: env-dev
	$(PYTEST) -m "not slow and not full"

test-all: env-dev lint types
	$(PYTEST)

# in two halves as well; figures are shown also where tests fail
faults: env-dev
	@rm -f build/faults.jsonl
	@$(FAULTS) tests/test_[a-q]*.py tests/test_runtime_[a-k]*.py & half=$$!; \
	$(FAULTS) tests/test_runs*.py tests/test_runtime_[l-z]*.py tests/test_[s-z]*.py; failed=$$?; \
	wait $$half || failed=$$?; \
	$(BIN)/python tests/scorecard.py build/faults.jsonl && exit $$failed

lint: env-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env-dev
	$(BIN)/mypy

size: env
	@$(BIN)/python scripts/size.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

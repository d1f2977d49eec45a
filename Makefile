# make demo   a small language model learns three games against itself; ends with runs/demo/report.html
# make test   linters, types, import rules, tests
# make lint   the same without the tests
# make test-vllm   the vLLM engine, with vLLM for CPUs in an environment of its own (.venv-vllm)
#
# PYTHON=...       another interpreter (3.11 to 3.13)
# TORCH_FLAGS=...  options of pip for torch alone, such as the index of its CPU builds
# RUN=...          another directory for the demo
# JOBS=...         test processes

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test test-vllm lint venv

PYTHON ?=
TORCH_FLAGS ?=
RUN ?= runs/demo
JOBS ?= 2
RECIPE := recipes/spiral_cpu.toml
MODEL := models/small

BIN := .venv/bin
SUM := $(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
STAMP := .venv/.installed-$(SUM)
DEV := .venv/.dev-$(SUM)

help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile

venv: $(DEV)

# torch goes first and alone, so that an index in TORCH_FLAGS serves nothing else.
$(STAMP):
	@python="$(PYTHON)"; right='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; \
	for candidate in python3 python3.13 python3.12 python3.11; do \
	  if [ -z "$$python" ] && "$$candidate" -c "$$right" 2>/dev/null; then python="$$candidate"; fi; \
	done; \
	if [ -z "$$python" ] || ! "$$python" -c "$$right"; then \
	  echo "Ludus needs Python 3.11, 3.12 or 3.13; $${python:-python3} is $$("$${python:-python3}" --version 2>&1 || true)." \
	    "Install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; \
	fi; \
	"$$python" -m venv .venv || { echo "cannot make .venv: $$python lacks the venv module" \
	  "(on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(BIN)/pip install -q -c constraints.txt $(TORCH_FLAGS) torch
	$(BIN)/pip install -q -c constraints.txt -e .
	@rm -f .venv/.installed-*
	@touch $@

# What the tests need besides; one of the suites' libraries is built by a C compiler.
$(DEV): $(STAMP)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@rm -f .venv/.dev-*
	@touch $@

# An unfinished demo goes on where it stopped; a finished one only shows what it found.
demo: $(STAMP)
	@if [ ! -e $(MODEL) ]; then $(BIN)/ludus make-model $(MODEL); fi
	@if [ -e $(RUN)/config.toml ]; then \
	  echo "$(RUN) exists: going on with it (for a fresh run: make demo RUN=$(RUN)-2)"; \
	  $(BIN)/ludus train $(RECIPE) --out $(RUN) --resume; \
	else \
	  $(BIN)/ludus train $(RECIPE) --out $(RUN); \
	fi

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# One thread per process: small tensors gain nothing from more, and the processes do not get in each other's way.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

VLLM := .venv-vllm/bin
VLLM_STAMP := .venv-vllm/.installed-$(shell cat pyproject.toml requirements-vllm.txt | cksum | cut -d' ' -f1)

# vLLM wants older versions of some libraries than the tests, and others that nothing else needs. Byte code is written
# for what vLLM loads, which is the smaller part: each of its processes loads that anew.
$(VLLM_STAMP): | $(STAMP)
	$(BIN)/python -m venv .venv-vllm
	$(VLLM)/pip install -q --no-deps --no-compile -c requirements-vllm.txt $(TORCH_FLAGS) torch
	$(VLLM)/pip install -q --no-deps --no-compile -r requirements-vllm.txt
	$(VLLM)/pip install -q --no-deps -e .
	PYTHONDONTWRITEBYTECODE= VLLM_LOGGING_LEVEL=ERROR $(VLLM)/python -W ignore -c 'import vllm.v1.worker.cpu_worker'
	@rm -f .venv-vllm/.installed-*
	@touch $@

test-vllm: $(VLLM_STAMP)
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(VLLM)/python -m pytest -n $(JOBS) --dist loadfile \
	  tests/engines/test_engines_vllm*.py tests/train/test_train_vllm*.py

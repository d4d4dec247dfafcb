# Every target makes its own .venv from nothing but Python 3.11 or newer, git and make; a second run installs nothing.
#
#   make demo         a minute with the trained model that comes along, page in samba-demo/; ARGS=--train trains four
#   make test         the tests; ARGS="-k scan" chooses among them
#   make test-all     the tests and the long ones (soaks, repeated kills)
#   make lint types   style and types
#   make clean        remove .venv and every cache
#
# The build of torch is yours to choose, for example the CPU's alone (a far smaller download on Linux):
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

TORCH ?= torch==2.13.0
PYTHON ?=
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check --quiet install --no-compile
# Instead of pip, on all cores: installing takes a quarter less. What is made for other Pythons does not compile. Ours too: where
# Python may not write bytecode (PYTHONDONTWRITEBYTECODE), each of the tests' many processes would compile it again.
COMPILE = $(BIN)/python -m compileall -qq -j 0 src $(wildcard $(VENV)/lib/python3*/site-packages) || true
# Test processes, of one thread each, one more than cores because tests also wait (for servers, for each other's processes);
# 0 runs the tests in pytest's own process.
WORKERS ?= 3
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

.PHONY: help demo test test-all lint types clean

help:
	@grep '^#   make' Makefile | cut -c 5-

demo: $(VENV)/.base
	$(BIN)/samba-lm demo $(ARGS)

test: $(VENV)/.test $(VENV)/.npm
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(VENV)/.test $(VENV)/.npm
	$(PYTEST) $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.dev
	$(BIN)/mypy

clean:
	rm -rf $(VENV) tests/serve/js/node_modules build dist .pytest_cache .ruff_cache .mypy_cache src/*.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp stands for a finished step and is written last: an interrupted installation is taken up again.

# A Python is tried by running it: some launchers exist for versions that do not.
$(VENV)/.python:
	@for python in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11); do \
	  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	  $$python -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "make: $$python has no venv module: install it (Debian and Ubuntu: python3-venv)" >&2; exit 2; }; \
	  echo "Making $(VENV) with $$($$python --version)"; \
	  $$python -m venv $(VENV) && touch $@; exit; \
	done; \
	echo "make: no Python 3.11 or newer: install one, or name one: make ... PYTHON=/path/to/python3" >&2; exit 2

# First and alone, so that nothing else decides which build of torch comes; what it needs comes with the next step.
$(VENV)/.torch: $(VENV)/.python
	@echo "Installing $(TORCH)"
	@$(PIP_INSTALL) --no-deps $(TORCH)
	@touch $@

$(VENV)/.base: $(VENV)/.torch pyproject.toml constraints.txt
	@echo "Installing samba-lm"
	@$(PIP_INSTALL) -c constraints.txt -e .
	@$(COMPILE)
	@touch $@

$(VENV)/.test: $(VENV)/.base
	@echo "Installing what the tests need"
	@$(PIP_INSTALL) -c constraints.txt -e ".[test]"
	@$(COMPILE)
	@touch $@

# Clients of the server that are JavaScript, and what drives the browser; without npm their tests are skipped.
$(VENV)/.npm: $(VENV)/.base tests/serve/js/package-lock.json
	@if command -v npm >/dev/null; then \
	  echo "Installing what the tests need of npm"; \
	  (cd tests/serve/js && npm ci --silent --ignore-scripts --no-audit --no-fund) && touch $@; \
	else \
	  echo "make: no npm: the tests of the web page and of the npm client are skipped"; \
	fi

$(VENV)/.dev: $(VENV)/.test
	@echo "Installing the linter and the type checker"
	@$(PIP_INSTALL) -c constraints.txt -e ".[dev]"
	@touch $@

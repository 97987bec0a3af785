# One command on a fresh machine: `make demo`, `make test`. Everything goes into .venv; nothing else is touched.
#
#   make demo                    a small model, bent to several budgets, as pictures and a table
#   make test                    the test suite            (PYTEST_ARGS="tests/paths -x" narrows it, WORKERS=4 widens it)
#   make slow                    the slow tests, and the README's commands
#   make lint                    ruff and mypy
#   make setup PYTHON=python3.12 another interpreter       (PIP_ARGS="--index-url ..." is handed to pip)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.pliant-installed
PIP_ARGS ?=
PYTEST_ARGS ?=
WORKERS ?= 2

# The tests are many small tensors: one thread per worker is faster than many threads that wait for each other.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
CHECK_PYTHON := import sys; v = sys.version_info; old = v < (3, 10); \
	print(f"Pliant needs Python 3.10 or newer; {sys.executable} is {v[0]}.{v[1]}.") if old else None; sys.exit(old)

.PHONY: demo test slow lint setup clean distclean
.DEFAULT_GOAL := test

demo: $(STAMP)
	$(BIN)/pliant demo

test: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

slow: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest -q -m "slow and not gpu" $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

setup: $(STAMP)

$(BIN)/python:
	@command -v $(PYTHON) > /dev/null || { echo "No $(PYTHON) found. Install Python 3.10 or newer, or: make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c '$(CHECK_PYTHON)' || { echo "Choose another one with: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "Could not create $(VENV); on Debian and Ubuntu: apt install python3-venv"; exit 1; }

# torch first: it is by far the largest, and a failed later step then need not fetch it again.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@$(BIN)/python -c '$(CHECK_PYTHON)' || { echo "Remove $(VENV), then: make PYTHON=python3.12"; exit 1; }
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt torch
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt -e '.[all,dev]'
	@touch $@

clean:
	rm -rf build dist demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) src/*.egg-info

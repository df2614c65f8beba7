# One environment (.venv), rebuilt when what it was built from changes, and the few things to do in it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := $(VENV)/.peers
# As many tests at a time as there are processors, four at most (a process of them takes a gigabyte).
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal
SOURCES := $(shell find csrc -type f) setup.py CMakeLists.txt pyproject.toml constraints.txt

.PHONY: demo test slow lint format bench bench-avx2 mlserver clean

demo: $(STAMP)
	$(BIN)/python -m wmengine demo

test: $(STAMP)
	$(PYTEST)

slow: $(STAMP)
	$(PYTEST) -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(find csrc -type f)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -type f)

bench: $(PEERS)
	$(BIN)/python -m benchmarks

# The same on a processor with AVX-512, with everyone held to AVX2 who lets himself be held. torch.compile keeps its
# kernels apart: those that it made for AVX-512 crash beside a torch held to AVX2.
bench-avx2: $(PEERS)
	WMENGINE_INSTRUCTION_SET=x86-64-v3 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
	FAISS_OPT_LEVEL=avx2 TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/$(VENV)/inductor-avx2 $(BIN)/python -m benchmarks

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

# The libraries that benchmarks compare with come on top.
$(PEERS): $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[bench]'
	touch $@

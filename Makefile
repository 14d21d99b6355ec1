# Every target sets up what it needs in $(VENV) from this repository's files; a second run skips what is done.
#
#   make demo                    train an RVAE on the embedded digits, score held-out rows, write a report
#   make demo DATA=mnist DIGIT=0 the same on MNIST's 70,000 images (fetched once)
#   make test | lint | bench     the test suite; ruff and mypy; the benchmarks in a short form
#   make bench-full              all benchmarks with every rival, recorded, and the README's table and plot drawn again
#   make data                    fetch the data sets into the cache folder
#   make gpu                     on a machine with a GPU: test and measure what runs there, within eight minutes, without network
#   make native                  recompile the native module in place (quick; for work on csrc/)
#   make doctor                  say which fast paths this installation has, and why not the others
#
# Variables: PYTHON (the interpreter that makes the venv), VENV, DATA, DIGIT, OUT, ARGS (passed to pytest), TEST_JOBS (processes
# that test, as many as there are cores up to four), and the build's own
# (RVAE_FAST_NATIVE, RVAE_FAST_CUDA, MAX_JOBS...: see build_tools/native_build.py). pip's own variables are honoured.

PYTHON ?= python3
VENV ?= .venv
DATA ?= digits
DIGIT ?=
OUT ?= runs/demo-$(DATA)$(DIGIT:%=-%)
ARGS ?=
TEST_JOBS ?= auto
BENCH_ARGS ?=
DATASETS ?= digits mnist fashion_mnist shuttle satellite

.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:

BIN := $(VENV)/bin
PY := $(BIN)/python
STAMP := $(VENV)/.stamps
# torch's tested release, from the one file that names it, holds for every later installation too.
PIP := $(PY) -m pip install --disable-pip-version-check -q -c requirements/torch.txt

BUILD_FILES := setup.py CMakeLists.txt pyproject.toml $(wildcard build_tools/*.py) rvae_fast/_version.py
NATIVE_SOURCES := $(shell find csrc -type f 2>/dev/null)

.PHONY: help
help:
	@sed -n '2,/^$$/s/^# \{0,1\}//p' Makefile

# ------------------------------------------------------------------------------------------------------------ environment
$(STAMP)/venv:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else f"Python 3.10 or newer is needed, $(PYTHON) is {v[0]}.{v[1]}; say make PYTHON=python3.12")'
	@$(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) cannot make a virtual environment (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	@mkdir -p $(STAMP) && touch $@

$(STAMP)/torch: requirements/torch.txt | $(STAMP)/venv
	@echo "installing torch (the tested release, requirements/torch.txt)"
	@$(PIP) -r requirements/torch.txt
	@touch $@

$(STAMP)/build-tools: pyproject.toml | $(STAMP)/torch
	@$(PY) build_tools/project_requirements.py build core > $(STAMP)/build-tools.txt
	@$(PIP) -r $(STAMP)/build-tools.txt
	@touch $@

# An editable install; the native module is compiled here, or a plain message says why not.
$(STAMP)/install: $(BUILD_FILES) $(NATIVE_SOURCES) $(STAMP)/torch $(STAMP)/build-tools
	@echo "installing rvae-fast and compiling its native module"
	@$(PIP) --no-build-isolation --no-deps -e .
	@$(PY) -c 'from rvae_fast import _native; print("native module:", _native.why_not() or "built and loaded")'
	@touch $@

# The packages of one extra of pyproject.toml.
$(STAMP)/extra-%: pyproject.toml | $(STAMP)/install
	@$(PY) build_tools/project_requirements.py $* > $(STAMP)/extra-$*.txt
	@$(PIP) -r $(STAMP)/extra-$*.txt
	@touch $@

.PHONY: install dev native doctor triton
install: $(STAMP)/install
dev: $(STAMP)/install $(STAMP)/extra-dev
triton: $(STAMP)/install $(STAMP)/extra-triton

native: | $(STAMP)/install
	RVAE_FAST_NATIVE=1 $(PY) setup.py -q build_ext --inplace

doctor: $(STAMP)/install
	@$(BIN)/rvae-fast doctor

# ------------------------------------------------------------------------------------------------------------------ for users
.PHONY: demo data
demo: $(STAMP)/install $(STAMP)/extra-report $(if $(filter-out digits mnist fashion_mnist emnist,$(DATA)),$(STAMP)/extra-data)
	$(BIN)/rvae-fast demo --data $(DATA) $(DIGIT:%=--novel %) --out $(OUT)

data: $(STAMP)/install $(STAMP)/extra-data
	$(BIN)/rvae-fast data fetch $(DATASETS)

# ------------------------------------------------------------------------------------------------------------- for developers
.PHONY: test lint format bench bench-full test-sanitize check-cuda dist clean distclean
test: $(STAMP)/install $(STAMP)/extra-test $(STAMP)/tests-triton
	$(PY) -m pytest -n $(TEST_JOBS) --maxprocesses 4 --dist worksteal $(ARGS)

# Triton runs interpreted and cross-compiles without a GPU. Where it cannot be installed its tests skip, and say so; the
# next run tries again.
.PHONY: $(STAMP)/tests-triton
$(STAMP)/tests-triton: | $(STAMP)/install
	@[ -e $(STAMP)/extra-triton ] || $(MAKE) --no-print-directory triton || \
	  echo "Triton cannot be installed here: its tests will skip"

lint: $(STAMP)/install $(STAMP)/extra-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)/install $(STAMP)/extra-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)/install $(STAMP)/extra-bench
	$(PY) -m pytest benchmarks $(BENCH_ARGS)

# A suite at a time, so that none inherits another's heap; hours with all units (BENCH_ARGS="--units eighth" for less).
BENCH_SUITES ?= $(wildcard benchmarks/bench_*.py)
bench-full: $(STAMP)/install $(STAMP)/extra-bench
	for suite in $(BENCH_SUITES); do $(PY) -m pytest -c benchmarks/pytest.ini $$suite --full $(BENCH_ARGS); done
	$(PY) benchmarks/readme.py

# The native module with AddressSanitizer and UBSan, in a folder of its own, under the tests of the ops and of the scorer.
SANITIZE_TESTS ?= tests/ops tests/test_scorer.py tests/test_score_pathway.py tests/training/test_direct_gradients.py
test-sanitize: $(STAMP)/install $(STAMP)/extra-test
	RVAE_FAST_NATIVE=1 RVAE_FAST_SANITIZE=address,undefined $(PY) setup.py -q build_ext --build-lib build/sanitize
	RVAE_FAST_NATIVE_DIR=$(CURDIR)/build/sanitize/rvae_fast ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
	  $(PY) -m pytest $(SANITIZE_TESTS) $(ARGS)

# With $(PYTHON) as it is: nothing is downloaded, no venv is made. ARGS=--dry-run proves the scripts where there is no GPU.
.PHONY: gpu
gpu:
	@$(PYTHON) build_tools/gpu_check.py $(ARGS)

# The CUDA sources compile for every architecture that is shipped (needs nvcc, no GPU and no CUDA build of torch).
check-cuda:
	@bash build_tools/check_cuda.sh

dist: $(STAMP)/install $(STAMP)/extra-dev
	$(PY) -m build --no-isolation

clean:
	rm -rf build dist *.egg-info rvae_fast/_C*.so rvae_fast/_C_build*.json .pytest_cache .mypy_cache .ruff_cache

distclean: clean
	rm -rf $(VENV)

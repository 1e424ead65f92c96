# Everything goes into .venv (and .venv-torch): no sudo, nothing outside of this folder but $VERIATTN_HOME and pip's cache.
# Useful settings: PYTHON=python3.12 (the interpreter to build with), EVAL_TEXT=FILE (for accept), PYTEST_ARGS="-k name".

VENV ?= .venv
VENV_TORCH ?= .venv-torch
VENV_PEERS ?= .venv-peers
EVAL_TEXT ?= ../shared/data/wikitext-2/valid.txt
FUZZ_SECONDS ?= 600
PYTEST_ARGS ?=

NATIVE_SOURCES := pyproject.toml CMakeLists.txt $(wildcard native/*)
BIN := $(VENV)/bin
# One test that hangs must not hang the rest; pytest's own closing lines stay the last ones printed.
PYTEST := -m pytest -q --timeout 300 $(PYTEST_ARGS)

.PHONY: help demo test test-sanitize test-torch test-gpu test-browser accept lint format bench bench-gpu bench-peers fuzz native clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo        fetch SmolLM2-135M, convert it, print a verified answer (a few minutes the first time)'
	@echo 'make test        lint, types, import contracts and all tests that need neither torch nor a GPU'
	@echo 'make test-sanitize  the tests of the native kernels under AddressSanitizer and UBSan, AMX tiles emulated'
	@echo 'make test-torch  the tests against transformers, and of the GPU code without a GPU (CPU build of torch)'
	@echo 'make test-gpu    the kernels and the prover on a GPU, with the torch of $$GPU_PYTHON (python3)'
	@echo 'make test-browser  the page of the server in headless Chromium ($$CHROMIUM, or one on the PATH)'
	@echo 'make accept      the acceptance measurements (long; quality needs EVAL_TEXT)'
	@echo 'make lint        ruff, mypy, import contracts        make format   let ruff rewrite'
	@echo 'make bench       measurements on this machine        make fuzz     fuzz the codec for FUZZ_SECONDS'
	@echo 'make bench-gpu   every figure that needs a GPU, part by part, and a report (BENCH_ARGS="--list"; $$GPU_PYTHON)'
	@echo 'make bench-peers  decoding beside llama.cpp, in an environment of its own (compiles it: some minutes)'
	@echo 'make native      build the native kernels in place   make clean    remove what was built here'

$(VENV)/.base: $(NATIVE_SOURCES)
	@sh tools/preflight.sh >/dev/null
	@sh tools/env.sh $(VENV) base
	@touch $@

$(VENV)/.dev: $(VENV)/.base tools/extra.py
	@sh tools/env.sh $(VENV) dev
	@touch $@

$(VENV)/.accept $(VENV)/.browser: $(VENV)/.dev
	@sh tools/env.sh $(VENV) $(patsubst .%,%,$(notdir $@))
	@touch $@

$(VENV_TORCH)/.torch: $(NATIVE_SOURCES) tools/extra.py
	@sh tools/preflight.sh >/dev/null
	@sh tools/env.sh $(VENV_TORCH) torch
	@touch $@

$(VENV_PEERS)/.peers:
	@sh tools/preflight.sh >/dev/null
	@sh tools/env.sh $(VENV_PEERS) peers
	@touch $@

demo: $(VENV)/.base
	@$(BIN)/python tools/check_demo.py

lint: $(VENV)/.dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	PYTHONPATH=src $(BIN)/lint-imports --no-logo

format: $(VENV)/.dev
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

test: lint
	$(BIN)/python $(PYTEST) -m 'not accept' --ignore tests/torch --ignore tests/gpu --ignore tests/browser tests

test-sanitize: $(VENV)/.dev
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tools/build_native.py --sanitize --emulate-amx --test

test-torch: $(VENV_TORCH)/.torch
	$(VENV_TORCH)/bin/python $(PYTEST) tests/torch

# Needs torch with CUDA and Triton in GPU_PYTHON, and no network: everything else it uses must be there too.
GPU_PYTHON ?= python3
define on-gpu
	@$(GPU_PYTHON) -c 'import torch, triton; raise SystemExit(not torch.cuda.is_available())' \
		|| { echo 'error: $(GPU_PYTHON) needs a CUDA GPU, torch with CUDA, and triton' >&2; exit 1; }
	PATH="$$(dirname $$(command -v $(GPU_PYTHON))):$$PATH" $(GPU_PYTHON) tools/build_native.py
	PYTHONPATH="src$${PYTHONPATH:+:$$PYTHONPATH}" $(GPU_PYTHON)
endef

test-gpu:
	$(on-gpu) -m pytest -q $(PYTEST_ARGS) tests/gpu

# What is complete is not measured again: with BENCH_ARGS='--budget 540' the next call goes on.
BENCH_ARGS ?=
bench-gpu:
	$(on-gpu) -m benchmarks.gpu $(BENCH_ARGS)

test-browser: $(VENV)/.browser
	$(BIN)/python $(PYTEST) tests/browser

accept: $(VENV)/.accept
	EVAL_TEXT='$(EVAL_TEXT)' $(BIN)/python -m pytest -v -s --timeout 7200 $(PYTEST_ARGS) -m accept --ignore tests/browser --ignore tests/gpu tests

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks

# Beside other programs, each in an environment of its own; outside CI.
bench-peers: $(VENV)/.dev $(VENV_PEERS)/.peers
	$(BIN)/python -m benchmarks.peers --python $(VENV_PEERS)/bin/python

fuzz: $(VENV)/.dev
	$(BIN)/python tools/fuzz_wire.py --seconds $(FUZZ_SECONDS)

# For work on the kernels: the extension beside the sources, with PY's cmake, ninja and nanobind.
PY ?= $(BIN)/python
native: $(if $(filter $(BIN)/python,$(PY)),$(VENV)/.dev)
	PATH="$(dir $(abspath $(PY))):$$PATH" $(PY) tools/build_native.py

clean:
	rm -rf $(VENV) $(VENV_TORCH) $(VENV_PEERS) build dist src/veriattn/native/_native*.so

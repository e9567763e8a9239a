# make demo   environment, install, the main job          make dev    build the extension in place (needs .[dev])
# make test   environment, install, the tests             make lint   ruff, mypy, clang-format
# make readme the measured tables, from the records
PYTHON ?= python3
VENV ?= .venv
JOBS ?= auto
# The CUDA kernels: OFF leaves them to NVRTC, which compiles those that are called, on the machine with the GPU; AUTO has nvcc,
# where there is one, compile all of them for four architectures, which takes minutes.
KERNELS ?= OFF
.DEFAULT_GOAL := help

help:
	@sed -n '1,3s/^# //p' Makefile

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

.PHONY: help demo test dev lint format bench
demo: $(VENV)/bin/python
	PYROUTE_CUDA=$(KERNELS) $(VENV)/bin/pip install --quiet ".[cli]"
	$(VENV)/bin/pyroute demo

test: $(VENV)/bin/python
	PYROUTE_CUDA=$(KERNELS) $(VENV)/bin/pip install --quiet ".[test]"
	MALLOC_PERTURB_=128 PYROUTE_EMULATOR_REQUIRED=1 $(VENV)/bin/pytest tests -n $(JOBS)

# Incremental: about 10 s after touching one kernel file. PYTHON is the environment that holds the dev extra.
dev:
	cmake -S . -B build/dev -G Ninja -DPython_EXECUTABLE=$$($(PYTHON) -c 'import sys; print(sys.executable)') \
	  -DPYROUTE_CUDA=$(KERNELS) -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/pyroute > build-dev.log 2>&1 || { cat build-dev.log; exit 1; }
	@rm -f build-dev.log
	cmake --build build/dev

# The GPU that tests/cuda runs the CUDA kernels on: the same sources, compiled for the host (tests/cuda/emulator).
.PHONY: emulator
emulator:
	mkdir -p build/emulator
	flock build/emulator/lock cmake -S . -B build/emulator -G Ninja -DPYROUTE_EMULATOR=ON --log-level=WARNING
	flock build/emulator/lock cmake --build build/emulator --target cuda_emulated

bench:
	$(VENV)/bin/pytest benches $(if $(OP),-k $(OP))

# The measured tables of README.md and benches/results/README.md, from the records.
.PHONY: readme
readme: export PYTHONPATH := $(CURDIR)
readme:
	$(PYTHON) benches/readme.py

lint:
	ruff check . && ruff format --check . && mypy
	git ls-files '*.cpp' '*.h' '*.cuh' '*.cu' | xargs clang-format --dry-run --Werror

format:
	ruff check --fix . && ruff format .
	git ls-files '*.cpp' '*.h' '*.cuh' '*.cu' | xargs clang-format -i

# The C++ tests (tests/cpp) under the address and undefined-behaviour sanitizers, and under the thread sanitizer, which does
# not understand the threads of OpenMP. Work is shared out alike on every instruction set: one of them shows its races.
.PHONY: sanitize
sanitize:
	cmake -S . -B build/sanitize -G Ninja -DPYROUTE_SANITIZE=address,undefined -DPYROUTE_TESTS=ON --log-level=WARNING
	cmake --build build/sanitize --target cpp_tests
	ctest --test-dir build/sanitize --output-on-failure
	cmake -S . -B build/thread -G Ninja -DPYROUTE_SANITIZE=thread -DPYROUTE_SCALAR_ONLY=ON -DPYROUTE_OPENMP=OFF -DPYROUTE_TESTS=ON --log-level=WARNING
	cmake --build build/thread --target cpp_tests
	PYROUTE_FUZZ_CASES=60 ctest --test-dir build/thread --output-on-failure

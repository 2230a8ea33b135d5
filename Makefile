# Every target sets up .venv first: Python 3.11 or newer, a C++ compiler and git are all that must be there.
PYTHON ?= python3
VENV ?= .venv
# Pinned: a release whose plain wheel is CPU-only where such a wheel is offered. Any torch from 2.11 on works.
TORCH ?= torch==2.13.0
# The digits of `make sample`.
SEEDS ?= 0-63
STEPS ?= 20
LAMBDA ?= 1.005

BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := setup.py pyproject.toml CMakeLists.txt $(wildcard csrc/*)

.PHONY: build sample test sanitize bench-cpu train clean

build: $(READY)

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH) numpy "setuptools>=77" wheel cmake ninja pybind11
	touch $@

$(READY): $(VENV)/.torch $(SOURCES)
	EPSKERNELS_BUILD=1 $(BIN)/pip install --quiet --no-build-isolation --editable '.[test]'
	touch $@

sample: $(READY)
	$(BIN)/epskernels sample --steps $(STEPS) --lambda $(LAMBDA) --compare --seeds $(SEEDS) --out samples.png

test: $(READY)
	$(BIN)/python -m pytest

sanitize: $(READY)
	PATH="$(abspath $(BIN)):$$PATH" bash tests/sanitize.sh

bench-cpu: $(READY)
	$(BIN)/python benchmarks/bench_cpu.py

train: $(READY)
	$(BIN)/python examples/train_mnist.py --out runs/mnist

clean:
	rm -rf build dist *.egg-info epskernels/*.so epskernels/not_built.txt $(READY)

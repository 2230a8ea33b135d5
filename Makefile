# Every target sets up .venv first: Python 3.11 or newer with its headers, a C++ compiler and git are all that must be there.
PYTHON ?= python3
VENV ?= .venv
# What .venv has, which its stamp tells; another is installed in its place, and all is built again. At first a pinned one: a
# release whose plain wheel is CPU-only where such a wheel is offered. Any torch from 2.11 on works.
TORCH_THERE := $(shell cat $(VENV)/.torch 2>/dev/null)
TORCH ?= $(or $(TORCH_THERE),torch==2.13.0)
# Where there is nvcc the CUDA kernel is compiled beside a torch without CUDA too: `make test` reads its machine code. It takes
# minutes; EPSKERNELS_CUDA=0 leaves it out.
NVCC := $(shell for nvcc in $(CUDACXX) nvcc $(CUDA_HOME:=/bin/nvcc) /usr/local/cuda/bin/nvcc; do \
	command -v $$nvcc && break; done)
EPSKERNELS_CUDA ?= $(if $(NVCC),1,auto)
# Of the tests.
WORKERS ?= 2
CHECKED := $(addprefix tests/,ops/test_bad_input.py ops/test_step_bits.py ops/test_guidance.py diffusers/test_calls.py \
	diffusers/test_stale_schedules.py project/test_pairwise.py $(foreach test,table schedule scaling oracles k_diffusion,samplers/test_$(test).py))
# The digits of `make sample`, whose first sixteen are in the picture.
SEEDS ?= 0-255
# How long `make quality` works before it stops; it goes on from there.
MINUTES ?= 60

# What gpu-check runs with: the Python whose torch sees the GPU, and where its results go.
GPU_PYTHON ?= $(shell for python in $(VENV)/bin/python python3; do \
	$$python -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null && echo $$python && break; done)
RESULTS ?= benchmarks/results
# The run that bench writes and report draws, and the two that bench-compare compares.
RUN ?= benchmarks/results/latest.json
OLD ?= benchmarks/results/cpu.json
NEW ?= $(RUN)

BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := setup.py pyproject.toml CMakeLists.txt epskernels/spec.py $(wildcard csrc/*)

.PHONY: build sample check test test-deep test-arm lint docs wheel-check mutants sanitize gpu-check gpu-check-dry bench bench-full \
	bench-diffusers bench-dispatch bench-compare report quality quality-report quality-quick explore train clean another-torch

build: $(READY)

ifneq ($(TORCH),$(TORCH_THERE))
$(VENV)/.torch: another-torch
endif
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH) numpy "setuptools>=77" wheel cmake ninja pybind11
	echo '$(TORCH)' > $@

COMPILE := EPSKERNELS_BUILD=1 EPSKERNELS_CUDA=$(EPSKERNELS_CUDA)
# What the tests need is installed while the kernels compile; the last command finds both.
$(READY): $(VENV)/.torch $(SOURCES)
	EPSKERNELS_BUILD=0 $(BIN)/pip install --quiet --no-build-isolation --editable '.[test]' & packages=$$!; \
		$(COMPILE) $(BIN)/python setup.py --quiet build_ext --inplace > $(VENV)/compiled.txt 2>&1 || \
		{ cat $(VENV)/compiled.txt; kill $$packages; exit 1; }; wait $$packages
	$(COMPILE) $(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

sample: $(READY)
	$(BIN)/epskernels demo --seeds $(SEEDS) --out samples.png

# Each worker on one thread; modules whose fixtures are expensive stay on one worker (tests/conftest.py).
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

# For the loop of working: the bits, the refusals and the tables, without Triton's interpreter.
check: $(READY)
	$(PYTEST) -k "not triton" $(CHECKED)

# Products of parameters in pairs, and what is not marked deep.
test: $(READY)
	$(PYTEST)

# The CPU kernel for Arm, under qemu, and as Clang makes it: every test of its bits, and random calls.
test-arm: $(READY)
	EPSKERNELS_TEST_KERNELS=arm_gcc,arm_clang,clang_generic,clang_avx2,clang_avx512 $(PYTEST) -m "" \
		-k "arm or clang or other_cpus or fuzz" $(addprefix tests/ops/test_,$(addsuffix .py,other_cpus step_bits noise guidance fuzz))

# Everything, Arm and Clang too; then kills, races, damage, full disks and torchrun, at length (some three hours).
test-deep: $(READY)
	$(PYTEST) -m ""
	$(MAKE) test-arm
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.ranks.test_campaigns damage=30000 race=1000 full=50 kill=180 ranks=16 torchrun=300

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The extra is read from the installed package: nothing is built again.
$(VENV)/.docs: $(READY)
	$(BIN)/pip install --quiet 'epskernels[docs]'
	touch $@

$(VENV)/.wheels: $(READY)
	$(BIN)/pip install --quiet 'epskernels[wheels]'
	touch $@

# Wheels with and without the CUDA kernel, under auditwheel and torch-abi-audit; EPSKERNELS_CUDA_PYTHON, a Python whose torch has
# CUDA, loads that kernel too.
wheel-check: $(VENV)/.wheels
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "" tests/project/test_install.py tests/ops/test_cuda_build.py \
		-k "wheel or abi or loads_it"

# build/site/index.html: every broken link, unknown anchor and unknown name is an error. EPSKERNELS_REPOSITORY=https://.../blob/main
# has the files that are no pages linked to.
docs: $(VENV)/.docs
	mkdir -p build/docs
	$(BIN)/python -m sphinx -q -W --keep-going -c docs -d build/doctrees build/docs build/site
	@echo build/site/index.html

# Plants faults and asks which test notices: MUTANTS="--resume", "--only REGEX" (python -m tests.mutants --help).
mutants: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants --jobs $(WORKERS) $(MUTANTS)

sanitize: $(READY)
	PATH="$(abspath $(BIN)):$$PATH" bash tests/project/sanitize.sh

# Installs nothing: where there is no network, the torch of the system will do. At most six minutes; called again it goes on.
gpu-check:
	@python="$(GPU_PYTHON)"; test -n "$$python" || \
		{ echo "gpu-check: no Python here has a torch that sees a GPU (GPU_PYTHON=...)"; exit 1; }; \
	"$$python" -m tests.gpu.gpu_check $(RESULTS)

# The same on a stand-in for a GPU, so that nothing trivial fails on the day when there is one.
gpu-check-dry: $(READY)
	$(BIN)/python -m tests.gpu.gpu_check --dry-run build/gpu-check

# Its results: benchmarks/results/latest.json, compared and drawn by the targets after it.
bench: $(READY)
	$(BIN)/python benchmarks/bench.py --json $(RUN)

bench-full: $(READY)
	$(BIN)/python benchmarks/bench.py --full --json $(RUN)

bench-diffusers: $(READY)
	$(BIN)/python benchmarks/bench_diffusers.py

bench-dispatch: $(READY)
	$(BIN)/python -m pytest benchmarks/test_dispatch.py --benchmark-group-by=func

bench-compare: $(READY)
	$(BIN)/python benchmarks/compare.py $(OLD) $(NEW)

report: $(READY)
	$(BIN)/python benchmarks/report.py $(RUN)

# Three models with and without Epsilon Scaling (docs/exposure.md): all of it, going on from runs/exposure; what that found moved
# into experiments/results, docs/exposure.md and its tables; and one row again, which must lie in the table's intervals.
quality: $(READY)
	$(BIN)/python experiments/exposure.py run --minutes $(MINUTES)

quality-report: $(READY)
	$(BIN)/python experiments/exposure.py report

quality-quick: $(READY)
	$(BIN)/python experiments/exposure.py quick

# The data of docs/explore, the page with the sliders: half an hour of one core, going on from runs/explore.
explore: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python experiments/explore.py

train: $(READY)
	$(BIN)/python examples/train_mnist.py --out runs/mnist

clean:
	rm -rf build dist *.egg-info epskernels/*.so epskernels/*built*.txt $(READY)

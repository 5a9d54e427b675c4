# Needs python3 (3.10 or newer), make and a C compiler; everything else goes into .venv.

VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
# In force for every pip call: a plain "torch" would fetch the newest build, and gigabytes of CUDA with it.
PIP := $(PYTHON) -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
# One thread a worker: two workers with all cores each would fight over them.
PYTEST := OMP_NUM_THREADS=1 $(PYTHON) -m pytest --numprocesses 2

.PHONY: demo chapter test test-slow bench lint clean help

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

demo: $(READY) ## train the chapter's small CNN on the embedded digits (ARGS="--help" for options)
	$(PYTHON) examples/train.py $(ARGS)

chapter: $(READY) ## train all the ways of the chapter and the blog, and draw the comparison (ARGS="--help")
	$(PYTHON) examples/chapter.py $(ARGS)

test: $(READY) ## the core tests
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(READY) ## the other tests that a CPU can run
	$(PYTEST) -m slow $(ARGS)

bench: $(READY) ## time regfast against its peers
	$(PYTHON) bench/run.py $(ARGS)

lint: $(READY) ## ruff and mypy
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

clean: ## remove what was built and measured; .venv stays
	rm -rf build dist out *.egg-info .benchmarks .hypothesis .pytest_cache .mypy_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt bench/peers.txt
	@echo "Installing the pinned environment into $(VENV), once"
	python3 -m venv $(VENV)
	$(PIP) setuptools
	$(PIP) --no-build-isolation --editable '.[demo,test,bench]'
	$(PIP) --no-deps --requirement bench/peers.txt
	@touch $@

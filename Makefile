# Needs python3 (3.10 or newer), make and a C compiler; everything else goes into .venv.

VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
# In force for every pip call: a plain "torch" would fetch the newest build, and gigabytes of CUDA with it.
PIP := $(PYTHON) -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
# One thread a worker: two workers with all cores each would fight over them.
PYTEST := OMP_NUM_THREADS=1 $(PYTHON) -m pytest --numprocesses 2

# The oldest and the newest torch that are supported, each with the Triton that its CUDA build pins.
# (Triton 3.6's interpreter turns arrays of one element into numbers, which NumPy 2.4 refuses.)
OLDEST := torch==2.11.0 triton==3.6.0 numpy==2.3.5
NEWEST := torch==2.15.0 triton==3.9.0

.PHONY: demo chapter test test-slow test-oldest test-newest bench docs lint clean help

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

test-oldest: .venv-oldest/.ready ## the core tests with torch 2.11 and triton 3.6 (makes .venv-oldest, 5 GB)
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest --numprocesses 2 -m "not slow" $(ARGS)

test-newest: .venv-newest/.ready ## the core tests with torch 2.15 and triton 3.9 (makes .venv-newest, 5 GB)
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest --numprocesses 2 -m "not slow" $(ARGS)

bench: $(READY) ## time regfast against its peers (ARGS="-k blur_pool", and pytest-benchmark's options)
	$(PYTHON) -m pytest bench --benchmark-autosave --benchmark-storage=out/benchmarks \
		--benchmark-columns=median,iqr,rounds --benchmark-sort=name $(ARGS)

docs: $(READY) ## build the documentation into out/site (warnings are errors)
	$(PIP) --no-build-isolation --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

lint: $(READY) ## ruff and mypy
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

clean: ## remove what was built and measured; the environments stay
	rm -rf build dist out *.egg-info .benchmarks .hypothesis .pytest_cache .mypy_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt bench/peers.txt
	@echo "Installing the pinned environment into $(VENV), once"
	python3 -m venv $(VENV)
	$(PIP) setuptools
	$(PIP) --no-build-isolation --editable '.[demo,test,bench]'
	$(PIP) --no-deps --requirement bench/peers.txt
	@touch $@

.venv-oldest/.ready: RELEASES := $(OLDEST)
.venv-newest/.ready: RELEASES := $(NEWEST)
.venv-oldest/.ready .venv-newest/.ready: pyproject.toml constraints.txt bench/peers.txt
	@echo "Installing $(RELEASES) into $(@D), once"
	python3 -m venv $(@D)
	grep -vE '^(torch|torchvision|triton|numpy|setuptools)==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/python -m pip --disable-pip-version-check install --quiet -c $(@D)/constraints.txt $(RELEASES) 'setuptools>=77'
	$(@D)/bin/python -m pip --disable-pip-version-check install --quiet -c $(@D)/constraints.txt $(RELEASES) \
		--no-build-isolation --editable '.[demo,test,bench]'
	$(@D)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt --no-deps -r bench/peers.txt
	@touch $@

# Every target works on a fresh clone: the virtual environment is made on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Where no NVIDIA GPU is found, a CPU build of PyTorch is enough.
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)
CONSTRAINTS := $(if $(HAS_GPU),,-c constraints-cpu.txt)

# Published packages that tests compare with: several versions of one, so each lies in a directory of its own.
ORIGINALS := $(VENV)/lucidrains
LUCIDRAINS_VERSIONS := 2.3.4 1.11.1 1.9.6 1.8.15 1.7.7 1.7.1 1.6.4 0.32.0
LUCIDRAINS := $(LUCIDRAINS_VERSIONS:%=$(ORIGINALS)/%/denoising_diffusion_pytorch/__init__.py)

# Most tests are small: a process a core, each on one thread, takes half the time of one process on all of them.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal

.PHONY: help sample test test-slow originals test-originals lint gpu clean

help:
	@echo "make sample     draw the demo's images into samples/"
	@echo "make test       the test suite, in two processes: with and without Triton's interpreter"
	@echo "make test-slow  the long parity tests (minutes)"
	@echo "make test-originals  parity with published packages, which are downloaded into $(ORIGINALS)"
	@echo "make lint       ruff, formatting, types of the public API"
	@echo "make gpu        on a machine with a GPU: gpu tests, then the benchmark; one JSON; no network needed"

$(VENV)/ready: pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e .[dev]
	@touch $@

sample: $(VENV)/ready
	$(BIN)/ddpm sample --seeds 0-15 --grid --out samples

test: $(VENV)/ready
	TRITON_INTERPRET=1 $(PYTEST) -m "interpret and not slow and not originals"
	$(PYTEST) -m "not interpret and not slow and not originals"

test-slow: $(VENV)/ready
	$(PYTEST) -m "slow and not interpret and not originals"

# Without their dependencies, which would bring another torch; tests/originals/lucidrains.py stands in for those.
$(ORIGINALS)/dependencies/einops/__init__.py: | $(VENV)/ready
	$(BIN)/python -m pip install --quiet --no-deps --target $(ORIGINALS)/dependencies einops==0.8.2 ema-pytorch==0.8.3

$(ORIGINALS)/%/denoising_diffusion_pytorch/__init__.py: | $(VENV)/ready
	$(BIN)/python -m pip install --quiet --no-deps --target $(ORIGINALS)/$* denoising-diffusion-pytorch==$*

originals: $(ORIGINALS)/dependencies/einops/__init__.py $(LUCIDRAINS)

test-originals: originals
	REQUIRE_ORIGINALS=1 $(PYTEST) tests/originals tests/ddpm -m originals

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# No virtual environment: it takes the python at hand, which has the machine's own torch.
gpu:
	PYTHONPATH=. $(PYTHON) -m bench gpu

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks

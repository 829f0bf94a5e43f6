# One target, one job. `make demo` and `make test` work on a fresh machine with Python 3.10+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := export runtime calibrate benchmarks
STAMP := $(VENV)/.installed
# PyTorch's CPU build, where pip is set up to find one; a plain `torch` brings gigabytes of CUDA packages.
TORCH ?= torch==2.13.0

.PHONY: install demo test test-fast test-gpu gpu-venv lint typecheck links bench bench-gpu bench-scale bench-int8 wheel clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: install
	$(BIN)/python examples/demo.py --out build/demo

# A worker for every core; more than eight only take memory.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

test: install lint typecheck
	$(PYTEST)

test-fast: install
	$(PYTEST) -m "not slow"

# An environment of its own: ONNX Runtime's builds for CPU and CUDA exclude each other.
gpu-venv:
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install --quiet "$(TORCH)"
	.venv-gpu/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[dev-gpu]"

# On a host with an NVIDIA GPU.
test-gpu: gpu-venv
	.venv-gpu/bin/python -m pytest -m gpu -rs tests/gpu

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# No static tool follows an editable install's import hook, so they get a tree of links.
links:
	@mkdir -p build/typing/latentrt
	@ln -sfn $(addprefix $(CURDIR)/,$(PACKAGES)) build/typing/latentrt/

typecheck: install links
	$(BIN)/mypy

# The figures of README.md. ONLY=end-to-end,growth runs some of its stages, KEEP=1 puts results under benchmarks/results.
PROJECT_BENCH := benchmarks/scripts/project_bench.py
CHOSEN = $(if $(ONLY),--only $(ONLY)) $(if $(KEEP),--keep)

bench: demo
	$(BIN)/python $(PROJECT_BENCH) $(CHOSEN)

# On a host with an NVIDIA GPU; says at once if there is none.
bench-gpu: install
	$(BIN)/python $(PROJECT_BENCH) --gpu --check
	$(MAKE) demo gpu-venv
	.venv-gpu/bin/python $(PROJECT_BENCH) --gpu $(CHOSEN)

# Full size, random weights: an hour on two cores, and 40 GB of disk.
bench-scale: install
	$(BIN)/python benchmarks/scripts/bench_scale.py --json build/bench_scale.json
	$(BIN)/python benchmarks/scripts/bench_build.py --families sd1,sdxl --json build/bench_build.json

# Quality of int8 on the shapes model. Two hours on two cores, kept as it goes.
bench-int8: demo
	$(BIN)/python benchmarks/scripts/bench_int8.py --bundle build/demo/shapes.bundle --work build/int8 --json build/bench_int8.json
	$(BIN)/python benchmarks/scripts/bench_statistics.py --json build/bench_statistics.json

wheel: install
	@rm -rf dist build/lib && mkdir -p build
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m zipfile --list dist/*.whl | awk '/^latentrt\//{print $$1}' | cut -d/ -f2- | sort > build/wheel.txt
	git ls-files $(PACKAGES) | grep -Ev '^benchmarks/(scripts|results)/' | sort | diff build/wheel.txt -

clean:
	rm -rf build dist

# Each target creates its virtual environment and installs what it needs, the first time only.

PYTHON ?= python3
# Each Python has its own environment, so that switching between them reinstalls nothing.
VENV ?= .venv$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
# The torch that `make parity` installs first. On Linux the default wheel includes CUDA. To avoid that, put a CPU wheel
# of this version where pip finds it, or give pip's arguments for one:
# make parity TORCH="torch --index-url ADDRESS-OF-THE-CPU-WHEELS"
TORCH ?= torch==2.13.0
# make test LOCKED=1 installs the versions of requirements-dev.txt, otherwise the newest that pyproject.toml allows.
LOCKED ?=
# More for pytest: make test ARGS="-k merge"
ARGS ?=

BIN := $(VENV)/bin
CUDA_VENV := $(VENV)-cuda
# Where configs/quickstart.yaml reads from and writes to.
DEMO_MODEL := examples/fennel-2m
DEMO := outputs/quickstart
# The extras whose packages requirements-dev.txt pins.
DEVELOPMENT := test parity dev docs browser
PROMPT ?= Tell me about Oscar.

export JAX_PLATFORMS ?= cpu

.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow test-exhaustive soak parity check check-report docs gpu-dry-run format dist lock memory aot aot-cuda clean

help: ## Show this list.
	@sed -n 's/^\([a-z-]*\):[^#]*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16
	@echo "  With another Python: make test PYTHON=python3.12"

demo: $(VENV)/.installed ## Train the shipped model on the shipped rows, merge, and show a prompt before and after.
	$(BIN)/python train.py configs/quickstart.yaml --overwrite
	$(BIN)/python merge.py --adapter $(DEMO)/adapter --output $(DEMO)/merged --overwrite
	@echo "Before:"
	@$(BIN)/lora-jax generate --model.path $(DEMO_MODEL) --prompt "$(PROMPT)"
	@echo "After:"
	@$(BIN)/lora-jax generate --model.path $(DEMO)/merged --prompt "$(PROMPT)"

test: $(VENV)/.installed-test ## Run the fast tests that need no torch.
	$(BIN)/python -m pytest --ignore=tests/parity -m "not slow and not exhaustive" -n 2 --dist loadfile $(ARGS)

test-slow: $(VENV)/.installed-test ## Run the slow tests: meshes, several processes, kernels, the docs, thousands of generated cases.
	$(BIN)/python -m pytest --ignore=tests/parity -m "slow and not exhaustive" -n 2 --dist worksteal $(ARGS)

test-exhaustive: $(VENV)/.installed-parity ## Run the tests that prove something once; not part of CI.
	JAX_DISABLE_MOST_OPTIMIZATIONS=false $(BIN)/python -m pytest -m exhaustive -n 2 --dist worksteal $(ARGS)

soak: $(VENV)/.installed-test ## Kill a training run 25 times and resume it, then check 10,000 generated files of rows; some minutes.
	$(BIN)/python scripts/soak.py $(ARGS)
	$(BIN)/python -m scripts.fuzz_rows

parity: $(VENV)/.installed-parity ## Run the tests that compare with torch, transformers and peft.
	JAX_DISABLE_MOST_OPTIMIZATIONS=false $(BIN)/python -m pytest tests/parity -m "not exhaustive" -n 2 --dist loadfile $(ARGS)

check: $(VENV)/.installed-dev ## Check style, formatting, import layers and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright --pythonpath $(BIN)/python

check-report: $(VENV)/.installed-browser ## Click through the pages of lora-jax report in Debian's chromium; some minutes.
	$(BIN)/python scripts/check_report.py $(ARGS)

docs: $(VENV)/.installed-docs ## Build the documentation into build/site; a broken link fails.
	$(BIN)/python scripts/make_docs.py

format: $(VENV)/.installed-dev ## Fix what ruff can fix.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

gpu-dry-run: $(VENV)/.installed-parity ## Try scripts/gpu_check.py on the CPU, with tiny shapes; some minutes.
	$(BIN)/python scripts/gpu_check.py --dry-run $(ARGS)

dist: $(VENV)/.installed-release ## Build the wheel and the sdist, and test the wheel in a separate environment.
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/python scripts/check_dist.py

lock: $(VENV)/.installed-release ## Pin the newest versions for development in requirements-dev.txt, for Python 3.11 and later.
	@echo "$(firstword $(TORCH))" > $(VENV)/torch.txt
	$(BIN)/uv pip compile pyproject.toml $(addprefix --extra ,$(DEVELOPMENT)) --universal --python-version 3.11 --upgrade \
	    --constraint $(VENV)/torch.txt --no-annotate --custom-compile-command "make lock" --output-file requirements-dev.txt

memory: $(VENV)/.installed-test ## Compile the steps of docs/memory.md for TPUs and print its table: half an hour or more.
	$(BIN)/python benchmarks/memory.py $(ARGS)

aot: $(VENV)/.installed-test ## Compile the 4-bit kernels for TPUs, in every shape of four models: half an hour or more.
	$(BIN)/python scripts/aot_tpu.py $(ARGS)

aot-cuda: $(CUDA_VENV)/.installed ## The same for GPUs, in a separate environment; downloads gigabytes.
	$(CUDA_VENV)/bin/python scripts/aot_cuda.py $(ARGS)

clean: ## Remove the environments, the caches and what the demo wrote.
	rm -rf .venv .venv-* build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis $(DEMO)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A pyenv shim only runs versions that are active, and others if they are named.
$(BIN)/python:
	@set -e; name='import sys; print(sys.executable)'; \
	python=$$($(PYTHON) -c "$$name" 2>/dev/null) \
	    || python=$$(PYENV_VERSION=$(patsubst python%,%,$(notdir $(PYTHON))) $(PYTHON) -c "$$name" 2>/dev/null) \
	    || { echo "$(PYTHON): no such Python here; give one with make $(MAKECMDGOALS) PYTHON=..." >&2; exit 2; }; \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "$(PYTHON): older than 3.11; give a newer one with PYTHON=python3.12" >&2; exit 2; }; \
	echo "Making $(VENV) with $$python"; \
	"$$python" -m venv --clear $(VENV)

# JAX 0.11 and later can also compile a kernel without a GPU, but write no PTX with its registers.
$(CUDA_VENV)/.installed: pyproject.toml $(BIN)/python
	$(BIN)/python -m venv --clear $(CUDA_VENV)
	@echo 'Installing CUDA for JAX into $(CUDA_VENV): gigabytes'
	$(CUDA_VENV)/bin/python -m pip install -qq -e . "jax[cuda13]<0.11"
	@touch $@

# A stamp file per set of extras; if it is older than pyproject.toml, something may have to be installed.
install = @echo 'Installing $(1) into $(VENV): minutes the first time'; $(BIN)/python -m pip install -qq $(if $(LOCKED),-c requirements-dev.txt) $(1)

$(VENV)/.installed: pyproject.toml $(BIN)/python
	$(call install,-e .)
	@touch $@

$(VENV)/.installed-parity: pyproject.toml $(BIN)/python
	$(call install,$(TORCH))
	$(call install,-e ".[test$(comma)parity]")
	@touch $@

$(VENV)/.installed-%: pyproject.toml $(BIN)/python
	$(call install,-e ".[$*]")
	@touch $@

comma := ,

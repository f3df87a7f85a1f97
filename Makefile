# One way to do each thing. `make help` lists them.

PYTHON ?= python3
GPU_PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup profile test check bench gpu clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv with memscope, editable, and the tested versions of what it needs

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

profile: setup ## See where the memory of a LLaMA2-7B fine-tuning step goes, and what LoRA and AMP change
	$(BIN)/memscope profile targets/llama2 --strategies lora,amp

test: setup ## Run the whole test suite
	$(BIN)/python -m pytest

check: setup ## Lint, formatting, and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	# mypy reads folders and cannot follow the package-dir mapping of pyproject.toml: it gets the installed shape as links.
	rm -rf build/typing
	mkdir -p build/typing/memscope
	ln -s "$(CURDIR)"/memscope/* "$(CURDIR)/targets" "$(CURDIR)/dashboards" build/typing/memscope/
	cd build/typing && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p memscope

bench: setup ## Measure memscope against what it is compared with
	$(BIN)/python -m pytest benchmarks

# The Python with CUDA may be offline and have few packages: built with its own setuptools where that is new enough, and
# installed beside it, not into it.
OWN_SETUPTOOLS := import setuptools as s; print("--no-build-isolation" * (int(s.__version__.split(".")[0]) >= 77))

gpu: ## Measure on the GPU of this machine with GPU_PYTHON (default python3), whose PyTorch has CUDA
	rm -rf build/gpu build/lib
	$(GPU_PYTHON) -m pip install --quiet --no-deps --target build/gpu \
		$$($(GPU_PYTHON) -c '$(OWN_SETUPTOOLS)' 2>/dev/null) .
	PYTHONPATH="$(CURDIR)/build/gpu" $(GPU_PYTHON) benchmarks/gpu.py

clean: ## Remove everything that can be made again, .venv included
	rm -rf .venv build dist .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One way to do each thing; `make help` lists them all.

PYTHON ?= python3
GPU_PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Silences a notice of mkdocs-material about mkdocs 2.
DOCS := NO_MKDOCS_2_WARNING=1

.DEFAULT_GOAL := help
.PHONY: help setup profile test check docs docs-check docs-update bench models scoreboard fuzz soak gpu clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Create .venv with memscope (editable) and the tested versions of its dependencies

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

profile: setup ## Show where the memory of a LLaMA2-7B fine-tuning step goes, and what LoRA and AMP change
	$(BIN)/memscope profile targets/llama2 --strategies lora,amp --device gpu

test: setup ## Run the whole test suite, on two processes
	# Where the environment forbids byte code, each of the many processes would compile every module anew.
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: setup ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	# mypy cannot follow the package-dir mapping of pyproject.toml: links give it the folders of an installation.
	rm -rf build/typing
	mkdir -p build/typing/memscope
	ln -s "$(CURDIR)"/memscope/* "$(CURDIR)/targets" "$(CURDIR)/dashboards" build/typing/memscope/
	cd build/typing && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p memscope

docs: setup ## Build the documentation, offline, into build/site
	# Without --quiet: mkdocs then counts no warnings, and --strict would pass every page.
	$(DOCS) $(BIN)/mkdocs build --strict

docs-check: setup ## Run every marked block of the documents, 7B included, and compare its output
	$(BIN)/python scripts/run_docs.py

docs-update: setup ## Rewrite the marked blocks of the documents with today's output
	$(BIN)/python scripts/run_docs.py --update

bench: setup ## Compare memscope's speed and precision with other tools
	$(BIN)/python -m pytest benchmarks

models: setup ## Simulate about a hundred architectures, compare them with runs, and write docs/models.md
	PYTHONPATH=tests $(BIN)/python benchmarks/bench_models.py

scoreboard: setup ## Predict what others published, with the libraries they used, and write docs/scoreboard.md
	$(BIN)/python benchmarks/scoreboard.py

fuzz: setup ## Read 100,000 changed files of every format in child processes, and tell what memscope does not withstand
	$(BIN)/python scripts/run_fuzz.py

soak: setup ## Run the whole suite five times in random order, twice beside busy processes; SEED=N sets the order
	$(BIN)/python scripts/run_soak.py $(if $(SEED),--seed $(SEED))

# The Python with CUDA may be offline and have few packages: memscope is built with its setuptools where that is new enough,
# and installed beside it, not into it.
OWN_SETUPTOOLS := import setuptools as s; print("--no-build-isolation" * (int(s.__version__.split(".")[0]) >= 77))

gpu: ## Measure on the GPU of this machine; GPU_PYTHON (default python3) needs PyTorch with CUDA
	rm -rf build/gpu build/lib
	$(GPU_PYTHON) -m pip install --quiet --no-deps --target build/gpu \
		$$($(GPU_PYTHON) -c '$(OWN_SETUPTOOLS)' 2>/dev/null) .
	PYTHONPATH="$(CURDIR)/build/gpu" $(GPU_PYTHON) benchmarks/gpu.py

clean: ## Remove everything that can be rebuilt, .venv included
	rm -rf .venv build dist .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

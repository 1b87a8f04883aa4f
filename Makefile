# Everything runs inside $(VENV), which is made and filled on first use.
PYTHON ?= python3
VENV ?= .venv
RECIPE ?= recipes/hf/pretrain-gpt2-stdlib.yaml
ARGS ?=
BIN = $(VENV)/bin/python
READY = $(VENV)/.installed
VENV4 ?= .venv-transformers4
BIN4 = $(VENV4)/bin/python
READY4 = $(VENV4)/.installed

.DEFAULT_GOAL := help
.PHONY: help train test test-slow test-transformers4 arms noise memory condition-number basis-cost gpu finetune wheel-check lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-18s %s\n", $$1, $$2}' Makefile

# The independent oracles of the tests. BackPACK also asks for torchvision, which it never imports: hence --no-deps.
ORACLES = backpack-for-pytorch curvlinops-for-pytorch unfoldNd einconv einops jaxtyping linear_operator opt_einsum scipy

$(READY): pyproject.toml .ci/constraints.txt
	@test -x $(BIN) || $(PYTHON) -m venv $(VENV)
	$(BIN) -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt torch==2.13.0 -e '.[dev]'
	$(BIN) -m pip install --quiet --disable-pip-version-check --no-deps -c .ci/constraints.txt $(ORACLES)
	@touch $(READY)

train: $(READY) ## train a GPT-2 with Sophia (RECIPE=… another recipe, ARGS='key=value …' overrides)
	@$(BIN) -m sophia_integrations train $(RECIPE) $(ARGS)

# Two test files at a time; one file's tests share what they set up. In the order of their names: xdist would put files
# of few tests last, which here are long, and one process would wait for the other.
BESIDE = --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: $(READY) ## run every test (ARGS='…' are passed to pytest)
	@OMP_NUM_THREADS=1 $(BIN) -m pytest $(BESIDE) $(ARGS)

test-slow: $(READY) ## the statistical checks at full size (minutes)
	@OMP_NUM_THREADS=1 $(BIN) -m pytest -m slow $(ARGS)

$(READY4): pyproject.toml .ci/constraints-transformers4.txt
	@test -x $(BIN4) || $(PYTHON) -m venv $(VENV4)
	$(BIN4) -m pip install --quiet --disable-pip-version-check -c .ci/constraints-transformers4.txt torch==2.13.0 -e '.[dev]'
	@touch $(READY4)

# What touches the Trainer, its arguments or its models. Not the comparison of logged losses to 1e-5: transformers 4
# rounds them to four decimals.
TESTS4 = tests/hf tests/curvature/test_models.py tests/curvature/test_hutchinson.py tests/lightning \
	--deselect tests/lightning/test_same_losses.py::test_three_loops_give_the_same_losses

test-transformers4: $(READY4) ## run the tests that touch transformers with the last transformers 4
	@OMP_NUM_THREADS=1 $(BIN4) -m pytest $(BESIDE) $(TESTS4) $(ARGS)

arms: $(READY) ## train the default recipe's model by any rule (ARGS='eigen:lr=4e-3 adamw:lr=4.5e-3 --seeds 0,1,2')
	@OMP_NUM_THREADS=1 $(BIN) tests/measurements/arms.py $(ARGS)

noise: $(READY) ## measure the estimator's noise against its cost
	@$(BIN) tests/measurements/estimator_noise.py $(ARGS)

memory: $(READY) ## measure the peak memory of the same Trainer run with AdamW, Sophia and SophiaH (minutes)
	@$(BIN) tests/measurements/peak_memory.py $(ARGS)

condition-number: $(READY) ## measure and draw steps to a loss over the condition number of the inputs (minutes)
	@OMP_NUM_THREADS=1 $(BIN) tests/measurements/condition_number.py $(ARGS)

basis-cost: $(READY) ## measure what the eigenbasis costs at the shapes of GPT-2 small (minutes)
	@OMP_NUM_THREADS=1 $(BIN) tests/measurements/basis_cost.py $(ARGS)

gpu: ## measure and test on a machine with one GPU, with what is installed there (ARGS='--only step,pass'; 8 minutes)
	@$(PYTHON) tests/measurements/gpu.py $(ARGS)

finetune: $(READY) ## fine-tune MiniLM and SmolLM2, Sophia beside AdamW (ARGS=headlines a part of it)
	@$(BIN) -m pip install --quiet --disable-pip-version-check --no-deps gguf==0.19.0
	@$(BIN) tests/measurements/finetune.py $(ARGS)

wheel-check: $(READY) ## install the built wheel in an empty environment and train from another folder (minutes)
	@$(BIN) tests/measurements/wheel.py

lint: $(READY) ## check style with ruff
	@$(BIN) -m ruff check . && $(BIN) -m ruff format --check .

format: $(READY) ## rewrite style with ruff
	@$(BIN) -m ruff check --fix . && $(BIN) -m ruff format .

clean: ## remove the virtual environment and caches, never runs/
	rm -rf $(VENV) $(VENV4) .pytest_cache .ruff_cache build dist

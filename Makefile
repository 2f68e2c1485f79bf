# Everything a newcomer, CI and the README call. `make help` lists it.
PYTHON ?= python3.11
PYTHON312 ?= python3.12
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
SGLANG_VENV  := .venv-sglang
SGLANG_STAMP := $(SGLANG_VENV)/.installed
ON_SGLANG    := MEGATRON_DPPO_SGLANG_PYTHON=$(CURDIR)/$(SGLANG_VENV)/bin/python
ENGINE ?= vllm
ENGINE_STAMP := $(if $(filter sglang,$(ENGINE)),$(SGLANG_STAMP))
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest
ARGS   ?=
WORKERS ?= 2
# Of the tests of jobs and sync, those that the engine has a part in; `make test-long` has the rest. The contract's last
# test ends the server.
SGLANG_TESTS := tests/engines/test_sglang.py tests/engines/test_engine_contract.py tests/engines/test_sync.py \
	tests/engines/test_job.py -k "test_sglang or test_engine_contract or ranks_have or weights_differ or group-rollout"

# An engine starts on one core. Tests that share a server are in one file.
TWO_SERVERS := -n 2 --dist loadfile

# Kept whatever the environment says: without it every process compiles all that it imports, for seven more seconds.
export PYTHONDONTWRITEBYTECODE :=

IS_PYTHON_311 = @$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || \
	{ echo "$(PYTHON): got $$($(PYTHON) --version 2>&1 | head -n 1), expected Python 3.11: install it, or say PYTHON=..." >&2; exit 1; }

.DEFAULT_GOAL := help
.PHONY: help .venv .venv-sglang quickstart check-quickstart test test-unit test-dist test-engines test-sglang test-slurm test-gpu test-long test-latest lint types format clean

help:  ## This list
	@grep -hE '^[a-z.-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-14s %s\n", $$1, $$2}'

.venv: $(STAMP)  ## The virtual environment with the pinned CPU set

# torch goes first and with its dependencies: an index that offers a CPU build gives it for the plain version, and
# where there is only a CUDA build pip brings what that build needs. The rest is complete, so --no-deps.
$(STAMP): requirements/cpu.txt pyproject.toml
	$(IS_PYTHON_311)
	@echo "installing the pinned set into $(VENV): about two minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint requirements/cpu.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --no-compile --no-deps -r requirements/cpu.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

.venv-sglang: $(SGLANG_STAMP)  ## Another one with SGLang as it runs on the CPU; its pins are not vLLM's

$(SGLANG_STAMP): requirements/sglang-cpu.txt
	$(IS_PYTHON_311)
	@echo "installing SGLang into $(SGLANG_VENV): about two minutes"
	$(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_VENV)/bin/python -m pip install --quiet --no-compile --constraint requirements/sglang-cpu.txt torch==2.13.0
	$(SGLANG_VENV)/bin/python -m pip install --quiet --no-compile --no-deps -r requirements/sglang-cpu.txt
	echo $(CURDIR)/tests/sglang_cpu > $$($(SGLANG_VENV)/bin/python -c 'import site; print(site.getsitepackages()[0])')/sglang_cpu.pth
	@touch $@

runs/quickstart/input/heldout.jsonl: | $(STAMP)
	$(BIN)/python tools/make_quickstart_input.py runs/quickstart/input

quickstart: $(STAMP) $(ENGINE_STAMP) runs/quickstart/input/heldout.jsonl  ## Train the small model end to end (ENGINE=sglang; ARGS="training.steps=10" overrides)
	$(ON_SGLANG) $(BIN)/megatron-dppo train configs/quickstart.yaml rollout.engine=$(ENGINE) $(ARGS)

check-quickstart: quickstart  ## The quickstart, and that it learned
	@$(BIN)/python -c 'import json; after = json.load(open("runs/quickstart/summary.json"))["accuracy_after"]; \
	assert after >= 0.9, f"held-out accuracy: got {after}, expected at least 0.9"; print("learned:", after)'

test: test-unit test-dist test-engines  ## Every test

test-unit: $(STAMP)  ## Tests that need neither several ranks nor an engine nor Slurm
	$(PYTEST) tests -n $(WORKERS) --ignore tests/distributed --ignore tests/engines --ignore tests/slurm $(ARGS)

test-dist: $(STAMP)  ## Several ranks over gloo
	$(PYTEST) tests/distributed $(ARGS)

test-engines: $(STAMP)  ## Real rollout engines
	$(PYTEST) tests/engines $(TWO_SERVERS) $(ARGS)

test-sglang: $(STAMP) $(SGLANG_STAMP)  ## The same on a real SGLang server
	MDPPO_ENGINE=sglang $(ON_SGLANG) $(PYTEST) $(SGLANG_TESTS) $(TWO_SERVERS) $(ARGS)

test-slurm: $(STAMP) runs/quickstart/input/heldout.jsonl  ## Jobs on a real Slurm of four nodes on this machine; as root
	@[ "$$(id -u)" = 0 ] || { echo "test-slurm: Slurm's daemons want root, this is $$(id -un)" >&2; exit 1; }
	@PATH="$$PATH:/usr/sbin"; \
	for program in slurmctld slurmd munged srun; do command -v $$program >/dev/null || missing=1; done; \
	[ -z "$${missing:-}" ] || { command -v apt-get >/dev/null && apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null; } || \
	{ echo "test-slurm: install Slurm and munge (Debian: slurm-wlm, munge); apt-get could not" >&2; exit 1; }
	$(PYTEST) tests/slurm $(ARGS)

test-gpu:  ## What one machine's GPUs can test, in the Python that PYTHON names: head, ranks over NCCL, memory, CUDA IPC
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest tests/head tests/distributed tests/weights/test_transfer.py \
		--ignore tests/distributed/test_kills.py --ignore tests/distributed/test_cuts.py \
		--ignore tests/distributed/test_policy_head.py $(ARGS)

test-long: $(STAMP) $(SGLANG_STAMP)  ## What CI does not repeat: every trainer against every engine, twenty kills (an hour)
	MDPPO_KILLS=20 $(PYTEST) tests/distributed/test_kills.py -s $(ARGS)
	MDPPO_ALL_PAIRS=1 $(PYTEST) tests/distributed/test_model_exactness.py tests/distributed/test_megatron_checkpoint.py \
		tests/distributed/test_memory.py tests/engines/test_sync.py tests/engines/test_job.py $(ARGS)
	MDPPO_ALL_PAIRS=1 MDPPO_ENGINE=sglang $(ON_SGLANG) $(PYTEST) tests/engines/test_sglang.py tests/engines/test_sync.py tests/engines/test_job.py $(ARGS)

# The index may have another build of torch for this Python, with another triton; vLLM is for the pinned one.
test-latest:  ## The backend's tests under Python 3.12 and the newest megatron-core, in .venv-latest
	@$(PYTHON312) -c '' || { echo "$(PYTHON312) does not run: install Python 3.12, or say PYTHON312=..." >&2; exit 1; }
	$(PYTHON312) -m venv .venv-latest
	.venv-latest/bin/python -m pip install --quiet torch==2.13.0
	grep -vE '^(\#|torch==|triton==|vllm|megatron-core)' requirements/cpu.txt > .venv-latest/requirements.txt
	.venv-latest/bin/python -m pip install --quiet --no-compile --no-deps -r .venv-latest/requirements.txt 'megatron-core>=0.19,<0.20'
	.venv-latest/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	OMP_NUM_THREADS=1 .venv-latest/bin/python -m pytest tests/backend tests/distributed $(ARGS)

lint: $(STAMP)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## mypy
	$(BIN)/mypy megatron_dppo tools

format: $(STAMP)  ## Rewrite the files as lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the environment and caches; runs/ stays
	rm -rf $(VENV) $(SGLANG_VENV) build .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

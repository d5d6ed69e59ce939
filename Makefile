# Each target is one line of real command; `make help` lists them.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
export OMP_NUM_THREADS ?= 1

# Settings of `make run` and `make predict`: `make run DATA=reviews.csv TEXT=review LABEL=stars`
run_options = $(if $(SOLUTION),--solution "$(SOLUTION)") $(if $(NAME),--name "$(NAME)") $(if $(PROFILE),--profile "$(PROFILE)") \
	$(if $(DATA),--data "$(DATA)") $(if $(TEXT),--text "$(TEXT)") $(if $(LABEL),--label "$(LABEL)") $(if $(ENCODING),--encoding "$(ENCODING)") \
	$(if $(ENCODER),--encoder "$(ENCODER)") $(if $(BUDGET_MINUTES),--budget-minutes "$(BUDGET_MINUTES)") $(foreach pair,$(SET),--set "$(pair)")

.PHONY: help run up down status logs predict lineage rollback retrain events clean-up test test-slow test-soak test-postgres check format bench-orchestration bench-events bench-training bench-gpu test-netns lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 22

run: $(VENV)/.run ## raw data to a served model; DATA= TEXT= LABEL= NAME= PROFILE= ENCODER= ENCODING= BUDGET_MINUTES= SET="key=value ..."
	@$(BIN)/millstream run $(run_options)

up: $(VENV)/.run ## start everything and keep it alive: object store, Prefect server, worker, predictor, event bridge
	@$(BIN)/millstream up

down: $(VENV)/.run ## stop everything that `make up` started
	@$(BIN)/millstream down

status: $(VENV)/.run ## what runs, where, and whether it is healthy
	@$(BIN)/millstream status

logs: $(VENV)/.run ## the logs of all parts, newest last
	@$(BIN)/millstream logs

predict: $(VENV)/.run ## score a file with the served model: DATA= OUT= [NAME=] [TEXT=]
	@$(BIN)/millstream predict --data "$(DATA)" --out "$(OUT)" $(if $(NAME),--name "$(NAME)") $(if $(TEXT),--text "$(TEXT)") $(if $(ENCODING),--encoding "$(ENCODING)")

lineage: $(VENV)/.run ## which data and which run made the served model: [NAME=]
	@$(BIN)/millstream lineage $(or $(NAME),sentiment)

rollback: $(VENV)/.run ## serve the previous champion again: [NAME=]
	@$(BIN)/millstream rollback $(or $(NAME),sentiment)

retrain: $(VENV)/.run ## ask for a training run of a model: [NAME=] [WHY=]
	@$(BIN)/millstream retrain $(or $(NAME),sentiment) $(if $(WHY),--why "$(WHY)")

events: $(VENV)/.run ## what happened lately, and what became of it: [NAME=]
	@$(BIN)/millstream events $(NAME)

clean-up: $(VENV)/.run ## what may be deleted; DELETE=1 deletes it
	@$(BIN)/millstream clean-up $(if $(DELETE),--delete)

test: $(VENV)/.dev ## the quick tests
	$(BIN)/python -m pytest

test-slow: $(VENV)/.dev ## the slow tests and the browser tests
	$(BIN)/python -m pytest -m 'slow or browser'

test-soak: $(VENV)/.dev ## loops of injected faults
	$(BIN)/python -m pytest -m soak --timeout=7200

test-postgres: $(VENV)/.dev ## the tests on a real PostgreSQL
	$(BIN)/python -m pytest -m postgres -rs

check: $(VENV)/.dev ## ruff, types, import rules
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/basedpyright && $(BIN)/lint-imports

format: $(VENV)/.dev ## format the code
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

bench-orchestration: $(VENV)/.dev ## what Prefect costs against a plain script: [PAIRS=5]
	$(BIN)/python -m benchmarks.bench_orchestration --pairs $(or $(PAIRS),5) --write

bench-events: $(VENV)/.dev ## from an object that landed to user code, leg by leg: [TIMES=15]
	$(BIN)/python -m benchmarks.bench_event_to_run --times $(or $(TIMES),15) --write

bench-training: $(VENV)/.dev ## step time against a plain torchrun script, scaling, batching, load-aware shares, gradient sync, checkpoints
	$(BIN)/python -m benchmarks.bench_training_overhead --write
	$(BIN)/python -m benchmarks.bench_training_scaling --write
	$(BIN)/python -m benchmarks.bench_batching --write
	$(BIN)/python -m benchmarks.bench_load_aware --write
	$(BIN)/python -m benchmarks.bench_gradient_sync --write
	$(BIN)/python -m benchmarks.bench_checkpoints --write

bench-gpu: $(VENV)/.dev ## tokens/s and MFU of transformers on one GPU
	$(BIN)/python -m benchmarks.bench_gpu_transformer --write

test-netns: $(VENV)/.dev ## several hosts in network namespaces; needs root
	$(BIN)/python -m pytest -m netns --timeout=1200 -rs

lock: $(VENV)/.dev ## resolve pyproject.toml into the lock files; UPGRADE=1 takes the newest versions
	$(BIN)/python infra/write_locks.py $(if $(UPGRADE),--upgrade)

clean: ## stop everything and remove all local state; keeps .venv
	@if [ -x $(BIN)/millstream ]; then $(BIN)/millstream clean --yes; else rm -rf .millstream; fi

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first and by plain pip: with it installed nothing else pulls another build of it.
$(VENV)/.run: requirements.lock requirements-demo.lock pyproject.toml | $(VENV)/bin/python
	$(PIP) install --quiet torch==2.13.0
	$(PIP) install --quiet --no-deps --require-hashes -r requirements.lock
	$(PIP) install --quiet --no-deps --require-hashes -r requirements-demo.lock
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.run requirements-dev.lock
	$(PIP) install --quiet --no-deps --require-hashes -r requirements-dev.lock
	@touch $@

# Two commands for a fresh machine: `make demo` and `make test`. Both make their own .venv first.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 22

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { echo "This Python has no venv module; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

install: $(READY)  ## Create .venv and install what the lock names

demo: $(READY)  ## Run the main job: real data to an API on 127.0.0.1:8000 (ARGS="--port 9000" for another port)
	@exec $(BIN)/banquet up --sources demo.sources:build --spec demo.model:repurchase $(ARGS)

test: $(READY)  ## Every test
	$(BIN)/python -m pytest $(ARGS)

unit: $(READY)  ## The unit tests: seconds
	$(BIN)/python -m pytest tests/unit $(ARGS)

lint: $(READY)  ## Format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint unit  ## Format, lint, types, unit tests

format: $(READY)  ## Format and fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench-serving: $(READY)  ## Measure the server beside feast serve and its limits (needs wrk)
	$(BIN)/python bench/serving.py $(ARGS)

bench-materialize: $(READY)  ## Measure loads beside feast materialize and a raw pipe (ARGS="--rows 100000")
	$(BIN)/python bench/materialize.py --memory-rows 10000000 --keep $(ARGS)

bench-historical: $(READY)  ## Measure point-in-time joins beside Feast's offline stores, raw DuckDB and polars
	$(BIN)/python bench/historical.py $(ARGS)

bench-stream: $(READY)  ## Measure from XADD to /predict at 5,000 events a second
	$(BIN)/python bench/stream.py --keep $(ARGS)

bench-rollout: $(READY)  ## Measure what a canary and a shadow cost on /predict (needs wrk)
	$(BIN)/python bench/rollout.py $(ARGS)

bench-on-demand: $(READY)  ## Measure on-demand views at request time beside stock Feast in process
	$(BIN)/python bench/on_demand.py $(ARGS)

bench-soak: $(READY)  ## Measure how workers' memory grows in 30 minutes of predictions and promotions
	$(BIN)/python bench/soak.py $(ARGS)

bench-judge: $(READY)  ## Simulate how often the judge is wrong and how soon it is right
	$(BIN)/python bench/judge.py $(ARGS)

lock: $(READY)  ## Resolve requirements.lock anew (hashes, no index address)
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --all-extras \
	  --no-emit-index-url --no-emit-find-links --no-header --output-file requirements.lock pyproject.toml

.PHONY: help install demo test unit lint check format bench-historical bench-materialize bench-serving \
  bench-stream bench-rollout bench-on-demand bench-soak bench-judge lock

# `make` lists the targets. ARGS adds options: make demo ARGS="--speed max"
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-engines lint check docs bench chaos chaos-alerts chaos-archive fuzz soak mutants format lock clean
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-13s %s\n", $$1, $$2}' Makefile

demo: .venv/.installed ## a real day of the Tehran market through the whole chain, on your screen
	@# A job of its own on the terminal: Ctrl-C reaches the demo, which ends with 0, and not make.
	@if [ -t 0 ]; then set -m; fi; $(BIN)/bourse demo $(ARGS)

test: .venv/.installed ## all tests; real Kafka is started by the tests themselves
	@$(BIN)/pytest $(ARGS)

test-engines: .venv/.installed ## Flink, Spark, Kafka Streams, Node, Polars, DuckDB: every bar of a real day; needs Java 17, Maven, Node
	@$(BIN)/pytest tests/engines/engines.py $(ARGS)

lint: .venv/.installed ## format, style, types, and who imports whom
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports

check: lint test ## all of lint, then the tests

docs: .venv/.installed ## the site of docs/, in build/site; a dead link is an error
	@$(BIN)/properdocs build --strict

bench: .venv/.installed .venv/bench/.installed ## the numbers of docs/benchmarks.md, measured on this machine
	@$(BIN)/python -m benchmarks.bench $(ARGS)

KILLS ?= 200
BROKERS ?= 1
N ?= 10000
POLLS ?= 10000
SEED ?= 1

chaos: .venv/.installed ## a real day while producers die and brokers restart: KILLS=200 SEED=1 BROKERS=1
	@$(BIN)/python -m reliability.chaos --kills $(KILLS) --seed $(SEED) --brokers $(BROKERS) $(ARGS)

SINK ?= delta

chaos-archive: .venv/.installed ## archives that die while a day is produced: KILLS=200 SEED=1 SINK=delta, s3 or postgres
	@$(BIN)/python -m reliability.chaos_archive --kills $(KILLS) --seed $(SEED) --sink $(SINK) $(ARGS)

chaos-alerts: .venv/.installed ## alerts while consumers die and the broker restarts: KILLS=200 SEED=1
	@$(BIN)/python -m reliability.chaos_alerts --kills $(KILLS) --seed $(SEED) $(ARGS)

fuzz: .venv/.installed ## mutated responses against the oracle: N=10000 SEED=1
	@$(BIN)/python -m reliability.fuzz --n $(N) --seed $(SEED) $(ARGS)

soak: .venv/.installed ## memory over many polls: POLLS=10000
	@$(BIN)/python -m reliability.soak --polls $(POLLS) $(ARGS)

mutants: .venv/.installed ## break the code on purpose and see which test goes red
	@$(BIN)/python -m reliability.mutants $(ARGS)

format: .venv/.installed ## format and sort
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

lock: .venv/.installed ## write both locks anew; ARGS=--upgrade takes the newest versions
	@$(COMPILE) pyproject.toml --group dev --all-extras --output-file requirements.lock $(ARGS)
	@$(COMPILE) benchmarks/requirements.in --output-file benchmarks/requirements.lock $(ARGS)
	@$(COMPILE) --no-deps tests/engines/requirements.in --output-file tests/engines/requirements.lock $(ARGS)

clean: ## remove what make made, the environment included
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header

.venv/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo missing); name one: make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) scripts/bootstrap.py .venv requirements.lock --project
	@touch $@

.venv/bench/.installed: benchmarks/requirements.lock .venv/.installed
	@$(BIN)/python scripts/bootstrap.py .venv/bench benchmarks/requirements.lock
	@touch $@

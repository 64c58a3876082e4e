# What a developer and the CI do; `make` alone lists it. Every target sets up what it needs first.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

BIN := .venv/bin
STAMP := .venv/.setup-stamp
TEST_STAMP := .venv/.test-setup-stamp
# Certificates of the system, as pip does: a company's own authority is known there.
export UV_SYSTEM_CERTS ?= true
# The tests start hundreds of processes, and each would compile again what the ones before it did not write down.
export PYTHONDONTWRITEBYTECODE :=
FACES ?= ../shared/faces
SOAK ?= docs/soak.jsonl
TORTURE ?= docs/torture.jsonl
# Real weights, where a checkout of them lies beside this one; dlib's come with the dependencies.
ifneq ($(wildcard ../shared/models/.),)
check test e2e bench: export MODEL_DIR ?= ../shared/models
endif

# Whose every branch is taken by tests: who may do what, what is recorded of it, keys, and the states of an identity.
GUARDED := app.access app.audit app.keys app.domain.policy app.domain.merkle
GUARDS := tests/unit/access tests/unit/test_keys.py tests/unit/domain/test_policy.py tests/unit/domain/test_merkle.py \
	$(addprefix tests/integration/test_,accounts.py backoff.py second_factor.py signing_keys.py audit_log.py audit_refused.py)

.PHONY: help setup up check test coverage fuzz e2e bench bench-index soak torture clean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile

setup: $(STAMP) ## Install what is locked into .venv (and libcurl4 for mongod, where it is missing)

$(STAMP): uv.lock pyproject.toml scripts/setup.sh
	@scripts/setup.sh
	@touch $@

$(TEST_STAMP): $(STAMP)
	@scripts/setup.sh tests
	@touch $@

up: $(STAMP) ## Start everything on this machine, run the demo once, serve until Ctrl-C
	@exec $(BIN)/idem up

check: $(STAMP) ## Format, lint, types, imports, unit tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -q tests/unit

test: $(TEST_STAMP) ## The tests on real servers and real faces; `check` runs those that need none
	$(BIN)/pytest -q tests/contract tests/integration tests/e2e

coverage: $(TEST_STAMP) ## Every branch of access, audit, keys and the states of an identity is tested
	$(BIN)/pytest -q $(GUARDS) $(addprefix --cov=,$(GUARDED)) --cov-branch --cov-report=term-missing:skip-covered --cov-fail-under=100

fuzz: $(TEST_STAMP) ## Hundreds of runs of what the tests draw a few of: FUZZ_EXAMPLES=500
	FUZZ_EXAMPLES=$${FUZZ_EXAMPLES:-200} $(BIN)/pytest -q tests/integration/test_openapi_fuzz.py tests/integration/test_identity_states.py

e2e: $(TEST_STAMP) ## The whole stack over HTTP
	$(BIN)/pytest -q tests/e2e

bench: $(STAMP) ## Measure a stack of its own: make bench FACES=DIR ARGS="--json --model buffalo_sc"
	@exec $(BIN)/idem bench --faces $(FACES) $(ARGS)

bench-index: $(STAMP) ## Measure the index beside exact scans: make bench-index ARGS="--size 100000 --json"
	@exec $(BIN)/idem index bench $(ARGS)

soak: $(TEST_STAMP) ## Eight minutes of load on the index, publishers killed; adds to SOAK=FILE, runs what is missing there
	@exec $(BIN)/python -m scripts.index_soak --results $(SOAK) $(ARGS)

torture: $(TEST_STAMP) ## 10,000 fault plans and 1,000 kills, adding to TORTURE=FILE what is missing there: ARGS="--minutes 30"
	@exec $(BIN)/python -W ignore -m scripts.torture --results $(TORTURE) $(ARGS)

clean: ## Remove what was built; the data in .data stays
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

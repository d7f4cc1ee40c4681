# What people run here. `make` alone lists it.
PYTHON ?= python3
PY := .venv/bin/python
ARGS ?=
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test check format bench lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

demo: .venv/ready ## Show it all on a real Kafka; ARGS="--for 20s --seed 7" goes to `credits demo`
	@$(PY) -m streams demo $(ARGS)

test: check ## Run every check and every test; the broker tests start a Kafka of their own
	$(PY) -m pytest -n 2 -m "not broker and not chaos"
	$(PY) -m pytest -m "broker or chaos"

check: .venv/ready ## Check style, types, imports and the rules of the house; needs no broker
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports
	$(PY) -m pytest -q tests/house

format: .venv/ready ## Format the code and mend what ruff can mend
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: .venv/ready ## Measure speed, restore and memory; ARGS="--only workers" measures one part
	@$(PY) -m streams.testbed.bench $(ARGS)

lock: .venv/ready ## Pin what pyproject.toml and requirements/dev.in ask for; ARGS=--upgrade for newest
	$(LOCK) pyproject.toml -o requirements/main.lock $(ARGS)
	$(LOCK) requirements/dev.in -o requirements/dev.lock $(ARGS)

clean: ## Remove the environment and everything that was built
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# One lock for every platform, with hashes, without the address of any registry.
LOCK := .venv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-header --no-annotate

# Made from nothing each time: whatever an interrupted run left behind is gone.
.venv/locked: requirements/main.lock requirements/dev.lock
	@sh deploy/install-debian.sh
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with make PYTHON=...")'
	$(PYTHON) -m venv --clear .venv
	$(PY) -m pip install --quiet --disable-pip-version-check --require-hashes \
		-r requirements/main.lock -r requirements/dev.lock
	@touch $@

.venv/ready: .venv/locked pyproject.toml
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

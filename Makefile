# What people run here. `make` alone lists it.
PYTHON ?= python3
PY := .venv/bin/python
ARGS ?=
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test chaos check format compiled bench simulate lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

demo: .venv/ready ## Show it all on a real Kafka; ARGS="--for 20s --seed 7" goes to `credits demo`
	@$(PY) -m streams demo $(ARGS)

test: check build/compiled/ready ## Run every check and every test; the broker tests start a Kafka of their own
	$(PY) -m pytest -n 2 -m "not broker and not chaos"
	$(COMPILED) -m streams version | grep -q '"compiled":true'
	$(COMPILED) -m pytest -q --import-mode=append -m "not broker and not chaos" tests/billing \
		tests/engine/test_fetched.py tests/engine/test_record_batch.py \
		tests/testbed/test_load_generator.py
	$(INSTALLED) -m pytest -n 3 --dist loadfile --no-loadscope-reorder \
		-m "(broker or chaos) and not alone"
	$(INSTALLED) -m pytest -m alone

chaos: .venv/ready ## Break everything and audit; ARGS="--seed 7 --for 120s --brokers 3" goes to it
	@$(PY) -m tests.chaos $(ARGS)

check: .venv/ready ## Check style, types, imports and the rules of the house; needs no broker
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports
	$(PY) -m pytest -q tests/house

format: .venv/ready ## Format the code and mend what ruff can mend
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

compiled: build/compiled/ready ## Build the hot path as machine code, as the image has it

bench: build/compiled/ready ## Measure speed, restore and memory; ARGS="--only workers" measures one part
	@$(COMPILED) -m streams.testbed.bench $(ARGS)

# Schedules by the thousand play what the image runs; a protection is taken out of the sources.
simulate: $(if $(findstring --mutant,$(ARGS)),.venv/ready,build/compiled/ready) ## Play the shard's protocol against a model of Kafka; ARGS="--schedules 100000"
	@$(if $(findstring --mutant,$(ARGS)),$(PY),$(SIMULATED)) -m tests.simulation $(ARGS)

lock: .venv/ready ## Pin what pyproject.toml and requirements/dev.in ask for; ARGS=--upgrade for newest
	$(LOCK) pyproject.toml -o requirements/main.lock $(ARGS)
	$(LOCK) requirements/dev.in -o requirements/dev.lock $(ARGS)

clean: ## Remove the environment and everything that was built
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# A checkout runs its sources; what is compiled from them stands beside it and is asked for by name.
COMPILED := PYTHONPATH="$(CURDIR)/build/compiled" $(PY) -P
# The same for workers that tests start, while the tests themselves are those of the checkout.
INSTALLED := PYTHONPATH="$(CURDIR)/build/compiled" $(PY)
SIMULATED := PYTHONPATH="$(CURDIR)/build/compiled:$(CURDIR)" $(PY) -P
SOURCES := $(shell find schemas streams -type f -not -name '*.pyc')

build/compiled/ready: .venv/ready pyproject.toml $(SOURCES)
	@sh deploy/install-debian.sh compiler
	rm -rf build/compiled build/source
	mkdir -p build/source
	cp -R README.md LICENSE pyproject.toml schemas streams build/source
	HATCH_BUILD_HOOKS_ENABLE=true $(PY) -m pip install --quiet --disable-pip-version-check --no-deps \
		--no-build-isolation --target build/compiled build/source/
	rm -rf build/source
	ln -s ../../deploy build/compiled/deploy
	@touch $@

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

# Two commands: `make demo` and `make test`. Both create .venv and install what they need on the first run.
# `make conformance` makes an environment of its own for each client, too.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints/cpu.txt
CLIENTS := $(basename $(notdir $(wildcard scripts/conformance/requirements/*.txt)))
INPUTS := pyproject.toml $(CONSTRAINTS)
export HF_HUB_OFFLINE := 1

.PHONY: demo test lint format docs a11y conformance dist scale-drills clean

demo: $(VENV)/.for-demo
	@echo "==> Main job: a document rewritten turn by turn by a small real model, through LangChain, beside its peers"
	@$(BIN)/copyspec demo --compare || { code=$$?; test $$code -ne 2 || \
	echo "Without the model: $(BIN)/copyspec demo --compare --model bundled"; exit $$code; }

# Most tests are one thread's work: several processes with one thread each take half the time of one with all of them.
test: lint
	@echo "==> Fetching SmolLM2-135M-Instruct for the tests on a real model (93 MB, once)"
	@$(BIN)/copyspec pull smollm2 || echo "It could not be fetched: the tests that need it are skipped"
	@echo "==> Tests"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

lint: $(VENV)/.for-test
	@echo "==> Format, lint and types"
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.for-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.for-docs
	@echo "==> Building the docs into site/"
	$(BIN)/python -m mkdocs build --strict --quiet

# axe looks at what people look at; the chromium or google-chrome of this machine shows it.
a11y: $(VENV)/.for-test
	npm install --prefix .node --no-save --no-package-lock axe-core@4.14.1
	$(BIN)/python -m pytest tests/test_pages.py

# CONFORMANCE="--clients litellm" runs one of them; see python -m scripts.conformance --help.
conformance: $(VENV)/.for-test $(CLIENTS:%=.venv-conformance/%/.ready)
	@$(BIN)/copyspec pull smollm2
	$(BIN)/python -m scripts.conformance $(CONFORMANCE)

# Ray goes into the environment; the drills run in a network of their own. SCALE_DRILLS="lost --json PATH" runs one.
scale-drills: $(VENV)/.for-scale
	$(BIN)/python -m scripts.scale_drill $(SCALE_DRILLS)

.venv-conformance/%/.ready: scripts/conformance/requirements/%.txt
	@echo "==> An environment for $*"
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -r $<
	@touch $@

# What goes to a package index: copyspec, and the two packages that bring it with an extra.
dist: .venv-dist/.ready
	@echo "==> Building and checking what is in dist/"
	.venv-dist/bin/python -m scripts.build_packages
	.venv-dist/bin/twine check --strict dist/*
	.venv-dist/bin/check-wheel-contents dist/copyspec-*.whl
	.venv-dist/bin/check-wheel-contents --config integrations/langchain/pyproject.toml dist/langchain_copyspec-*.whl
	.venv-dist/bin/check-wheel-contents --config integrations/llama_index/pyproject.toml dist/llama_index_llms_copyspec-*.whl
	.venv-dist/bin/cffconvert --validate

.venv-dist/.ready: constraints/dist.txt
	@echo "==> An environment for building"
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -r $<
	@touch $@

$(VENV)/.created:
	@echo "==> Creating $(VENV) with $(PYTHON)"
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(None if sys.version_info >= (3, 10) else "copyspec needs Python 3.10 or newer, but $(PYTHON) is " + v + ". Try: make PYTHON=python3.12 demo")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.for-demo: $(VENV)/.created $(INPUTS)
	@echo "==> Installing copyspec with its two integrations (a few minutes the first time)"
	$(BIN)/python -m pip install -c $(CONSTRAINTS) -e '.[langchain,llama-index]'
	@echo "==> Compiling drafting and passes of a few tokens (once, a minute or so)"
	$(BIN)/python -c 'from copyspec_engine.loop.warm_up import compile_ahead; compile_ahead()'
	@touch $@

$(VENV)/.for-test: $(VENV)/.for-demo $(INPUTS)
	@echo "==> Installing what the tests need"
	$(BIN)/python -m pip install -c $(CONSTRAINTS) -e '.[langchain,llama-index,serve,docs,eval,dev]'
	@touch $@

$(VENV)/.for-scale: $(VENV)/.for-test $(INPUTS)
	@echo "==> Installing Ray"
	$(BIN)/python -m pip install -c $(CONSTRAINTS) -e '.[scale]'
	@touch $@

$(VENV)/.for-docs: $(VENV)/.for-demo $(INPUTS)
	@echo "==> Installing what the docs need"
	$(BIN)/python -m pip install -c $(CONSTRAINTS) -e '.[langchain,llama-index,docs]'
	@touch $@

clean:
	rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis

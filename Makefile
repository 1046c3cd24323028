# make help lists the targets. Each one installs what it needs, once: a stamp in the environment says that it is there.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2

PY = $(VENV)/bin/python
PIP_INSTALL = "$(PY)" -m pip install --disable-pip-version-check -c constraints.txt -e
DEV = $(VENV)/.installed-dev
DEMO = $(VENV)/.installed-demo
BENCH = $(VENV)/.installed-bench
DOCS = $(VENV)/.installed-docs
PINS = pyproject.toml setup.py constraints.txt src/twinmerge/maths/fused.c

# One torch thread for each pytest worker: more would fight for the cores.
PYTEST = OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false "$(PY)" -m pytest -n $(JOBS) --dist worksteal --doctest-modules

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo docs test test-all dist lint format bench-deps clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

demo: $(DEMO) ## Build a small suite, merge it, write the report to demo/
	"$(VENV)/bin/twinmerge" demo --out demo

docs: $(DOCS) ## Build the documentation site into site/, and its man page; stops at a broken link
	"$(PY)" docs/make_site.py

test: lint ## Lint, types, layers, then all tests and doctests but the slow ones
	$(PYTEST) tests src

test-all: lint ## The same with the slow tests
	$(PYTEST) -m "" --hypothesis-profile=thorough tests src

dist: $(DEV) ## Build sdist and wheel into dist/, try both in an empty environment
	rm -rf dist
	PIP_CONSTRAINT=constraints.txt "$(PY)" -m build
	DIST=dist $(PYTEST) -m slow tests/whole/test_dist.py

lint: $(DEV) ## ruff, mypy, import-linter
	"$(PY)" -m ruff check .
	"$(PY)" -m ruff format --check .
	"$(PY)" -m mypy
	"$(VENV)/bin/lint-imports"

format: $(DEV) ## Mend what ruff can mend
	"$(PY)" -m ruff check --fix .
	"$(PY)" -m ruff format .

bench-deps: $(BENCH) ## Install what the benchmarks need

clean: ## Remove caches and build outputs; never an environment, a model or a result
	rm -rf build dist site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	for folder in src tests benchmarks; do \
	    if [ -d "$$folder" ]; then find "$$folder" -type d -name __pycache__ -prune -exec rm -rf {} +; fi; \
	done

$(PY):
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || \
	    { echo 'twinmerge needs Python 3.11 to 3.14: try make PYTHON=python3.12' >&2; exit 2; }
	"$(PYTHON)" -m venv "$(VENV)"

$(DEV): $(PINS) | $(PY)
	$(PIP_INSTALL) '.[dev]'
	@touch "$@"

# The dev extra holds all of the demo extra, so a fresh dev stamp is enough.
$(DEMO): $(PINS) | $(PY)
	@if [ -n "$$(find "$(DEV)" $(addprefix -newer ,$(PINS)) 2>/dev/null)" ]; then \
	    echo 'the demo needs nothing that is not already installed'; \
	else \
	    set -x; $(PIP_INSTALL) '.[demo]'; \
	fi
	@touch "$@"

$(BENCH): $(PINS) | $(PY)
	$(PIP_INSTALL) '.[bench]'
	@touch "$@"

$(DOCS): $(PINS) | $(PY)
	$(PIP_INSTALL) '.[docs]'
	@touch "$@"

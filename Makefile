# `make train` and `make test` each work alone on a fresh clone; `make help` lists the targets.
VENV   := .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready
TOOLS  := $(VENV)/.tools
SITE   := $(VENV)/.site
ARGS   ?=
# One of these, for a machine that has it.
ACCELERATORS := cuda12 cuda13 tpu
EXTRA  ?=
# The interpreter to build .venv with: the first of these that starts and fits.
PYTHON ?= python3 python3.13 python3.12 python3.11 python /usr/bin/python3

# The library lies in this tree, unless a fork has removed it: then the published one is installed.
LIBRARY  := $(wildcard packages/linen-nnx/pyproject.toml)
LIBRARY  := $(patsubst %/pyproject.toml,%,$(LIBRARY))
PROJECTS := pyproject.toml $(LIBRARY:%=%/pyproject.toml) $(wildcard constraints-*.txt)
# uv, where it is found, installs several times faster than pip; UV= takes pip all the same.
UV       := $(shell command -v uv)
# Each Python has the versions that were tested with it.
VERSIONS  = constraints-py3$$($(PY) -c "import sys; print(11 if sys.version_info < (3, 12) else 12)").txt
INSTALL   = $(if $(UV),$(UV) pip install -q --python $(PY),$(PY) -m pip install -q --disable-pip-version-check) -c $(VERSIONS)

.DEFAULT_GOAL := help
.PHONY: setup tools train test test-library test-long lint bench parity fuzz docs clean help

setup: $(READY) $(EXTRA:%=$(VENV)/.extra-%)  ## make .venv, as the other targets do by themselves

tools: $(TOOLS)  ## add what tests, sweeps, figures and linters need

train: $(READY)  ## train; ARGS="experiment=digits stage=nnx"
	$(PY) train.py $(ARGS)

test: $(TOOLS)  ## run the tests; ARGS="tests/test_config.py" for some
	$(PY) -m pytest -n 2 --dist worksteal $(ARGS)
ifneq ($(LIBRARY),)
	$(if $(ARGS),,cd $(LIBRARY) && $(CURDIR)/$(PY) -m pytest -n 2 --dist worksteal)
endif

test-library: $(TOOLS)  ## run the library's tests; ARGS="tests/test_rules.py"
	cd $(LIBRARY) && $(CURDIR)/$(PY) -m pytest -n 2 --dist worksteal $(ARGS)

test-long: $(TOOLS)  ## run the longer tests, which `make test` leaves out
	$(PY) -m pytest -n 2 --dist worksteal -m long $(ARGS)
ifneq ($(LIBRARY),)
	$(if $(ARGS),,cd $(LIBRARY) && $(CURDIR)/$(PY) -m pytest -n 2 --dist worksteal -m long)
endif

lint: $(TOOLS)  ## check style, layout and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyrefly check
ifneq ($(LIBRARY),)
	cd $(LIBRARY) && $(CURDIR)/$(PY) -m pyrefly check
endif

bench: $(TOOLS)  ## time steps, the loop and growth; ARGS="steps loop" for some
	$(PY) -m benchmarks $(ARGS)

parity: $(TOOLS)  ## compare the layers of Linen and nnx, as installed
	cd $(LIBRARY) && $(CURDIR)/$(PY) -m benchmarks.parity $(ARGS)

fuzz: $(TOOLS)  ## damage checkpoints; ARGS="--count 50000 --seed 7"
	cd $(LIBRARY) && $(CURDIR)/$(PY) -m benchmarks.fuzz $(ARGS)

docs: $(SITE)  ## build build/site/index.html: all pages, and the docstrings
	$(PY) -m sphinx -W -E -q -c docs . build/site $(ARGS)

clean:  ## remove .venv and the caches; runs/ stays
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## show this list
	@awk -F ':.*##' '/^[a-z-]+:.*##/ { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo '  ARGS="..." is passed on; PYTHON=... names an interpreter (3.11 to 3.13);'
	@echo '  make setup EXTRA=... adds an accelerator (cuda12, cuda13 or tpu).'

# The stamp is removed before and written after the installation, so an environment whose making
# was cut short has none and is made anew; one that has it is brought up to date in place.
# `rm -rf` without a slash: were .venv a link, only the link would go.
$(READY): $(PROJECTS)
	@found=; \
	if [ ! -f $@ ] || ! $(PY) -c "" 2>/dev/null; then \
	  for python in $(PYTHON); do \
	    found=$$($$python -c "import os, sys, venv, ensurepip; \
	      (3, 11) <= sys.version_info < (3, 14) or sys.exit(1); \
	      print(os.path.realpath(sys.executable))" 2>/dev/null) && break; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "No usable Python among: $(PYTHON)." >&2; \
	    echo "Needed: Python 3.11, 3.12 or 3.13 with its venv module (Hydra 1.3 breaks on 3.14)." >&2; \
	    echo "Install one, or name yours: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; \
	    exit 1; \
	  fi; \
	  echo "Making $(VENV) with $$($$found --version); this takes about a minute, once."; \
	  rm -rf $(VENV) && $$found -m venv $(VENV) || exit 1; \
	fi
	@rm -f $@ $(TOOLS) $(SITE) $(VENV)/.extra-*
	@$(INSTALL) $(if $(LIBRARY),-e $(LIBRARY)) -e . && touch $@

$(TOOLS): $(READY)
	@echo "Adding what tests and linters need, once."
	@$(INSTALL) $(if $(LIBRARY),-e "$(LIBRARY)[dev]") -e ".[dev]" && touch $@

$(SITE): $(READY)
	@$(INSTALL) $(if $(LIBRARY),-e $(LIBRARY)) -e ".[docs]" && touch $@

$(ACCELERATORS:%=$(VENV)/.extra-%): $(VENV)/.extra-%: $(READY)
	@$(INSTALL) $(if $(LIBRARY),-e $(LIBRARY)) -e ".[$*]" && touch $@

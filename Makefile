# make demo    the whole chain on the bundled model, into runs/demo/report.html
# make test    the tests, without the slow and the GPU ones
# make check   lint, format, types
# make format  put the code in form
# make docs    the documentation site, into site/index.html
# make slow    the slow tests; make slow PART=stats runs those of tests/stats/, PART=fuzz those of tests/*/test_fuzz*.py
#
# Each target makes or refreshes .venv by itself. A user without a GPU may install PyTorch's CPU build into .venv first (README).

PYTHON ?= python3
PART ?=

VENV := .venv
BIN := $(VENV)/bin
BASE := $(VENV)/.installed-base
DEV := $(VENV)/.installed-dev
SLOW_TESTS := $(if $(PART),$(or $(wildcard tests/$(PART)),$(wildcard tests/*/test_$(PART)*.py tests/test_$(PART)*.py)),tests)

.PHONY: demo test check format slow docs

demo: $(BASE)
	$(BIN)/sae-bias demo

test: $(DEV)
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow and not gpu"

check: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DEV)
	$(BIN)/mkdocs build --strict

slow: $(DEV)
	@test -n "$(SLOW_TESTS)" || { echo "no tests/$(PART)/ and no tests/*/test_$(PART)*.py; PART is a folder of tests or the start of a test file, such as stats"; exit 2; }
	$(BIN)/pytest -m "slow and not gpu" $(SLOW_TESTS)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "sae-bias needs Python 3.11 or newer; try make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(BASE): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install -c constraints.txt -e .
	@touch $@

$(DEV): $(BASE)
	$(BIN)/pip install -c constraints.txt -e ".[judge,ray,notebook,dev]"
	@touch $@

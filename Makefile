# make demo    install, compare five methods on the embedded data set, write demo/report.html
# make test    install, run the tests
# make check   install, lint and check types
# make docs    install, build the documentation site, docs/_build/html/index.html
# make contract  install, test every family under training machinery, write docs/contract.md
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Test processes; each uses one thread.
JOBS ?= 2
# Threads that wait should not spin: on shared cores that takes several times as long.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test check docs contract format clean

demo: $(VENV)/.train
	$(BIN)/vitmix demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -n -W --keep-going -q -b html docs docs/_build/html
	@echo "the first page is docs/_build/html/index.html"

contract: $(VENV)/.dev
	rm -f docs/contract.md
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --contract-table docs/contract.md \
		tests/test_contract.py tests/test_distributed.py

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.train: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[train]'
	@touch $@

$(VENV)/.docs: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@

$(VENV)/.dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.train

clean:
	rm -rf $(VENV) demo docs/_build

# One environment in .venv; its stamps depend on pyproject.toml, so a second call starts at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test docs lint clean compiler

demo: $(VENV)/.demo
	$(BIN)/retroexit demo

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

docs: $(VENV)/.docs
	$(BIN)/sphinx-build -W -b html docs docs/_build
	@echo "open docs/_build/index.html"

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) docs/_build dist build .pytest_cache .ruff_cache .mypy_cache

compiler:
	@command -v g++ >/dev/null || { \
	    echo "g++ not found: hnswlib is compiled during installation. Install a C++ compiler first," \
	         "for example 'apt-get install g++' or 'xcode-select --install'." >&2; exit 1; }

$(BIN)/python: | compiler
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "$(PYTHON) is older than Python 3.11; name another: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[all,test,zoo]'
	touch $@

$(VENV)/.docs: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

$(VENV)/.lint: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[all,dev]'
	touch $@

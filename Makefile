# make demo: install the package, then train a small model, score it and show how to chat with it.
# make test: run the linter and the test suite.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo test lint clean

install: $(VENV)/.installed

# requirements.lock pins what was tested; torch==2.13.0 is a CPU build on Linux machines without a GPU (README).
$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is required: set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

demo: install
	$(BIN)/tinyllava train quickstart

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Two processes with one thread each: more threads than cores would slow each other down.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

clean:
	rm -rf $(VENV) runs build *.egg-info

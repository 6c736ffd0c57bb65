# make demo: install the package, then train a small model, score it and show how to chat with it.
# make test: run the linter and the test suite.
# make fuzz: try inputs that nobody would write: MINUTES=10 TARGET=records SEED=0 CHUNKS=1 (tests/fuzz).
# make faults: play the faults of docs/scale.md (kills, full disks, damage, ...) and print the table.
# make test-distributed: train in two and three processes with every engine, in .venv with DeepSpeed (.venv-distributed).
# make test-distributed-full: the same for every engine x tuning x connector, and every model of tests/test_matrix.py.
# make test-engines: compare our answers with those of vLLM, which gets an environment of its own (.venv-engines).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

ENGINES := .venv-engines
DISTRIBUTED := .venv-distributed

.PHONY: install demo test test-distributed test-distributed-full test-engines fuzz faults lint clean

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

# Two processes at a time; exit code 1 if anything is found.
fuzz: install
	$(BIN)/python -m tests.fuzz --minutes $(or $(MINUTES),10) --seed $(or $(SEED),0) --chunks $(or $(CHUNKS),0) \
	    $(if $(TARGET),--target $(TARGET))

faults: install
	$(BIN)/python -m tests.faults

# DeepSpeed's CPU operator is compiled once, for about a minute, and kept in the environment.
RUN_DISTRIBUTED = OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR=$(CURDIR)/$(DISTRIBUTED)/extensions \
    TINYLLAVA_DISTRIBUTED=1 $(DISTRIBUTED)/bin/python -m pytest tests/distributed

test-distributed: install $(DISTRIBUTED)/.installed
	$(RUN_DISTRIBUTED)

test-distributed-full: install $(DISTRIBUTED)/.installed
	$(RUN_DISTRIBUTED) --full-matrix
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 tests/test_matrix.py --full-matrix

# A layer on .venv: it reads torch and everything else from there.
$(DISTRIBUTED)/.installed: tests/distributed/requirements.lock | $(VENV)/.installed
	$(PYTHON) -m venv $(DISTRIBUTED)
	$(DISTRIBUTED)/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement $<
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')')" \
	    > $$($(DISTRIBUTED)/bin/python -c 'import site; print(site.getsitepackages()[0])')/layer.pth
	touch $@

test-engines: install $(ENGINES)/.installed
	OMP_NUM_THREADS=1 TINYLLAVA_ENGINES=$(CURDIR)/$(ENGINES)/bin/python $(BIN)/pytest tests/engines

# The lock has every package, because vLLM's own requirements name a CPU build of torch that PyPI does not have.
# torchvision from PyPI cannot register its operators in a CPU build of torch. Llava does not use them: they are left out.
$(ENGINES)/.installed: tests/engines/requirements.lock
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement tests/engines/requirements.lock
	echo 'import sys; sys.modules["torchvision._meta_registrations"] = sys.modules["torchvision._autograd_registrations"] = sys' \
	    > $$($(ENGINES)/bin/python -c 'import site; print(site.getsitepackages()[0])')/torchvision_without_operators.pth
	touch $@

clean:
	rm -rf $(VENV) $(ENGINES) $(DISTRIBUTED) runs build *.egg-info
